//! Encodes a `CheckRequest` as Envoy does, and interprets the reply as Envoy does. The canary uses it to check its own
//! key.

use envoy_types::pb::{
    envoy::service::auth::v3::{
        AttributeContext, CheckRequest, CheckResponse,
        attribute_context::{HttpRequest, Request},
    },
    google::protobuf::value::Kind,
};
use prost::Message as _;

use crate::ext_authz::{framing, response::Reply};

/// The meaning of a reply for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The request passes.
    Granted {
        /// True for a stale grant: the database did not answer, so it has not confirmed the record recently.
        is_stale: bool,
    },
    /// The request is denied.
    Denied,
    /// The server could not decide.
    Undecided,
}

/// The `CheckRequest` for a GET of `path` with these headers, encoded.
#[must_use]
pub fn request(path: &str, headers: &[(&str, &str)]) -> Vec<u8> {
    let http = HttpRequest {
        method: "GET".to_owned(),
        path: path.to_owned(),
        host: "localhost".to_owned(),
        headers: headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        ..HttpRequest::default()
    };
    let request = Some(Request { http: Some(http), ..Request::default() });
    CheckRequest { attributes: Some(AttributeContext { request, ..AttributeContext::default() }) }.encode_to_vec()
}

/// The meaning of `reply`. A reply that cannot be decoded is undecided.
#[must_use]
pub fn verdict(reply: &Reply) -> Verdict {
    let Reply::Message(framed) = reply else { return Verdict::Undecided };
    let message = framing::unframe(framed).and_then(|message| CheckResponse::decode(message).ok());
    let Some(CheckResponse { status, dynamic_metadata, .. }) = message else { return Verdict::Undecided };
    let field = |name| dynamic_metadata.as_ref().and_then(|metadata| metadata.fields.get(name)?.kind.as_ref());
    // Envoy takes a response without a status for OK.
    if status.is_none_or(|status| status.code == 0) {
        return Verdict::Granted { is_stale: field("stale") == Some(&Kind::BoolValue(true)) };
    }
    match field("reason") {
        Some(Kind::StringValue(reason)) if reason == "fault" => Verdict::Undecided,
        _ => Verdict::Denied,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ext_authz::{
        credential::extract::Removals,
        decision::{Basis, Decision, DenyReason},
        request::View,
        response::{OnFault, Replies},
    };

    #[test]
    fn a_request_is_decoded_as_it_was_encoded() {
        let message = request("/?key=k", &[("x-api-key", "k"), ("cookie", "a=b")]);
        let view = View::parse(&message).unwrap();
        assert_eq!((view.is_http, view.method, view.path), (true, "GET", "/?key=k"));
        assert_eq!(view.header("x-api-key").collect::<Vec<_>>(), [b"k"]);
        assert_eq!(view.header("cookie").collect::<Vec<_>>(), [b"a=b"]);
    }

    #[test]
    fn replies_are_interpreted_as_envoy_interprets_them() {
        for on_fault in [OnFault::Deny, OnFault::Error, OnFault::ErrorResponse] {
            let replies = Replies::new(on_fault, Duration::from_secs(1));
            assert_eq!(verdict(&replies.fault()), Verdict::Undecided, "{on_fault:?}");
            for reason in DenyReason::ALL {
                assert_eq!(verdict(&replies.denial(reason)), Verdict::Denied, "{reason:?}");
            }
            let granted = replies.decision(&Decision::Anonymous, &Removals::default(), Basis::Confirmed);
            assert_eq!(verdict(&granted), Verdict::Granted { is_stale: false });
        }
        assert_eq!(verdict(&Reply::Message(vec![0].into())), Verdict::Undecided, "no message");
        assert_eq!(verdict(&Reply::Message(vec![0; 5].into())), Verdict::Granted { is_stale: false }, "an empty one");
    }
}
