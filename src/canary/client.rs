//! The client of the canary: connects to replicas over gRPC, sends checks as Envoy does, and interprets the answers as
//! Envoy does.

use std::{fmt, io, net::SocketAddr, path::PathBuf, time::Duration};

use envoy_types::pb::{
    envoy::service::auth::v3::{
        AttributeContext, CheckRequest, CheckResponse,
        attribute_context::{HttpRequest, Request as AttributeRequest},
        authorization_client::AuthorizationClient,
    },
    google::protobuf::value::Kind,
};
use futures_util::future::join_all;
use tokio::{fs, net::lookup_host, time::timeout};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::settings::{CanarySettings, Target};
use crate::ext_authz::credential::{
    CredentialSettings,
    source::{Scheme, Source},
};

/// Timeout for the DNS lookup of a target, and for each connection attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout of one check. Envoy's timeout is shorter, but with a shorter timeout the canary could not distinguish a slow
/// replica from a broken replica.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum number of addresses of one target that the canary connects to.
const ADDRESSES_MAX: usize = 64;

/// Why a file in the TLS settings cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("canary.{setting}: cannot read {path}: {source}", path = path.display())]
pub(crate) struct TlsFileError {
    setting: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// Why the canary cannot connect to a target or to one of its replicas.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The DNS lookup of the host failed or returned no address.
    #[error("DNS lookup of {0} failed: {1}")]
    Dns(Target, io::Error),
    /// The replica does not accept the connection.
    #[error("cannot connect to {0}: {1}")]
    Refused(String, String),
}

/// Connects to replicas.
pub(crate) struct Connector {
    /// `None` for connections without TLS.
    tls: Option<ClientTlsConfig>,
    server_name: Option<String>,
}

impl Connector {
    /// Creates a connector from `settings`. Reads the TLS files.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub(crate) async fn new(settings: &CanarySettings) -> Result<Self, TlsFileError> {
        let CanarySettings { tls_ca_file, tls_server_name, tls_certificate_file, tls_key_file, .. } = settings;
        let mut tls = None;
        if let Some(authorities) = tls_ca_file {
            let authorities = Certificate::from_pem(read("tls_ca_file", authorities).await?);
            let mut config = ClientTlsConfig::new().ca_certificate(authorities);
            if let (Some(certificate), Some(key)) = (tls_certificate_file, tls_key_file) {
                let certificate = read("tls_certificate_file", certificate).await?;
                config = config.identity(Identity::from_pem(certificate, read("tls_key_file", key).await?));
            }
            tls = Some(config);
        }
        Ok(Self { tls, server_name: tls_server_name.clone() })
    }

    /// Connects to each address of `target`. The list has an error for each address that cannot be reached, or one
    /// error if the target has no address.
    pub(crate) async fn connect(&self, target: &Target) -> Vec<Result<Replica, ConnectError>> {
        match target {
            Target::Unix(path) => {
                vec![replica(target.to_string(), Endpoint::from_shared(format!("unix://{}", path.display()))).await]
            }
            Target::Tcp(host, port) => match addresses(target).await {
                Ok(addresses) => join_all(addresses.iter().map(|address| self.connect_to(host, *port, *address))).await,
                Err(error) => vec![Err(ConnectError::Dns(target.clone(), error))],
            },
        }
    }

    async fn connect_to(&self, host: &str, port: u16, address: SocketAddr) -> Result<Replica, ConnectError> {
        let name = if address.ip().to_string() == host.trim_matches(['[', ']']) {
            address.to_string()
        } else {
            format!("{host}:{port} ({address})")
        };
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"));
        if let Some(tls) = &self.tls {
            let expected = self.server_name.as_deref().unwrap_or(host.trim_matches(['[', ']']));
            endpoint = endpoint.and_then(|endpoint| endpoint.tls_config(tls.clone().domain_name(expected)));
        }
        replica(name, endpoint).await
    }
}

/// Returns the addresses that DNS returns for `target`, without duplicates.
async fn addresses(target: &Target) -> io::Result<Vec<SocketAddr>> {
    let found = timeout(CONNECT_TIMEOUT, lookup_host(target.to_string())).await;
    let found = found.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    let mut addresses: Vec<_> = found.take(ADDRESSES_MAX).collect();
    addresses.sort_unstable();
    addresses.dedup();
    if addresses.is_empty() { Err(io::Error::other("DNS returned no address")) } else { Ok(addresses) }
}

async fn read(setting: &'static str, path: &PathBuf) -> Result<Vec<u8>, TlsFileError> {
    fs::read(path).await.map_err(|source| TlsFileError { setting, path: path.clone(), source })
}

async fn replica(name: String, endpoint: Result<Endpoint, tonic::transport::Error>) -> Result<Replica, ConnectError> {
    let connected = async { endpoint?.connect().await };
    match timeout(CONNECT_TIMEOUT, connected).await {
        Ok(Ok(channel)) => Ok(Replica { name, client: AuthorizationClient::new(channel) }),
        Ok(Err(error)) => Err(ConnectError::Refused(name, causes(&error))),
        Err(_) => Err(ConnectError::Refused(name, format!("no answer within {CONNECT_TIMEOUT:?}"))),
    }
}

/// Returns the causes of `error`, because the message of a transport error only says that the transport failed.
fn causes(error: &dyn std::error::Error) -> String {
    let mut texts = Vec::new();
    let mut next = error.source();
    while let Some(cause) = next {
        texts.push(cause.to_string());
        next = cause.source();
    }
    texts.dedup();
    if texts.is_empty() { error.to_string() } else { texts.join(": ") }
}

/// A connection to one replica.
pub(crate) struct Replica {
    name: String,
    client: AuthorizationClient<Channel>,
}

impl fmt::Display for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Replica {
    /// Sends a check. Returns [`Verdict::Undecided`] for a gRPC error, and if no answer arrives within 1 s.
    pub(crate) async fn check(&self, request: &Request) -> Verdict {
        match timeout(CHECK_TIMEOUT, self.client.clone().check(request.0.clone())).await {
            Ok(Ok(response)) => verdict(&response.into_inner()),
            Ok(Err(status)) => Verdict::Undecided(format!("gRPC status {:?}", status.code())),
            Err(_) => Verdict::Undecided(format!("no answer within {CHECK_TIMEOUT:?}")),
        }
    }
}

/// The meaning of an answer for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The request passes.
    Granted {
        /// True for a stale grant: the database does not answer, so it has not confirmed the record recently.
        is_stale: bool,
    },
    /// The request is denied.
    Denied,
    /// The replica could not decide the check for this reason.
    Undecided(String),
}

/// A check with one key. The type does not implement `Debug`, because the output would contain the key.
#[derive(Clone)]
pub(crate) struct Request(CheckRequest);

/// Creates a check for a GET request that presents `key` in the first configured source.
#[must_use]
pub(crate) fn request(credential: &CredentialSettings, key: &str) -> Request {
    let (mut path, mut headers) = ("/".to_owned(), Vec::new());
    match credential.sources.first() {
        Some(Source::Header(name)) => headers.push((name.clone(), key.to_owned())),
        Some(Source::Authorization(Scheme::Bearer)) => headers.push(("authorization".into(), format!("Bearer {key}"))),
        Some(Source::Authorization(Scheme::ApiKey)) => headers.push(("authorization".into(), format!("ApiKey {key}"))),
        Some(Source::Query(name)) => path = format!("/?{name}={key}"),
        Some(Source::Cookie(name)) => headers.push(("cookie".into(), format!("{name}={key}"))),
        None => {} // loading refuses a configuration without a source
    }
    let http = HttpRequest {
        method: "GET".to_owned(),
        path,
        host: "trustgate-canary.invalid".to_owned(),
        scheme: "https".to_owned(),
        protocol: "HTTP/1.1".to_owned(),
        headers: headers.into_iter().collect(),
        ..HttpRequest::default()
    };
    let request = Some(AttributeRequest { http: Some(http), ..AttributeRequest::default() });
    Request(CheckRequest { attributes: Some(AttributeContext { request, ..AttributeContext::default() }) })
}

/// Interprets `response` as Envoy does.
fn verdict(response: &CheckResponse) -> Verdict {
    let CheckResponse { status, dynamic_metadata, .. } = response;
    let field = |name| dynamic_metadata.as_ref().and_then(|metadata| metadata.fields.get(name)?.kind.as_ref());
    // Envoy treats a response without a status as OK.
    if status.as_ref().is_none_or(|status| status.code == 0) {
        return Verdict::Granted { is_stale: field("stale") == Some(&Kind::BoolValue(true)) };
    }
    match field("reason") {
        Some(Kind::StringValue(reason)) if reason == "fault" => Verdict::Undecided("fault".to_owned()),
        _ => Verdict::Denied,
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::{
        base::settings::{RawValue, Setting as _},
        ext_authz::{
            credential::extract::{Removals, extract},
            decision::{Basis, Decision, DenyReason},
            framing,
            request::View,
            response::{OnFault, Replies, Reply},
        },
    };

    #[test]
    fn the_key_is_presented_in_the_first_source() {
        for source in ["header:x-key", "authorization:bearer", "authorization:apikey", "query:key", "cookie:key"] {
            let sources = vec![Source::read(&RawValue::One(source.to_owned())).unwrap()];
            let credential = CredentialSettings { sources, ..CredentialSettings::default() };
            let message = request(&credential, "a-key-for-this-test").0.encode_to_vec();
            let found = extract(&credential, &View::parse(&message).unwrap()).key;
            assert_eq!(found.unwrap().expose(), b"a-key-for-this-test", "{source}");
        }
    }

    #[test]
    fn answers_are_interpreted_as_envoy_interprets_them() {
        let of = |reply: &Reply| match reply {
            Reply::Message(framed) => verdict(&CheckResponse::decode(framing::unframe(framed).unwrap()).unwrap()),
            Reply::Unavailable => Verdict::Undecided("fault".to_owned()),
        };
        for on_fault in [OnFault::Deny, OnFault::Error, OnFault::ErrorResponse] {
            let replies = Replies::new(on_fault, Duration::from_secs(1));
            assert_eq!(of(&replies.fault()), Verdict::Undecided("fault".to_owned()), "{on_fault:?}");
            for reason in DenyReason::ALL {
                assert_eq!(of(&replies.denial(reason)), Verdict::Denied, "{reason:?}");
            }
            let granted = replies.decision(&Decision::Anonymous, &Removals::default(), Basis::Confirmed);
            assert_eq!(of(&granted), Verdict::Granted { is_stale: false });
        }
        assert_eq!(verdict(&CheckResponse::default()), Verdict::Granted { is_stale: false }, "an empty response");
    }
}
