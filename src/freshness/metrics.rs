//! The metrics of polls and of the lease.

use std::time::Duration;

use super::replica_state::ReplicaState;
use crate::base::{
    clock::Clock,
    metrics::{
        Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, SHORT_SECONDS, register,
    },
};

/// The metrics of polls and of the lease.
#[derive(Clone)]
pub struct PollMetrics {
    pub(super) store_up: IntGauge,
    pub(super) applied_version: IntGauge,
    pub(super) lease_age: Gauge,
    pub(super) bound: Gauge,
    pub(super) latency: Histogram,
    pub(super) lost: IntCounter,
    pub(super) confirmed: IntCounter,
    pub(super) unanswered: IntCounter,
    pub(super) unusable: IntCounter,
}

impl PollMetrics {
    /// Declares the metrics.
    ///
    /// # Errors
    /// Returns the error of [`register`].
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let gauge = |name, help| register(registry, IntGauge::with_opts(Opts::new(name, help)));
        let seconds = |name, help| register(registry, Gauge::with_opts(Opts::new(name, help)));
        let polls = IntCounterVec::new(
            Opts::new(
                "trustgate_polls_total",
                "Polls of the database, by outcome: ok, unanswered, or unusable (answered, but lease not renewed).",
            ),
            &["outcome"],
        );
        let polls = register(registry, polls)?;
        let latency = HistogramOpts::new(
            "trustgate_revocation_latency_seconds",
            "Seconds from the commit of a change until this replica applied the change, by the database's clock.",
        );
        let mut buckets = SHORT_SECONDS.to_vec();
        buckets.extend([0.5, 1.0, 2.5]);
        Ok(Self {
            store_up: gauge("trustgate_store_up", "1 while the database answers polls and can be used, otherwise 0.")?,
            applied_version: gauge(
                "trustgate_applied_version",
                "The newest database version that this replica has applied.",
            )?,
            lease_age: seconds(
                "trustgate_lease_age_seconds",
                "Age of the lease: seconds since the last successful poll was sent; +Inf without a lease.",
            )?,
            bound: seconds(
                "trustgate_revocation_bound_seconds",
                "The current revocation bound: the maximum number of seconds for which a revoked key is still granted.",
            )?,
            latency: register(registry, Histogram::with_opts(latency.buckets(buckets)))?,
            lost: register(
                registry,
                IntCounter::new(
                    "trustgate_lost_history_total",
                    "Losses of database history that this replica detected: restores, and failovers with data loss.",
                ),
            )?,
            confirmed: polls.with_label_values(&["ok"]),
            unanswered: polls.with_label_values(&["unanswered"]),
            unusable: polls.with_label_values(&["unusable"]),
        })
    }

    /// Returns true if the last poll was answered and the database can be used.
    #[must_use]
    pub fn is_store_up(&self) -> bool {
        self.store_up.get() == 1
    }

    /// Sets the gauges whose values are computed at scrape time. `bound` returns the revocation bound; its argument is
    /// true while polls get no answer.
    pub fn observe(&self, replica_state: &ReplicaState, clock: &dyn Clock, bound: impl FnOnce(bool) -> Duration) {
        let view = replica_state.load();
        let age = view.lease().start().map_or(f64::INFINITY, |start| clock.now().since(start).as_secs_f64());
        self.lease_age.set(age);
        self.bound.set(bound(view.lease().is_unanswered()).as_secs_f64());
    }
}
