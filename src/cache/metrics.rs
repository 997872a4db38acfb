//! The metrics of the cache tiers. The counter for each label value is looked up once, at registration, because a
//! lookup by label computes a hash and takes a lock.

use super::cacheable::Cacheable;
use crate::base::{
    fault::Tier,
    metrics::{
        Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, SHORT_SECONDS,
        ThreadCounter, ThreadCounters, register,
    },
};

/// The outcomes of lookups in one tier.
pub(crate) struct Outcomes {
    pub(crate) hit: ThreadCounter,
    pub(crate) negative_hit: ThreadCounter,
    pub(crate) miss: ThreadCounter,
    pub(crate) refused: ThreadCounter,
    pub(crate) error: ThreadCounter,
}

/// The metrics of one kind of cached value.
pub(crate) struct CacheMetrics {
    pub(crate) l1: Outcomes,
    pub(crate) l2: Outcomes,
    pub(crate) store: Outcomes,
    pub(crate) entries: IntGauge,
    pub(crate) reads_ok: IntCounter,
    pub(crate) reads_failed: IntCounter,
    pub(crate) read_seconds: Histogram,
    pub(crate) samples: SampleCounts,
}

impl CacheMetrics {
    /// Declares the metrics.
    ///
    /// # Errors
    /// Returns the error of [`register`].
    pub(crate) fn register<K: Cacheable>(registry: &Registry) -> prometheus::Result<Self> {
        let lookups = ThreadCounters::new(
            Opts::new(
                "trustgate_cache_lookups_total",
                "Lookups by kind of value, tier (l1, l2, store) and outcome (hit, negative_hit, miss, refused, error).",
            ),
            &["kind", "tier", "outcome"],
        );
        let lookups = register(registry, lookups)?;
        let outcomes = |tier: Tier| {
            let outcome = |outcome| lookups.with(&[K::NAME, tier.as_str(), outcome]);
            Outcomes {
                hit: outcome("hit"),
                negative_hit: outcome("negative_hit"),
                miss: outcome("miss"),
                refused: outcome("refused"),
                error: outcome("error"),
            }
        };
        let entries = IntGaugeVec::new(
            Opts::new("trustgate_cache_entries", "Entries in L1, including negative entries, by kind of value."),
            &["kind"],
        );
        let reads = IntCounterVec::new(
            Opts::new("trustgate_store_reads_total", "Database reads for checks and samples, by outcome (ok, error)."),
            &["outcome"],
        );
        let reads = register(registry, reads)?;
        let seconds = HistogramOpts::new(
            "trustgate_store_read_duration_seconds",
            "Duration of database reads for checks and samples, in seconds.",
        );
        Ok(Self {
            l1: outcomes(Tier::L1),
            l2: outcomes(Tier::L2),
            store: outcomes(Tier::Store),
            entries: register(registry, entries)?.with_label_values(&[K::NAME]),
            reads_ok: reads.with_label_values(&["ok"]),
            reads_failed: reads.with_label_values(&["error"]),
            read_seconds: register(registry, Histogram::with_opts(seconds.buckets(SHORT_SECONDS.to_vec())))?,
            samples: SampleCounts::register::<K>(registry)?,
        })
    }
}

/// The result of comparing a cached record with its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Comparison {
    /// The cached copy matches the database.
    Same,
    /// A change to the record was applied in the meantime, so no check would use the cached copy.
    Changed,
    /// The row differs or is missing, and no recorded change explains the difference.
    Different,
    /// The comparison was not possible: the database did not answer, or no poll has confirmed the version of the
    /// answer.
    Error,
}

/// The counters of the sampler's comparisons, one for each outcome.
pub(crate) struct SampleCounts {
    same: IntCounter,
    changed: IntCounter,
    different: IntCounter,
    error: IntCounter,
}

impl SampleCounts {
    fn register<K: Cacheable>(registry: &Registry) -> prometheus::Result<Self> {
        let opts = Opts::new(
            "trustgate_samples_total",
            "Cached records compared with the database, by kind and outcome: same, changed (a change was applied in \
             the meantime), different (no recorded change explains the difference) or error (not compared).",
        );
        let samples = register(registry, IntCounterVec::new(opts, &["kind", "outcome"]))?;
        let count = |outcome| samples.with_label_values(&[K::NAME, outcome]);
        Ok(Self {
            same: count("same"),
            changed: count("changed"),
            different: count("different"),
            error: count("error"),
        })
    }

    pub(crate) const fn of(&self, comparison: Comparison) -> &IntCounter {
        match comparison {
            Comparison::Same => &self.same,
            Comparison::Changed => &self.changed,
            Comparison::Different => &self.different,
            Comparison::Error => &self.error,
        }
    }
}
