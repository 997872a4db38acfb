//! A value that was read before a change and comes to the cache after it: into L1, into Redis, and out of Redis.

use std::time::Duration;

use tokio::task::JoinHandle;
use trustgate::server::Delay;

use crate::{
    fixture::{Fixture, PATIENT_REDIS},
    support::{
        eventually,
        grpc::{CheckClient, Verdict},
        server::{IssuedKey, Server, TestConfig, UNHURRIED},
        shared,
        store_proxy::StoreProxy,
    },
};

const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn read_before_a_revocation_it_serves_nobody_after_it() {
    let _turn = shared().await;
    let fixture = Fixture::new(&UNHURRIED).await;
    let (running, proxy) = StoreProxy::start(&fixture.test_config, |_| ()).await;
    running.ready().await;
    let other = fixture.test_config.serve().await;
    let (client, at_other) =
        (CheckClient::connect(running.grpc_address().unwrap()).await, CheckClient::connect(other.grpc()).await);
    for somebody_waits in [true, false] {
        let key = fixture.test_config.issue("acme", &[]).await;
        let finds = proxy.finds();
        proxy.after_find().close();
        let waiting = ask(&client, &key);
        eventually("the key was read", PATIENCE, || async { proxy.after_find().waiting() == 1 }).await;
        if !somebody_waits {
            // What it brings then goes into the caches unseen.
            waiting.abort();
        }
        let revoked = fixture.test_config.json(&["key", "revoke", &key.id]).await;
        let effect = &revoked["effect"];
        assert_eq!((&effect["replicas"], &effect["applied"]), (&2.into(), &2.into()), "{revoked}");
        proxy.after_find().open();
        if somebody_waits {
            refused(&waiting.await.unwrap());
        }
        eventually("it is in the caches", PATIENCE, || async { running.loads() == 0 }).await;
        for client in [&client, &at_other] {
            refused(&client.check(&key.key).await);
        }
        assert_eq!(proxy.finds(), finds + 2, "what was read before the revocation was not used");
    }
    running.stop(Delay::None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn read_before_the_caches_were_cleared_it_serves_nobody_after_it() {
    let _turn = shared().await;
    let test_config = TestConfig::new().unhurried();
    test_config.migrate().await;
    test_config.trust("acme").await;
    let key = test_config.issue("acme", &[]).await;
    let (running, proxy) = StoreProxy::start(&test_config, |_| ()).await;
    running.ready().await;
    let client = CheckClient::connect(running.grpc_address().unwrap()).await;
    proxy.after_find().close();
    let waiting = ask(&client, &key);
    eventually("the key was read", PATIENCE, || async { proxy.after_find().waiting() == 1 }).await;
    test_config.revoke(&key).await;
    let cleared = test_config.json(&["cache", "clear"]).await;
    assert_eq!((&cleared["replicas"], &cleared["applied"]), (&1.into(), &1.into()), "{cleared}");
    proxy.after_find().open();
    refused(&waiting.await.unwrap());
    refused(&client.check(&key.key).await);
    running.stop(Delay::None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn put_into_redis_after_a_revocation_it_serves_no_replica_that_knows_of_it() {
    let _turn = shared().await;
    // The replica that holds the old value never hears of the revocation, and may rely on it for a minute.
    let fixture = Fixture::new(&[PATIENT_REDIS.as_slice(), &[("freshness.lease", "1m")]].concat()).await;
    let key = fixture.test_config.issue("acme", &[]).await;
    let (running, proxy) = StoreProxy::start(&fixture.test_config, |_| ()).await;
    running.ready().await;
    let other = fixture.test_config.serve().await;
    let (client, at_other) =
        (CheckClient::connect(running.grpc_address().unwrap()).await, CheckClient::connect(other.grpc()).await);
    proxy.after_find().close();
    let waiting = ask(&client, &key);
    eventually("the key was read", PATIENCE, || async { proxy.after_find().waiting() == 1 }).await;
    proxy.after_poll().close();
    eventually("no poll comes through", PATIENCE, || async { proxy.after_poll().waiting() == 1 }).await;
    revoked_behind_the_command(&fixture, &key, &other).await;

    proxy.after_find().open();
    assert_eq!(waiting.await.unwrap().trust_id.as_ref(), Some(&key.trust_id), "its lease holds");
    fixture.until_shared(1).await;
    refused(&at_other.check(&key.key).await);
    assert!(other.l2("refused").await > 0.0, "the old value was in Redis");
    let late = fixture.test_config.serve().await;
    refused(&CheckClient::connect(late.grpc()).await.check(&key.key).await);

    proxy.after_poll().open();
    eventually("it hears of it", PATIENCE, || async { client.check(&key.key).await.status == 401 }).await;
    running.stop(Delay::None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn read_out_of_redis_across_a_revocation_it_serves_nobody_after_it() {
    let _turn = shared().await;
    let fixture = Fixture::new(&[
        ("redis.timeout", "30s"),
        ("store.read_timeout", "30s"),
        ("decision.deadline", "70s"),
        ("decision.envoy_timeout", "80s"),
    ])
    .await;
    let key = fixture.test_config.issue("acme", &[]).await;
    let (one, other) = (fixture.test_config.serve().await, fixture.test_config.serve().await);
    let (at_one, at_other) = (CheckClient::connect(one.grpc()).await, CheckClient::connect(other.grpc()).await);
    assert_eq!(at_one.check(&key.key).await.trust_id.as_ref(), Some(&key.trust_id));
    fixture.until_shared(1).await;

    let frozen = fixture.redis.freeze();
    let waiting = ask(&at_other, &key);
    eventually("it asks Redis", PATIENCE, || async {
        other.metric("trustgate_cache_lookups_total{kind=\"api_key\",outcome=\"miss\",tier=\"l1\"}").await > 0.0
    })
    .await;
    revoked_behind_the_command(&fixture, &key, &other).await;
    drop(frozen);
    refused(&waiting.await.unwrap());
    assert!(other.l2("refused").await > 0.0, "Redis gave the old value");
    refused(&at_other.check(&key.key).await);
}

fn ask(client: &CheckClient, key: &IssuedKey) -> JoinHandle<Verdict> {
    let (client, key) = (client.clone(), key.key.clone());
    tokio::spawn(async move { client.check(&key).await })
}

#[track_caller]
fn refused(verdict: &Verdict) {
    assert_eq!((verdict.status, verdict.reason.as_deref()), (401, Some("revoked")), "{verdict:?}");
}

/// Revokes a key in the table and waits until `server` has applied that: the command would wait for every replica.
async fn revoked_behind_the_command(fixture: &Fixture, key: &IssuedKey, server: &Server) {
    let revocation = format!("UPDATE trustgate.api_key SET revoked_at = now() WHERE id = '{}'", key.id);
    fixture.postgres.execute(&fixture.database, &revocation).await;
    let newest = "SELECT max(version)::text FROM trustgate.version";
    let newest: String = fixture.postgres.value(&fixture.database, newest).await;
    let newest: f64 = newest.parse().unwrap();
    eventually("it is applied", PATIENCE, || async { server.metric("trustgate_applied_version").await >= newest })
        .await;
}
