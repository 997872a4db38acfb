//! Redis in every set-up, with TLS and a password, and a Redis in which somebody else writes: it never decides anything.

use std::time::Duration;

use redis::{AsyncCommands as _, aio::MultiplexedConnection};
use sha2::{Digest as _, Sha256};
use trustgate::record::ApiKeyDigest;

use crate::{
    fixture::{Fixture, PATIENT_REDIS},
    support::{
        eventually,
        grpc::CheckClient,
        postgres::Postgres,
        redis::{Cluster, MASTER, Redis, USER, Watched},
        server::{Server, TestConfig, made_up_key},
        shared,
    },
};

const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn with_tls_user_and_password_replicas_share_what_they_read() {
    let _turn = shared().await;
    let (redis, mut test_config, _postgres) = secured().await;
    test_config.set("redis.ca_file", redis.ca_file().display().to_string());
    two_share_what_they_read(&test_config, async |_| redis.connection().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_sentinels_replicas_share_what_they_read() {
    let _turn = shared().await;
    let (postgres, watched) = (Postgres::shared().await, Watched::start(false).await);
    let urls = ["redis://127.0.0.1:1".to_owned(), watched.sentinel.url()].join(", ");
    let test_config = test_config(&postgres, &[("redis.url", &urls), ("redis.sentinel_master", MASTER)]).await;
    two_share_what_they_read(&test_config, async |_| watched.master.connection().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_cluster_replicas_share_what_they_read() {
    let _turn = shared().await;
    let (postgres, cluster) = (Postgres::shared().await, Cluster::start(false).await);
    let urls: Vec<_> = cluster.nodes.iter().map(Redis::url).collect();
    let test_config = test_config(&postgres, &[("redis.url", &urls.join(",")), ("redis.cluster", "true")]).await;
    two_share_what_they_read(&test_config, async |name: &str| cluster.home_of(name).await.0.connection().await).await;
}

/// Two replicas, of which one reads the database and the other Redis; `home` gives the server for a name.
async fn two_share_what_they_read(test_config: &TestConfig, home: impl AsyncFn(&str) -> MultiplexedConnection) {
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
async fn with_the_wrong_password_it_serves_without_redis_and_says_why() {
    let _turn = shared().await;
    let (redis, mut test_config, _postgres) = secured().await;
    test_config.set("redis.ca_file", redis.ca_file().display().to_string());
    std::fs::write(test_config.path().join("password"), "wrong").unwrap();
    let server = serves_without(&test_config, "AuthenticationFailed").await;
    assert!(!server.log().contains("connected to redis"));
    // The file is read at every connect: no restart is needed.
    std::fs::write(test_config.path().join("password"), USER.1).unwrap();
    until_connected(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_password_it_serves_without_redis_and_says_why() {
    let _turn = shared().await;
    let (postgres, redis) = (Postgres::shared().await, Redis::start_secured().await);
    let url = redis.url().replace(&format!("{}@", USER.0), "");
    let test_config =
        test_config(&postgres, &[("redis.url", &url), ("redis.ca_file", &redis.ca_file().display().to_string())]).await;
    serves_without(&test_config, "NOAUTH").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_wrong_authority_it_serves_without_redis_and_says_why() {
    let _turn = shared().await;
    let (_redis, mut test_config, _postgres) = secured().await;
    let stranger = Redis::start_secured().await;
    test_config.set("redis.ca_file", stranger.ca_file().display().to_string());
    serves_without(&test_config, "certificate").await;
}

async fn serves_without(test_config: &TestConfig, why: &str) -> Server {
    let key = test_config.issue("acme", &[]).await;
    let server = test_config.serve().await;
    server.until_logged("cannot connect to redis").await;
    let log = server.log();
    let line = log.lines().find(|line| line.contains("cannot connect to redis")).unwrap();
    assert!(line.contains(why), "{line}");
    assert!(!log.contains(USER.1), "{log}");
    let client = CheckClient::connect(server.grpc()).await;
    assert_eq!(client.check(&key.key).await.trust_id.as_ref(), Some(&key.trust_id));
    assert_eq!(client.check(&made_up_key()).await.status, 401);
    assert!(server.metric("trustgate_redis_up").await < 1.0);
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_write_into_redis_is_refused_deleted_and_grants_nothing() {
    let _turn = shared().await;
    let fixture = Fixture::new(&PATIENT_REDIS).await;
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
        ("half of it", genuine[..genuine.len() / 2].to_vec()),
        ("more than it", [&genuine[..], b"x"].concat()),
    ];
    forged.extend((1..genuine.len()).step_by(16).map(|at| {
        let mut changed = genuine.clone();
        changed[at] ^= 1;
        ("a changed bit", changed)
    }));
    let count = forged.len();
    for (what, value) in forged {
        // Under a key that nobody issued ...
        let stranger = made_up_key();
        connection.set::<_, _, ()>(name(&stranger), value).await.unwrap();
        let verdict = client.check(&stranger).await;
        assert_eq!((verdict.status, verdict.reason.as_deref()), (401, Some("unknown")), "{what}");
        assert!(!connection.exists::<_, bool>(name(&stranger)).await.unwrap(), "{what} was not deleted");
    }
    assert!((server.l2("refused").await - f64::from(u32::try_from(count).unwrap())).abs() < 0.5);
    // What another release may have written grants nothing either, but is left to it.
    for (what, value) in [
        ("nothing", Vec::new()),
        ("text", b"{\"trust_id\":\"00000000-0000-0000-0000-000000000001\"}".to_vec()),
        ("the layout before", [&[1], &genuine[1..]].concat()),
        ("a layout to come", [&[3], &genuine[1..]].concat()),
    ] {
        let stranger = made_up_key();
        connection.set::<_, _, ()>(name(&stranger), value).await.unwrap();
        assert_eq!(client.check(&stranger).await.reason.as_deref(), Some("unknown"), "{what}");
        assert!(connection.exists::<_, bool>(name(&stranger)).await.unwrap(), "{what} was deleted");
    }
    // ... and under one that belongs to somebody else: who it belongs to, the database says.
    connection.set::<_, _, ()>(name(&other.key), &genuine).await.unwrap();
    assert_eq!(client.check(&other.key).await.trust_id, Some(other.trust_id));
    eventually("a genuine value took its place", PATIENCE, || async {
        let value: Option<Vec<u8>> = connection.clone().get(name(&other.key)).await.unwrap();
        value.is_some_and(|value| value != genuine)
    })
    .await;
    // Not even a text.
    let (stranger, refused) = (made_up_key(), server.l2("refused").await);
    connection.lpush::<_, _, ()>(name(&stranger), &genuine).await.unwrap();
    assert_eq!(client.check(&stranger).await.status, 401);
    assert!(!connection.exists::<_, bool>(name(&stranger)).await.unwrap());
    assert!(server.l2("refused").await > refused);
}

/// A Redis with TLS and a password, and settings that name them, without the authority to trust.
async fn secured() -> (Redis, TestConfig, std::sync::Arc<Postgres>) {
    let (postgres, redis) = (Postgres::shared().await, Redis::start_secured().await);
    let mut test_config = test_config(&postgres, &[("redis.url", &redis.url())]).await;
    let password = test_config.path().join("password");
    std::fs::write(&password, USER.1).unwrap();
    test_config.set("redis.password_file", password.display().to_string());
    (redis, test_config, postgres)
}

/// These settings and a new database, in which there is a trust.
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

/// Where the value of `key` stands in Redis.
fn name(key: &str) -> String {
    let digest = ApiKeyDigest::from_bytes(Sha256::digest(key).into());
    format!("trustgate:api_key:{}", digest.to_hex())
}

/// The value of `key`, once it is there.
async fn genuine(connection: &mut MultiplexedConnection, key: &str) -> Vec<u8> {
    eventually("the value is in Redis", PATIENCE, || async {
        connection.clone().exists::<_, bool>(name(key)).await.unwrap()
    })
    .await;
    connection.get(name(key)).await.unwrap()
}
