//! A value that was read before a change and comes to the cache after it: into L1, into Redis, and out of Redis.

use std::time::Duration;

use tokio::task::JoinHandle;
use trustgate::server::Delay;

use crate::{
    stage::{PATIENT_REDIS, Stage},
    support::{
        among_others, eventually,
        grpc::{Asker, Verdict},
        seam::Seam,
        server::{IssuedKey, Server, Site, UNHURRIED},
    },
};

const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn read_before_a_revocation_it_serves_nobody_after_it() {
    let _turn = among_others().await;
    let stage = Stage::new(&UNHURRIED).await;
    let (running, seam) = Seam::start(&stage.site, |_| ()).await;
    running.ready().await;
    let other = stage.site.serve().await;
    let (asker, at_other) = (Asker::connect(running.grpc_address().unwrap()).await, Asker::connect(other.grpc()).await);
    for somebody_waits in [true, false] {
        let key = stage.site.issue("acme", &[]).await;
        let finds = seam.finds();
        seam.after_find().close();
        let waiting = ask(&asker, &key);
        eventually("the key was read", PATIENCE, || async { seam.after_find().waiting() == 1 }).await;
        if !somebody_waits {
            // What it brings then goes into the caches unseen.
            waiting.abort();
        }
        let revoked = stage.site.json(&["key", "revoke", &key.id]).await;
        let effect = &revoked["effect"];
        assert_eq!((&effect["replicas"], &effect["applied"]), (&2.into(), &2.into()), "{revoked}");
        seam.after_find().open();
        if somebody_waits {
            refused(&waiting.await.unwrap());
        }
        eventually("it is in the caches", PATIENCE, || async { running.loads() == 0 }).await;
        for asker in [&asker, &at_other] {
            refused(&asker.check(&key.key).await);
        }
        assert_eq!(seam.finds(), finds + 2, "what was read before the revocation was not used");
    }
    running.stop(Delay::None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn read_before_the_caches_were_cleared_it_serves_nobody_after_it() {
    let _turn = among_others().await;
    let site = Site::new().unhurried();
    site.migrate().await;
    site.trust("acme").await;
    let key = site.issue("acme", &[]).await;
    let (running, seam) = Seam::start(&site, |_| ()).await;
    running.ready().await;
    let asker = Asker::connect(running.grpc_address().unwrap()).await;
    seam.after_find().close();
    let waiting = ask(&asker, &key);
    eventually("the key was read", PATIENCE, || async { seam.after_find().waiting() == 1 }).await;
    site.revoke(&key).await;
    let cleared = site.json(&["cache", "clear"]).await;
    assert_eq!((&cleared["replicas"], &cleared["applied"]), (&1.into(), &1.into()), "{cleared}");
    seam.after_find().open();
    refused(&waiting.await.unwrap());
    refused(&asker.check(&key.key).await);
    running.stop(Delay::None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn put_into_redis_after_a_revocation_it_serves_no_replica_that_knows_of_it() {
    let _turn = among_others().await;
    // The replica that holds the old value never hears of the revocation, and may rely on it for a minute.
    let stage = Stage::new(&[PATIENT_REDIS.as_slice(), &[("freshness.lease", "1m")]].concat()).await;
    let key = stage.site.issue("acme", &[]).await;
    let (running, seam) = Seam::start(&stage.site, |_| ()).await;
    running.ready().await;
    let other = stage.site.serve().await;
    let (asker, at_other) = (Asker::connect(running.grpc_address().unwrap()).await, Asker::connect(other.grpc()).await);
    seam.after_find().close();
    let waiting = ask(&asker, &key);
    eventually("the key was read", PATIENCE, || async { seam.after_find().waiting() == 1 }).await;
    seam.after_poll().close();
    eventually("no poll comes through", PATIENCE, || async { seam.after_poll().waiting() == 1 }).await;
    revoked_behind_the_command(&stage, &key, &other).await;

    seam.after_find().open();
    assert_eq!(waiting.await.unwrap().trust_id.as_ref(), Some(&key.trust_id), "its lease holds");
    stage.until_shared(1).await;
    refused(&at_other.check(&key.key).await);
    assert!(other.l2("refused").await > 0.0, "the old value was in Redis");
    let late = stage.site.serve().await;
    refused(&Asker::connect(late.grpc()).await.check(&key.key).await);

    seam.after_poll().open();
    eventually("it hears of it", PATIENCE, || async { asker.check(&key.key).await.status == 401 }).await;
    running.stop(Delay::None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn read_out_of_redis_across_a_revocation_it_serves_nobody_after_it() {
    let _turn = among_others().await;
    let stage = Stage::new(&[
        ("redis.timeout", "30s"),
        ("store.read_timeout", "30s"),
        ("decision.deadline", "70s"),
        ("decision.envoy_timeout", "80s"),
    ])
    .await;
    let key = stage.site.issue("acme", &[]).await;
    let (one, other) = (stage.site.serve().await, stage.site.serve().await);
    let (at_one, at_other) = (Asker::connect(one.grpc()).await, Asker::connect(other.grpc()).await);
    assert_eq!(at_one.check(&key.key).await.trust_id.as_ref(), Some(&key.trust_id));
    stage.until_shared(1).await;

    let frozen = stage.redis.freeze();
    let waiting = ask(&at_other, &key);
    eventually("it asks Redis", PATIENCE, || async {
        other.metric("trustgate_cache_lookups_total{kind=\"api_key\",outcome=\"miss\",tier=\"l1\"}").await > 0.0
    })
    .await;
    revoked_behind_the_command(&stage, &key, &other).await;
    drop(frozen);
    refused(&waiting.await.unwrap());
    assert!(other.l2("refused").await > 0.0, "Redis gave the old value");
    refused(&at_other.check(&key.key).await);
}

fn ask(asker: &Asker, key: &IssuedKey) -> JoinHandle<Verdict> {
    let (asker, key) = (asker.clone(), key.key.clone());
    tokio::spawn(async move { asker.check(&key).await })
}

#[track_caller]
fn refused(verdict: &Verdict) {
    assert_eq!((verdict.status, verdict.reason.as_deref()), (401, Some("revoked")), "{verdict:?}");
}

/// Revokes a key in the table and waits until `server` has applied that: the command would wait for every replica.
async fn revoked_behind_the_command(stage: &Stage, key: &IssuedKey, server: &Server) {
    let revocation = format!("UPDATE trustgate.api_key SET revoked_at = now() WHERE id = '{}'", key.id);
    stage.postgres.execute(&stage.database, &revocation).await;
    let newest = "SELECT max(version)::text FROM trustgate.version";
    let newest: String = stage.postgres.value(&stage.database, newest).await;
    let newest: f64 = newest.parse().unwrap();
    eventually("it is applied", PATIENCE, || async { server.metric("trustgate_applied_version").await >= newest })
        .await;
}
