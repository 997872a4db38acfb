//! Redis with TLS and a password, Redis behind Sentinels, and a Redis Cluster. Also a Redis to which another program
//! writes forged values, which must not grant anything.

use std::time::Duration;

use redis::{AsyncCommands as _, aio::MultiplexedConnection};
use sha2::{Digest as _, Sha256};
use trustgate::testing::record::ApiKeyDigest;

use crate::{
    fixture::Fixture,
    support::{
        eventually,
        grpc::CheckClient,
        postgres::Postgres,
        redis::{Cluster, MASTER, Redis, SentinelSetup, USER},
        server::{LONG_DEADLINES, Server, TestConfig, made_up_key},
        shared,
    },
};

const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_records_through_redis_with_tls_user_and_password() {
    let _turn = shared().await;
    let (redis, mut test_config, _postgres) = secured().await;
    test_config.set("redis.ca_file", redis.ca_file().display().to_string());
    assert_replicas_share(&test_config, async |_| redis.connection().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_records_through_redis_behind_sentinels() {
    let _turn = shared().await;
    let (postgres, sentinels) = (Postgres::shared().await, SentinelSetup::start(false).await);
    let urls = ["redis://127.0.0.1:1".to_owned(), sentinels.sentinel.url()].join(", ");
    let test_config = test_config(&postgres, &[("redis.url", &urls), ("redis.sentinel_master", MASTER)]).await;
    assert_replicas_share(&test_config, async |_| sentinels.master.connection().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_records_through_a_redis_cluster() {
    let _turn = shared().await;
    let (postgres, cluster) = (Postgres::shared().await, Cluster::start(false).await);
    let urls: Vec<_> = cluster.nodes.iter().map(Redis::url).collect();
    let test_config = test_config(&postgres, &[("redis.url", &urls.join(",")), ("redis.cluster", "true")]).await;
    assert_replicas_share(&test_config, async |name: &str| cluster.node_of(name).await.0.connection().await).await;
}

/// Starts two replicas and asserts that the first reads a key from the database and the second reads the key from
/// Redis. Also asserts that the value in Redis does not contain the key. `home` connects to the Redis node that stores
/// the entry with a given name.
async fn assert_replicas_share(test_config: &TestConfig, home: impl AsyncFn(&str) -> MultiplexedConnection) {
    let key = test_config.issue("acme", &[]).await;
    let (one, other) = (test_config.serve().await, test_config.serve().await);
    for server in [&one, &other] {
        until_connected(server).await;
    }
    assert_eq!(CheckClient::connect(one.grpc()).await.check(&key.key).await.trust_id.as_ref(), Some(&key.trust_id));
    let value = genuine(&mut home(&name(&key.key)).await, &key.key).await;
    assert_eq!(CheckClient::connect(other.grpc()).await.check(&key.key).await.trust_id.as_ref(), Some(&key.trust_id));
    assert!(other.l2("hit").await > 0.0);
    assert!(!value.windows(16).any(|part| key.key.as_bytes().windows(16).any(|of_key| of_key == part)));
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_wrong_redis_password_the_server_runs_without_redis_and_logs_the_cause() {
    let _turn = shared().await;
    let (redis, mut test_config, _postgres) = secured().await;
    test_config.set("redis.ca_file", redis.ca_file().display().to_string());
    std::fs::write(test_config.path().join("password"), "wrong").unwrap();
    let server = serve_without_redis(&test_config, "AuthenticationFailed").await;
    assert!(!server.log().contains("redis connection established"));
    // The server reads the password file for each new connection, so it needs no restart.
    std::fs::write(test_config.path().join("password"), USER.1).unwrap();
    until_connected(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_redis_password_the_server_runs_without_redis_and_logs_the_cause() {
    let _turn = shared().await;
    let (postgres, redis) = (Postgres::shared().await, Redis::start_secured().await);
    let url = redis.url().replace(&format!("{}@", USER.0), "");
    let test_config =
        test_config(&postgres, &[("redis.url", &url), ("redis.ca_file", &redis.ca_file().display().to_string())]).await;
    serve_without_redis(&test_config, "NOAUTH").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_wrong_redis_ca_the_server_runs_without_redis_and_logs_the_cause() {
    let _turn = shared().await;
    let (_redis, mut test_config, _postgres) = secured().await;
    let other_redis = Redis::start_secured().await;
    test_config.set("redis.ca_file", other_redis.ca_file().display().to_string());
    serve_without_redis(&test_config, "certificate").await;
}

async fn serve_without_redis(test_config: &TestConfig, why: &str) -> Server {
    let key = test_config.issue("acme", &[]).await;
    let server = test_config.serve().await;
    server.until_logged("redis connection failed").await;
    let log = server.log();
    let line = log.lines().find(|line| line.contains("redis connection failed")).unwrap();
    assert!(line.contains(why), "{line}");
    assert!(!log.contains(USER.1), "{log}");
    let client = CheckClient::connect(server.grpc()).await;
    assert_eq!(client.check(&key.key).await.trust_id.as_ref(), Some(&key.trust_id));
    assert_eq!(client.check(&made_up_key()).await.status, 401);
    assert!(server.metric("trustgate_redis_up").await < 1.0);
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_redis_values_are_refused_deleted_and_grant_nothing() {
    let _turn = shared().await;
    let fixture = Fixture::new(&LONG_DEADLINES).await;
    let server = fixture.test_config.serve().await;
    until_connected(&server).await;
    let client = CheckClient::connect(server.grpc()).await;
    let mut connection = fixture.redis.connection().await;
    let good = fixture.test_config.issue("acme", &[]).await;
    let other = fixture.test_config.issue("globex", &[]).await;
    assert_eq!(client.check(&good.key).await.status, 200);
    let genuine = genuine(&mut connection, &good.key).await;

    let mut forged = vec![
        ("noise", (0..genuine.len()).map(|at| u8::try_from((at * 37 + 2) % 256).unwrap()).collect()),
        ("the value of another key", genuine.clone()),
        ("half of a value", genuine[..genuine.len() / 2].to_vec()),
        ("a value with one byte more", [&genuine[..], b"x"].concat()),
    ];
    forged.extend((1..genuine.len()).step_by(16).map(|at| {
        let mut changed = genuine.clone();
        changed[at] ^= 1;
        ("a changed bit", changed)
    }));
    let count = forged.len();
    for (what, value) in forged {
        // Write a forged value for a key that was not issued.
        let unissued = made_up_key();
        connection.set::<_, _, ()>(name(&unissued), value).await.unwrap();
        let verdict = client.check(&unissued).await;
        assert_eq!((verdict.status, verdict.reason.as_deref()), (401, Some("unknown")), "{what}");
        assert!(!connection.exists::<_, bool>(name(&unissued)).await.unwrap(), "{what} was not deleted");
    }
    assert!((server.l2("refused").await - f64::from(u32::try_from(count).unwrap())).abs() < 0.5);
    // Values that another release may have written must not grant anything either, but the server leaves them in Redis.
    for (what, value) in [
        ("nothing", Vec::new()),
        ("text", b"{\"trust_id\":\"00000000-0000-0000-0000-000000000001\"}".to_vec()),
        ("the previous layout", [&[1], &genuine[1..]].concat()),
        ("a later layout", [&[3], &genuine[1..]].concat()),
    ] {
        let unissued = made_up_key();
        connection.set::<_, _, ()>(name(&unissued), value).await.unwrap();
        assert_eq!(client.check(&unissued).await.reason.as_deref(), Some("unknown"), "{what}");
        assert!(connection.exists::<_, bool>(name(&unissued)).await.unwrap(), "{what} was deleted");
    }
    // Write the value of one key under the name of another key. The database must decide which trust the other key
    // belongs to.
    connection.set::<_, _, ()>(name(&other.key), &genuine).await.unwrap();
    assert_eq!(client.check(&other.key).await.trust_id, Some(other.trust_id));
    eventually("a genuine value has replaced the forgery", PATIENCE, || async {
        let value: Option<Vec<u8>> = connection.clone().get(name(&other.key)).await.unwrap();
        value.is_some_and(|value| value != genuine)
    })
    .await;
    // Write a value that is a Redis list instead of a string.
    let (unissued, refused) = (made_up_key(), server.l2("refused").await);
    connection.lpush::<_, _, ()>(name(&unissued), &genuine).await.unwrap();
    assert_eq!(client.check(&unissued).await.status, 401);
    assert!(!connection.exists::<_, bool>(name(&unissued)).await.unwrap());
    assert!(server.l2("refused").await > refused);
}

/// Starts a Redis with TLS and a password. Returns the Redis, settings for its URL and password but without
/// `redis.ca_file`, and the shared PostgreSQL.
async fn secured() -> (Redis, TestConfig, std::sync::Arc<Postgres>) {
    let (postgres, redis) = (Postgres::shared().await, Redis::start_secured().await);
    let mut test_config = test_config(&postgres, &[("redis.url", &redis.url())]).await;
    let password = test_config.path().join("password");
    std::fs::write(&password, USER.1).unwrap();
    test_config.set("redis.password_file", password.display().to_string());
    (redis, test_config, postgres)
}

/// Creates a database with the trust "acme". Returns `settings` with the URL of that database.
async fn test_config(postgres: &Postgres, settings: &[(&str, &str)]) -> TestConfig {
    let database = postgres.database().await;
    let mut test_config = TestConfig::new().with("store.url", postgres.url("admin", &database));
    for (setting, value) in settings {
        test_config.set(setting, *value);
    }
    test_config.migrate().await;
    test_config.trust("acme").await;
    test_config
}

async fn until_connected(server: &Server) {
    eventually("Redis is connected", PATIENCE, || async { server.metric("trustgate_redis_up").await > 0.0 }).await;
}

/// Returns the name of the Redis entry for `key`.
fn name(key: &str) -> String {
    let digest = ApiKeyDigest::from_bytes(Sha256::digest(key).into());
    format!("trustgate:api_key:{}", digest.to_hex())
}

/// Waits until Redis has the value for `key`, and returns it.
async fn genuine(connection: &mut MultiplexedConnection, key: &str) -> Vec<u8> {
    eventually("the value is in Redis", PATIENCE, || async {
        connection.clone().exists::<_, bool>(name(key)).await.unwrap()
    })
    .await;
    connection.get(name(key)).await.unwrap()
}
