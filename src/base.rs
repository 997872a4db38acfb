//! Building blocks that do not depend on checks: time, settings, text and units, secrets, faults, logs, metrics, jitter,
//! conversion of integers and the circuit breaker.

pub mod breaker;
pub mod clock;
pub mod fault;
pub mod jitter;
pub mod log_limit;
pub mod metrics;
pub mod saturate;
pub mod secret;
pub mod settings;
pub mod telemetry;
pub mod text;
pub mod units;
