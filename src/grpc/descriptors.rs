//! Each connection is a descriptor, and so is everything else that this process needs open: how many connections there can be.
//!
//! Never closes anything.

use rustix::process::{Resource, getrlimit, setrlimit};

use super::settings::LimitsSettings;

/// How many connections may be open, of those that `limits` allow: what the system allows is used up to its end, except for
/// what the database, Redis, the probes and files need.
pub fn connections(limits: &LimitsSettings) -> u32 {
    let mut allowed = getrlimit(Resource::Nofile);
    allowed.current = allowed.maximum;
    // Where that is not permitted, what there is has to do.
    let _ = setrlimit(Resource::Nofile, allowed);
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let possible = among(descriptors);
    if possible < limits.connections_max {
        tracing::warn!(
            descriptors,
            possible,
            limit = limits.connections_max,
            "fewer connections than limits.connections_max can be open: raise the limit of descriptors (RLIMIT_NOFILE)"
        );
    }
    possible.min(limits.connections_max)
}

/// How many of so many descriptors may be connections of Envoy.
fn among(descriptors: u64) -> u32 {
    let reserved = (descriptors / 4).min(256);
    u32::try_from(descriptors - reserved).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn not_every_descriptor_is_for_connections() {
        for (descriptors, connections) in [(0, 0), (64, 48), (1024, 768), (4352, 4096), (u64::MAX, u32::MAX)] {
            assert_eq!(among(descriptors), connections, "{descriptors}");
        }
    }
}
