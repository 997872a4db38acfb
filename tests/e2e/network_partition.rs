//! A replica that cannot reach the database, or that was paused: which keys it still grants and for how long, what its
//! probes report in the meantime, and how soon its lease is fresh again.

use std::{collections::BTreeSet, path::Path, time::Duration};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::{Instant, sleep, sleep_until};
use trustgate::testing::ext_authz::framing::SERVICE;

use crate::{
    fixture::Fixture,
    support::{
        envoy::Envoy,
        eventually, exclusive,
        forward::Forwarder,
        grpc::{CheckClient, is_serving},
        http,
        load::{self, KeyCase},
        machine::{PAUSE_MARGIN, keep_undisturbed},
        probe::{Probe, Probing, granted_after},
        server::{IssuedKey, Server, digest, made_up_key},
    },
};

const PATIENCE: Duration = Duration::from_secs(30);
/// The default of `freshness.lease`.
const LEASE: Duration = Duration::from_secs(1);
/// The value of `freshness.stale_if_unconfirmed` in the tests that set it.
const STALE: Duration = Duration::from_secs(3);
/// The tolerance for the end of the lease and the end of the stale window: the check deadline (150 ms) plus 50 ms.
const MARGIN: Duration = Duration::from_millis(200);
const STRICT: &[(&str, &str)] = &[("trustgate.freshness", "strict")];
const LIVE: &[(&str, &str)] = &[("trustgate.freshness", "live")];

/// How the replica loses contact with the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// The forwarder closes all connections, and closes new connections immediately.
    Dropped,
    /// SIGSTOP pauses all processes of PostgreSQL: connections stay open, but no reply arrives.
    Stopped,
}

#[tokio::test(flavor = "multi_thread")]
async fn with_connections_dropped_cached_keys_pass_until_the_stale_window_ends() {
    cut_off(Loss::Dropped).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_postgresql_paused_cached_keys_pass_until_the_stale_window_ends() {
    cut_off(Loss::Stopped).await;
}

#[allow(clippy::too_many_lines, clippy::similar_names, reason = "one sequence of steps")]
async fn cut_off(loss: Loss) {
    let _turn = exclusive().await;
    let mut fixture = Fixture::with_default_deadlines(&[("freshness.stale_if_unconfirmed", "3s")]).await;
    let forwarder = Forwarder::start(fixture.postgres.socket()).await;
    let direct = fixture.postgres.url("admin", &fixture.database);
    fixture.test_config.set("store.management_url", direct);
    fixture.test_config.set("store.url", forwarder.url("admin", &fixture.database));
    let (cached, unseen) = (fixture.keys(20).await, fixture.keys(600).await);
    let server = fixture.test_config.serve().await;
    fixture.test_config.set("freshness.stale_if_unconfirmed", "0s");
    let no_stale = fixture.test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    let no_stale_client = CheckClient::connect(no_stale.grpc()).await;
    let (unknown, newest) = (made_up_key(), fixture.keys(1).await.remove(0));
    for client in [&client, &no_stale_client] {
        assert_eq!(client.check(&unknown).await.status, 401);
        client.fill_cache(&cached).await;
    }

    let keys = |cases: &[KeyCase]| cases.iter().map(|case| case.key.clone()).collect::<Vec<_>>();
    let probing = [
        Probing::start(&client, 200, keys(&cached), &[]),
        Probing::start(&client, 100, keys(&cached), STRICT),
        Probing::start(&no_stale_client, 100, keys(&cached), &[]),
        Probing::start(&client, 50, vec![unknown], &[]),
        Probing::start(&client, 50, keys(&unseen), &[]),
        Probing::start(&client, 50, keys(&cached), LIVE),
    ];
    sleep(LEASE / 2).await;
    let losing = Instant::now();
    let frozen = match loss {
        Loss::Dropped => {
            forwarder.cut();
            None
        }
        Loss::Stopped => Some(fixture.postgres.freeze()),
    };
    let lost = Instant::now();
    let (mut fresh_until, mut lease_age) = (losing, 0.0);
    while lost.elapsed() < LEASE + STALE + Duration::from_millis(1_200) {
        let began = Instant::now();
        for server in [&server, &no_stale] {
            let readiness = server.readiness().await;
            assert_eq!(readiness.status, 200, "{readiness:?}");
            assert!(is_serving(server.grpc(), "").await && is_serving(server.grpc(), SERVICE).await);
        }
        if is_serving(server.grpc(), "trustgate.fresh").await {
            fresh_until = began;
        }
        lease_age = server.metric("trustgate_lease_age_seconds").await;
        sleep(Duration::from_millis(50)).await;
    }
    let mut answers = Vec::new();
    for probing in probing {
        answers.push(probing.stop().await);
    }
    let [cached_probes, strict, no_stale_probes, unknown_probes, unseen_probes, live] = &answers[..] else {
        unreachable!()
    };

    // Cached keys are granted in the stale window. Strict routes, and the server without a stale window, grant them
    // only until the lease ends.
    all_granted("cached", cached_probes, |probe| probe.answered < losing + STALE);
    for (name, lease_only) in [("strict", strict), ("stale window off", no_stale_probes)] {
        all_granted(name, lease_only, |probe| probe.answered < losing + LEASE / 2);
        all_faults(name, lease_only, |probe| probe.began > lost + LEASE + MARGIN);
    }
    // After the stale window, all checks are faults. Checks in mode `live` and checks of keys that are not cached are
    // faults from the start of the outage. Negative entries are not served after the end of the lease.
    all_faults("cached", cached_probes, |probe| probe.began > lost + LEASE + STALE + MARGIN);
    all_faults("live", live, |probe| probe.began > lost + MARGIN);
    all_faults("unseen", unseen_probes, |probe| probe.began > lost + MARGIN);
    all_faults("unknown", unknown_probes, |probe| probe.began > lost + LEASE + MARGIN);
    let is_denied_or_fault = |probe: &Probe| probe.status() == Some(401) || probe.is_fault();
    assert!(unknown_probes.iter().all(is_denied_or_fault), "an unknown key was neither denied nor a fault");
    for (name, probes) in
        [("cached", cached_probes), ("strict", strict), ("stale window off", no_stale_probes), ("live", live)]
    {
        println!("{loss:?}, {name}: last grant began {:?} after the loss", granted_after(lost, probes));
    }
    println!("{loss:?}: fresh until {:?} after the loss", fresh_until.saturating_duration_since(lost));
    assert!(fresh_until <= lost + LEASE + MARGIN);
    assert!(lease_age > (LEASE + STALE).as_secs_f64(), "{lease_age}");
    assert!(server.metric("trustgate_stale_grants_total").await > 0.0);
    assert!(no_stale.metric("trustgate_stale_grants_total").await < 1.0);

    let back = Instant::now();
    match frozen {
        Some(frozen) => drop(frozen),
        None => forwarder.forward_to(fixture.postgres.socket()),
    }
    for (server, client) in [(&server, &client), (&no_stale, &no_stale_client)] {
        fresh_again(server, client, &newest, back, Duration::from_millis(500)).await;
    }
}

/// Waits until `server` has a fresh lease that was renewed recently, and grants `unseen`, a key that is not cached.
/// Panics if that takes longer than `limit` after `back`, plus a margin for a pause of the machine.
async fn fresh_again(server: &Server, client: &CheckClient, unseen: &KeyCase, back: Instant, limit: Duration) {
    eventually("the lease is fresh again", PATIENCE, || async {
        is_serving(server.grpc(), "trustgate.fresh").await
            && client.check_with(&unseen.key, STRICT).await.unwrap().trust_id == unseen.trust_id
            && server.metric("trustgate_lease_age_seconds").await < 0.5
    })
    .await;
    let took = back.elapsed();
    println!("lease fresh {took:?} after the database returned");
    assert!(took <= limit + PAUSE_MARGIN, "{took:?}\n{}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_revoked_while_a_replica_is_cut_off_is_denied_after_its_stale_window() {
    let _turn = exclusive().await;
    let mut fixture = Fixture::with_default_deadlines(&[("freshness.stale_if_unconfirmed", "3s")]).await;
    let forwarder = Forwarder::start(fixture.postgres.socket()).await;
    fixture.test_config.set("store.management_url", fixture.postgres.url("admin", &fixture.database));
    let key = fixture.test_config.issue("acme", &[]).await;
    fixture.test_config.set("store.url", forwarder.url("admin", &fixture.database));
    let server = fixture.test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    assert_eq!(client.check(&key.key).await.status, 200);
    let probing = Probing::start(&client, 200, vec![key.key.clone()], &[]);
    sleep(LEASE / 2).await;
    // `key revoke` waits for the replica before it ends, so count the time from before the command.
    let revoking = Instant::now();
    forwarder.cut();
    let answer = fixture.test_config.run(&["--output", "json", "key", "revoke", &key.id]).await;
    println!("output of `key revoke`: {answer:?}");
    let answer: serde_json::Value = serde_json::from_str(&answer.out).unwrap();
    let effect = &answer["effect"];
    assert_eq!((&effect["replicas"], &effect["applied"]), (&1.into(), &0.into()), "{answer}");
    assert_eq!(effect["missing"].as_array().map(Vec::len), Some(1), "{answer}");
    sleep_until(revoking + LEASE + STALE + Duration::from_millis(500)).await;
    forwarder.forward_to(fixture.postgres.socket());
    eventually("the lease is fresh again", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
    sleep(LEASE).await;
    let probes = probing.stop().await;
    let late = granted_after(revoking, &probes);
    println!("last grant began {late:?} after a revocation that the replica could not read");
    assert!(late >= STALE && late <= LEASE + STALE + MARGIN, "{late:?}");
    let last = probes.iter().max_by_key(|probe| probe.began).unwrap();
    assert_eq!(last.verdict.as_ref().unwrap().reason.as_deref(), Some("revoked"));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_for_a_cached_key_fails_while_postgresql_is_down_for_15_seconds() {
    const LENGTH: Duration = Duration::from_secs(20);
    let _turn = exclusive().await;
    let mut fixture = Fixture::with_default_deadlines(&[]).await;
    let cached = fixture.keys(100).await;
    let servers = [fixture.test_config.serve().await, fixture.test_config.serve().await];
    for server in &servers {
        let client = CheckClient::connect(server.grpc()).await;
        client.fill_cache(&cached).await;
    }
    let envoy = Envoy::start(http::application().await, &[servers[0].grpc(), servers[1].grpc()]).await;
    let mut number = 0;
    let aim = move |_| {
        number += 1;
        cached[number % cached.len()].clone()
    };
    let start = Instant::now();
    let firing = tokio::spawn(load::send_requests(envoy.address(), 500, LENGTH, aim));
    sleep_until(start + Duration::from_secs(2)).await;
    fixture.postgres.stop();
    let stopped = Instant::now();
    while stopped.elapsed() < Duration::from_secs(15) {
        for server in &servers {
            assert_eq!(server.readiness().await.status, 200);
        }
        sleep(Duration::from_millis(100)).await;
    }
    fixture.postgres.resume().await;
    let hits = firing.await.unwrap();
    load::print_times("PostgreSQL restarted, cached keys", hits.iter());
    assert_eq!(hits.len(), 10_000);
    let wrong: Vec<_> = hits.iter().filter(|hit| !hit.is_expected()).collect();
    assert!(wrong.is_empty(), "{} requests failed; the first: {:?}", wrong.len(), wrong[0]);
    for server in &servers {
        assert!(server.metric("trustgate_stale_grants_total").await > 0.0);
        eventually("the lease is fresh again", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_added_to_the_deny_file_is_denied_within_a_second_with_the_database_down() {
    let _turn = exclusive().await;
    let mut fixture = Fixture::with_default_deadlines(&[]).await;
    let file = fixture.test_config.path().join("deny");
    write(&file, "# no entries yet\n");
    fixture.test_config.set("freshness.deny_file", file.display().to_string());
    let by_id = [fixture.test_config.issue("acme", &[]).await, fixture.test_config.issue("acme", &[]).await];
    let by_digest = fixture.test_config.issue("acme", &[]).await;
    let by_trust = [fixture.test_config.issue("globex", &[]).await, fixture.test_config.issue("globex", &[]).await];
    let entry_expired = fixture.test_config.issue("acme", &[]).await;
    let good = fixture.test_config.issue("initech", &[]).await;
    let denied: Vec<_> = by_id.iter().chain([&by_digest]).chain(&by_trust).cloned().collect();
    let granted = vec![entry_expired.clone(), good];
    let server = fixture.test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    for key in denied.iter().chain(&granted) {
        assert_eq!(client.check(&key.key).await.trust_id.as_ref(), Some(&key.trust_id));
    }
    fixture.postgres.stop();
    sleep(LEASE * 2).await; // from now on grants are stale grants

    let texts = |keys: &[IssuedKey]| keys.iter().map(|key| key.key.clone()).collect::<Vec<_>>();
    let probing =
        [Probing::start(&client, 250, texts(&denied), &[]), Probing::start(&client, 100, texts(&granted), &[])];
    sleep(Duration::from_millis(300)).await;
    let at = |offset: time::Duration| (OffsetDateTime::now_utc() + offset).format(&Rfc3339).unwrap();
    let hour = time::Duration::HOUR;
    let digest = digest(&by_digest.key);
    let lines = format!(
        "# in an emergency\nkey {}\nkey {} until {}\n\ndigest {digest}\ntrust {}\nkey {} until {}\n",
        by_id[0].id,
        by_id[1].id,
        at(hour),
        by_trust[0].trust_id,
        entry_expired.id,
        at(-hour),
    );
    write(&file, &lines);
    let written = Instant::now();
    sleep_until(written + Duration::from_secs(2)).await;
    let [probes, other_probes] = probing;
    let (probes, other_probes) = (probes.stop().await, other_probes.stop().await);
    let late = granted_after(written, &probes);
    println!("last grant began {late:?} after the keys were in the deny file");
    // The replica reads the file five times a second, but a pause of the machine can delay the next read.
    assert!(late <= Duration::from_secs(1) + PAUSE_MARGIN, "{late:?}");
    for (number, key) in denied.iter().enumerate() {
        let of_key = probes.iter().filter(|probe| probe.key == number);
        assert!(of_key.clone().any(Probe::is_grant), "{} was not granted before", key.id);
        assert_eq!(of_key.max_by_key(|probe| probe.began).unwrap().status(), Some(401), "{}", key.id);
    }
    all_granted("not on the deny list", &other_probes, |_| true);

    write(&file, "");
    eventually("a key that is no longer on the deny list is granted again", PATIENCE, || async {
        client.check(&by_id[0].key).await.status == 200
    })
    .await;
}

/// Replaces `file` atomically.
fn write(file: &Path, text: &str) {
    let new = file.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, file).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_paused_for_ten_seconds_grants_no_key_revoked_during_the_pause() {
    pause_during_revocation(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_replica_with_dropped_connections_grants_no_key_revoked_during_the_pause() {
    pause_during_revocation(true).await;
}

/// Revokes a key while SIGSTOP pauses a replica, then resumes the replica. With `connections_dropped`, the first poll
/// after the pause fails. The failure must not open a stale window, because it does not show that the database was
/// unreachable during the pause.
async fn pause_during_revocation(connections_dropped: bool) {
    let _turn = exclusive().await;
    let mut fixture = Fixture::with_default_deadlines(&[]).await;
    let (revoked, good) =
        (fixture.test_config.issue("acme", &[]).await, fixture.test_config.issue("globex", &[]).await);
    let other = fixture.test_config.serve().await;
    let forwarder = Forwarder::start(fixture.postgres.socket()).await;
    fixture.test_config.set("store.management_url", fixture.postgres.url("admin", &fixture.database));
    fixture.test_config.set("store.url", forwarder.url("admin", &fixture.database));
    let paused = fixture.test_config.serve().await;
    let (client, other_client) = (CheckClient::connect(paused.grpc()).await, CheckClient::connect(other.grpc()).await);
    for (client, key) in [(&client, &revoked), (&client, &good), (&other_client, &revoked)] {
        assert_eq!(client.check(&key.key).await.trust_id.as_ref(), Some(&key.trust_id));
    }
    let frozen = paused.freeze();
    let probing = [
        Probing::start(&client, 80, vec![revoked.key.clone()], &[]),
        Probing::start(&client, 20, vec![good.key.clone()], &[]),
    ];
    let start = Instant::now();
    sleep(Duration::from_secs(1)).await;
    let revoking = Instant::now();
    let answer = fixture.test_config.run(&["--output", "json", "key", "revoke", &revoked.id]).await;
    println!("output of `key revoke`: {answer:?}");
    let answer: serde_json::Value = serde_json::from_str(&answer.out).unwrap();
    let effect = &answer["effect"];
    assert_eq!((&effect["replicas"], &effect["applied"]), (&2.into(), &1.into()), "{answer}");
    assert_eq!(effect["missing"].as_array().map(Vec::len), Some(1), "{answer}");
    if connections_dropped {
        forwarder.forward_to(fixture.postgres.socket());
    }
    sleep_until(start + Duration::from_secs(10)).await;
    let resumed = Instant::now();
    drop(frozen);
    sleep(Duration::from_secs(2)).await;
    let [probes, of_good] = probing;
    let (probes, of_good) = (probes.stop().await, of_good.stop().await);

    let sent_while_paused = probes.iter().filter(|probe| probe.began < resumed).count();
    println!("{sent_while_paused} checks were sent during the pause, {} after it", probes.len() - sent_while_paused);
    assert!(sent_while_paused > 700 && probes.len() - sent_while_paused > 100);
    // SIGSTOP does not stop all threads at once, so the replica may still answer a check that was sent just after the
    // signal. Ignore answers from before the revocation.
    let probes: Vec<_> = probes.into_iter().filter(|probe| probe.answered >= revoking).collect();
    let wrong: Vec<_> = probes.iter().filter(|probe| probe.is_grant()).collect();
    assert!(wrong.is_empty(), "{} grants of a revoked key; the first: {:?}", wrong.len(), wrong[0]);
    let answered: BTreeSet<_> = probes.iter().map(Probe::status).collect();
    assert!(answered.contains(&Some(401)) && answered.is_subset(&[Some(401), Some(503)].into()), "{answered:?}");
    all_granted("good", &of_good, |probe| probe.began > resumed + Duration::from_millis(500));
}

/// Asserts that all probes that `selected` picks were granted. A fault is excused if the machine was disturbed during
/// the check.
#[track_caller]
fn all_granted(name: &str, probes: &[Probe], selected: impl Fn(&Probe) -> bool) {
    let samples = probes.iter().filter(|probe| selected(probe)).map(Probe::sample);
    let kept = keep_undisturbed(name, samples, |probe| probe.is_fault());
    all(name, "granted", &kept, Probe::is_grant);
}

/// Asserts that all probes that `selected` picks are faults.
#[track_caller]
fn all_faults(name: &str, probes: &[Probe], selected: impl Fn(&Probe) -> bool) {
    let probes: Vec<_> = probes.iter().filter(|probe| selected(probe)).collect();
    all(name, "a fault", &probes, Probe::is_fault);
}

#[track_caller]
fn all(name: &str, what: &str, probes: &[&Probe], is: impl Fn(&Probe) -> bool) {
    let (right, wrong): (Vec<&Probe>, Vec<_>) = probes.iter().copied().partition(|probe| is(probe));
    assert!(right.len() >= 20, "{name}: only {} are {what}", right.len());
    assert!(wrong.is_empty(), "{name}: {} of {} are not {what}: {:?}", wrong.len(), probes.len(), wrong[0]);
}
