//! The gRPC listeners: TLS with and without client certificates, Unix sockets, the distribution of connections over the
//! workers, and the effects of misbehaving peers.

use std::{net::SocketAddr, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::select_all;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;
use trustgate::testing::ext_authz::framing::frame;

use crate::{
    fixture::Fixture,
    support::{
        certificates::certificates,
        connection::{answer, call, connect, head, head_of, try_connect},
        envoy::Plan,
        eventually, exclusive,
        grpc::{CheckClient, request},
        http, load,
        machine::PAUSE_MARGIN,
        server::{IssuedKey, LONG_DEADLINES, Server, TestConfig, made_up_key},
        shared,
    },
};

const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn the_server_answers_envoy_over_a_unix_socket() {
    let _turn = shared().await;
    let mut test_config = TestConfig::new();
    let socket = test_config.path().join("trustgate.sock");
    test_config.set("grpc.listen", format!("127.0.0.1:0, unix://{}", socket.display()));
    test_config.set("grpc.socket_mode", "0600");
    test_config.migrate().await;
    test_config.trust("acme").await;
    let key = test_config.issue("acme", &[]).await;
    let server = test_config.serve().await;
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let envoy = Plan::new(http::application().await, &[server.grpc()])
        .replace(
            &format!("{{socket_address: {{address: 127.0.0.1, port_value: {}}}}}", server.grpc().port()),
            &format!("{{pipe: {{path: {}}}}}", socket.display()),
        )
        .start()
        .await;
    eventually("Envoy finds the server healthy", PATIENCE, || async {
        envoy.get("/", &[("x-api-key", &key.key)]).await.saw_or_none("x-trust-id").as_ref() == Some(&key.trust_id)
    })
    .await;
    assert_eq!(envoy.get("/", &[]).await.status, 401);
    drop(envoy);

    // A second server cannot use the socket path while the first server runs. A later server can use the path, even if
    // SIGKILL ended the first server.
    let ran = test_config.run(&["serve"]).await;
    assert_eq!(ran.code, 1, "{ran:?}");
    for text in ["in use", "grpc.listen", "unix:///"] {
        assert!(ran.err.contains(text), "no {text:?} in {ran:?}");
    }
    server.signal("KILL");
    eventually("the process has ended", PATIENCE, || async { !server.is_running() }).await;
    assert!(socket.exists());
    let next = test_config.serve().await;
    next.signal("INT");
    let (code, log) = next.ended(PATIENCE).await;
    assert_eq!((code, socket.exists()), (0, false), "{log}");
    std::fs::write(&socket, "precious").unwrap();
    let ran = test_config.run(&["serve"]).await;
    assert!(ran.code == 1 && ran.err.contains("not a socket"), "{ran:?}");
    assert_eq!(std::fs::read_to_string(&socket).unwrap(), "precious");
}

/// Returns a configuration with TLS, and a valid key. With `with_clients`, the server requires client certificates.
async fn encrypted(certificates: &Path, with_clients: bool) -> (TestConfig, IssuedKey) {
    let file = |name: &str| certificates.join(name).display().to_string();
    let mut test_config = TestConfig::new().with("grpc.tls_certificate_file", file("server.pem"));
    test_config.set("grpc.tls_key_file", file("server.key"));
    if with_clients {
        test_config.set("grpc.tls_client_ca_file", file("ca.pem"));
    }
    test_config.migrate().await;
    test_config.trust("acme").await;
    let key = test_config.issue("acme", &[]).await;
    (test_config, key)
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tls_only_peers_with_the_required_certificate_are_answered() {
    let _turn = shared().await;
    let certificates = certificates();
    let file = |name: &str| certificates.path().join(name).display().to_string();
    for with_clients in [false, true] {
        let (test_config, key) = encrypted(certificates.path(), with_clients).await;
        let server = test_config.serve().await;
        let own = format!(
            ", tls_certificates: [{{certificate_chain: {{filename: {}}}, private_key: {{filename: {}}}}}]",
            file("client.pem"),
            file("client.key"),
        );
        let validation = format!(
            "validation_context: {{trusted_ca: {{filename: {}}}, match_typed_subject_alt_names: \
             [{{san_type: DNS, matcher: {{exact: localhost}}}}]}}",
            file("ca.pem")
        );
        let socket = format!(
            "    transport_socket:\n      name: tls\n      typed_config:\n        \
             \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext\n        \
             sni: localhost\n        common_tls_context: {{{validation}{}}}\n",
            if with_clients { &own } else { "" }
        );
        let plan = Plan::new(http::application().await, &[server.grpc()]);
        let anchor = "    connect_timeout: 0.1s ";
        let envoy = plan.replace(anchor, &format!("{socket}{anchor}")).start().await;
        envoy.until_healthy(server.grpc()).await;
        let granted = envoy.get("/", &[("x-api-key", &key.key)]).await;
        assert_eq!((granted.status, granted.saw("x-trust-id")), (200, Some(key.trust_id.clone())), "{with_clients}");
        assert_eq!(envoy.get("/", &[]).await.status, 401);

        // The server refuses peers without TLS. If it requires client certificates, it also refuses peers without a
        // certificate.
        let mut unencrypted = TcpStream::connect(server.grpc()).await.unwrap();
        unencrypted.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        assert!(ends(&mut unencrypted).await);
        let anonymous = tls(server.grpc(), certificates.path(), None).await;
        let may_call = match anonymous {
            Ok(stream) => match try_connect(stream).await {
                Ok(connection) => answer(call(&connection, &key.key)).await.is_some(),
                Err(_) => false,
            },
            Err(_) => false,
        };
        assert_eq!(may_call, !with_clients);
        let known = connect(tls(server.grpc(), certificates.path(), Some("client")).await.unwrap()).await;
        assert_eq!(answer(call(&known, &key.key)).await.unwrap().status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_the_server_in_time_despite_unfinished_tls_connections() {
    let _turn = exclusive().await;
    let certificates = certificates();
    let (mut test_config, key) = encrypted(certificates.path(), false).await;
    test_config.set("limits.drain_delay", "1s");
    test_config.set("limits.drain_grace", "2s");
    let server = test_config.serve().await;
    let (mut raw, mut connections, mut unfinished, mut unread) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..100 {
        // Open a silent connection, half a TLS handshake, half a message, an idle HTTP/2 connection, and a call whose
        // answer the client does not read.
        raw.push(TcpStream::connect(server.grpc()).await.unwrap());
        let mut half = TcpStream::connect(server.grpc()).await.unwrap();
        half.write_all(b"\x16\x03\x01\x02").await.unwrap();
        raw.push(half);
        let connection = connect(tls(server.grpc(), certificates.path(), None).await.unwrap()).await;
        let (answer, mut stream) = connection.clone().send_request(head(), false).unwrap();
        stream.send_data(Bytes::from_static(b"\0\0\0"), false).unwrap();
        unfinished.push((answer, stream));
        connections.push(connection);
        connections.push(connect(tls(server.grpc(), certificates.path(), None).await.unwrap()).await);
        let stream = tls(server.grpc(), certificates.path(), None).await.unwrap();
        let (closed, reading) =
            h2::client::Builder::new().initial_window_size(0).handshake::<_, Bytes>(stream).await.unwrap();
        tokio::spawn(reading);
        unread.push(call(&closed.ready().await.unwrap(), &key.key));
    }
    server.signal("TERM");
    let signalled = Instant::now();
    let (_, log) = server.ended(PATIENCE).await;
    let took = signalled.elapsed();
    println!("the server exited {took:?} after SIGTERM");
    // The limit is the sum of the drain delay (1 s), the grace period (2 s), and 0.5 s for the rest of the shutdown.
    assert!(took < Duration::from_millis(3_500), "{took:?}\n{log}");
    assert!(log.contains("\"stopped\""), "{log}");
    drop((raw, connections, unfinished, unread));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tls_error_names_the_setting_and_the_file() {
    let _turn = shared().await;
    let certificates = certificates();
    let (mut test_config, _) = encrypted(certificates.path(), false).await;
    test_config.set("grpc.tls_key_file", certificates.path().join("client.key").display().to_string());
    let ran = test_config.run(&["serve"]).await;
    assert!(ran.code == 1 && ran.err.contains("grpc.tls_key_file") && ran.err.contains("client.key"), "{ran:?}");
    test_config.set("grpc.tls_certificate_file", certificates.path().join("nothing.pem").display().to_string());
    let ran = test_config.run(&["serve"]).await;
    assert!(ran.code == 1 && ran.err.contains("grpc.tls_certificate_file") && ran.err.contains("nothing"), "{ran:?}");
    let ran = test_config.run(&["config", "check"]).await;
    assert!(ran.code != 0 && ran.out.contains("grpc.tls_certificate_file: cannot read"), "{ran:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_of_envoy_workers_are_spread_over_the_server_workers() {
    let _turn = exclusive().await;
    let fixture = Fixture::new(&[]).await;
    let cases = fixture.keys(1).await;
    for workers in [1, 2, 8] {
        let server = fixture.test_config.serve().await;
        let server_workers = server.worker_waits().len();
        assert_eq!(server_workers, std::thread::available_parallelism().unwrap().get());
        let envoy = Plan::new(http::application().await, &[server.grpc()]).workers(workers).start().await;
        envoy.until_healthy(server.grpc()).await;
        let expected = workers.min(server_workers);
        // The kernel chooses the Envoy worker for each client connection, so the test opens connections until each
        // Envoy worker has one.
        eventually(&format!("{workers} Envoy workers keep {expected} server workers busy"), PATIENCE, || async {
            let before = server.worker_waits();
            for _ in 0..20 {
                let hits =
                    load::send_requests(envoy.address(), 500, Duration::from_millis(20), |_| cases[0].clone()).await;
                load::assert_expected(hits.iter());
            }
            let busy = |(name, waits): &(String, u64)| waits - before[name] > 50;
            let busy = server.worker_waits().into_iter().filter(busy).count();
            println!("{workers} Envoy workers: {busy} of {server_workers} server workers busy");
            busy == expected
        })
        .await;
    }
}

// === peers that misbehave ===

/// The default of `limits.preface_timeout`, plus one second.
const SLOW: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread")]
async fn slow_peers_are_disconnected_and_unfinished_messages_time_out() {
    let _turn = exclusive().await;
    let certificates = certificates();
    let (test_config, key) = encrypted(certificates.path(), false).await;
    let behind_tls = test_config.serve().await;
    let plain = TestConfig::new().serve().await;
    let begun = Instant::now();
    // Open silent connections, a connection with a part of the HTTP/2 preface, and a TLS handshake with nothing after
    // it.
    let mut silent = TcpStream::connect(plain.grpc()).await.unwrap();
    let mut partial = TcpStream::connect(plain.grpc()).await.unwrap();
    partial.write_all(b"PRI * HTT").await.unwrap();
    let mut unencrypted = TcpStream::connect(behind_tls.grpc()).await.unwrap();
    let mut shaken = tls(behind_tls.grpc(), certificates.path(), None).await.unwrap();
    assert!(ends(&mut silent).await && ends(&mut partial).await);
    assert!(ends(&mut unencrypted).await && ends(&mut shaken).await);
    assert!(begun.elapsed() < 2 * SLOW, "{:?}", begun.elapsed());
    // An unfinished message gets an HTTP error, because an Envoy in `http_service` mode would take a 200 as a grant.
    let mut connection = connect(tls(behind_tls.grpc(), certificates.path(), None).await.unwrap()).await;
    let (unfinished, mut stream) = connection.send_request(head(), false).unwrap();
    stream.send_data(frame(&request(&key.key, &[])).slice(..20), false).unwrap();
    assert_eq!(timeout(SLOW, unfinished).await.unwrap().unwrap().status(), 408);
    // Unfinished and oversized health checks get HTTP errors for the same reason.
    let (unfinished, mut stream) = connection.send_request(head_of(HEALTH), false).unwrap();
    stream.send_data(Bytes::from_static(&[0, 0, 0, 0, 100, 10, 98, b'a']), false).unwrap();
    assert_eq!(timeout(SLOW, unfinished).await.unwrap().unwrap().status(), 408);
    let (long, mut stream) = connection.send_request(head_of(HEALTH), false).unwrap();
    stream.send_data([&[0, 0, 0, 16, 0][..], &[b'a'; 4096]].concat().into(), true).unwrap();
    assert_eq!(timeout(PATIENCE, long).await.unwrap().unwrap().status(), 413);
    assert_eq!(answer(call(&connection, &key.key)).await.unwrap().status, 200);
}

/// The path of the gRPC health check.
const HEALTH: &str = "/grpc.health.v1.Health/Check";

#[tokio::test(flavor = "multi_thread")]
async fn a_check_with_60_kib_of_headers_is_answered() {
    let _turn = shared().await;
    let test_config = TestConfig::new();
    test_config.migrate().await;
    let server = test_config.serve().await;
    let mut connection = connect(TcpStream::connect(server.grpc()).await.unwrap()).await;
    let mut head = head();
    let traced = "a=1,".repeat(60 << 8).parse().unwrap();
    head.headers_mut().insert("tracestate", traced);
    let (answered, mut stream) = connection.send_request(head, false).unwrap();
    stream.send_data(frame(&request("no key", &[])), true).unwrap();
    assert_eq!(answer(answered).await.unwrap().status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_in_flight_are_bounded_even_if_their_streams_opened_earlier() {
    let _turn = shared().await;
    let bounds = [("limits.message_size", "64KiB"), ("limits.messages_in_flight_size", "128KiB")];
    let fixture = Fixture::new(&[LONG_DEADLINES.as_slice(), &bounds].concat()).await;
    let key = fixture.test_config.issue("acme", &[]).await;
    let server = fixture.test_config.serve().await;
    let mut connection = connect(TcpStream::connect(server.grpc()).await.unwrap()).await;
    assert_eq!(answer(call(&connection, &key.key)).await.unwrap().status, 200);
    let _frozen = fixture.postgres.freeze();
    let padding = "x".repeat(50 << 10);
    let mut begun = Vec::new();
    for _ in 0..3 {
        begun.push(connection.send_request(head(), false).unwrap());
        connection = connection.ready().await.unwrap();
    }
    // The server reads the three heads before this call, so once it has answered this call, it waits for the messages
    // of the three streams.
    assert_eq!(answer(call(&connection, &key.key)).await.unwrap().status, 200);
    let mut waiting = Vec::new();
    for (answered, mut stream) in begun {
        let message = frame(&request(&made_up_key(), &[("x-padding", &padding)]));
        stream.send_data(message, true).unwrap();
        waiting.push(tokio::spawn(answer(answered)));
    }
    // Two messages fit into `limits.messages_in_flight_size` and wait for the database. The server refuses the third
    // message immediately.
    let (first, ..) = timeout(PATIENCE, select_all(waiting)).await.expect("one message exceeds the limit");
    assert_eq!(first.unwrap().unwrap().status, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_with_a_zero_window_does_not_block_other_connections() {
    let _turn = shared().await;
    let certificates = certificates();
    let (test_config, key) = encrypted(certificates.path(), false).await;
    let server = test_config.serve().await;
    let stream = tls(server.grpc(), certificates.path(), None).await.unwrap();
    let mut builder = h2::client::Builder::new();
    let (sender, connection) = builder.initial_window_size(0).handshake::<_, Bytes>(stream).await.unwrap();
    tokio::spawn(connection);
    let closed = sender.ready().await.unwrap();
    let unread: Vec<_> = (0..500).map(|_| call(&closed, &key.key)).collect();
    let other = connect(tls(server.grpc(), certificates.path(), None).await.unwrap()).await;
    for _ in 0..500 {
        assert_eq!(answer(call(&other, &key.key)).await.unwrap().status, 200);
    }
    drop(unread);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_per_connection_are_limited() {
    let _turn = shared().await;
    let fixture = Fixture::new(&[LONG_DEADLINES.as_slice(), &[("limits.streams_per_connection", "8")]].concat()).await;
    let key = fixture.test_config.issue("acme", &[]).await;
    let server = fixture.test_config.serve().await;
    let frozen = fixture.postgres.freeze();
    let connection = connect(TcpStream::connect(server.grpc()).await.unwrap()).await;
    // After this call, the client knows the server's HTTP/2 settings and queues streams above the limit.
    assert_eq!(answer(call(&connection, "too-short")).await.unwrap().status, 401);
    let waiting: Vec<_> = (0..20).map(|_| call(&connection, &key.key)).collect();
    let misses = "trustgate_cache_lookups_total{kind=\"api_key\",outcome=\"miss\",tier=\"l1\"}";
    eventually("eight checks wait", PATIENCE, || async { (server.metric(misses).await - 8.0).abs() < 0.5 }).await;
    drop(frozen);
    for waiting in waiting {
        assert_eq!(answer(waiting).await.unwrap().status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_resets_at_once_close_no_connection() {
    let _turn = exclusive().await;
    let fixture =
        Fixture::new(&[LONG_DEADLINES.as_slice(), &[("limits.streams_per_connection", "1024")]].concat()).await;
    let key = fixture.test_config.issue("acme", &[]).await;
    let server = fixture.test_config.serve().await;
    let frozen = fixture.postgres.freeze();
    let mut connections = Vec::new();
    for _ in 0..5 {
        connections.push(connect(TcpStream::connect(server.grpc()).await.unwrap()).await);
    }
    // Dropping these calls resets all their streams at once, as Envoy does when its timeout expires.
    let mut in_flight = Vec::new();
    for connection in &connections {
        for _ in 0..1_000 {
            in_flight.push(call(connection, &key.key));
        }
    }
    let misses = "trustgate_cache_lookups_total{kind=\"api_key\",outcome=\"miss\",tier=\"l1\"}";
    eventually("all checks wait", PATIENCE, || async { server.metric(misses).await >= 5_000.0 }).await;
    let reset = Instant::now();
    drop(in_flight);
    let cancelled =
        "trustgate_checks_total{credential=\"key\",decision=\"cancelled\",reason=\"cancelled\",transport=\"grpc\"}";
    eventually("all checks are cancelled", PATIENCE, || async { server.metric(cancelled).await >= 5_000.0 }).await;
    drop(frozen);
    for connection in &connections {
        let again = answer(call(connection, &key.key)).await.expect("the connection was not closed");
        assert_eq!(again.trust_id.as_ref(), Some(&key.trust_id));
    }
    let took = reset.elapsed();
    println!("5 000 resets: all connections answer again after {took:?}");
    assert!(took < Duration::from_secs(1) + PAUSE_MARGIN, "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_within_a_message_counts_as_cancelled_and_not_as_denied() {
    let _turn = shared().await;
    let server = TestConfig::new().serve().await;
    let connection = connect(TcpStream::connect(server.grpc()).await.unwrap()).await;
    let message = frame(&request("a-key-of-another-system", &[]));
    for _ in 0..20 {
        let (_answer, mut stream) = connection.clone().send_request(head(), false).unwrap();
        stream.send_data(message.slice(..message.len() / 2), false).unwrap();
        stream.send_reset(h2::Reason::CANCEL);
    }
    let checks = |decision: &str, reason: &str| {
        format!(
            "trustgate_checks_total{{credential=\"key\",decision=\"{decision}\",reason=\"{reason}\",transport=\"grpc\"}}"
        )
    };
    let cancelled = checks("cancelled", "cancelled");
    eventually("the checks are cancelled", PATIENCE, || async { server.metric(&cancelled).await >= 20.0 }).await;
    assert!(server.metric(&checks("deny", "undecodable")).await < 0.5);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_counted_until_they_end() {
    let _turn = shared().await;
    let server = TestConfig::new().serve().await;
    let mut connections = Vec::new();
    for _ in 0..3 {
        connections.push(connect(TcpStream::connect(server.grpc()).await.unwrap()).await);
    }
    let open = async |count: f64| (server.metric("trustgate_grpc_connections").await - count).abs() < 0.5;
    eventually("three connections are counted", PATIENCE, || open(3.0)).await;
    drop(connections);
    eventually("no connection is counted", PATIENCE, || open(0.0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_starts_with_the_longest_connect_timeout() {
    let _turn = shared().await;
    let test_config = TestConfig::new().with("store.connect_timeout", "500000000000y");
    test_config.migrate().await;
    test_config.serve().await.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_free_descriptors_serves_open_connections_and_recovers() {
    let _turn = shared().await;
    let test_config = TestConfig::new();
    test_config.migrate().await;
    test_config.trust("acme").await;
    let key = test_config.issue("acme", &[]).await;
    let server = test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    assert_eq!(client.check(&key.key).await.status, 200);
    server.limit_descriptors(64);
    let mut crowd = Vec::new();
    for _ in 0..100 {
        crowd.push(TcpStream::connect(server.grpc()).await.unwrap());
    }
    server.until_logged("gRPC accept failed").await;
    assert_eq!(client.check(&key.key).await.status, 200, "an open connection is not served");
    drop(crowd);
    eventually("new connections are served again", PATIENCE, || async {
        let connection = connect(TcpStream::connect(server.grpc()).await.unwrap()).await;
        timeout(Duration::from_secs(1), answer(call(&connection, &key.key))).await.is_ok_and(|answer| answer.is_some())
    })
    .await;
}

/// The server must not close the connection without a response: an Envoy in `http_service` mode that forwards a gRPC
/// content type would turn a closed connection into a grant.
#[tokio::test(flavor = "multi_thread")]
async fn http1_inside_tls_is_answered_with_an_http_error() {
    let _turn = shared().await;
    let certificates = certificates();
    let (test_config, _) = encrypted(certificates.path(), false).await;
    let server = test_config.serve().await;
    let mut peer = tls_for(b"http/1.1", server.grpc(), certificates.path(), None).await.unwrap();
    peer.write_all(b"PROPFIND /admin HTTP/1.1\r\nhost: a\r\ncontent-type: application/grpc\r\n\r\n").await.unwrap();
    let mut answer = vec![0; 12];
    timeout(SLOW, peer.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, b"HTTP/1.1 400");
    eventually("the refusal is counted", PATIENCE, || async { refused(&server, "http1").await > 0.5 }).await;
}

/// Tests per-message gRPC compression, which Envoy's `google_grpc` client can be configured to use.
#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_message_is_a_fault_whose_log_line_names_the_encoding() {
    let _turn = shared().await;
    let server = TestConfig::new().serve().await;
    let connection = connect(TcpStream::connect(server.grpc()).await.unwrap()).await;
    let mut head = head();
    head.headers_mut().insert("grpc-encoding", "gzip".parse().unwrap());
    let (answered, mut stream) = connection.clone().send_request(head, false).unwrap();
    stream.send_data(Bytes::from_static(b"\x01\0\0\0\x04\x1f\x8b\x08\0"), true).unwrap();
    let verdict = answer(answered).await.unwrap();
    assert_eq!((verdict.status, verdict.reason.as_deref()), (503, Some("fault")));
    server.until_logged("compressed with \\\"gzip\\\", which is not supported").await;
}

// === peers that do not speak gRPC ===

async fn refused(server: &Server, reason: &str) -> f64 {
    server.metric(&format!("trustgate_grpc_refused_total{{reason=\"{reason}\"}}")).await
}

fn lines(server: &Server, reason: &str) -> usize {
    let reason = format!("\"reason\":\"{reason}\"");
    server.log().lines().filter(|line| line.contains("peer refused") && line.contains(&reason)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_peers_are_counted_by_reason_and_logged_once_a_minute() {
    let _turn = shared().await;
    let certificates = certificates();
    let (test_config, _) = encrypted(certificates.path(), true).await;
    let socket = test_config.path().join("trustgate.sock");
    let behind_tls = test_config.serve().await;
    let plain =
        TestConfig::new().with("grpc.listen", format!("127.0.0.1:0, unix://{}", socket.display())).serve().await;

    for server in [&plain, &behind_tls] {
        for _ in 0..3 {
            let mut peer = TcpStream::connect(server.grpc()).await.unwrap();
            peer.write_all(b"GET /envoy HTTP/1.1\r\nhost: trustgate\r\n\r\n").await.unwrap();
            assert!(ends(&mut peer).await);
        }
        assert_eq!((refused(server, "http1").await, lines(server, "http1")), (3.0, 1), "{}", server.log());
    }
    let mut local = tokio::net::UnixStream::connect(&socket).await.unwrap();
    local.write_all(b"POST / HTTP/1.1\r\n\r\n").await.unwrap();
    assert!(ends(&mut local).await);
    assert_eq!((refused(&plain, "http1").await, lines(&plain, "http1")), (4.0, 1));

    assert!(tls(plain.grpc(), certificates.path(), None).await.is_err(), "the listener speaks TLS");
    eventually("the refusal is counted", PATIENCE, || async { refused(&plain, "tls").await > 0.5 }).await;
    let mut unencrypted = TcpStream::connect(behind_tls.grpc()).await.unwrap();
    unencrypted.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    assert!(ends(&mut unencrypted).await);
    // The connection may end before the refusal is counted, so wait for the count.
    eventually("the refusal is counted", PATIENCE, || async { refused(&behind_tls, "tls").await > 0.5 }).await;
    assert_eq!(lines(&plain, "tls"), 1);
    if let Ok(mut anonymous) = tls(behind_tls.grpc(), certificates.path(), None).await {
        // In TLS 1.3, the client may finish its handshake before the server refuses the connection.
        let _ = ends(&mut anonymous).await;
    }
    let is_counted = || async { refused(&behind_tls, "no_client_certificate").await > 0.5 };
    eventually("the refusal is counted", PATIENCE, is_counted).await;
    assert_eq!(lines(&behind_tls, "no_client_certificate"), 1, "{}", behind_tls.log());

    let connection = connect(TcpStream::connect(plain.grpc()).await.unwrap()).await;
    for _ in 0..3 {
        let (answered, _) = connection.clone().send_request(head_of("/other.Service/Method"), true).unwrap();
        assert_eq!(answered.await.unwrap().status(), 404);
    }
    assert_eq!((refused(&plain, "not_grpc").await, lines(&plain, "not_grpc")), (3.0, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn port_scans_cause_no_log_lines() {
    let _turn = shared().await;
    let server = TestConfig::new().serve().await;
    let certificates = certificates();
    let (test_config, _) = encrypted(certificates.path(), false).await;
    let behind_tls = test_config.serve().await;
    for _ in 0..60 {
        drop(TcpStream::connect(server.grpc()).await.unwrap());
        drop(TcpStream::connect(behind_tls.grpc()).await.unwrap());
    }
    for bytes in [&b"\0\0\0\0"[..], b"SSH-2.0-scan\r\n", b"\x80\x2e\x01", b"HELP\r\n"] {
        let mut scanner = TcpStream::connect(server.grpc()).await.unwrap();
        scanner.write_all(bytes).await.unwrap();
        assert!(ends(&mut scanner).await);
    }
    assert!((refused(&server, "unrecognized").await - 4.0).abs() < 0.5);
    for reason in ["http1", "tls", "no_client_certificate", "not_grpc"] {
        assert!(refused(&server, reason).await < 0.5, "{reason}");
        assert!(refused(&behind_tls, reason).await < 0.5, "{reason}");
    }
    // Look only for lines about peers: on a busy machine, the log may have lines about late polls.
    for server in [&server, &behind_tls] {
        assert!(!server.log().contains("peer"), "{}", server.log());
    }
}

// === clients ===

/// Opens a TLS connection to `server`. `client_name` is the name of the client certificate to present.
async fn tls(
    server: SocketAddr,
    certificates: &Path,
    client_name: Option<&str>,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    tls_for(b"h2", server, certificates, client_name).await
}

/// Like [`tls`], but with `protocol` as the ALPN protocol.
async fn tls_for(
    protocol: &[u8],
    server: SocketAddr,
    certificates: &Path,
    client_name: Option<&str>,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let certificate = |name: &str| CertificateDer::from_pem_file(certificates.join(name)).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate("ca.pem")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let builder = builder.with_root_certificates(roots);
    let mut config = match client_name {
        None => builder.with_no_client_auth(),
        Some(name) => {
            let key = PrivateKeyDer::from_pem_file(certificates.join(format!("{name}.key"))).unwrap();
            builder.with_client_auth_cert(vec![certificate(&format!("{name}.pem"))], key).unwrap()
        }
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    let stream = TcpStream::connect(server).await.unwrap();
    TlsConnector::from(Arc::new(config)).connect("localhost".try_into().unwrap(), stream).await
}

/// Returns true if the server closes the connection within [`SLOW`], whatever data it sends before.
async fn ends(stream: &mut (impl AsyncRead + Unpin)) -> bool {
    let mut received = Vec::new();
    timeout(SLOW, stream.read_to_end(&mut received)).await.is_ok()
}
