//! The metrics of the canary.

use std::time::Duration;

use super::settings::Target;
use crate::base::metrics::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry, SHORT_SECONDS, register};

/// The counter of rounds and the histogram of revocation times.
#[derive(Clone)]
pub struct CanaryMetrics {
    rounds: IntCounterVec,
    revocation: HistogramVec,
}

impl CanaryMetrics {
    /// Registers the metrics and creates all their series for `targets`, because Prometheus misses the first increase
    /// of a series that did not exist before.
    ///
    /// # Errors
    /// Same as [`register`].
    pub fn register(registry: &Registry, targets: &[Target]) -> prometheus::Result<Self> {
        let rounds = Opts::new(
            "trustgate_canary_rounds_total",
            "Rounds of the canary by target and outcome: ok, late (the revoked key was granted beyond the bound), \
             denied (the valid key was denied) or failed.",
        );
        let rounds = register(registry, IntCounterVec::new(rounds, &["target", "outcome"]))?;
        let revocation = HistogramOpts::new(
            "trustgate_canary_revocation_seconds",
            "Time from the acknowledged revocation of the canary's key to the start of the last granted check, in \
             seconds.",
        );
        let mut buckets = SHORT_SECONDS.to_vec();
        buckets.extend([0.5, 1.0, 2.5]);
        let revocation = register(registry, HistogramVec::new(revocation.buckets(buckets), &["target"]))?;
        for target in targets.iter().map(ToString::to_string) {
            for outcome in ["ok", "late", "denied", "failed"] {
                rounds.with_label_values(&[&*target, outcome]);
            }
            revocation.with_label_values(&[&*target]);
        }
        Ok(Self { rounds, revocation })
    }

    /// Counts a round for `target` with the outcome `outcome`.
    pub(crate) fn count(&self, target: &Target, outcome: &str) {
        self.rounds.with_label_values(&[&*target.to_string(), outcome]).inc();
    }

    /// Records the time from a revocation to the start of the last granted check on one replica.
    pub(crate) fn observe_revocation(&self, target: &Target, last_grant: Duration) {
        self.revocation.with_label_values(&[&target.to_string()]).observe(last_grant.as_secs_f64());
    }
}
