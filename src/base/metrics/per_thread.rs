//! Counters and histograms for the request path. Each thread adds to its own copy, so that threads do not contend for
//! cache lines. A scrape sums the copies, and the result looks like an ordinary metric.
//!
//! If there are more threads than copies, some threads share a copy. Sharing costs time, but loses no counts.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread::available_parallelism,
    time::Duration,
};

use prometheus::{
    HistogramOpts, Opts,
    core::{Collector, Desc},
    proto::{self, MetricFamily, MetricType},
};

use crate::base::saturate::Saturate as _;

/// The number of copies in addition to one per processor, for threads other than the workers.
const OTHER_THREADS: usize = 4;

thread_local! {
    /// The number of this thread, which selects the copy that the thread adds to.
    static COPY: usize = {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed)
    };
}

/// A value that shares no cache line with other values. The alignment is 128 bytes, because processors fetch cache
/// lines in pairs.
#[derive(Debug)]
#[repr(align(128))]
struct CacheAligned<T>(T);

/// The copies of a value. Each thread uses one copy.
#[derive(Debug)]
struct PerThread<T>(Box<[CacheAligned<T>]>);

impl<T> PerThread<T> {
    fn of(one: impl Fn() -> T) -> Arc<Self> {
        let processors = available_parallelism().map_or(1, std::num::NonZero::get);
        Arc::new(Self((0..processors + OTHER_THREADS).map(|_| CacheAligned(one())).collect()))
    }

    /// Returns the copy that this thread uses.
    fn own(&self) -> &T {
        // There is at least one copy.
        &self.0[COPY.with(|copy| *copy) % self.0.len()].0
    }

    fn all(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|copy| &copy.0)
    }
}

/// One counter of a [`ThreadCounters`] family.
#[derive(Clone, Debug)]
pub(crate) struct ThreadCounter(Arc<PerThread<AtomicU64>>);

impl ThreadCounter {
    fn new() -> Self {
        Self(PerThread::of(|| AtomicU64::new(0)))
    }

    pub(crate) fn inc(&self) {
        self.0.own().fetch_add(1, Ordering::Relaxed);
    }

    fn sum(&self) -> u64 {
        self.0.all().map(|copy| copy.load(Ordering::Relaxed)).sum()
    }
}

/// A family of counters, with or without labels.
#[derive(Clone, Debug)]
pub(crate) struct ThreadCounters {
    labels: &'static [&'static str],
    desc: Desc,
    counters: Arc<Mutex<HashMap<Vec<&'static str>, ThreadCounter>>>,
}

impl ThreadCounters {
    /// Creates a family of counters with the label names `labels`.
    ///
    /// # Errors
    /// If a name or the description is invalid.
    pub(crate) fn new(opts: Opts, labels: &'static [&'static str]) -> prometheus::Result<Self> {
        let names = labels.iter().map(|label| (*label).to_owned()).collect();
        let desc = Desc::new(opts.fq_name(), opts.help, names, HashMap::new())?;
        Ok(Self { labels, desc, counters: Arc::default() })
    }

    /// Returns the counter with these label values. Callers keep the counter, because the lookup takes a lock.
    #[must_use]
    pub(crate) fn with(&self, values: &[&'static str]) -> ThreadCounter {
        // Ignore poisoning: a panic cannot leave an insertion half done.
        let mut counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        counters.entry(values.to_owned()).or_insert_with(ThreadCounter::new).clone()
    }
}

impl Collector for ThreadCounters {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        let metrics = counters.iter().map(|(values, counter)| {
            // Sort the labels by name, as the prometheus crate does.
            let sorted: BTreeMap<_, _> = self.labels.iter().zip(values).collect();
            let pairs = sorted.into_iter().map(|(name, value)| {
                let mut pair = proto::LabelPair::default();
                pair.set_name((*name).to_owned());
                pair.set_value((*value).to_owned());
                pair
            });
            let mut count = proto::Counter::default();
            count.set_value(as_float(counter.sum()));
            let mut metric = proto::Metric::from_label(pairs.collect());
            metric.set_counter(count);
            metric
        });
        vec![family(&self.desc, MetricType::COUNTER, metrics.collect())]
    }
}

/// A histogram of durations. Scrapes return it in seconds.
#[derive(Clone, Debug)]
pub(crate) struct ThreadHistogram {
    desc: Desc,
    /// The upper bound of each bucket, in seconds and in nanoseconds.
    bounds: Arc<[(f64, u64)]>,
    copies: Arc<PerThread<Observed>>,
}

#[derive(Debug)]
struct Observed {
    /// One bucket for each bound, and one for longer durations.
    buckets: Box<[AtomicU64]>,
    nanos: AtomicU64,
}

impl ThreadHistogram {
    /// Creates a histogram with the buckets of `opts`.
    ///
    /// # Errors
    /// If the name or the description is invalid.
    pub(crate) fn new(opts: HistogramOpts) -> prometheus::Result<Self> {
        let bound = |seconds: &f64| (*seconds, nanos(Duration::from_secs_f64(*seconds)));
        let bounds: Arc<[_]> = opts.buckets.iter().map(bound).collect();
        let desc = Desc::new(opts.common_opts.fq_name(), opts.common_opts.help, Vec::new(), HashMap::new())?;
        let copies = PerThread::of(|| Observed {
            buckets: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(),
            nanos: AtomicU64::new(0),
        });
        Ok(Self { desc, bounds, copies })
    }

    /// Adds a duration.
    pub(crate) fn observe(&self, took: Duration) {
        let (took, own) = (nanos(took), self.copies.own());
        // Search from the front, because most durations fall into the first bucket.
        let bucket = self.bounds.iter().position(|(_, nanos)| took <= *nanos).unwrap_or(self.bounds.len());
        own.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        own.nanos.fetch_add(took, Ordering::Relaxed);
    }
}

impl Collector for ThreadHistogram {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let mut count = 0;
        let buckets = self.bounds.iter().enumerate().map(|(number, (seconds, _))| {
            count += self.copies.all().map(|copy| load(&copy.buckets[number])).sum::<u64>();
            let mut bucket = proto::Bucket::default();
            bucket.set_upper_bound(*seconds);
            bucket.set_cumulative_count(count);
            bucket
        });
        let buckets = buckets.collect();
        let longer = self.copies.all().map(|copy| load(&copy.buckets[self.bounds.len()])).sum::<u64>();
        let nanos: u64 = self.copies.all().map(|copy| load(&copy.nanos)).sum();
        let mut histogram = proto::Histogram::default();
        histogram.set_bucket(buckets);
        histogram.set_sample_count(count + longer);
        histogram.set_sample_sum(Duration::from_nanos(nanos).as_secs_f64());
        let mut metric = proto::Metric::default();
        metric.set_histogram(histogram);
        vec![family(&self.desc, MetricType::HISTOGRAM, vec![metric])]
    }
}

fn family(desc: &Desc, kind: MetricType, metrics: Vec<proto::Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(desc.fq_name.clone());
    family.set_help(desc.help.clone());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

fn nanos(duration: Duration) -> u64 {
    duration.as_nanos().saturate()
}

/// Converts a count. The result is exact up to 2^53, which a counter reaches only after centuries.
#[expect(clippy::cast_precision_loss, reason = "Prometheus values are floating-point numbers")]
const fn as_float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::metrics::{Registry, SHORT_SECONDS, register, text};

    #[test]
    fn a_scrape_sums_the_copies_of_all_threads() {
        let registry = Registry::new();
        let counters = register(&registry, ThreadCounters::new(Opts::new("c_total", "Some."), &["what", "a"])).unwrap();
        let opts = HistogramOpts::new("t_seconds", "Times.").buckets(SHORT_SECONDS.to_vec());
        let histogram = register(&registry, ThreadHistogram::new(opts)).unwrap();
        let (one, other) = (counters.with(&["one", "z"]), counters.with(&["other", "z"]));
        std::thread::scope(|scope| {
            for _ in 0..50 {
                scope.spawn(|| {
                    for _ in 0..1_000 {
                        one.inc();
                        histogram.observe(Duration::from_micros(10));
                    }
                    other.inc();
                    histogram.observe(Duration::from_millis(7));
                    histogram.observe(Duration::from_secs(3));
                });
            }
        });
        counters.with(&["one", "z"]).inc();
        let text = text(&registry);
        for line in [
            "# TYPE c_total counter",
            "c_total{a=\"z\",what=\"one\"} 50001",
            "c_total{a=\"z\",what=\"other\"} 50",
            "# TYPE t_seconds histogram",
            "t_seconds_bucket{le=\"0.00001\"} 50000",
            "t_seconds_bucket{le=\"0.005\"} 50000",
            "t_seconds_bucket{le=\"0.01\"} 50050",
            "t_seconds_bucket{le=\"0.25\"} 50050",
            "t_seconds_bucket{le=\"+Inf\"} 50100",
            "t_seconds_sum 150.85",
            "t_seconds_count 50100",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
        }
    }
}
