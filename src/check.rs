//! One check from bytes to bytes: credential, record, decision, answer; the same for every transport.
//!
//! Never picks codes or headers (`wire::response` does) and never talks to Redis or the database itself.

use std::time::Duration;

crate::settings! {
    /// How a check is answered, and within what time.
    pub struct DecisionSettings in "decision" {
        /// What Envoy gets when a request cannot be decided: `deny` (denied with 503, whatever Envoy's failure mode is),
        /// `error` (a gRPC error, so that Envoy's own failure mode decides) or `error_response` (both; Envoy 1.37 or newer).
        on_fault: OnFault = "deny",
        /// CORS preflight requests: `check` them like any other, or `pass` them (where Envoy asks before its CORS filter).
        preflight: Preflight = "check",
        /// How long a check may take in all. What could not be decided by then is a fault.
        deadline: Duration = "150ms",
        /// The timeout set in Envoy's `grpc_service`: must be longer than `deadline`, so that Envoy gets our answer.
        envoy_timeout: Duration = "200ms",
        /// What a client is told to wait after a fault, in `Retry-After`.
        retry_after: Duration = "1s",
    }
}

crate::words! {
    /// What Envoy gets when a request cannot be decided.
    pub enum OnFault ("\"deny\", \"error\" or \"error_response\"") {
        /// A denial with 503: Envoy enforces it whatever its failure mode is.
        Deny = "deny",
        /// A gRPC error: Envoy's failure mode decides.
        Error = "error",
        /// A gRPC error that carries the response: Envoy's failure mode decides, and has our answer.
        ErrorResponse = "error_response",
    }
}

crate::words! {
    /// What to do with CORS preflight requests.
    pub enum Preflight ("\"check\" or \"pass\"") {
        /// Check them like any other request.
        Check = "check",
        /// Let them through without a credential.
        Pass = "pass",
    }
}
