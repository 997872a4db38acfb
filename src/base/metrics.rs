//! The metrics registry and its text format. Each module declares its own metrics in a typed struct.
//!
//! Label values come from the code or the configuration. No text from a request becomes a label value, so the number of
//! time series is limited.

pub(crate) mod per_thread;

pub(crate) use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    core::Collector,
};

pub(crate) use self::per_thread::{ThreadCounter, ThreadCounters, ThreadHistogram};

/// Upper bounds of histogram buckets in seconds, from 10 us to 250 ms.
pub(crate) const SHORT_SECONDS: [f64; 14] =
    [0.000_01, 0.000_02, 0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25];

/// Registers `metric` and returns it.
///
/// # Errors
/// If the name is taken, or if the name or the description is invalid. Both are programming errors that show at
/// startup.
pub(crate) fn register<M: Collector + Clone + 'static>(
    registry: &Registry,
    metric: prometheus::Result<M>,
) -> prometheus::Result<M> {
    let metric = metric?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

/// Creates a registry with the process metrics: build information, and kernel statistics such as CPU time and memory
/// usage.
///
/// # Errors
/// The same as for [`register`].
pub fn registry(version: &str, commit: &str) -> prometheus::Result<Registry> {
    let registry = Registry::new();
    registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
    let build = IntGaugeVec::new(
        Opts::new("trustgate_build_info", "Build information: constant 1, with the version and commit as labels."),
        &["version", "commit"],
    );
    register(&registry, build)?.with_label_values(&[version, commit]).set(1);
    Ok(registry)
}

/// Returns all metrics in the Prometheus text format.
#[must_use]
pub fn text(registry: &Registry) -> String {
    let mut text = String::new();
    let encoder = prometheus::TextEncoder::new();
    // Writing to a String cannot fail, and families from one registry are consistent.
    if let Err(error) = encoder.encode_utf8(&registry.gather(), &mut text) {
        tracing::error!(%error, "metrics encoding failed");
    }
    text
}
