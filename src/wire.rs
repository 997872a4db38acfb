//! The wire: bytes of a Check call in, bytes of its answer out. The only place that knows Envoy's messages.
//!
//! Never decides anything.

pub mod client;
pub mod grpc;
pub mod identity;
pub mod response;
pub mod view;
