//! The other end of the wire: a request as Envoy sends one, and what Envoy makes of the reply. For a server that asks
//! itself.
//!
//! Never has a part in a check that somebody else asks for.

use envoy_types::pb::{
    envoy::service::auth::v3::{
        AttributeContext, CheckRequest, CheckResponse,
        attribute_context::{HttpRequest, Request},
    },
    google::protobuf::value::Kind,
};
use prost::Message as _;

use crate::ext_authz::{framing, response::Reply};

/// What a reply means for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is let in.
    Granted {
        /// On what the database has not confirmed lately, while it did not answer.
        is_stale: bool,
    },
    /// It is refused: the caller's doing.
    Denied,
    /// It could not be decided.
    Undecided,
}

/// The message that asks about a GET of `path` with these headers.
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

/// What `reply` means. One that cannot be read means nothing.
#[must_use]
pub fn verdict(reply: &Reply) -> Verdict {
    let Reply::Message(framed) = reply else { return Verdict::Undecided };
    let message = framing::unframe(framed).and_then(|message| CheckResponse::decode(message).ok());
    let Some(CheckResponse { status, dynamic_metadata, .. }) = message else { return Verdict::Undecided };
    let said = |name| dynamic_metadata.as_ref().and_then(|metadata| metadata.fields.get(name)?.kind.as_ref());
    // To Envoy no status at all is OK.
    if status.is_none_or(|status| status.code == 0) {
        return Verdict::Granted { is_stale: said("stale") == Some(&Kind::BoolValue(true)) };
    }
    match said("reason") {
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
    fn a_request_is_read_as_it_was_meant() {
        let message = request("/?key=k", &[("x-api-key", "k"), ("cookie", "a=b")]);
        let view = View::parse(&message).unwrap();
        assert_eq!((view.is_http, view.method, view.path), (true, "GET", "/?key=k"));
        assert_eq!(view.header("x-api-key").collect::<Vec<_>>(), [b"k"]);
        assert_eq!(view.header("cookie").collect::<Vec<_>>(), [b"a=b"]);
    }

    #[test]
    fn every_reply_means_to_us_what_it_means_to_envoy() {
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
