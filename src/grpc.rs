//! The gRPC server: accepts connections, answers `Check` calls and health checks, and enforces the limits.
//!
//! `ext_authz::check` decodes the message of a check and decides it. `server` passes in the listeners and the shutdown
//! signals.

pub(crate) mod accept;
pub(crate) mod answer;
pub(crate) mod body;
pub(crate) mod call;
pub(crate) mod connection;
pub(crate) mod descriptors;
pub(crate) mod health;
pub(crate) mod http1;
pub(crate) mod listener;
pub(crate) mod protocol;
pub(crate) mod refused;
pub(crate) mod rpc;
pub(crate) mod service;
pub(crate) mod settings;
pub(crate) mod stream;
pub(crate) mod tls;
pub(crate) mod worker;

pub(crate) use self::{
    service::{Service, Signals},
    settings::{GrpcSettings, LimitsSettings},
};
