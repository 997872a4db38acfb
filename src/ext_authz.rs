//! Envoy's `ext_authz` check, from the bytes of a `CheckRequest` to the bytes of a `CheckResponse`: find the
//! credential, look up its record, decide, and encode the response. [`crate::grpc`] receives and sends the bytes.

pub mod check;
pub mod credential;
pub mod decision;
pub mod framing;
pub mod identity;
pub(crate) mod metrics;
pub mod request;
pub mod response;
pub mod route;
