//! A thousand concurrent checks of one key that is not cached: one database read serves all of them, even if half
//! of the callers cancel their checks in the meantime.

use std::{future::poll_fn, pin::Pin, sync::Arc, task::Poll, time::Duration};

use prost::Message as _;
use tokio::task::JoinSet;
use trustgate::testing::{
    ext_authz::response::Reply,
    server::{Delay, Running},
};

use crate::support::{
    eventually,
    grpc::{CheckClient, Verdict, request, verdict},
    server::{IssuedKey, TestConfig, metric},
    shared,
    store_proxy::StoreProxy,
};

const CALLERS: usize = 1_000;
const CANCELLING: usize = 500;
const PATIENCE: Duration = Duration::from_secs(30);

/// Issues a key, then starts a server with long deadlines and `mode` as `freshness.mode`. The server has not cached the
/// key yet.
async fn start(mode: &str) -> (Running, Arc<StoreProxy>, IssuedKey, TestConfig) {
    let test_config = TestConfig::new()
        .with_long_deadlines()
        .with("freshness.mode", mode)
        .with("limits.streams_per_connection", "1024");
    test_config.migrate().await;
    test_config.trust("acme").await;
    let key = test_config.issue("acme", &[]).await;
    let (running, proxy) = StoreProxy::start(&test_config, |_| ()).await;
    running.ready().await;
    (running, proxy, key, test_config)
}

#[tokio::test(flavor = "multi_thread")]
async fn in_process_one_read_serves_all_waiters_after_the_first_caller_cancels() {
    let _turn = shared().await;
    let (running, proxy, key, _test_config) = start("lease").await;
    proxy.before_find().close();
    let message = request(&key.key, &[]).encode_to_vec();
    let mut calls: Vec<_> = (0..CALLERS).map(|_| check(&running, &message)).collect();
    for call in &mut calls {
        // Poll each call once: the first call starts the load, and the other calls join it.
        assert!(poll_fn(|context| Poll::Ready(call.as_mut().poll(context))).await.is_pending());
    }
    eventually("the read is blocked", PATIENCE, || async { proxy.before_find().waiting() == 1 }).await;
    assert_eq!(running.loads(), 1);

    drop(calls.drain(..CANCELLING));
    proxy.before_find().open();
    for call in calls {
        granted(&decoded(&call.await), &key);
    }
    ends_with_one_read(running, &proxy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_grpc_one_read_serves_all_waiters_after_the_first_caller_cancels() {
    let _turn = shared().await;
    let (running, proxy, key, _test_config) = start("lease").await;
    let client = CheckClient::connect(running.grpc_address().unwrap()).await;
    proxy.before_find().close();
    let call = |client: CheckClient| {
        let key = key.key.clone();
        async move { client.check(&key).await }
    };
    let first = tokio::spawn(call(client.clone()));
    eventually("the first caller's read is blocked", PATIENCE, || async { proxy.before_find().waiting() == 1 }).await;
    let (mut cancelling, mut waiters) = (JoinSet::new(), JoinSet::new());
    for _ in 0..CANCELLING - 1 {
        cancelling.spawn(call(client.clone()));
    }
    for _ in CANCELLING..CALLERS {
        waiters.spawn(call(client.clone()));
    }
    let misses = "trustgate_cache_lookups_total{kind=\"api_key\",outcome=\"miss\",tier=\"l1\"}";
    until_metric(&running, misses, CALLERS).await;

    first.abort();
    cancelling.abort_all();
    until_metric(
        &running,
        "trustgate_checks_total{credential=\"key\",decision=\"cancelled\",reason=\"cancelled\",transport=\"grpc\"}",
        CANCELLING,
    )
    .await;
    assert_eq!((proxy.finds(), running.loads()), (1, 1));
    proxy.before_find().open();
    let verdicts = waiters.join_all().await;
    assert_eq!(verdicts.len(), CALLERS - CANCELLING);
    for verdict in verdicts {
        granted(&verdict, &key);
    }
    ends_with_one_read(running, &proxy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_panics_is_a_fault_for_all_waiters_and_the_next_read_works() {
    let _turn = shared().await;
    for mode in ["lease", "strict", "live", "ttl"] {
        let (running, proxy, key, _test_config) = start(mode).await;
        proxy.before_find().close();
        proxy.set_panics(true);
        let message = request(&key.key, &[]).encode_to_vec();
        let mut calls = JoinSet::new();
        for _ in 0..10 {
            calls.spawn(check(&running, &message));
        }
        eventually("the read is blocked", PATIENCE, || async { proxy.before_find().waiting() == 1 }).await;
        proxy.before_find().open();
        for reply in calls.join_all().await {
            let verdict = decoded(&reply);
            assert_eq!((verdict.status, verdict.reason.as_deref()), (503, Some("fault")), "{mode}");
        }
        proxy.set_panics(false);
        granted(&decoded(&check(&running, &message).await), &key);
        eventually("no load is in flight", PATIENCE, || async { running.loads() == 0 }).await;
        running.stop(Delay::None).await.unwrap();
    }
}

type Call = Pin<Box<dyn Future<Output = Reply> + Send>>;

fn check(running: &Running, message: &[u8]) -> Call {
    let (checker, message) = (running.checker(), message.to_owned());
    Box::pin(async move { checker.check(&message).await })
}

fn decoded(reply: &Reply) -> Verdict {
    let Reply::Message(framed) = reply else { panic!("a gRPC error") };
    verdict(&prost::Message::decode(&framed[5..]).unwrap())
}

#[track_caller]
fn granted(verdict: &Verdict, key: &IssuedKey) {
    assert_eq!((verdict.status, verdict.trust_id.as_ref()), (200, Some(&key.trust_id)));
}

async fn until_metric(running: &Running, name: &str, value: usize) {
    let what = format!("{name} is at least {value}");
    let wanted = f64::from(u32::try_from(value).unwrap());
    eventually(&what, PATIENCE, || async { metric(running.admin_address(), name).await >= wanted }).await;
}

async fn ends_with_one_read(running: Running, proxy: &StoreProxy) {
    eventually("no load is in flight", PATIENCE, || async { running.loads() == 0 }).await;
    assert_eq!((proxy.finds(), proxy.before_find().waiting()), (1, 0));
    running.stop(Delay::None).await.unwrap();
}
