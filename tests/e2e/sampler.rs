//! The sampler on three replicas of one database detects changes that are missing from the change log, and reports no
//! difference for changes that the log contains.

use std::time::Duration;

use crate::{
    fixture::Fixture,
    support::{
        eventually,
        grpc::{CheckClient, granted, refused},
        server::{IssuedKey, Server, digest},
        shared,
    },
};

const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn a_change_missing_from_the_change_log_is_detected_on_every_replica() {
    let _turn = shared().await;
    let mut fixture = Fixture::new(&[]).await;
    let issue = async |trust: &str| fixture.test_config.issue(trust, &[]).await;
    let (ordinary, good) = ([issue("acme").await, issue("globex").await], issue("initech").await);
    let (revoked, deleted) = (issue("acme").await, issue("globex").await);
    let unsampled = fixture.test_config.serve().await;
    fixture.test_config.set("freshness.sample_interval", "20ms");
    let sampled =
        [fixture.test_config.serve().await, fixture.test_config.serve().await, fixture.test_config.serve().await];
    let control = CheckClient::connect(unsampled.grpc()).await;
    let mut clients = Vec::new();
    for server in &sampled {
        clients.push(CheckClient::connect(server.grpc()).await);
    }
    for client in clients.iter().chain([&control]) {
        for key in ordinary.iter().chain([&good, &revoked, &deleted]) {
            granted(client, key).await;
        }
    }

    // The sampler reports no difference for recorded changes, whether a command or plain SQL made them.
    fixture.test_config.revoke(&ordinary[0]).await;
    fixture.postgres.execute(&fixture.database, &update(&ordinary[1])).await;
    for (server, client) in sampled.iter().zip(&clients) {
        for key in &ordinary {
            eventually("the key is denied", PATIENCE, || async { client.check(&key.key).await.status == 401 }).await;
        }
        let before = samples(server, "same").await;
        let enough = || async { samples(server, "same").await >= before + 20.0 };
        eventually("the sampler has compared 20 more entries", PATIENCE, enough).await;
        assert!(samples(server, "different").await < 1.0, "{}", server.log());
    }

    for (key, change, reason, count) in
        [(&revoked, update(&revoked), "revoked", 1.0), (&deleted, deletion(&deleted), "unknown", 2.0)]
    {
        fixture.postgres.execute(&fixture.database, &unrecorded(&change)).await;
        for (server, client) in sampled.iter().zip(&clients) {
            eventually("the sampler detects the change", PATIENCE, || async {
                samples(server, "different").await >= count
            })
            .await;
            refused(client, key, reason).await;
            granted(client, &good).await;
            server.until_logged(&key.id).await;
            assert!(!server.log().contains(&digest(&key.key)), "the log contains a digest");
        }
        // The replica without the sampler still grants the key, because its polls report no change.
        granted(&control, key).await;
    }
    for server in &sampled {
        assert!(samples(server, "different").await < 3.0, "the sampler reported a change twice");
    }
}

/// Returns SQL that makes `change` without recording it in the change log. The transaction gets a version, but deletes
/// its rows in `trustgate.change`, which list the changed keys.
fn unrecorded(change: &str) -> String {
    format!("BEGIN; {change}; DELETE FROM trustgate.change WHERE tx = pg_current_xact_id(); COMMIT")
}

fn update(key: &IssuedKey) -> String {
    format!("UPDATE trustgate.api_key SET revoked_at = now() WHERE id = '{}'", key.id)
}

fn deletion(key: &IssuedKey) -> String {
    format!("DELETE FROM trustgate.api_key WHERE id = '{}'", key.id)
}

async fn samples(server: &Server, outcome: &str) -> f64 {
    server.metric(&format!("trustgate_samples_total{{kind=\"api_key\",outcome=\"{outcome}\"}}")).await
}
