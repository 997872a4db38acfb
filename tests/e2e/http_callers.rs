//! A misconfigured Envoy that calls the gRPC listener with `http_service`. In that mode Envoy takes every HTTP 200 as a
//! grant, so the gRPC listener must not answer 200 to anything but a complete gRPC call.

use std::sync::{Arc, atomic::AtomicUsize, atomic::Ordering::Relaxed};

use ::http::{Method, Request, Uri};
use bytes::Bytes;
use http_body_util::Full;
use tokio::net::TcpStream;
use trustgate::testing::ext_authz::framing::{CHECK_PATH, frame};

use crate::support::{
    connection::connect,
    envoy::{Envoy, Plan},
    grpc::request,
    http,
    server::{IssuedKey, Server, TestConfig},
    shared,
};

/// The part of a request that Envoy forwards to the authorization server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Forwarding {
    /// The method, the path, and the headers that Envoy forwards by default.
    Default,
    /// All headers and the body.
    Everything,
    /// All headers and the body, with `path_prefix`.
    EverythingBelowPrefix,
}

impl Forwarding {
    const ALL: [Self; 3] = [Self::Default, Self::Everything, Self::EverythingBelowPrefix];
}

/// The protocol that Envoy uses to call the authorization server.
#[derive(Clone, Copy, Debug)]
enum Upstream {
    Http1,
    Http2,
}

async fn envoy(
    application: std::net::SocketAddr,
    server: &Server,
    upstream: Upstream,
    forwarding: Forwarding,
) -> Envoy {
    let prefix = if forwarding == Forwarding::EverythingBelowPrefix { ", path_prefix: /authorize" } else { "" };
    let mut filter = format!(
        "http_service: {{server_uri: {{uri: http://trustgate, cluster: trustgate, timeout: 5s}}{prefix}}}\n              "
    );
    if forwarding != Forwarding::Default {
        filter.push_str(
            "allowed_headers: {patterns: [{safe_regex: {regex: \".*\"}}]}\n              \
             with_request_body: {max_request_bytes: 65536, allow_partial_message: true}\n              ",
        );
    }
    let plan = Plan::new(application, &[server.grpc()])
        .replace_block("grpc_service:  ", "emit_filter_state_stats", &filter)
        // gRPC health checks need HTTP/2, so remove them. Without health checks, Envoy considers the server healthy.
        .replace_block("    health_checks:", "    load_assignment:\n      cluster_name: trustgate", "");
    let plan = match upstream {
        Upstream::Http2 => plan,
        Upstream::Http1 => plan.replace_block(
            "          http2_protocol_options:                       # gRPC is HTTP/2",
            "    circuit_breakers:",
            "          http_protocol_options: {}\n",
        ),
    };
    plan.start().await
}

/// Returns the requests that clients send: each combination of path, method, content type and body, with forged
/// identity headers.
fn requests(key: &IssuedKey) -> Vec<(String, Request<Bytes>)> {
    let message = frame(&request(&key.key, &[]));
    let bodies = [
        ("no body", Bytes::new()),
        ("a whole message", message.clone()),
        ("half a message", message.slice(..message.len() / 2)),
        ("text", Bytes::from_static(b"{\"hello\": \"world\"}")),
    ];
    let paths = [
        "/",
        "/things?q=1",
        CHECK_PATH,
        "/envoy.service.auth.v3.Authorization/Check?q=1",
        "/envoy.service.auth.v3.Authorization/Other",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ];
    let types = [
        None,
        Some("application/grpc"),
        Some("application/grpc+proto"),
        Some("application/grpc-web"),
        Some("text/html"),
    ];
    let other = Method::from_bytes(b"PROPFIND").unwrap();
    let unusual = Method::from_bytes(b"any!token").unwrap();
    let methods = [
        other,
        unusual,
        Method::GET,
        Method::HEAD,
        Method::POST,
        Method::PUT,
        Method::DELETE,
        Method::OPTIONS,
        Method::PATCH,
    ];
    let mut requests = Vec::new();
    for path in paths {
        for method in &methods {
            for content_type in types {
                for (body_name, body) in &bodies {
                    let mut request = Request::builder()
                        .method(method)
                        .uri(path)
                        .header("te", "trailers")
                        .header("x-api-key", &key.key)
                        .header("x-trust-id", "forged")
                        .header("x-trust-scopes", "admin");
                    if let Some(content_type) = content_type {
                        request = request.header("content-type", content_type);
                    }
                    let name = format!("{method} {path}, {content_type:?}, {body_name}");
                    requests.push((name, request.body(body.clone()).unwrap()));
                }
            }
        }
    }
    requests
}

/// Returns true if the exception in SECURITY.md can apply to `request`, that is, if Envoy forwards the whole request
/// and its path is the path of the Check method.
fn is_exception(request: &Request<Bytes>, forwarding: Forwarding) -> bool {
    forwarding == Forwarding::Everything && request.uri().path_and_query().unwrap() == CHECK_PATH
}

/// Sends `request` over HTTP/1.1; returns the status of the response.
async fn over_http1(connection: &mut http::Connection, request: &Request<Bytes>) -> u16 {
    let (mut head, body) = request.clone().into_parts();
    head.headers.insert("host", "service.example".parse().unwrap());
    http::send(connection, Request::from_parts(head, Full::new(body))).await.unwrap().status
}

/// Sends `request` over HTTP/2; returns the status of the response.
async fn over_http2(connection: &h2::client::SendRequest<Bytes>, request: &Request<Bytes>) -> u16 {
    let (mut head, body) = request.clone().into_parts();
    head.uri = format!("http://service.example{}", head.uri).parse::<Uri>().unwrap();
    let mut connection = connection.clone().ready().await.unwrap();
    let (answered, mut stream) = connection.send_request(Request::from_parts(head, ()), body.is_empty()).unwrap();
    if !body.is_empty() {
        // Ignore the error: Envoy may have answered already.
        let _ = stream.send_data(body, true);
    }
    answered.await.unwrap().status().as_u16()
}

/// Sends each request over HTTP/1.1 and over HTTP/2; returns the number of requests. Panics if a request reaches the
/// application.
async fn none_reaches_the_application(
    envoy: &Envoy,
    key: &IssuedKey,
    reached: &Arc<AtomicUsize>,
    (upstream, forwarding): (Upstream, Forwarding),
) -> usize {
    let mut sent = 0;
    let http2 = connect(TcpStream::connect(envoy.address()).await.unwrap()).await;
    let mut http1 = http::connect(envoy.address()).await.unwrap();
    for (name, request) in requests(key) {
        if is_exception(&request, forwarding) {
            continue;
        }
        // Envoy may close a connection if it answers before it has received the whole request.
        if http1.ready().await.is_err() {
            http1 = http::connect(envoy.address()).await.unwrap();
        }
        for (client, status) in
            [("HTTP/1.1", over_http1(&mut http1, &request).await), ("HTTP/2", over_http2(&http2, &request).await)]
        {
            assert_eq!(reached.load(Relaxed), 0, "{name}, by {client}: {status} ({upstream:?}, {forwarding:?})");
            sent += 1;
        }
    }
    sent
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_in_http_service_mode_lets_no_request_through() {
    let _turn = shared().await;
    let test_config = TestConfig::new();
    test_config.migrate().await;
    test_config.trust("acme").await;
    let key = test_config.issue("acme", &[]).await;
    let server = test_config.serve().await;
    let (application, reached) = http::counting_application().await;
    let mut sent = 0;
    for upstream in [Upstream::Http1, Upstream::Http2] {
        for forwarding in Forwarding::ALL {
            let envoy = envoy(application, &server, upstream, forwarding).await;
            sent += none_reaches_the_application(&envoy, &key, &reached, (upstream, forwarding)).await;
        }
    }
    println!("{sent} requests, none reached the application");
    let log = server.log();
    for reason in ["http1", "not_grpc"] {
        let counted = server.metric(&format!("trustgate_grpc_refused_total{{reason=\"{reason}\"}}")).await;
        assert!(counted > 100.0, "{reason}: {counted}");
        let lines = log.lines().filter(|line| line.contains("peer refused") && line.contains(reason)).count();
        assert!((1..=3).contains(&lines), "{reason}: at most one line a minute, not {lines}");
    }
    assert!(!log.contains(&key.key), "a key reached the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_complete_check_call_passes_if_envoy_forwards_everything() {
    let _turn = shared().await;
    let test_config = TestConfig::new();
    test_config.migrate().await;
    test_config.trust("acme").await;
    let key = test_config.issue("acme", &[]).await;
    let server = test_config.serve().await;
    let (application, reached) = http::counting_application().await;
    let envoy = envoy(application, &server, Upstream::Http2, Forwarding::Everything).await;
    let connection = connect(TcpStream::connect(envoy.address()).await.unwrap()).await;
    for (name, request) in requests(&key) {
        if !is_exception(&request, Forwarding::Everything) {
            continue;
        }
        let is_grpc = ["application/grpc", "application/grpc+proto"]
            .iter()
            .any(|grpc| request.headers().get("content-type").is_some_and(|found| found == grpc));
        let passes = request.method() == Method::POST && is_grpc && name.ends_with("a whole message");
        let before = reached.load(Relaxed);
        over_http2(&connection, &request).await;
        assert_eq!(reached.load(Relaxed) > before, passes, "{name}");
    }
}
