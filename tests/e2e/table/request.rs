//! Encodes a request as a `CheckRequest`, in each of the two encodings that Envoy has for headers.

use std::collections::{BTreeMap, HashMap};

use envoy_types::pb::envoy::{
    config::core::v3::{Address, HeaderMap, HeaderValue, Pipe, SocketAddress, address::Address as AddressKind},
    service::auth::v3::{
        AttributeContext, CheckRequest,
        attribute_context::{HttpRequest, Peer, Request as ProtoRequest},
    },
};
use prost::Message as _;

/// The encoding of the headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// `encode_raw_headers: true`: a list of the headers as the client sent them.
    Raw,
    /// A map: the values of headers with the same name are joined with commas, and each byte that is not UTF-8 is
    /// replaced with `!`.
    Map,
}

impl Encoding {
    pub const BOTH: [Self; 2] = [Self::Raw, Self::Map];
}

/// A request from the table.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// The client's address, `unix` for a Unix socket, or empty for no address.
    pub from: String,
    pub headers: Vec<(String, Vec<u8>)>,
    /// The route's context extensions.
    pub route: BTreeMap<String, String>,
    /// The bytes to send instead of the encoded request.
    pub instead: Option<Vec<u8>>,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            method: "GET".to_owned(),
            path: "/things?page=2".to_owned(),
            from: "127.0.0.1".to_owned(),
            headers: Vec::new(),
            route: BTreeMap::new(),
            instead: None,
        }
    }
}

impl Request {
    pub fn with_header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.as_bytes().to_vec()));
        self
    }

    /// Returns the encoded `CheckRequest`, or the bytes to send instead.
    pub fn message(&self, encoding: Encoding) -> Vec<u8> {
        self.instead.clone().unwrap_or_else(|| self.proto(encoding).encode_to_vec())
    }

    fn proto(&self, encoding: Encoding) -> CheckRequest {
        let pseudo = [(":authority", "table.test"), (":method", &self.method), (":path", &self.path)];
        let pseudo = pseudo.map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec()));
        let all = pseudo.iter().chain(&self.headers);
        let (mut headers, mut header_map) = (HashMap::new(), None);
        match encoding {
            Encoding::Raw => {
                let raw = |(name, value): &(String, Vec<u8>)| HeaderValue {
                    key: name.clone(),
                    raw_value: value.clone(),
                    ..Default::default()
                };
                header_map = Some(HeaderMap { headers: all.map(raw).collect() });
            }
            Encoding::Map => {
                for (name, value) in all {
                    let value = sanitized(value);
                    headers
                        .entry(name.to_ascii_lowercase())
                        .and_modify(|joined: &mut String| {
                            joined.push(',');
                            joined.push_str(&value);
                        })
                        .or_insert(value);
                }
            }
        }
        let http = HttpRequest {
            method: self.method.clone(),
            path: self.path.clone(),
            host: "table.test".to_owned(),
            scheme: "http".to_owned(),
            protocol: "HTTP/1.1".to_owned(),
            headers,
            header_map,
            ..Default::default()
        };
        let attributes = AttributeContext {
            source: Some(Peer { address: self.address(), ..Default::default() }),
            request: Some(ProtoRequest { http: Some(http), ..Default::default() }),
            context_extensions: self.route.clone().into_iter().collect(),
            ..Default::default()
        };
        CheckRequest { attributes: Some(attributes) }
    }

    fn address(&self) -> Option<Address> {
        let kind = match self.from.as_str() {
            "" => return None,
            "unix" => AddressKind::Pipe(Pipe { path: "@".to_owned(), mode: 0 }),
            address => AddressKind::SocketAddress(SocketAddress { address: address.to_owned(), ..Default::default() }),
        };
        Some(Address { address: Some(kind) })
    }
}

/// Returns the string that Envoy sends for a header value in the map encoding.
fn sanitized(value: &[u8]) -> String {
    value.utf8_chunks().map(|chunk| chunk.valid().to_owned() + &"!".repeat(chunk.invalid().len())).collect()
}
