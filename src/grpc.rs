//! The gRPC listener: connections in, Check calls and health checks answered, bounds kept.
//!
//! Never decides and never reads a message: `check` does. The caller passes the listener and the signals to stop.

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
