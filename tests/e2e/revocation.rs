//! A revoked key is refused when it must be: on every replica once the command says so, at once where a request asks the
//! database, within the TTL on tables that name no changes.

use std::time::Duration;

use serde_json::Value;
use sqlx::Connection as _;
use tokio::time::{Instant, sleep, sleep_until};
use trustgate::server::Delay;

use crate::{
    stage::{PATIENT_REDIS, Stage},
    support::{
        among_others,
        envoy::Envoy,
        eventually,
        grpc::{Asker, granted, refused},
        http,
        seam::Seam,
        server::{IssuedKey, Site, made_up_key},
    },
};

const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn within_the_ttl_on_tables_that_name_no_changes() {
    let _turn = among_others().await;
    let ttl = Duration::from_secs(2);
    let stage = Stage::new(&[]).await;
    let (site, table) = foreign_table(&stage, "2s").await;
    let key = table.key().await;
    let server = site.serve().await;
    let asker = Asker::connect(server.grpc()).await;
    granted(&asker, &key).await;
    table.revoke(&key).await;
    let revoked = Instant::now();
    let last = last_grant(&asker, &key, "unknown").await.map(|began| began.duration_since(revoked));
    println!("last granted {last:?} after the revocation, of {ttl:?}");
    assert!(last.is_none_or(|late| late <= ttl), "{last:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn on_every_replica_as_soon_as_the_command_says_so() {
    let _turn = among_others().await;
    let stage = Stage::new(&PATIENT_REDIS).await;
    let (one, other) = (stage.site.serve().await, stage.site.serve().await);
    let (at_one, at_other) = (Asker::connect(one.grpc()).await, Asker::connect(other.grpc()).await);
    let [key, good] = [stage.site.issue("acme", &[]).await, stage.site.issue("acme", &[]).await];
    let trusted = stage.site.issue("globex", &[]).await;
    for key in [&key, &good, &trusted] {
        granted(&at_one, key).await;
        granted(&at_other, key).await;
    }
    stage.until_shared(3).await;
    let revoked = stage.site.json(&["key", "revoke", &key.id]).await;
    println!("revoked: {}", revoked["effect"]);
    assert_eq!((&revoked["effect"]["replicas"], &revoked["effect"]["applied"]), (&2.into(), &2.into()), "{revoked}");
    let disabled = stage.site.json(&["trust", "disable", "globex"]).await;
    assert_eq!(disabled["effect"]["applied"], 2, "{disabled}");
    for asker in [&at_one, &at_other] {
        refused(asker, &key, "revoked").await;
        refused(asker, &trusted, "trust_disabled").await;
        granted(asker, &good).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn at_once_where_every_request_asks() {
    let _turn = among_others().await;
    let stage = Stage::new(&[("freshness.mode", "live")]).await;
    let server = stage.site.serve().await;
    let asker = Asker::connect(server.grpc()).await;
    for _ in 0..3 {
        let key = stage.site.issue("acme", &[]).await;
        granted(&asker, &key).await; // by a full look-up
        granted(&asker, &key).await; // by primary key
        stage.site.revoke(&key).await;
        refused(&asker, &key, "revoked").await;
    }
    let key = stage.site.issue("globex", &[]).await;
    granted(&asker, &key).await;
    stage.site.json(&["trust", "disable", "globex"]).await;
    refused(&asker, &key, "trust_disabled").await;
    stage.site.json(&["trust", "enable", "globex"]).await;
    granted(&asker, &key).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn at_once_on_a_route_that_asks_though_the_others_do_not() {
    let _turn = among_others().await;
    let stage = Stage::new(&[("freshness.ttl", "10m")]).await;
    let key = stage.site.issue("acme", &["--scope", "admin"]).await;
    let server = stage.site.serve().await;
    let envoy = Envoy::start(http::application().await, &[server.grpc()]).await;
    let status = async |path: &str| envoy.get(path, &[("x-api-key", &key.key)]).await.status;
    assert_eq!((status("/").await, status("/admin/x").await), (200, 200));
    stage.site.revoke(&key).await;
    assert_eq!(status("/admin/x").await, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn at_once_after_the_caches_were_cleared_on_every_replica_and_in_redis() {
    let _turn = among_others().await;
    let stage = Stage::new(&[PATIENT_REDIS.as_slice(), &[("freshness.ttl", "10m")]].concat()).await;
    let (one, other) = (stage.site.serve().await, stage.site.serve().await);
    let (at_one, at_other) = (Asker::connect(one.grpc()).await, Asker::connect(other.grpc()).await);
    let (everywhere, one_only, good) =
        (stage.site.issue("acme", &[]).await, stage.site.issue("acme", &[]).await, stage.site.issue("acme", &[]).await);
    for key in [&everywhere, &one_only, &good] {
        granted(&at_one, key).await;
    }
    granted(&at_other, &everywhere).await;
    stage.until_shared(3).await;
    let cleared = stage.site.json(&["cache", "clear"]).await;
    println!("cleared: {cleared}");
    assert_eq!((&cleared["replicas"], &cleared["applied"]), (&2.into(), &2.into()), "{cleared}");
    // The other one first: what it does not hold itself it finds in Redis, as old as it is.
    let before = other.metric("trustgate_store_reads_total{outcome=\"ok\"}").await;
    for asker in [&at_other, &at_one] {
        for key in [&everywhere, &one_only, &good] {
            granted(asker, key).await;
        }
    }
    assert!(other.l2("refused").await > 0.0, "Redis held a value from before the clearing");
    assert!(other.metric("trustgate_store_reads_total{outcome=\"ok\"}").await >= before + 3.0, "all was read again");
}

#[tokio::test(flavor = "multi_thread")]
async fn age_is_counted_from_the_database_through_both_tiers() {
    let _turn = among_others().await;
    let ttl = Duration::from_secs(4);
    let stage = Stage::new(&[]).await;
    let (site, table) = foreign_table(&stage, "4s").await;
    let (one, other) = (site.serve().await, site.serve().await);
    let (at_one, at_other) = (Asker::connect(one.grpc()).await, Asker::connect(other.grpc()).await);
    let key = table.key().await;
    granted(&at_one, &key).await;
    let read = Instant::now();
    stage.until_shared(1).await;
    table.revoke(&key).await;
    // Late in the life of the value the other replica gets it out of Redis: that does not make it young again.
    sleep_until(read + ttl * 5 / 8).await;
    granted(&at_other, &key).await;
    assert!(other.l2("hit").await > 0.0, "it came out of Redis");
    let last = last_grant(&at_other, &key, "unknown").await.map(|began| began.duration_since(read));
    println!("last granted {last:?} after the read, of {ttl:?}");
    assert!(last.is_none_or(|late| late <= ttl), "{last:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clearing_does_not_overlook_a_replica_that_is_just_starting() {
    let _turn = among_others().await;
    let site = Site::new();
    site.migrate().await;
    let (running, seam) = Seam::start(&site, |seam| seam.after_poll().close()).await;
    // It has read the newest version and is about to serve what it reads.
    eventually("the version was read", PATIENCE, || async { seam.after_poll().waiting() == 1 }).await;
    let cleared = site.run(&["--output", "json", "cache", "clear"]).await;
    let counts: Value = serde_json::from_str(&cleared.out).unwrap();
    assert_eq!((cleared.code, &counts["replicas"], &counts["applied"]), (1, &1.into(), &0.into()), "{cleared:?}");
    seam.after_poll().open();
    running.ready().await;
    running.stop(Delay::None).await.unwrap();
}

/// Asks again and again until the key is refused; returns when the last request that was granted began.
async fn last_grant(asker: &Asker, key: &IssuedKey, reason: &str) -> Option<Instant> {
    let (start, mut last) = (Instant::now(), None);
    loop {
        let began = Instant::now();
        let verdict = asker.check(&key.key).await;
        if verdict.status != 200 {
            assert_eq!((verdict.status, verdict.reason.as_deref()), (401, Some(reason)), "{verdict:?}");
            return last;
        }
        assert!(start.elapsed() < PATIENCE, "still granted");
        last = Some(began);
        sleep(Duration::from_millis(2)).await;
    }
}

/// A table of somebody else in the stage's database server, and settings that read it.
async fn foreign_table(stage: &Stage, ttl: &str) -> (Site, ForeignTable) {
    let database = stage.postgres.database().await;
    let url = stage.postgres.url("admin", &database);
    let mut connection = sqlx::PgConnection::connect(&url).await.unwrap();
    sqlx::raw_sql("CREATE TABLE trust (id uuid PRIMARY KEY, api_key_hash char(64))")
        .execute(&mut connection)
        .await
        .unwrap();
    let site = Site::new();
    let mac_key = site.path().join("mac-key");
    std::fs::write(&mac_key, [7; 32]).unwrap();
    let site = site
        .with("store.url", url)
        .with("store.preset", "trust-table")
        .with("redis.url", stage.redis.url())
        .with("redis.mac_key_file", mac_key.display().to_string())
        .with("freshness.ttl", ttl);
    let site = PATIENT_REDIS.iter().fold(site, |site, (setting, value)| site.with(setting, *value));
    (site, ForeignTable(tokio::sync::Mutex::new(connection)))
}

struct ForeignTable(tokio::sync::Mutex<sqlx::PgConnection>);

impl ForeignTable {
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
