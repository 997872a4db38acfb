//! Limits the number of connections to what the process's file descriptor limit (`RLIMIT_NOFILE`) allows.

use rustix::process::{Resource, getrlimit, setrlimit};

use super::settings::LimitsSettings;
use crate::base::saturate::Saturate as _;

/// Raises the soft file descriptor limit to the hard limit, and returns the maximum number of open connections:
/// `limits.connections_max`, or fewer if the file descriptor limit is too low. Reserves some descriptors for the
/// database, Redis, probes and files.
pub(crate) fn connections(limits: &LimitsSettings) -> u32 {
    let mut allowed = getrlimit(Resource::Nofile);
    allowed.current = allowed.maximum;
    // If the limit cannot be raised, the current limit applies.
    let _ = setrlimit(Resource::Nofile, allowed);
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX); // `None`: no limit
    let possible = connections_for(descriptors);
    if possible < limits.connections_max {
        tracing::warn!(
            descriptors,
            possible,
            limit = limits.connections_max,
            "connection limit reduced: too few file descriptors for limits.connections_max; raise RLIMIT_NOFILE"
        );
    }
    possible.min(limits.connections_max)
}

/// Returns the number of connections that `descriptors` file descriptors allow. Reserves a quarter of the descriptors,
/// but at most 256.
fn connections_for(descriptors: u64) -> u32 {
    let reserved = (descriptors / 4).min(256);
    (descriptors - reserved).saturate()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_the_descriptors_up_to_256_is_reserved() {
        for (descriptors, connections) in [(0, 0), (64, 48), (1024, 768), (4352, 4096), (u64::MAX, u32::MAX)] {
            assert_eq!(connections_for(descriptors), connections, "{descriptors}");
        }
    }
}
