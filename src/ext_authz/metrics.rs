//! The metrics of checks. Label values are resolved here once, since a look-up by label hashes and locks.

use std::time::Duration;

use super::decision::DenyReason;
use crate::base::{
    fault::FaultReason,
    metrics::{HistogramOpts, Opts, Registry, SHORT_SECONDS, ThreadCounter, ThreadCounters, ThreadHistogram, register},
};

/// Checks by their decision.
pub(crate) struct CheckMetrics {
    pub(crate) allowed: ThreadCounter,
    pub(crate) anonymous: ThreadCounter,
    pub(crate) denied: [ThreadCounter; DenyReason::ALL.len()],
    pub(crate) cancelled: ThreadCounter,
    /// Grants under a stale lease.
    pub(crate) stale: ThreadCounter,
    faults: [ThreadCounter; FaultReason::ALL.len()],
    seconds: ThreadHistogram,
}

impl CheckMetrics {
    /// Declares the metrics.
    ///
    /// # Errors
    /// As [`register`].
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
            "How long checks took from the whole message to the reply, in seconds.",
        );
        let stale = Opts::new(
            "trustgate_stale_grants_total",
            "Grants on what the database has not confirmed within freshness.lease, while it did not answer.",
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

    /// The counter of faults with this reason.
    pub(crate) const fn fault(&self, reason: FaultReason) -> &ThreadCounter {
        &self.faults[reason as usize]
    }

    /// Counts one check that took `took`.
    pub(crate) fn observe(&self, counter: &ThreadCounter, took: Duration) {
        counter.inc();
        self.seconds.observe(took);
    }
}
