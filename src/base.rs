//! Foundations without knowledge of checks: time, text, secrets, units, settings, metrics, faults and logging.

pub mod breaker;
pub mod clock;
pub mod fault;
pub mod jitter;
pub mod log_limit;
pub mod metrics;
pub mod secret;
pub mod settings;
pub mod telemetry;
pub mod text;
pub mod units;
