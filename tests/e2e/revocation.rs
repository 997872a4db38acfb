//! A revoked key is denied in time: on all replicas once the command reports success, at once if each check reads the
//! database, and within the TTL on an existing table, which has no change log.

use std::time::Duration;

use serde_json::Value;
use sqlx::Connection as _;
use tokio::time::{Instant, sleep, sleep_until};
use trustgate::testing::server::Delay;

use crate::{
    fixture::Fixture,
    support::{
        envoy::Envoy,
        eventually,
        grpc::{CheckClient, granted, refused},
        http,
        server::{IssuedKey, LONG_DEADLINES, TestConfig, made_up_key},
        shared,
        store_proxy::StoreProxy,
    },
};

const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn revoked_keys_are_denied_within_the_ttl_on_tables_without_a_change_log() {
    let _turn = shared().await;
    let ttl = Duration::from_secs(2);
    let fixture = Fixture::new(&[]).await;
    let (test_config, table) = existing_table(&fixture, "2s").await;
    let key = table.key().await;
    let server = test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    granted(&client, &key).await;
    table.revoke(&key).await;
    let revoked = Instant::now();
    let last = last_grant(&client, &key, "unknown").await.map(|began| began.duration_since(revoked));
    println!("last grant after the revocation: {last:?}; the TTL is {ttl:?}");
    assert!(last.is_none_or(|late| late <= ttl), "{last:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_keys_are_denied_on_all_replicas_once_the_command_succeeds() {
    let _turn = shared().await;
    let fixture = Fixture::new(&LONG_DEADLINES).await;
    let (one, other) = (fixture.test_config.serve().await, fixture.test_config.serve().await);
    let (at_one, at_other) = (CheckClient::connect(one.grpc()).await, CheckClient::connect(other.grpc()).await);
    let [key, good] = [fixture.test_config.issue("acme", &[]).await, fixture.test_config.issue("acme", &[]).await];
    let trusted = fixture.test_config.issue("globex", &[]).await;
    for key in [&key, &good, &trusted] {
        granted(&at_one, key).await;
        granted(&at_other, key).await;
    }
    fixture.until_shared(3).await;
    let revoked = fixture.test_config.json(&["key", "revoke", &key.id]).await;
    println!("revoked: {}", revoked["effect"]);
    assert_eq!((&revoked["effect"]["replicas"], &revoked["effect"]["applied"]), (&2.into(), &2.into()), "{revoked}");
    let disabled = fixture.test_config.json(&["trust", "disable", "globex"]).await;
    assert_eq!(disabled["effect"]["applied"], 2, "{disabled}");
    for client in [&at_one, &at_other] {
        refused(client, &key, "revoked").await;
        refused(client, &trusted, "trust_disabled").await;
        granted(client, &good).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_keys_are_denied_at_once_in_live_mode() {
    let _turn = shared().await;
    let fixture = Fixture::new(&[("freshness.mode", "live")]).await;
    let server = fixture.test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    for _ in 0..3 {
        let key = fixture.test_config.issue("acme", &[]).await;
        granted(&client, &key).await; // the server reads the key by its digest
        granted(&client, &key).await; // the server reads the key by its primary key
        fixture.test_config.revoke(&key).await;
        refused(&client, &key, "revoked").await;
    }
    let key = fixture.test_config.issue("globex", &[]).await;
    granted(&client, &key).await;
    fixture.test_config.json(&["trust", "disable", "globex"]).await;
    refused(&client, &key, "trust_disabled").await;
    fixture.test_config.json(&["trust", "enable", "globex"]).await;
    granted(&client, &key).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_keys_are_denied_at_once_on_a_live_route() {
    let _turn = shared().await;
    let fixture = Fixture::new(&[("freshness.ttl", "10m")]).await;
    let key = fixture.test_config.issue("acme", &["--scope", "admin"]).await;
    let server = fixture.test_config.serve().await;
    let envoy = Envoy::start(http::application().await, &[server.grpc()]).await;
    let status = async |path: &str| envoy.get(path, &[("x-api-key", &key.key)]).await.status;
    assert_eq!((status("/").await, status("/admin/x").await), (200, 200));
    fixture.test_config.revoke(&key).await;
    assert_eq!(status("/admin/x").await, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn cache_clear_discards_entries_on_every_replica_and_in_redis() {
    let _turn = shared().await;
    let fixture = Fixture::new(&[LONG_DEADLINES.as_slice(), &[("freshness.ttl", "10m")]].concat()).await;
    let (one, other) = (fixture.test_config.serve().await, fixture.test_config.serve().await);
    let (at_one, at_other) = (CheckClient::connect(one.grpc()).await, CheckClient::connect(other.grpc()).await);
    let (on_both, first_on_one, second_on_one) = (
        fixture.test_config.issue("acme", &[]).await,
        fixture.test_config.issue("acme", &[]).await,
        fixture.test_config.issue("acme", &[]).await,
    );
    for key in [&on_both, &first_on_one, &second_on_one] {
        granted(&at_one, key).await;
    }
    granted(&at_other, &on_both).await;
    fixture.until_shared(3).await;
    let cleared = fixture.test_config.json(&["cache", "clear"]).await;
    println!("cleared: {cleared}");
    assert_eq!((&cleared["replicas"], &cleared["applied"]), (&2.into(), &2.into()), "{cleared}");
    // Check the other replica first. Two of the keys are not in its L1, so it reads their values from Redis. These
    // values were written before `cache clear`.
    let before = other.metric("trustgate_store_reads_total{outcome=\"ok\"}").await;
    for client in [&at_other, &at_one] {
        for key in [&on_both, &first_on_one, &second_on_one] {
            granted(client, key).await;
        }
    }
    assert!(other.l2("refused").await > 0.0, "the replica refused no value from Redis");
    assert!(
        other.metric("trustgate_store_reads_total{outcome=\"ok\"}").await >= before + 3.0,
        "the replica did not read all keys again"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ttl_counts_from_the_database_read_even_for_values_from_redis() {
    let _turn = shared().await;
    let ttl = Duration::from_secs(4);
    let fixture = Fixture::new(&[]).await;
    let (test_config, table) = existing_table(&fixture, "4s").await;
    let (one, other) = (test_config.serve().await, test_config.serve().await);
    let (at_one, at_other) = (CheckClient::connect(one.grpc()).await, CheckClient::connect(other.grpc()).await);
    let key = table.key().await;
    granted(&at_one, &key).await;
    let read = Instant::now();
    fixture.until_shared(1).await;
    table.revoke(&key).await;
    // The other replica loads the value from Redis after 5/8 of the TTL. The age of the value still counts from the
    // database read.
    sleep_until(read + ttl * 5 / 8).await;
    granted(&at_other, &key).await;
    assert!(other.l2("hit").await > 0.0, "the other replica did not load the value from Redis");
    let last = last_grant(&at_other, &key, "unknown").await.map(|began| began.duration_since(read));
    println!("last grant after the read: {last:?}; the TTL is {ttl:?}");
    assert!(last.is_none_or(|late| late <= ttl), "{last:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn cache_clear_counts_a_replica_that_is_just_starting() {
    let _turn = shared().await;
    let test_config = TestConfig::new();
    test_config.migrate().await;
    let (running, proxy) = StoreProxy::start(&test_config, |proxy| proxy.after_poll().close()).await;
    // The replica has read the newest version and is about to serve, but the proxy delays the poll result.
    eventually("the replica has read the version", PATIENCE, || async { proxy.after_poll().waiting() == 1 }).await;
    let cleared = test_config.run(&["--output", "json", "cache", "clear"]).await;
    let counts: Value = serde_json::from_str(&cleared.out).unwrap();
    assert_eq!((cleared.code, &counts["replicas"], &counts["applied"]), (1, &1.into(), &0.into()), "{cleared:?}");
    proxy.after_poll().open();
    running.ready().await;
    running.stop(Delay::None).await.unwrap();
}

/// Repeats a check until the key is denied with `reason`. Returns the start of the last check that was granted.
async fn last_grant(client: &CheckClient, key: &IssuedKey, reason: &str) -> Option<Instant> {
    let (start, mut last) = (Instant::now(), None);
    loop {
        let began = Instant::now();
        let verdict = client.check(&key.key).await;
        if verdict.status != 200 {
            assert_eq!((verdict.status, verdict.reason.as_deref()), (401, Some(reason)), "{verdict:?}");
            return last;
        }
        assert!(start.elapsed() < PATIENCE, "the key is still granted");
        last = Some(began);
        sleep(Duration::from_millis(2)).await;
    }
}

/// Creates a table that trustgate does not manage (an existing table) on the fixture's database server. Returns
/// settings with which trustgate reads the table, and the table.
async fn existing_table(fixture: &Fixture, ttl: &str) -> (TestConfig, ExistingTable) {
    let database = fixture.postgres.database().await;
    let url = fixture.postgres.url("admin", &database);
    let mut connection = sqlx::PgConnection::connect(&url).await.unwrap();
    sqlx::raw_sql("CREATE TABLE trust (id uuid PRIMARY KEY, api_key_hash char(64))")
        .execute(&mut connection)
        .await
        .unwrap();
    let test_config = TestConfig::new();
    let mac_key = test_config.path().join("mac-key");
    std::fs::write(&mac_key, [7; 32]).unwrap();
    let test_config = test_config
        .with("store.url", url)
        .with("store.preset", "trust-table")
        .with("redis.url", fixture.redis.url())
        .with("redis.mac_key_file", mac_key.display().to_string())
        .with("freshness.ttl", ttl)
        .with_long_deadlines();
    (test_config, ExistingTable(tokio::sync::Mutex::new(connection)))
}

struct ExistingTable(tokio::sync::Mutex<sqlx::PgConnection>);

impl ExistingTable {
    async fn key(&self) -> IssuedKey {
        let (key, trust_id) = (made_up_key(), uuid::Uuid::new_v4());
        let sql = "INSERT INTO trust VALUES ($1, encode(sha256(convert_to($2, 'UTF8')), 'hex'))";
        sqlx::query(sql).bind(trust_id).bind(&key).execute(&mut *self.0.lock().await).await.unwrap();
        IssuedKey { id: trust_id.to_string(), key, trust_id: trust_id.to_string() }
    }

    async fn revoke(&self, key: &IssuedKey) {
        let sql = "UPDATE trust SET api_key_hash = NULL WHERE id = $1::uuid";
        sqlx::query(sql).bind(&key.trust_id).execute(&mut *self.0.lock().await).await.unwrap();
    }
}
