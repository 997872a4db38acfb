//! The metrics of checks. The counters are looked up by their labels once, at startup, because each lookup hashes the
//! labels and takes a lock.

use std::time::Duration;

use super::decision::DenyReason;
use crate::base::{
    fault::FaultReason,
    metrics::{HistogramOpts, Opts, Registry, SHORT_SECONDS, ThreadCounter, ThreadCounters, ThreadHistogram, register},
};

/// The counters of checks by decision, and the histogram of their durations.
pub(crate) struct CheckMetrics {
    pub(crate) allowed: ThreadCounter,
    pub(crate) anonymous: ThreadCounter,
    pub(crate) denied: [ThreadCounter; DenyReason::ALL.len()],
    pub(crate) cancelled: ThreadCounter,
    /// Grants while the lease was stale.
    pub(crate) stale: ThreadCounter,
    faults: [ThreadCounter; FaultReason::ALL.len()],
    seconds: ThreadHistogram,
}

impl CheckMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// Same as [`register`].
    pub(crate) fn register(registry: &Registry) -> prometheus::Result<Self> {
        let checks = ThreadCounters::new(
            Opts::new(
                "trustgate_checks_total",
                "Checks by decision (allow, deny, fault, cancelled), reason, kind of credential and transport.",
            ),
            &["decision", "reason", "credential", "transport"],
        );
        let checks = register(registry, checks)?;
        let seconds = HistogramOpts::new(
            "trustgate_check_duration_seconds",
            "Duration of checks from the complete message to the reply, in seconds.",
        );
        let stale = Opts::new(
            "trustgate_stale_grants_total",
            "Stale grants: cached keys granted while the lease was stale because the database did not answer.",
        );
        let count = |decision, reason| checks.with(&[decision, reason, "key", "grpc"]);
        Ok(Self {
            allowed: count("allow", "key"),
            anonymous: count("allow", "anonymous"),
            denied: DenyReason::ALL.map(|reason| count("deny", reason.as_str())),
            cancelled: count("cancelled", "cancelled"),
            stale: register(registry, ThreadCounters::new(stale, &[]))?.with(&[]),
            faults: FaultReason::ALL.map(|reason| count("fault", reason.as_str())),
            seconds: register(registry, ThreadHistogram::new(seconds.buckets(SHORT_SECONDS.to_vec())))?,
        })
    }

    /// Returns the counter of faults with this reason.
    pub(crate) const fn fault(&self, reason: FaultReason) -> &ThreadCounter {
        &self.faults[reason as usize]
    }

    /// Counts one check in `counter`, and records its duration `took`.
    pub(crate) fn observe(&self, counter: &ThreadCounter, took: Duration) {
        counter.inc();
        self.seconds.observe(took);
    }
}
