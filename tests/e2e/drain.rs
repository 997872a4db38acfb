//! Graceful shutdown: no request through Envoy fails, and the server finishes in-flight calls. Also tests the error
//! that a server reports if its address is in use.

use std::time::Duration;

use tokio::{
    net::TcpStream,
    time::{Instant, sleep_until},
};
use tonic::{Code, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use trustgate::testing::ext_authz::framing::SERVICE;

use crate::{
    fixture::Fixture,
    support::{
        connection::{answer, call, connect},
        envoy::Envoy,
        eventually, exclusive,
        grpc::CheckClient,
        http, load,
        server::{LONG_DEADLINES, TestConfig},
        shared,
    },
};

const PATIENCE: Duration = Duration::from_secs(30);
/// The default of `limits.drain_delay`.
const DELAY: Duration = Duration::from_secs(5);
/// The default of `limits.drain_grace`.
const GRACE: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_while_one_of_two_replicas_shuts_down_under_load() {
    let _turn = exclusive().await;
    let fixture = Fixture::new(&[]).await;
    let mut keys = fixture.keys(300).await;
    keys.push(fixture.revoked_key().await);
    let (leaving, staying) = (fixture.test_config.serve().await, fixture.test_config.serve().await);
    let envoy = Envoy::start(http::application().await, &[leaving.grpc(), staying.grpc()]).await;
    let mut number = 0;
    let aim = move |_| {
        number += 1;
        keys[number % keys.len()].clone()
    };
    let length = Duration::from_secs(10);
    let start = Instant::now();
    let firing = tokio::spawn(load::send_requests(envoy.address(), 250, length, aim));
    sleep_until(start + Duration::from_secs(2)).await;
    let its_share = leaving
        .metric("trustgate_checks_total{credential=\"key\",decision=\"allow\",reason=\"key\",transport=\"grpc\"}")
        .await;
    assert!(its_share > 0.0, "{its_share}");
    leaving.signal("TERM");
    let signalled = Instant::now();
    let (code, log) = leaving.ended(DELAY + GRACE).await;
    let took = signalled.elapsed();
    assert_eq!(code, 0, "{log}");
    assert!(start.elapsed() < length, "the load ended before the server: {took:?}");
    let hits = firing.await.unwrap();
    load::print_times("while one of two replicas shuts down", hits.iter());
    println!("the server exited {took:?} after SIGTERM");
    assert_eq!(hits.len(), 2_500);
    load::assert_expected(hits.iter());
}

#[tokio::test(flavor = "multi_thread")]
async fn health_watchers_are_notified_of_the_drain_and_do_not_delay_it() {
    let _turn = shared().await;
    let server = Fixture::new(&[("limits.drain_delay", "1s")]).await.test_config.serve().await;
    let channel = Channel::from_shared(format!("http://{}", server.grpc())).unwrap().connect().await.unwrap();
    let watched = HealthClient::new(channel).watch(HealthCheckRequest { service: SERVICE.to_owned() }).await;
    let mut watched = watched.unwrap().into_inner();
    assert_eq!(watched.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    server.signal("TERM");
    assert_eq!(watched.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    let end = loop {
        match watched.message().await {
            Ok(again) => assert_eq!(again.unwrap().status(), ServingStatus::NotServing),
            Err(end) => break end,
        }
    };
    assert_eq!(end.code(), Code::Unavailable);
    let (code, log) = server.ended(GRACE / 2).await;
    assert_eq!(code, 0, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn in_flight_calls_are_answered_after_goaway() {
    let _turn = shared().await;
    let fixture = Fixture::new(&[LONG_DEADLINES.as_slice(), &[("limits.drain_delay", "1s")]].concat()).await;
    let key = fixture.test_config.issue("acme", &[]).await;
    let server = fixture.test_config.serve().await;
    let (admin, grpc) = (server.admin(), server.grpc());
    let mut health =
        HealthClient::new(Channel::from_shared(format!("http://{grpc}")).unwrap().connect().await.unwrap());
    let mut serving = async || {
        let asked = health.check(HealthCheckRequest { service: SERVICE.to_owned() }).await;
        asked.map(|answer| answer.into_inner().status())
    };
    assert_eq!(serving().await.unwrap(), ServingStatus::Serving);

    let connection = connect(TcpStream::connect(grpc).await.unwrap()).await;
    let frozen = fixture.postgres.freeze();
    let in_flight = call(&connection, &key.key);
    eventually("the check is in flight", PATIENCE, || async {
        server.metric("trustgate_cache_lookups_total{kind=\"api_key\",outcome=\"miss\",tier=\"l1\"}").await > 0.0
    })
    .await;
    server.signal("TERM");
    eventually("the server is draining", PATIENCE, || async {
        let readiness = http::get(admin, "/readyz", &[]).await;
        readiness.status == 503 && readiness.body.starts_with("draining")
    })
    .await;
    // The draining server still answers checks, because Envoy needs a moment to stop sending them.
    while serving().await.unwrap() != ServingStatus::NotServing {
        tokio::task::yield_now().await; // the health service changes a moment after `/readyz`
    }
    let bad = call(&connection, "too-short");
    assert_eq!(answer(bad).await.unwrap().status, 401);
    let goaway = loop {
        match connection.clone().ready().await {
            Ok(_) => tokio::task::yield_now().await,
            Err(error) => break error,
        }
    };
    assert!(goaway.is_go_away() && goaway.is_remote(), "{goaway}");
    assert_eq!(goaway.reason(), Some(h2::Reason::NO_ERROR));
    eventually("the gRPC port is closed", PATIENCE, || async { TcpStream::connect(grpc).await.is_err() }).await;
    assert!(server.is_running());

    drop(frozen);
    let granted = answer(in_flight).await.unwrap();
    assert_eq!((granted.status, granted.trust_id), (200, Some(key.trust_id)));
    let (code, log) = server.ended(GRACE).await;
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("\"stopped\""), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigint_ends_the_server_without_the_drain_delay() {
    let _turn = shared().await;
    let test_config = TestConfig::new().with("limits.drain_delay", "10m");
    let server = test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    assert_eq!(client.check("key-that-was-not-issued").await.status, 401);
    server.signal("INT");
    let (code, log) = server.ended(GRACE).await;
    assert_eq!(code, 0, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_in_use_is_an_error_that_names_the_setting() {
    let _turn = shared().await;
    let mut test_config = TestConfig::new();
    let server = test_config.serve().await;
    for (setting, address) in [("grpc.listen", server.grpc()), ("admin.listen", server.admin())] {
        test_config.set(setting, address.to_string());
        let ran = test_config.run(&["serve"]).await;
        assert_eq!(ran.code, 1, "{ran:?}");
        let variable = format!("TRUSTGATE__{}", setting.to_uppercase().replace('.', "__"));
        for text in [setting, &variable, &address.to_string(), "in use"] {
            assert!(ran.err.contains(text), "no {text:?} in {ran:?}");
        }
        test_config.set(setting, "127.0.0.1:0");
    }
    assert_eq!(server.readiness().await.status, 200);
}
