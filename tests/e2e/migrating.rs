//! From a table of trusts with their keys' digests, step by step, as `docs/migrating.md` says: read as it is, attached,
//! and moved into our own tables.

use std::time::Duration;

use uuid::Uuid;

use crate::support::{
    eventually,
    grpc::{CheckClient, Verdict},
    postgres::Postgres,
    redis::Redis,
    server::{Server, TestConfig, digest, made_up_key},
    shared,
};

/// PostgreSQL with such a table, as an application made it.
struct Before {
    postgres: Postgres,
    database: String,
    test_config: TestConfig,
}

impl Before {
    async fn new() -> Self {
        let postgres = Postgres::start().await;
        let database = postgres.database().await;
        postgres
            .execute(&database, "CREATE TABLE trust (id uuid PRIMARY KEY, api_key_hash char(64) NULL UNIQUE)")
            .await;
        let test_config = TestConfig::new().unhurried().with("store.url", postgres.url("admin", &database));
        Self { postgres, database, test_config }
    }

    async fn execute(&self, sql: &str) {
        self.postgres.execute(&self.database, sql).await;
    }

    /// A trust with a key; its id and the key.
    async fn trust(&self) -> (String, String) {
        let (id, key) = (Uuid::new_v4().to_string(), made_up_key());
        self.execute(&format!("INSERT INTO trust VALUES ('{id}', '{}')", digest(&key))).await;
        (id, key)
    }

    async fn served(mut self, settings: &[(&str, &str)]) -> (Self, Server, CheckClient) {
        for (setting, value) in settings {
            self.test_config.set(setting, *value);
        }
        let server = self.test_config.serve().await;
        let client = CheckClient::connect(server.grpc()).await;
        (self, server, client)
    }

    async fn attached(mut self) -> (Self, Server, CheckClient) {
        self.test_config.set("store.table", "public.trust");
        self.test_config.set("store.attached", "true");
        self.test_config.migrate().await;
        self.test_config.json(&["attach"]).await;
        self.served(&[]).await
    }
}

const LIVE: &[(&str, &str)] = &[("store.preset", "trust-table"), ("freshness.mode", "live")];

#[track_caller]
fn is_of(verdict: &Verdict, id: &str) {
    assert_eq!((verdict.status, verdict.trust_id.as_deref()), (200, Some(id)), "{verdict:?}");
}

#[track_caller]
fn is_unknown(verdict: &Verdict) {
    assert_eq!((verdict.status, verdict.reason.as_deref()), (401, Some("unknown")), "{verdict:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hit_is_compared_with_the_live_row_before_it_is_granted() {
    let _turn = shared().await;
    let (before, server, client) = Before::new().await.served(LIVE).await;
    let (id, key) = before.trust().await;
    for _ in 0..3 {
        is_of(&client.check(&key).await, &id);
    }
    assert!(server.metric("trustgate_store_reads_total{outcome=\"ok\"}").await >= 3.0, "each request reads its row");
    before.execute(&format!("UPDATE trust SET api_key_hash = '{}'", digest("another-key-altogether"))).await;
    is_unknown(&client.check(&key).await);
    is_of(&client.check("another-key-altogether").await, &id);
    before.execute("UPDATE trust SET api_key_hash = NULL").await;
    is_unknown(&client.check("another-key-altogether").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_moved_to_another_row_is_looked_for_and_not_refused() {
    let _turn = shared().await;
    let move_it = |from: &str, to: &str, key: &str| {
        format!(
            "BEGIN; UPDATE trust SET api_key_hash = NULL WHERE id = '{from}';
             UPDATE trust SET api_key_hash = '{}' WHERE id = '{to}'; COMMIT",
            digest(key)
        )
    };
    let (before, _server, client) = Before::new().await.served(LIVE).await;
    let ((one, key), (other, _)) = (before.trust().await, before.trust().await);
    is_of(&client.check(&key).await, &one);
    before.execute(&move_it(&one, &other, &key)).await;
    is_of(&client.check(&key).await, &other);

    let (before, _server, client) = Before::new().await.attached().await;
    let ((one, key), (other, _)) = (before.trust().await, before.trust().await);
    is_of(&client.check(&key).await, &one);
    before.execute(&move_it(&one, &other, &key)).await;
    // Whoever clears the caches is told when every replica has applied all that was committed before.
    before.test_config.json(&["cache", "clear"]).await;
    is_of(&client.check(&key).await, &other);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trust_that_is_being_made_has_no_key_until_it_is_written() {
    let _turn = shared().await;
    for attached in [false, true] {
        let before = Before::new().await;
        let (before, _server, client) = if attached { before.attached().await } else { before.served(LIVE).await };
        let (id, key) = (Uuid::new_v4(), made_up_key());
        before.execute(&format!("INSERT INTO trust (id) VALUES ('{id}')")).await;
        is_unknown(&client.check(&key).await);
        before.execute(&format!("UPDATE trust SET api_key_hash = '{}' WHERE id = '{id}'", digest(&key))).await;
        if attached {
            before.test_config.json(&["cache", "clear"]).await;
        }
        is_of(&client.check(&key).await, &id.to_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_of_an_attached_table_needs_no_read_until_it_changes() {
    let _turn = shared().await;
    let (before, server, client) = Before::new().await.attached().await;
    let ((id, key), (other, theirs)) = (before.trust().await, before.trust().await);
    // What is read from then on is of a version that has been confirmed, so it is held at once.
    before.test_config.json(&["cache", "clear"]).await;
    is_of(&client.check(&key).await, &id);
    is_of(&client.check(&theirs).await, &other);
    let reads = || server.metric("trustgate_store_reads_total{outcome=\"ok\"}");
    let read = reads().await;
    for _ in 0..100 {
        is_of(&client.check(&key).await, &id);
    }
    assert!(reads().await <= read, "nothing is read");
    before.execute(&format!("DELETE FROM trust WHERE id = '{id}'")).await;
    let effect = before.test_config.json(&["cache", "clear"]).await;
    assert_eq!((&effect["replicas"], &effect["applied"]), (&1.into(), &1.into()), "{effect}");
    is_unknown(&client.check(&key).await);
    is_of(&client.check(&theirs).await, &other);
}

#[tokio::test(flavor = "multi_thread")]
async fn moved_into_our_own_tables_every_key_keeps_its_trust() {
    let _turn = shared().await;
    let (redis, mut before) = (Redis::start().await, Before::new().await);
    before.test_config.set("redis.url", redis.url());
    let (mut before, server, client) = before.attached().await;
    let (id, key) = before.trust().await;
    before.execute(&format!("INSERT INTO trust (id) VALUES ('{}')", Uuid::new_v4())).await;
    before.test_config.json(&["cache", "clear"]).await;
    is_of(&client.check(&key).await, &id);
    eventually("it is shared", Duration::from_secs(30), || async { keys_in(&redis).await == 1 }).await;
    drop(server);
    before.execute(&moving()).await;
    let attached = before.test_config;
    let url = before.postgres.url("admin", &before.database);
    before.test_config = TestConfig::new().unhurried().with("store.url", url).with("redis.url", redis.url());
    let (before, _server, client) = before.served(&[]).await;
    is_of(&client.check(&key).await, &id);
    eventually("it is shared apart", Duration::from_secs(30), || async {
        is_of(&client.check(&key).await, &id);
        keys_in(&redis).await == 2
    })
    .await;
    let keys = before.test_config.json(&["key", "list"]).await;
    assert_eq!((keys.as_array().unwrap().len(), &keys[0]["trust_id"]), (1, &id.as_str().into()), "{keys}");
    // Of a row of the other table this would say nothing.
    before.test_config.json(&["key", "revoke", keys[0]["id"].as_str().unwrap()]).await;
    assert_eq!(client.check(&key).await.reason.as_deref(), Some("revoked"));
    attached.json(&["detach"]).await;
    assert_eq!(client.check(&key).await.reason.as_deref(), Some("revoked"));
}

/// How many records Redis holds.
async fn keys_in(redis: &Redis) -> usize {
    let names: Vec<String> =
        redis::cmd("KEYS").arg("trustgate:api_key*").query_async(&mut redis.connection().await).await.unwrap();
    names.len()
}

/// The statements of the page.
fn moving() -> String {
    let page = include_str!("../../docs/migrating.md");
    let block = page.split_once("```sql\n").expect("the page has statements").1;
    block.split_once("```").expect("they end").0.to_owned()
}
