//! trustgate: whose request is this, and may it pass?
pub mod breaker;
pub mod cache;
pub mod check;
pub mod clock;
pub mod credential;
pub mod decision;
pub mod demand;
pub mod fault;
pub mod freshness;
pub mod metrics;
pub mod record;
pub mod redis;
pub mod secret;
pub mod settings;
pub mod store;
pub mod units;
pub mod wire;
