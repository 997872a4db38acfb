//! A check, in the order of a request: message, credential, route demands, decision, response.

pub mod check;
pub mod credential;
pub mod decision;
pub mod framing;
pub mod identity;
pub(crate) mod metrics;
pub mod request;
pub mod response;
pub mod route;
