//! Callers cannot make a server use an unlimited amount of memory, connections or time. A signal ends the server within
//! a limited time, whatever its connections do.

use std::{sync::Mutex, time::Duration};

use bytes::Bytes;
use h2::client::SendRequest;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout},
};
use trustgate::testing::ext_authz::framing::frame_bytes;

use crate::support::{
    connection::{answer, call, connect, head, head_of},
    eventually, exclusive,
    grpc::{CheckClient, granted},
    server::{IssuedKey, Memory, Server, TestConfig},
    shared,
};

/// The maximum memory, in MiB, that the callers of one test may add to a server.
const GROWTH_MAX: f64 = 32.0;

/// The maximum amount of the added memory, in MiB, that may remain after the callers have disconnected.
const LEFT_MAX: f64 = 8.0;

struct Fixture {
    test_config: TestConfig,
    server: Server,
    key: IssuedKey,
}

impl Fixture {
    async fn new(settings: &[(&str, &str)]) -> Self {
        let mut test_config = TestConfig::new();
        for (setting, value) in settings {
            test_config.set(setting, *value);
        }
        test_config.migrate().await;
        test_config.trust("acme").await;
        let key = test_config.issue("acme", &[]).await;
        let server = test_config.serve().await;
        granted(&CheckClient::connect(server.grpc()).await, &key).await;
        Self { test_config, server, key }
    }

    async fn connection(&self) -> SendRequest<Bytes> {
        connect(TcpStream::connect(self.server.grpc()).await.unwrap()).await
    }

    /// Runs `callers` twice. The peak memory must grow by less than [`GROWTH_MAX`] over both runs, so that repeated
    /// attacks do not accumulate memory.
    async fn assert_memory_is_bounded<C>(&self, what: &str, callers: impl AsyncFn() -> C) {
        let before = self.server.memory();
        let first = callers().await;
        let after_first = self.server.memory();
        drop(first);
        let second = callers().await;
        let after_second = self.server.memory();
        let growth = (after_first.peak - before.now, after_second.peak - before.now);
        println!("{what}: the peak grew by {:.1} MiB, and by {:.1} MiB after the second run", growth.0, growth.1);
        assert!(growth.1 < GROWTH_MAX, "{what}: {before:?}, then {after_first:?}, then {after_second:?}");
        // Checks on a new connection must still be granted.
        granted(&CheckClient::connect(self.server.grpc()).await, &self.key).await;
        drop(second);
        self.until_released(what, before).await;
    }

    /// Waits until the server's memory is at most [`LEFT_MAX`] above `before`.
    async fn until_released(&self, what: &str, before: Memory) {
        let released = "the server releases memory after the connections ended";
        eventually(released, Duration::from_secs(40), async || self.server.memory().now < before.now + LEFT_MAX).await;
        println!("{what}: {:.1} MiB more after the connections ended", self.server.memory().now - before.now);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_for_unfinished_admin_requests_is_bounded() {
    let _turn = exclusive().await;
    let fixture = Fixture::new(&[]).await;
    let padding = format!("GET /metrics HTTP/1.1\r\nx-padding: {}", "x".repeat(400 << 10));
    let unfinished = async || {
        let mut callers = Vec::new();
        for _ in 0..1_000 {
            let mut caller = TcpStream::connect(fixture.server.admin()).await.unwrap();
            // Ignore the result: the server stops reading a head that is too large, or closes the connection.
            let _ = timeout(Duration::from_millis(5), caller.write_all(padding.as_bytes())).await;
            callers.push(caller);
        }
        // Readiness probes must succeed in the meantime.
        for _ in 0..10 {
            assert_eq!(fixture.server.readiness().await.status, 200);
        }
        callers
    };
    fixture.assert_memory_is_bounded("1 000 unfinished heads", unfinished).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_for_health_watches_is_bounded() {
    let _turn = exclusive().await;
    let fixture = Fixture::new(&[]).await;
    let callers = async || {
        let (mut callers, mut watching, mut refused) = (Vec::new(), Vec::new(), 0);
        for _ in 0..200 {
            let connection = fixture.connection().await;
            let watches: Vec<_> = (0..50)
                .map(|_| {
                    let head = head_of("/grpc.health.v1.Health/Watch");
                    let (watch, mut stream) = connection.clone().send_request(head, false).unwrap();
                    // Ignore the error: the server may have refused the stream already.
                    let _ = stream.send_data(frame_bytes(b""), true);
                    watch
                })
                .collect();
            for watch in watches {
                let response = watch.await.unwrap();
                match response.status().as_u16() {
                    200 => watching.push(response),
                    status => {
                        assert_eq!(status, 503);
                        refused += 1;
                    }
                }
            }
            callers.push(connection);
        }
        println!("{} streams watch, the server refused {refused}", watching.len());
        assert!((500..1_000).contains(&watching.len()), "{} streams watch", watching.len());
        (callers, watching)
    };
    fixture.assert_memory_is_bounded("10 000 watchers", callers).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_for_streams_without_a_message_is_bounded() {
    let _turn = exclusive().await;
    let fixture = Fixture::new(&[("limits.preface_timeout", "500ms")]).await;
    let callers = async || {
        let mut callers = Vec::new();
        for _ in 0..40 {
            let connection = fixture.connection().await;
            // The client queues streams beyond `limits.streams_per_connection` until earlier streams have ended.
            let unfinished: Vec<_> =
                (0..1_000).map(|_| connection.clone().send_request(head(), false).unwrap()).collect();
            callers.push((connection, unfinished));
        }
        let (mut refused, mut late) = (0, 0);
        for (connection, unfinished) in &mut callers {
            for (answered, _stream) in unfinished.drain(..) {
                match answered.await.map(|response| response.status().as_u16()) {
                    Ok(503) => refused += 1,
                    Ok(status) => {
                        assert_eq!(status, 408);
                        late += 1;
                    }
                    // The client opened this stream before it had received the server's limit.
                    Err(error) => {
                        assert_eq!(error.reason(), Some(h2::Reason::REFUSED_STREAM));
                        refused += 1;
                    }
                }
            }
            assert_eq!(answer(call(connection, &fixture.key.key)).await.unwrap().status, 200);
        }
        println!("{refused} streams refused at once, {late} after the timeout");
        callers
    };
    fixture.assert_memory_is_bounded("40 000 streams without a message", callers).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_for_bursts_of_calls_is_bounded() {
    let _turn = exclusive().await;
    let fixture = Fixture::new(&[]).await;
    // Both bursts use the same connections, because a connection keeps the buffers of a burst until the connection
    // ends.
    let reused = Mutex::new(None);
    let bursts = async || {
        let earlier = reused.lock().unwrap().take();
        let connections = if let Some(connections) = earlier {
            connections
        } else {
            let mut connections = Vec::new();
            for _ in 0..200 {
                connections.push(fixture.connection().await);
            }
            *reused.lock().unwrap() = Some(connections.clone());
            connections
        };
        for connection in &connections {
            let calls: Vec<_> = (0..1_000).map(|_| call(connection, &fixture.key.key)).collect();
            for call in calls {
                assert_eq!(answer(call).await.unwrap().status, 200);
            }
        }
        connections
    };
    fixture.assert_memory_is_bounded("bursts of 1 000 calls on 200 connections", bursts).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_for_unread_answers_is_bounded() {
    let _turn = exclusive().await;
    let fixture = Fixture::new(&[]).await;
    let reader = fixture.connection().await;
    let callers = async || {
        let mut callers = Vec::new();
        for _ in 0..200 {
            let stream = TcpStream::connect(fixture.server.grpc()).await.unwrap();
            let mut builder = h2::client::Builder::new();
            let (sender, connection) = builder.initial_window_size(0).handshake::<_, Bytes>(stream).await.unwrap();
            tokio::spawn(connection);
            let closed = sender.ready().await.unwrap();
            let mut unread = Vec::new();
            for number in 0..64 {
                unread.push(call(&closed, &fixture.key.key));
                // Between these calls, another connection gets answers from the same workers. If connections shared
                // buffers, an unread answer would keep a whole shared buffer alive.
                if number % 50 == 0 {
                    assert_eq!(answer(call(&reader, &fixture.key.key)).await.unwrap().status, 200);
                }
            }
            callers.push((closed, unread));
        }
        callers
    };
    fixture.assert_memory_is_bounded("12 800 unread answers", callers).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_with_a_health_watch_still_accepts_connections() {
    let _turn = exclusive().await;
    let fixture = Fixture::new(&[]).await;
    let workers = std::thread::available_parallelism().unwrap().get();
    let watcher = fixture.connection().await;
    let (watch, mut stream) = watcher.clone().send_request(head_of("/grpc.health.v1.Health/Watch"), false).unwrap();
    stream.send_data(frame_bytes(b""), true).unwrap();
    let _watching = watch.await.unwrap();
    let mut connections = Vec::new();
    for _ in 0..10 * workers {
        connections.push(fixture.connection().await);
    }
    let before = fixture.server.worker_waits();
    for _ in 0..50 {
        for connection in &connections {
            assert_eq!(answer(call(connection, &fixture.key.key)).await.unwrap().status, 200);
        }
    }
    let after = fixture.server.worker_waits();
    let busy = after.iter().filter(|(name, waits)| *waits - before[*name] > 100).count();
    assert_eq!(busy, workers, "{before:?}, then {after:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_the_server_in_time_despite_open_connections() {
    let _turn = exclusive().await;
    let fixture = Fixture::new(&[("limits.drain_delay", "1s"), ("limits.drain_grace", "2s")]).await;
    let mut open = Vec::new();
    // On the admin listener: half a request line, an unfinished head, and a request whose answer the caller does not
    // read.
    for bytes in
        [&b"GET /met"[..], b"GET /metrics HTTP/1.1\r\nhost: a\r\n", b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n"]
    {
        for _ in 0..100 {
            let mut caller = TcpStream::connect(fixture.server.admin()).await.unwrap();
            caller.write_all(bytes).await.unwrap();
            open.push(caller);
        }
    }
    // On the gRPC listener: half a preface, an idle connection that answers no ping, half a message, and unread
    // answers.
    for _ in 0..100 {
        let mut caller = TcpStream::connect(fixture.server.grpc()).await.unwrap();
        caller.write_all(b"PRI * HT").await.unwrap();
        open.push(caller);
        let mut caller = TcpStream::connect(fixture.server.grpc()).await.unwrap();
        caller.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        open.push(caller);
    }
    let (mut connections, mut unfinished) = (Vec::new(), Vec::new());
    for _ in 0..100 {
        let connection = fixture.connection().await;
        let (answer, mut stream) = connection.clone().send_request(head(), false).unwrap();
        stream.send_data(Bytes::from_static(b"\0\0\0"), false).unwrap();
        unfinished.push((answer, stream));
        connections.push(connection);
    }
    let mut closed = h2::client::Builder::new();
    let (sender, unread) = closed
        .initial_window_size(0)
        .handshake::<_, Bytes>(TcpStream::connect(fixture.server.grpc()).await.unwrap())
        .await
        .unwrap();
    tokio::spawn(unread);
    let sender = sender.ready().await.unwrap();
    let _unread: Vec<_> = (0..100).map(|_| call(&sender, &fixture.key.key)).collect();

    fixture.server.signal("TERM");
    let asked = Instant::now();
    let (_, log) = fixture.server.ended(Duration::from_secs(30)).await;
    let took = asked.elapsed();
    println!("ended {took:?} after SIGTERM");
    // The limit is the sum of the drain delay (1 s), the grace period (2 s), and 0.5 s for the rest of the shutdown.
    assert!(took < Duration::from_millis(3_500), "{took:?}\n{log}");
    assert!(log.contains("\"stopped\""), "{log}");
    drop((open, connections, unfinished, fixture.test_config));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_the_server_at_once() {
    let _turn = shared().await;
    let server = TestConfig::new().serve().await;
    server.signal("TERM");
    server.until_logged("draining").await;
    server.signal("TERM");
    // Without the second signal, the server would wait for the drain delay of 5 s.
    let (code, log) = server.ended(Duration::from_secs(3)).await;
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("second signal"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_sigusr1_and_sigusr2_are_ignored_and_sigquit_drains() {
    let _turn = shared().await;
    let server = TestConfig::new().with("limits.drain_delay", "1s").serve().await;
    for signal in ["HUP", "USR1", "USR2"] {
        server.signal(signal);
        server.until_logged(&format!("\"SIG{signal}\"")).await;
    }
    assert_eq!(server.readiness().await.status, 200);
    server.signal("QUIT");
    let (code, log) = server.ended(Duration::from_secs(30)).await;
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("draining"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_listener_accepts_only_http1_and_closes_slow_connections() {
    let _turn = shared().await;
    let server = TestConfig::new().serve().await;
    let mut http2 = TcpStream::connect(server.admin()).await.unwrap();
    http2.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut output = Vec::new();
    let closed = timeout(Duration::from_secs(3), http2.read_to_end(&mut output)).await;
    assert!(closed.is_ok() && !output.starts_with(b"\0\0"), "{output:?}");
    let mut slow = TcpStream::connect(server.admin()).await.unwrap();
    slow.write_all(b"GET /readyz HTTP/1.1\r\n").await.unwrap();
    let mut output = Vec::new();
    assert!(timeout(Duration::from_secs(3), slow.read_to_end(&mut output)).await.is_ok(), "not closed within 3 s");
    for (request, status) in [
        ("GET /livez HTTP/1.1\r\nhost: a\r\n\r\n", "200"),
        ("HEAD /metrics HTTP/1.1\r\nhost: a\r\n\r\n", "200"),
        ("POST /metrics HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n", "405"),
        ("GET / HTTP/1.1\r\nhost: a\r\n\r\n", "404"),
        ("nonsense\r\n\r\n", "400"),
    ] {
        let mut stream = TcpStream::connect(server.admin()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut output = String::new();
        stream.read_to_string(&mut output).await.unwrap();
        assert!(output.starts_with(&format!("HTTP/1.1 {status}")), "{request:?}: {output:?}");
    }
}
