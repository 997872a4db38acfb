//! The migration in `docs/migrating.md`: trustgate first reads an application's table of trusts and key digests
//! unchanged, then the operator attaches the table, and finally the operator moves its rows into trustgate's own
//! tables.

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

/// PostgreSQL with an application's table, and a configuration that points to it.
struct Application {
    postgres: Postgres,
    database: String,
    test_config: TestConfig,
}

impl Application {
    async fn new() -> Self {
        let postgres = Postgres::start().await;
        let database = postgres.database().await;
        postgres
            .execute(&database, "CREATE TABLE trust (id uuid PRIMARY KEY, api_key_hash char(64) NULL UNIQUE)")
            .await;
        let test_config = TestConfig::new().with_long_deadlines().with("store.url", postgres.url("admin", &database));
        Self { postgres, database, test_config }
    }

    async fn execute(&self, sql: &str) {
        self.postgres.execute(&self.database, sql).await;
    }

    /// Inserts a trust with a key; returns the id of the trust and the key.
    async fn trust(&self) -> (String, String) {
        let (id, key) = (Uuid::new_v4().to_string(), made_up_key());
        self.execute(&format!("INSERT INTO trust VALUES ('{id}', '{}')", digest(&key))).await;
        (id, key)
    }

    /// Starts a server with the additional `settings`.
    async fn served(mut self, settings: &[(&str, &str)]) -> (Self, Server, CheckClient) {
        for (setting, value) in settings {
            self.test_config.set(setting, *value);
        }
        let server = self.test_config.serve().await;
        let client = CheckClient::connect(server.grpc()).await;
        (self, server, client)
    }

    /// Attaches the table and starts a server.
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
fn assert_granted(verdict: &Verdict, id: &str) {
    assert_eq!((verdict.status, verdict.trust_id.as_deref()), (200, Some(id)), "{verdict:?}");
}

#[track_caller]
fn assert_unknown(verdict: &Verdict) {
    assert_eq!((verdict.status, verdict.reason.as_deref()), (401, Some("unknown")), "{verdict:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cached_key_is_compared_with_its_live_row_before_it_is_granted() {
    let _turn = shared().await;
    let (app, server, client) = Application::new().await.served(LIVE).await;
    let (id, key) = app.trust().await;
    for _ in 0..3 {
        assert_granted(&client.check(&key).await, &id);
    }
    assert!(server.metric("trustgate_store_reads_total{outcome=\"ok\"}").await >= 3.0, "each request reads its row");
    app.execute(&format!("UPDATE trust SET api_key_hash = '{}'", digest("another-key-altogether"))).await;
    assert_unknown(&client.check(&key).await);
    assert_granted(&client.check("another-key-altogether").await, &id);
    app.execute("UPDATE trust SET api_key_hash = NULL").await;
    assert_unknown(&client.check("another-key-altogether").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_moved_to_another_row_is_granted_for_the_trust_in_that_row() {
    let _turn = shared().await;
    let move_it = |from: &str, to: &str, key: &str| {
        format!(
            "BEGIN; UPDATE trust SET api_key_hash = NULL WHERE id = '{from}';
             UPDATE trust SET api_key_hash = '{}' WHERE id = '{to}'; COMMIT",
            digest(key)
        )
    };
    let (app, _server, client) = Application::new().await.served(LIVE).await;
    let ((one, key), (other, _)) = (app.trust().await, app.trust().await);
    assert_granted(&client.check(&key).await, &one);
    app.execute(&move_it(&one, &other, &key)).await;
    assert_granted(&client.check(&key).await, &other);

    let (app, _server, client) = Application::new().await.attached().await;
    let ((one, key), (other, _)) = (app.trust().await, app.trust().await);
    assert_granted(&client.check(&key).await, &one);
    app.execute(&move_it(&one, &other, &key)).await;
    // `cache clear` returns once all replicas have applied the changes that were committed before the command.
    app.test_config.json(&["cache", "clear"]).await;
    assert_granted(&client.check(&key).await, &other);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trust_without_a_digest_has_no_key_until_the_digest_is_written() {
    let _turn = shared().await;
    for attached in [false, true] {
        let app = Application::new().await;
        let (app, _server, client) = if attached { app.attached().await } else { app.served(LIVE).await };
        let (id, key) = (Uuid::new_v4(), made_up_key());
        app.execute(&format!("INSERT INTO trust (id) VALUES ('{id}')")).await;
        assert_unknown(&client.check(&key).await);
        app.execute(&format!("UPDATE trust SET api_key_hash = '{}' WHERE id = '{id}'", digest(&key))).await;
        if attached {
            app.test_config.json(&["cache", "clear"]).await;
        }
        assert_granted(&client.check(&key).await, &id.to_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cached_key_from_an_attached_table_needs_no_read_until_its_row_changes() {
    let _turn = shared().await;
    let (app, server, client) = Application::new().await.attached().await;
    let ((id, key), (other, other_key)) = (app.trust().await, app.trust().await);
    // After `cache clear`, the replica has confirmed the newest version, so it caches a key at the first read.
    app.test_config.json(&["cache", "clear"]).await;
    assert_granted(&client.check(&key).await, &id);
    assert_granted(&client.check(&other_key).await, &other);
    let reads = || server.metric("trustgate_store_reads_total{outcome=\"ok\"}");
    let read = reads().await;
    for _ in 0..100 {
        assert_granted(&client.check(&key).await, &id);
    }
    assert!(reads().await <= read, "the server read the database");
    app.execute(&format!("DELETE FROM trust WHERE id = '{id}'")).await;
    let effect = app.test_config.json(&["cache", "clear"]).await;
    assert_eq!((&effect["replicas"], &effect["applied"]), (&1.into(), &1.into()), "{effect}");
    assert_unknown(&client.check(&key).await);
    assert_granted(&client.check(&other_key).await, &other);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_moved_into_trustgate_tables_keep_their_trusts() {
    let _turn = shared().await;
    let (redis, mut app) = (Redis::start().await, Application::new().await);
    app.test_config.set("redis.url", redis.url());
    let (mut app, server, client) = app.attached().await;
    let (id, key) = app.trust().await;
    app.execute(&format!("INSERT INTO trust (id) VALUES ('{}')", Uuid::new_v4())).await;
    app.test_config.json(&["cache", "clear"]).await;
    assert_granted(&client.check(&key).await, &id);
    eventually("the record is in Redis", Duration::from_secs(30), || async { keys_in(&redis).await == 1 }).await;
    drop(server);
    app.execute(&statements_of_the_page()).await;
    let attached = app.test_config;
    let url = app.postgres.url("admin", &app.database);
    app.test_config = TestConfig::new().with_long_deadlines().with("store.url", url).with("redis.url", redis.url());
    let (app, _server, client) = app.served(&[]).await;
    assert_granted(&client.check(&key).await, &id);
    eventually("the record of the other table is in Redis", Duration::from_secs(30), || async {
        assert_granted(&client.check(&key).await, &id);
        keys_in(&redis).await == 2
    })
    .await;
    let keys = app.test_config.json(&["key", "list"]).await;
    assert_eq!((keys.as_array().unwrap().len(), &keys[0]["trust_id"]), (1, &id.as_str().into()), "{keys}");
    // `key revoke` changes trustgate's own table only, so the denial shows that the server reads that table.
    app.test_config.json(&["key", "revoke", keys[0]["id"].as_str().unwrap()]).await;
    assert_eq!(client.check(&key).await.reason.as_deref(), Some("revoked"));
    attached.json(&["detach"]).await;
    assert_eq!(client.check(&key).await.reason.as_deref(), Some("revoked"));
}

/// Returns the number of API key records in Redis.
async fn keys_in(redis: &Redis) -> usize {
    let names: Vec<String> =
        redis::cmd("KEYS").arg("trustgate:api_key*").query_async(&mut redis.connection().await).await.unwrap();
    names.len()
}

/// Returns the SQL statements of `docs/migrating.md`.
fn statements_of_the_page() -> String {
    let page = include_str!("../../docs/migrating.md");
    let block = page.split_once("```sql\n").expect("the page has statements").1;
    block.split_once("```").expect("the block ends").0.to_owned()
}
