//! Envoy's `ext_authz` check, from the bytes of a `CheckRequest` to the bytes of a `CheckResponse`: find the
//! credential, look up its record, decide, and encode the response. [`crate::grpc`] receives and sends the bytes.

pub(crate) mod check;
pub(crate) mod credential;
pub(crate) mod decision;
pub(crate) mod framing;
pub(crate) mod identity;
pub(crate) mod metrics;
pub(crate) mod request;
pub(crate) mod response;
pub(crate) mod route;
