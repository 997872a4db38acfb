//! Building blocks that all other modules can use: time, settings, text and units, secrets, faults, logs, metrics,
//! jitter, integer conversion and the circuit breaker.

pub(crate) mod breaker;
pub(crate) mod clock;
pub(crate) mod fault;
pub(crate) mod jitter;
pub(crate) mod log_limit;
pub(crate) mod metrics;
pub(crate) mod saturate;
pub(crate) mod secret;
pub(crate) mod settings;
pub(crate) mod telemetry;
pub(crate) mod text;
pub(crate) mod units;
