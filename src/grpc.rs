//! The gRPC server: accepts connections, answers `Check` calls and health checks, and enforces the limits.
//!
//! `ext_authz::check` decodes the messages and decides them. `server` passes in the listeners and the shutdown signals.

pub mod accept;
pub(crate) mod answer;
pub(crate) mod body;
pub(crate) mod call;
pub(crate) mod connection;
pub mod descriptors;
pub(crate) mod health;
pub(crate) mod http1;
pub mod listener;
pub(crate) mod protocol;
pub(crate) mod refused;
pub(crate) mod rpc;
pub mod service;
pub mod settings;
pub(crate) mod stream;
pub mod tls;
pub mod worker;

pub use self::{
    service::{Service, Signals},
    settings::{GrpcSettings, LimitsSettings},
};
