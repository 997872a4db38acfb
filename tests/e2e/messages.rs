//! Messages and bodies that Envoy does not send. The server answers a complete message with a `CheckResponse` and not
//! with a gRPC error, because Envoy with `failure_mode_allow` lets a request pass after an error. A body that ends
//! before its message is complete is not a gRPC call and gets HTTP 400.

use std::convert::Infallible;

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, Request as HttpRequest, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, TestRunner},
};
use serde_json::Value;
use tokio::runtime::Handle;
use tonic::{body::Body, transport::Channel};
use tower_service::Service as _;
use trustgate::testing::ext_authz::{framing::CHECK_PATH, response::Reply};

use crate::table::{
    answer,
    fixture::Fixture,
    request::{Encoding, Request},
};

/// The default of `limits.message_size`.
const MESSAGE_BYTES_MAX: usize = 256 << 10;

async fn fixture() -> Fixture {
    Fixture::of(|server| server == "default").await
}

fn good(fixture: &Fixture) -> Request {
    Request::default().with_header("x-note", "before").with_header("x-api-key", &fixture.key("scoped").secret)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_truncation_of_a_valid_message_is_denied() {
    let fixture = fixture().await;
    let checker = fixture.checker("default");
    for encoding in Encoding::BOTH {
        let message = good(&fixture).message(encoding);
        for length in 0..message.len() {
            let got = answer::read(checker.check(&message[..length]).await);
            let reason = got["metadata"]["reason"].as_str();
            assert_eq!(
                (&got["kind"], reason),
                (&"denied".into(), Some("undecodable")),
                "{length} bytes ({encoding:?})"
            );
        }
        assert_eq!(answer::read(checker.check(&message).await)["kind"], "ok");
    }
    fixture.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_and_damaged_messages_are_answered_with_a_check_response() {
    let fixture = fixture().await;
    let (checker, handle) = (fixture.checker("default"), Handle::current());
    let message = good(&fixture).message(Encoding::Raw);
    let damage = vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    tokio::task::block_in_place(|| {
        let strategy = (vec(any::<u8>(), 0..400), damage);
        TestRunner::new(Config::with_cases(512)).run(&strategy, |(bytes, damage)| {
            let mut damaged = message.clone();
            for (at, byte) in damage {
                let at = at.index(damaged.len());
                damaged[at] = byte;
            }
            for message in [&bytes, &damaged] {
                let reply = handle.block_on(checker.check(message));
                prop_assert!(matches!(reply, Reply::Message(_)));
                answer::read(reply); // panics if the response breaks a rule that all responses must follow
            }
            Ok(())
        })
    })
    .unwrap();
    fixture.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn complete_messages_are_answered_with_a_check_response_and_incomplete_messages_with_http_400() {
    let fixture = fixture().await;
    let mut client = Client::connect(&fixture).await;
    let message = good(&fixture).message(Encoding::Raw);
    let framed = frame(0, message.len(), &message);
    let longer = message.len() + 1;
    for (name, body, want) in [
        ("a valid message", framed.clone(), "ok"),
        ("an empty body", vec![], "HTTP 400"),
        ("an empty message", frame(0, 0, &[]), "undecodable"),
        ("less than a prefix", vec![0, 0, 0, 0], "HTTP 400"),
        ("only a prefix", framed[..5].to_vec(), "HTTP 400"),
        ("one byte missing", framed[..framed.len() - 1].to_vec(), "HTTP 400"),
        ("one byte more", [&*framed, b"x"].concat(), "undecodable"),
        ("no prefix", message.clone(), "HTTP 400"),
        ("compressed", frame(1, message.len(), &message), "fault"),
        ("an unknown flag", frame(255, message.len(), &message), "undecodable"),
        ("a length that is too long", frame(0, longer, &message), "HTTP 400"),
        ("a length that is too short", frame(0, message.len() - 1, &message), "undecodable"),
        ("a length of 4 GiB", frame(0, u32::MAX as usize, &message), "HTTP 400"),
        ("two messages", [&*framed, &framed].concat(), "undecodable"),
        ("an empty message before it", [&*frame(0, 0, &[]), &framed].concat(), "undecodable"),
    ] {
        assert_eq!(client.outcome(Body::new(http_body_util::Full::new(body.into()))).await, want, "{name}");
    }
    let bytes = framed.iter().map(|byte| Ok::<_, Infallible>(Frame::data(Bytes::copy_from_slice(&[*byte]))));
    let bytes: Vec<_> = bytes.collect();
    assert_eq!(client.outcome(Body::new(StreamBody::new(stream::iter(bytes)))).await, "ok", "byte by byte");
    let trailers = [Ok::<_, Infallible>(Frame::data(framed.into())), Ok(Frame::trailers(HeaderMap::new()))];
    assert_eq!(client.outcome(Body::new(StreamBody::new(stream::iter(trailers)))).await, "ok", "with trailers");
    fixture.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_at_the_size_limit_is_decided_and_a_larger_one_is_denied() {
    let fixture = fixture().await;
    let mut client = Client::connect(&fixture).await;
    for encoding in Encoding::BOTH {
        let at_bound = padded(&fixture, encoding, MESSAGE_BYTES_MAX);
        assert_eq!(client.outcome(framed(&at_bound)).await, "ok", "{encoding:?}");
        for size in [MESSAGE_BYTES_MAX + 1, 1 << 20, 4 << 20, (4 << 20) + 1, 5 << 20, 20 << 20] {
            let outcome = client.outcome(framed(&padded(&fixture, encoding, size))).await;
            assert_eq!(outcome, "too_large", "{size} bytes ({encoding:?})");
        }
        // The connection must still work after messages that were too large.
        assert_eq!(client.outcome(framed(&at_bound)).await, "ok", "{encoding:?}");
    }
    fixture.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_with_header_values_that_are_not_utf8_is_decided() {
    // Envoy replaces bytes that are not UTF-8 with `!`, but other proxies may not. A generated decoder would reject the
    // whole message.
    let fixture = fixture().await;
    let mut client = Client::connect(&fixture).await;
    let secret = &fixture.key("scoped").secret;
    let damaged = format!("{}{MARK}", &secret[..secret.len() - MARK.len()]);
    for (name, note, key, want) in [
        ("beside the key", MARK, secret.as_str(), "ok"),
        ("inside the key", "plain", &damaged, "malformed"),
        ("both", MARK, &damaged, "malformed"),
    ] {
        let request = Request::default().with_header("x-note", note).with_header("x-api-key", key);
        let mut message = request.message(Encoding::Map);
        while let Some(at) = message.windows(MARK.len()).position(|bytes| bytes == MARK.as_bytes()) {
            message[at..at + MARK.len()].fill(0xff);
        }
        assert_eq!(client.outcome(framed(&message)).await, want, "{name}");
    }
    fixture.stop().await;
}

/// A placeholder that the test replaces with bytes that are not UTF-8.
const MARK: &str = "~~~~~~";

/// Returns a valid message of exactly `size` bytes.
fn padded(fixture: &Fixture, encoding: Encoding, size: usize) -> Vec<u8> {
    let with = |pad: usize| good(fixture).with_header("x-pad", &"p".repeat(pad)).message(encoding);
    // Measure the overhead with a little less padding, for which the length prefixes have the same size.
    let around = with(size - 1_000).len() - (size - 1_000);
    let message = with(size - around);
    assert_eq!(message.len(), size);
    message
}

fn frame(flag: u8, length: usize, message: &[u8]) -> Vec<u8> {
    [&[flag], &u32::try_from(length).unwrap().to_be_bytes()[..], message].concat()
}

fn framed(message: &[u8]) -> Body {
    Body::new(http_body_util::Full::new(frame(0, message.len(), message).into()))
}

/// A gRPC client that can send any body.
struct Client(Channel);

impl Client {
    async fn connect(fixture: &Fixture) -> Self {
        let url = format!("http://{}", fixture.address("default"));
        Self(Channel::from_shared(url).unwrap().connect().await.unwrap())
    }

    /// Sends `body`. Returns `ok`, the reason for a denial, or the HTTP status of an error; panics on any other answer.
    async fn outcome(&mut self, body: Body) -> String {
        std::future::poll_fn(|cx| self.0.poll_ready(cx)).await.unwrap();
        let request = HttpRequest::post(CHECK_PATH).header("content-type", "application/grpc").header("te", "trailers");
        let response = self.0.call(request.body(body).unwrap()).await.unwrap();
        if response.status() != StatusCode::OK {
            return format!("HTTP {}", response.status().as_u16());
        }
        assert_eq!(response.headers()["content-type"], "application/grpc");
        assert_eq!(response.headers().get("grpc-status"), None, "a gRPC error");
        let body = response.into_body().collect().await.unwrap();
        assert_eq!(body.trailers().unwrap()["grpc-status"], "0");
        let got: Value = answer::read(Reply::Message(body.to_bytes()));
        if got["kind"] == "ok" { "ok".to_owned() } else { got["metadata"]["reason"].as_str().unwrap().to_owned() }
    }
}
