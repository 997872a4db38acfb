//! A client that sends checks directly to trustgate, in the same form as Envoy.

use std::{net::SocketAddr, time::Duration};

use envoy_types::pb::{
    envoy::service::auth::v3::{
        AttributeContext, CheckRequest, CheckResponse,
        attribute_context::{HttpRequest, Request},
        authorization_client::AuthorizationClient,
        check_response::HttpResponse,
    },
    google::protobuf::value::Kind,
};
use tonic::{Status, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use super::{eventually, load::KeyCase, server::IssuedKey};

/// A connection to one trustgate server.
#[derive(Clone)]
pub struct CheckClient(AuthorizationClient<Channel>);

/// The result of a check, as Envoy interprets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// 200 for a grant; otherwise the status that the client receives.
    pub status: u16,
    /// The value of the header `x-trust-id` that a grant sets.
    pub trust_id: Option<String>,
    /// The `reason` in the dynamic metadata.
    pub reason: Option<String>,
}

impl CheckClient {
    /// Connects to `server`.
    ///
    /// # Panics
    /// If the connection fails.
    pub async fn connect(server: SocketAddr) -> Self {
        let endpoint = Channel::from_shared(format!("http://{server}")).expect("a URL");
        Self(AuthorizationClient::new(endpoint.connect().await.expect("a connection")))
    }

    /// Sends a check of a request with `key` in `x-api-key`.
    ///
    /// # Panics
    /// If the server answers with a gRPC error.
    pub async fn check(&self, key: &str) -> Verdict {
        self.check_with(key, &[]).await.expect("an answer")
    }

    /// Checks each key until it is granted, so that the server has cached it. All keys must be valid.
    ///
    /// # Panics
    /// If a key is denied, or is not granted within 30 s.
    pub async fn fill_cache(&self, cases: &[KeyCase]) {
        for case in cases {
            eventually("a valid key is granted", Duration::from_secs(30), || async {
                let verdict = self.check(&case.key).await;
                assert!(verdict.trust_id == case.trust_id || verdict.status == 503, "{verdict:?}");
                verdict.status == 200
            })
            .await;
        }
    }

    /// Like [`Self::check`], with `extensions` as the context extensions of the route.
    ///
    /// # Errors
    /// If the server answers with a gRPC error.
    pub async fn check_with(&self, key: &str, extensions: &[(&str, &str)]) -> Result<Verdict, Status> {
        let answer = self.0.clone().check(request(key, extensions)).await?;
        Ok(verdict(&answer.into_inner()))
    }
}

/// Asserts that `key` is granted for its trust.
pub async fn granted(client: &CheckClient, key: &IssuedKey) {
    let verdict = client.check(&key.key).await;
    assert_eq!((verdict.status, verdict.trust_id.as_ref()), (200, Some(&key.trust_id)), "{verdict:?}");
}

/// Asserts that `key` is denied with `reason`.
pub async fn refused(client: &CheckClient, key: &IssuedKey, reason: &str) {
    let verdict = client.check(&key.key).await;
    assert_eq!((verdict.status, verdict.reason.as_deref()), (401, Some(reason)), "{verdict:?}");
}

/// Returns true if the gRPC health service of `server` reports `service` as SERVING.
///
/// # Panics
/// If the server does not answer, or does not know the service.
pub async fn is_serving(server: SocketAddr, service: &str) -> bool {
    let channel = Channel::from_shared(format!("http://{server}")).expect("a URL").connect().await;
    let mut health = HealthClient::new(channel.expect("a connection"));
    let answer = health.check(HealthCheckRequest { service: service.to_owned() }).await;
    let answer = answer.unwrap_or_else(|status| panic!("{service:?}: {status}")).into_inner();
    answer.status() == ServingStatus::Serving
}

/// Returns the `CheckRequest` for a request with `key` in `x-api-key`, on a route with the context extensions
/// `extensions`.
pub fn request(key: &str, extensions: &[(&str, &str)]) -> CheckRequest {
    let headers = [(":method", "GET"), (":path", "/"), (":authority", "service.example"), ("x-api-key", key)];
    let http = HttpRequest {
        method: "GET".to_owned(),
        path: "/".to_owned(),
        host: "service.example".to_owned(),
        headers: headers.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        ..HttpRequest::default()
    };
    let extensions = extensions.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    CheckRequest {
        attributes: Some(AttributeContext {
            request: Some(Request { http: Some(http), ..Request::default() }),
            context_extensions: extensions.collect(),
            ..AttributeContext::default()
        }),
    }
}

/// Returns the result that Envoy derives from `answer`.
pub fn verdict(answer: &CheckResponse) -> Verdict {
    let granted = answer.status.as_ref().is_none_or(|status| status.code == 0);
    let mut verdict = Verdict { status: if granted { 200 } else { 403 }, trust_id: None, reason: None };
    match &answer.http_response {
        Some(HttpResponse::OkResponse(ok)) if granted => {
            let headers = ok.headers.iter().filter_map(|header| header.header.as_ref());
            verdict.trust_id = headers
                .filter(|header| header.key == "x-trust-id")
                .map(|header| {
                    if header.raw_value.is_empty() {
                        header.value.clone()
                    } else {
                        String::from_utf8_lossy(&header.raw_value).into_owned()
                    }
                })
                .next();
        }
        Some(HttpResponse::DeniedResponse(denied)) => {
            let code = denied.status.as_ref().map_or(403, |status| status.code);
            verdict.status = u16::try_from(code).expect("an HTTP status");
        }
        _ => {}
    }
    let reason = answer.dynamic_metadata.as_ref().and_then(|metadata| metadata.fields.get("reason"));
    if let Some(Kind::StringValue(reason)) = reason.and_then(|reason| reason.kind.as_ref()) {
        verdict.reason = Some(reason.clone());
    }
    verdict
}
