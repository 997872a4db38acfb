//! Loads that overlap a change: a later check must not be granted from a value that was read before the change and
//! reached L1 or Redis after the change.

use std::time::Duration;

use tokio::task::JoinHandle;
use trustgate::testing::server::Delay;

use crate::{
    fixture::Fixture,
    support::{
        eventually,
        grpc::{CheckClient, Verdict},
        server::{IssuedKey, LONG_DEADLINES, Server, TestConfig},
        shared,
        store_proxy::StoreProxy,
    },
};

const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn a_key_read_before_its_revocation_is_denied_after_it() {
    let _turn = shared().await;
    let fixture = Fixture::new(&LONG_DEADLINES).await;
    let (running, proxy) = StoreProxy::start(&fixture.test_config, |_| ()).await;
    running.ready().await;
    let other = fixture.test_config.serve().await;
    let client = CheckClient::connect(running.grpc_address().unwrap()).await;
    let other_client = CheckClient::connect(other.grpc()).await;
    for caller_waits in [true, false] {
        let key = fixture.test_config.issue("acme", &[]).await;
        let finds = proxy.finds();
        proxy.after_find().close();
        let waiting = spawn_check(&client, &key);
        eventually("the key was read", PATIENCE, || async { proxy.after_find().waiting() == 1 }).await;
        if !caller_waits {
            // The load continues without its caller.
            waiting.abort();
        }
        let revoked = fixture.test_config.json(&["key", "revoke", &key.id]).await;
        let effect = &revoked["effect"];
        assert_eq!((&effect["replicas"], &effect["applied"]), (&2.into(), &2.into()), "{revoked}");
        proxy.after_find().open();
        if caller_waits {
            refused(&waiting.await.unwrap());
        }
        eventually("the load has ended", PATIENCE, || async { running.loads() == 0 }).await;
        for client in [&client, &other_client] {
            refused(&client.check(&key.key).await);
        }
        assert_eq!(proxy.finds(), finds + 2, "each replica reads the key again after the revocation");
    }
    running.stop(Delay::None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_revoked_during_its_load_is_denied_after_cache_clear() {
    let _turn = shared().await;
    let test_config = TestConfig::new().with_long_deadlines();
    test_config.migrate().await;
    test_config.trust("acme").await;
    let key = test_config.issue("acme", &[]).await;
    let (running, proxy) = StoreProxy::start(&test_config, |_| ()).await;
    running.ready().await;
    let client = CheckClient::connect(running.grpc_address().unwrap()).await;
    proxy.after_find().close();
    let waiting = spawn_check(&client, &key);
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
async fn a_stale_value_put_into_redis_is_refused_by_replicas_that_applied_the_revocation() {
    let _turn = shared().await;
    // The test blocks the polls of the first replica below, so that this replica does not see the revocation. Its lease
    // allows the replica to use the old value for a minute.
    let fixture = Fixture::new(&[LONG_DEADLINES.as_slice(), &[("freshness.lease", "1m")]].concat()).await;
    let key = fixture.test_config.issue("acme", &[]).await;
    let (running, proxy) = StoreProxy::start(&fixture.test_config, |_| ()).await;
    running.ready().await;
    let other = fixture.test_config.serve().await;
    let client = CheckClient::connect(running.grpc_address().unwrap()).await;
    let other_client = CheckClient::connect(other.grpc()).await;
    proxy.after_find().close();
    let waiting = spawn_check(&client, &key);
    eventually("the key was read", PATIENCE, || async { proxy.after_find().waiting() == 1 }).await;
    proxy.after_poll().close();
    eventually("the poll is blocked", PATIENCE, || async { proxy.after_poll().waiting() == 1 }).await;
    revoke_by_sql(&fixture, &key, &other).await;

    proxy.after_find().open();
    assert_eq!(waiting.await.unwrap().trust_id.as_ref(), Some(&key.trust_id), "not granted despite a fresh lease");
    fixture.until_shared(1).await;
    refused(&other_client.check(&key.key).await);
    assert!(other.l2("refused").await > 0.0, "the replica refused no value from Redis");
    let late = fixture.test_config.serve().await;
    refused(&CheckClient::connect(late.grpc()).await.check(&key.key).await);

    proxy.after_poll().open();
    eventually("the key is denied", PATIENCE, || async { client.check(&key.key).await.status == 401 }).await;
    running.stop(Delay::None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_value_read_from_redis_during_a_revocation_is_refused() {
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
    let (client, other_client) = (CheckClient::connect(one.grpc()).await, CheckClient::connect(other.grpc()).await);
    assert_eq!(client.check(&key.key).await.trust_id.as_ref(), Some(&key.trust_id));
    fixture.until_shared(1).await;

    let frozen = fixture.redis.freeze();
    let waiting = spawn_check(&other_client, &key);
    eventually("the check missed L1", PATIENCE, || async {
        other.metric("trustgate_cache_lookups_total{kind=\"api_key\",outcome=\"miss\",tier=\"l1\"}").await > 0.0
    })
    .await;
    revoke_by_sql(&fixture, &key, &other).await;
    drop(frozen);
    refused(&waiting.await.unwrap());
    assert!(other.l2("refused").await > 0.0, "the replica refused no value from Redis");
    refused(&other_client.check(&key.key).await);
}

fn spawn_check(client: &CheckClient, key: &IssuedKey) -> JoinHandle<Verdict> {
    let (client, key) = (client.clone(), key.key.clone());
    tokio::spawn(async move { client.check(&key).await })
}

#[track_caller]
fn refused(verdict: &Verdict) {
    assert_eq!((verdict.status, verdict.reason.as_deref()), (401, Some("revoked")), "{verdict:?}");
}

/// Revokes a key with SQL and waits until `server` has applied the change. `key revoke` would wait for all replicas.
async fn revoke_by_sql(fixture: &Fixture, key: &IssuedKey, server: &Server) {
    let revocation = format!("UPDATE trustgate.api_key SET revoked_at = now() WHERE id = '{}'", key.id);
    fixture.postgres.execute(&fixture.database, &revocation).await;
    let newest = "SELECT max(version)::text FROM trustgate.version";
    let newest: String = fixture.postgres.value(&fixture.database, newest).await;
    let newest: f64 = newest.parse().unwrap();
    let is_applied = || async { server.metric("trustgate_applied_version").await >= newest };
    eventually("the revocation is applied", PATIENCE, is_applied).await;
}
