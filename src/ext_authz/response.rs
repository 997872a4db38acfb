//! Encodes a decision as a `CheckResponse`. Only this module chooses status codes, headers and bodies.
//!
//! Envoy decides by `status.code` and allows the request if the status is unset (envoy.service.auth.v3,
//! `CheckResponse.status`), so each response sets it. The bodies are fixed and contain no details of internal errors.

pub(crate) mod allowed;

use std::time::Duration;

use bytes::Bytes;
use envoy_types::pb::{
    envoy::{
        config::core::v3::{HeaderValue, HeaderValueOption, header_value_option::HeaderAppendAction},
        service::auth::v3::{CheckResponse, DeniedHttpResponse, check_response::HttpResponse},
        r#type::v3::HttpStatus,
    },
    google::{
        protobuf::{BoolValue, Struct, Value, value::Kind},
        rpc::Status,
    },
};

use self::allowed::allowed;
use super::{
    credential::extract::Removals,
    decision::{Basis, Decision, DenyReason},
    framing,
};

crate::setting_enum! {
    /// The answer to Envoy when trustgate cannot decide.
    pub enum OnFault ("\"deny\", \"error\" or \"error_response\"") {
        /// A denial with 503, which Envoy enforces regardless of its `failure_mode_allow`.
        Deny = "deny",
        /// The gRPC error UNAVAILABLE. Envoy may retry with another replica. If no replica decides,
        /// `failure_mode_allow` and `status_on_error` apply.
        Error = "error",
        /// `CheckResponse.error_response` with 503 (Envoy 1.37 and later). Envoy counts this response as an error, so
        /// `failure_mode_allow` applies. An older Envoy treats it as a denial with 403.
        ErrorResponse = "error_response",
    }
}

/// Denials use only these two values of `google.rpc.Code`: Envoy before 1.32 treated other codes as errors.
const PERMISSION_DENIED: i32 = 7;
const UNAUTHENTICATED: i32 = 16;

/// The reply to Envoy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// One framed `CheckResponse`, with the gRPC status OK.
    Message(Bytes),
    /// No message, with the gRPC status UNAVAILABLE.
    Unavailable,
}

/// Builds replies. Denials and faults are encoded once, at startup.
pub struct Replies {
    denials: [Bytes; DenyReason::ALL.len()],
    fault: Reply,
}

impl Replies {
    /// Encodes the replies. `on_fault` selects the form of the reply to a fault; `retry_after` is the value of its
    /// `Retry-After` header.
    #[must_use]
    pub fn new(on_fault: OnFault, retry_after: Duration) -> Self {
        let retry_after = retry_after.as_secs().max(1).to_string();
        let unavailable = || {
            denied(
                503,
                "unavailable",
                "the request could not be authorized at the moment",
                &[("retry-after", &retry_after)],
            )
        };
        let metadata = reason_metadata("fault");
        let fault = match on_fault {
            // Envoy sends this denial to the client regardless of its error settings.
            OnFault::Deny => {
                Reply::Message(response(PERMISSION_DENIED, HttpResponse::DeniedResponse(unavailable()), metadata))
            }
            // Envoy applies `grpc_service.retry_policy`, `failure_mode_allow` and `status_on_error`.
            OnFault::Error => Reply::Unavailable,
            // Envoy applies `failure_mode_allow`; without it, Envoy sends this response to the client.
            OnFault::ErrorResponse => {
                Reply::Message(response(PERMISSION_DENIED, HttpResponse::ErrorResponse(unavailable()), metadata))
            }
        };
        Self { denials: DenyReason::ALL.map(denial), fault }
    }

    /// Returns the reply to a decided request. `removals` lists the credentials that must not reach the upstream. The
    /// dynamic metadata of a grant records whether `basis` is stale.
    #[must_use]
    pub fn decision(&self, decision: &Decision<'_>, removals: &Removals<'_>, basis: Basis) -> Reply {
        Reply::Message(match decision {
            Decision::Allow(grant) => allowed(Some(grant), removals, basis),
            Decision::Anonymous => allowed(None, removals, Basis::Confirmed),
            Decision::Deny(reason) => self.denials[*reason as usize].clone(),
        })
    }

    /// Returns the reply to a request that is denied without a lookup.
    #[must_use]
    pub fn denial(&self, reason: DenyReason) -> Reply {
        Reply::Message(self.denials[reason as usize].clone())
    }

    /// Returns the reply to a request that could not be decided.
    #[must_use]
    pub fn fault(&self) -> Reply {
        self.fault.clone()
    }
}

fn denial(reason: DenyReason) -> Bytes {
    let (code, response_parts) = match reason {
        DenyReason::Missing => (UNAUTHENTICATED, unauthorized("missing_credential", "an API key is required")),
        DenyReason::Ambiguous => {
            (UNAUTHENTICATED, unauthorized("ambiguous_credential", "the request holds more than one API key"))
        }
        DenyReason::Malformed => {
            (UNAUTHENTICATED, unauthorized("malformed_credential", "what was sent cannot be an API key"))
        }
        // The client must not learn which of these reasons applies, because that would reveal whether a key exists.
        DenyReason::Unknown
        | DenyReason::Revoked
        | DenyReason::Expired
        | DenyReason::NotYetValid
        | DenyReason::TrustDisabled
        | DenyReason::DenyListed => (UNAUTHENTICATED, unauthorized("invalid_credential", "the API key is not valid")),
        DenyReason::Undecodable => (UNAUTHENTICATED, unauthorized("invalid_request", "the request cannot be read")),
        DenyReason::Scope | DenyReason::Source => {
            (PERMISSION_DENIED, denied(403, "forbidden", "the API key may not be used for this request", &[]))
        }
        DenyReason::TooLarge => {
            (PERMISSION_DENIED, denied(431, "too_large", "the request's headers are too large", &[]))
        }
    };
    response(code, HttpResponse::DeniedResponse(response_parts), reason_metadata(reason.as_str()))
}

/// Builds a 401 response, which must name the authentication scheme to use (RFC 9110, section 15.5.2).
fn unauthorized(error: &str, message: &str) -> DeniedHttpResponse {
    denied(401, error, message, &[("www-authenticate", "ApiKey")])
}

fn denied(status: i32, error: &str, message: &str, headers: &[(&str, &str)]) -> DeniedHttpResponse {
    let common = [("content-type", "application/json"), ("cache-control", "no-store")];
    DeniedHttpResponse {
        status: Some(HttpStatus { code: status }),
        headers: headers.iter().chain(&common).map(|(name, value)| overwrite(name, (*value).to_owned())).collect(),
        body: serde_json::json!({ "error": error, "message": message }).to_string() + "\n",
    }
}

fn response(code: i32, http: HttpResponse, metadata: Struct) -> Bytes {
    framing::frame(&CheckResponse {
        status: Some(Status { code, ..Default::default() }),
        http_response: Some(http),
        dynamic_metadata: Some(metadata),
    })
}

/// Builds an option that overwrites a header. Sets both `append` and `append_action`, so that every version of Envoy
/// replaces the client's header: Envoy up to 1.40 reads only `append`, and Envoy 1.37.0 appends if both are unset.
fn overwrite(name: &str, value: String) -> HeaderValueOption {
    #[expect(deprecated, reason = "Envoy up to 1.40 only looks at `append`")]
    HeaderValueOption {
        header: Some(HeaderValue { key: name.to_owned(), value, ..Default::default() }),
        append: Some(BoolValue { value: false }),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
        ..Default::default()
    }
}

fn reason_metadata(reason: &str) -> Struct {
    Struct { fields: [("reason".to_owned(), text(reason.to_owned()))].into() }
}

const fn text(text: String) -> Value {
    Value { kind: Some(Kind::StringValue(text)) }
}
