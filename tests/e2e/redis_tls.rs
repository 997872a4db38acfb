//! Redis in every set-up, with TLS and a password, and a Redis in which somebody else writes: it never decides anything.

use std::time::Duration;

use redis::{AsyncCommands as _, aio::MultiplexedConnection};
use sha2::{Digest as _, Sha256};
use trustgate::record::ApiKeyDigest;

use crate::{
    stage::{PATIENT_REDIS, Stage},
    support::{
        among_others, eventually,
        grpc::Asker,
        postgres::Postgres,
        redis::{Cluster, MASTER, Redis, USER, Watched},
        server::{Server, Site, made_up_key},
    },
};

const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn with_tls_user_and_password_replicas_share_what_they_read() {
    let _turn = among_others().await;
    let (redis, mut site, _postgres) = secured().await;
    site.set("redis.ca_file", redis.ca_file().display().to_string());
    two_share_what_they_read(&site, async |_| redis.connection().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_sentinels_replicas_share_what_they_read() {
    let _turn = among_others().await;
    let (postgres, watched) = (Postgres::shared().await, Watched::start(false).await);
    let urls = ["redis://127.0.0.1:1".to_owned(), watched.sentinel.url()].join(", ");
    let site = site(&postgres, &[("redis.url", &urls), ("redis.sentinel_master", MASTER)]).await;
    two_share_what_they_read(&site, async |_| watched.master.connection().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_cluster_replicas_share_what_they_read() {
    let _turn = among_others().await;
    let (postgres, cluster) = (Postgres::shared().await, Cluster::start(false).await);
    let urls: Vec<_> = cluster.nodes.iter().map(Redis::url).collect();
    let site = site(&postgres, &[("redis.url", &urls.join(",")), ("redis.cluster", "true")]).await;
    two_share_what_they_read(&site, async |name: &str| cluster.home_of(name).await.0.connection().await).await;
}

/// Two replicas, of which one reads the database and the other Redis; `home` gives the server for a name.
async fn two_share_what_they_read(site: &Site, home: impl AsyncFn(&str) -> MultiplexedConnection) {
    let key = site.issue("acme", &[]).await;
    let (one, other) = (site.serve().await, site.serve().await);
    for server in [&one, &other] {
        until_connected(server).await;
    }
    assert_eq!(Asker::connect(one.grpc()).await.check(&key.key).await.trust_id.as_ref(), Some(&key.trust_id));
    let value = genuine(&mut home(&name(&key.key)).await, &key.key).await;
    assert_eq!(Asker::connect(other.grpc()).await.check(&key.key).await.trust_id.as_ref(), Some(&key.trust_id));
    assert!(other.l2("hit").await > 0.0);
    assert!(!value.windows(16).any(|part| key.key.as_bytes().windows(16).any(|of_key| of_key == part)));
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_wrong_password_it_serves_without_redis_and_says_why() {
    let _turn = among_others().await;
    let (redis, mut site, _postgres) = secured().await;
    site.set("redis.ca_file", redis.ca_file().display().to_string());
    std::fs::write(site.path().join("password"), "wrong").unwrap();
    let server = serves_without(&site, "AuthenticationFailed").await;
    assert!(!server.log().contains("connected to redis"));
    // The file is read at every connect: no restart is needed.
    std::fs::write(site.path().join("password"), USER.1).unwrap();
    until_connected(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_password_it_serves_without_redis_and_says_why() {
    let _turn = among_others().await;
    let (postgres, redis) = (Postgres::shared().await, Redis::start_secured().await);
    let url = redis.url().replace(&format!("{}@", USER.0), "");
    let site = site(&postgres, &[("redis.url", &url), ("redis.ca_file", &redis.ca_file().display().to_string())]).await;
    serves_without(&site, "NOAUTH").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_wrong_authority_it_serves_without_redis_and_says_why() {
    let _turn = among_others().await;
    let (_redis, mut site, _postgres) = secured().await;
    let stranger = Redis::start_secured().await;
    site.set("redis.ca_file", stranger.ca_file().display().to_string());
    serves_without(&site, "certificate").await;
}

async fn serves_without(site: &Site, why: &str) -> Server {
    let key = site.issue("acme", &[]).await;
    let server = site.serve().await;
    server.until_logged("cannot connect to redis").await;
    let log = server.log();
    let line = log.lines().find(|line| line.contains("cannot connect to redis")).unwrap();
    assert!(line.contains(why), "{line}");
    assert!(!log.contains(USER.1), "{log}");
    let asker = Asker::connect(server.grpc()).await;
    assert_eq!(asker.check(&key.key).await.trust_id.as_ref(), Some(&key.trust_id));
    assert_eq!(asker.check(&made_up_key()).await.status, 401);
    assert!(server.metric("trustgate_redis_up").await < 1.0);
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_write_into_redis_is_refused_deleted_and_grants_nothing() {
    let _turn = among_others().await;
    let stage = Stage::new(&PATIENT_REDIS).await;
    let server = stage.site.serve().await;
    until_connected(&server).await;
    let asker = Asker::connect(server.grpc()).await;
    let mut connection = stage.redis.connection().await;
    let good = stage.site.issue("acme", &[]).await;
    let other = stage.site.issue("globex", &[]).await;
    assert_eq!(asker.check(&good.key).await.status, 200);
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
        let verdict = asker.check(&stranger).await;
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
        assert_eq!(asker.check(&stranger).await.reason.as_deref(), Some("unknown"), "{what}");
        assert!(connection.exists::<_, bool>(name(&stranger)).await.unwrap(), "{what} was deleted");
    }
    // ... and under one that belongs to somebody else: who it belongs to, the database says.
    connection.set::<_, _, ()>(name(&other.key), &genuine).await.unwrap();
    assert_eq!(asker.check(&other.key).await.trust_id, Some(other.trust_id));
    eventually("a genuine value took its place", PATIENCE, || async {
        let value: Option<Vec<u8>> = connection.clone().get(name(&other.key)).await.unwrap();
        value.is_some_and(|value| value != genuine)
    })
    .await;
    // Not even a text.
    let (stranger, refused) = (made_up_key(), server.l2("refused").await);
    connection.lpush::<_, _, ()>(name(&stranger), &genuine).await.unwrap();
    assert_eq!(asker.check(&stranger).await.status, 401);
    assert!(!connection.exists::<_, bool>(name(&stranger)).await.unwrap());
    assert!(server.l2("refused").await > refused);
}

/// A Redis with TLS and a password, and settings that name them, without the authority to trust.
async fn secured() -> (Redis, Site, std::sync::Arc<Postgres>) {
    let (postgres, redis) = (Postgres::shared().await, Redis::start_secured().await);
    let mut site = site(&postgres, &[("redis.url", &redis.url())]).await;
    let password = site.path().join("password");
    std::fs::write(&password, USER.1).unwrap();
    site.set("redis.password_file", password.display().to_string());
    (redis, site, postgres)
}

/// These settings and a new database, in which there is a trust.
async fn site(postgres: &Postgres, settings: &[(&str, &str)]) -> Site {
    let database = postgres.database().await;
    let mut site = Site::new().with("store.url", postgres.url("admin", &database));
    for (setting, value) in settings {
        site.set(setting, *value);
    }
    site.migrate().await;
    site.trust("acme").await;
    site
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
