//! A replica that cannot reach the database: what it still grants, for how long, what it says meanwhile, and how soon it
//! is fresh again. And one that was not running for a while.

use std::{collections::BTreeSet, path::Path, time::Duration};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::{Instant, sleep, sleep_until};
use trustgate::ext_authz::framing::SERVICE;

use crate::{
    fixture::Fixture,
    support::{
        envoy::Envoy,
        eventually, exclusive,
        forward::Forwarder,
        grpc::{CheckClient, is_serving},
        http,
        load::{self, KeyCase},
        machine,
        probe::{Probe, Probing, granted_after},
        server::{IssuedKey, Server, digest, made_up_key},
    },
};

const PATIENCE: Duration = Duration::from_secs(30);
/// `freshness.lease` as it is by default.
const LEASE: Duration = Duration::from_secs(1);
/// `freshness.stale_if_unconfirmed` in these tests.
const STALE: Duration = Duration::from_secs(3);
/// What a check may take, and a little for the beginning of the last lease.
const MARGIN: Duration = Duration::from_millis(200);
const STRICT: &[(&str, &str)] = &[("trustgate.freshness", "strict")];
const LIVE: &[(&str, &str)] = &[("trustgate.freshness", "live")];

/// How the database goes out of reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// Every connection is dropped, and each new one at once.
    Dropped,
    /// Every process of PostgreSQL is stopped: connections stay, and nothing comes.
    Stopped,
}

#[tokio::test(flavor = "multi_thread")]
async fn with_connections_dropped_held_keys_pass_until_the_stale_window_ends() {
    cut_off(Loss::Dropped).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_postgresql_stopped_held_keys_pass_until_the_stale_window_ends() {
    cut_off(Loss::Stopped).await;
}

#[allow(clippy::too_many_lines, clippy::similar_names, reason = "one story, told in its order")]
async fn cut_off(loss: Loss) {
    let _turn = exclusive().await;
    let mut fixture = Fixture::with_default_deadlines(&[("freshness.stale_if_unconfirmed", "3s")]).await;
    let forwarder = Forwarder::start(fixture.postgres.socket()).await;
    let direct = fixture.postgres.url("admin", &fixture.database);
    fixture.test_config.set("store.management_url", direct);
    fixture.test_config.set("store.url", forwarder.url("admin", &fixture.database));
    let (held, unseen) = (fixture.keys(20).await, fixture.keys(600).await);
    let server = fixture.test_config.serve().await;
    fixture.test_config.set("freshness.stale_if_unconfirmed", "0s");
    let impatient = fixture.test_config.serve().await;
    let (client, at_impatient) =
        (CheckClient::connect(server.grpc()).await, CheckClient::connect(impatient.grpc()).await);
    let (absent, newest) = (made_up_key(), fixture.keys(1).await.remove(0));
    for client in [&client, &at_impatient] {
        assert_eq!(client.check(&absent).await.status, 401);
        client.hold(&held).await;
    }

    let keys = |cases: &[KeyCase]| cases.iter().map(|case| case.key.clone()).collect::<Vec<_>>();
    let probing = [
        Probing::start(&client, 200, keys(&held), &[]),
        Probing::start(&client, 100, keys(&held), STRICT),
        Probing::start(&at_impatient, 100, keys(&held), &[]),
        Probing::start(&client, 50, vec![absent], &[]),
        Probing::start(&client, 50, keys(&unseen), &[]),
        Probing::start(&client, 50, keys(&held), LIVE),
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
        for server in [&server, &impatient] {
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
    let [held_probes, strict, at_impatient_probes, absence, unseen_probes, live] = &answers[..] else { unreachable!() };

    // While it lasts, it changes nothing for what was held ...
    all_granted("held", held_probes, |probe| probe.answered < losing + STALE);
    for (name, lease_only) in [("strict", strict), ("S = 0", at_impatient_probes)] {
        all_granted(name, lease_only, |probe| probe.answered < losing + LEASE / 2);
        all_faults(name, lease_only, |probe| probe.began > lost + LEASE + MARGIN);
    }
    // ... and then it is over.
    all_faults("held", held_probes, |probe| probe.began > lost + LEASE + STALE + MARGIN);
    all_faults("live", live, |probe| probe.began > lost + MARGIN);
    all_faults("unseen", unseen_probes, |probe| probe.began > lost + MARGIN);
    all_faults("absent", absence, |probe| probe.began > lost + LEASE + MARGIN);
    assert!(absence.iter().all(|probe| probe.status() == Some(401) || probe.is_fault()), "an absence was granted");
    for (name, probes) in [("held", held_probes), ("strict", strict), ("S = 0", at_impatient_probes), ("live", live)] {
        println!("{loss:?}, {name}: last grant began {:?} after the loss", granted_after(lost, probes));
    }
    println!("{loss:?}: fresh until {:?} after the loss", fresh_until.saturating_duration_since(lost));
    assert!(fresh_until <= lost + LEASE + MARGIN);
    assert!(lease_age > (LEASE + STALE).as_secs_f64(), "{lease_age}");
    assert!(server.metric("trustgate_stale_grants_total").await > 0.0);
    assert!(impatient.metric("trustgate_stale_grants_total").await < 1.0);

    let back = Instant::now();
    match frozen {
        Some(frozen) => drop(frozen),
        None => forwarder.lead_to(fixture.postgres.socket()),
    }
    for (server, client) in [(&server, &client), (&impatient, &at_impatient)] {
        fresh_again(server, client, &newest, back, Duration::from_millis(500)).await;
    }
}

/// A key nobody asked for before is granted, and the lease is young; all of that soon after `back`.
async fn fresh_again(server: &Server, client: &CheckClient, newest: &KeyCase, back: Instant, limit: Duration) {
    eventually("it is fresh again", PATIENCE, || async {
        is_serving(server.grpc(), "trustgate.fresh").await
            && client.check_with(&newest.key, STRICT).await.unwrap().trust_id == newest.owner
            && server.metric("trustgate_lease_age_seconds").await < 0.5
    })
    .await;
    let took = machine::elapsed(back);
    println!("fresh {took:?} after the return");
    assert!(took <= limit, "{took:?}\n{}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_revoked_beyond_the_reach_of_a_replica_ends_with_its_stale_window() {
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
    // The command waits for the replica before it ends: counted from before it, nothing is counted too short.
    let revoking = Instant::now();
    forwarder.cut();
    let answer = fixture.test_config.run(&["--output", "json", "key", "revoke", &key.id]).await;
    println!("told of the revocation: {answer:?}");
    let answer: serde_json::Value = serde_json::from_str(&answer.out).unwrap();
    let effect = &answer["effect"];
    assert_eq!((&effect["replicas"], &effect["applied"]), (&1.into(), &0.into()), "{answer}");
    assert_eq!(effect["missing"].as_array().map(Vec::len), Some(1), "{answer}");
    sleep_until(revoking + LEASE + STALE + Duration::from_millis(500)).await;
    forwarder.lead_to(fixture.postgres.socket());
    eventually("it is fresh again", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
    sleep(LEASE).await;
    let probes = probing.stop().await;
    let late = granted_after(revoking, &probes);
    println!("last grant began {late:?} after a revocation that could not be heard of");
    assert!(late >= STALE && late <= LEASE + STALE + MARGIN, "{late:?}");
    let last = probes.iter().max_by_key(|probe| probe.began).unwrap();
    assert_eq!(last.verdict.as_ref().unwrap().reason.as_deref(), Some("revoked"));
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_restarted_for_15_seconds_under_load_fails_no_request_for_a_held_key() {
    const LENGTH: Duration = Duration::from_secs(20);
    let _turn = exclusive().await;
    let mut fixture = Fixture::with_default_deadlines(&[]).await;
    let held = fixture.keys(100).await;
    let servers = [fixture.test_config.serve().await, fixture.test_config.serve().await];
    for server in &servers {
        let client = CheckClient::connect(server.grpc()).await;
        client.hold(&held).await;
    }
    let envoy = Envoy::start(http::application().await, &[servers[0].grpc(), servers[1].grpc()]).await;
    let mut number = 0;
    let aim = move |_| {
        number += 1;
        held[number % held.len()].clone()
    };
    let start = Instant::now();
    let firing = tokio::spawn(load::fire(envoy.address(), 500, LENGTH, aim));
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
    load::figures("PostgreSQL restarted, held keys", hits.iter());
    assert_eq!(hits.len(), 10_000);
    let wrong: Vec<_> = hits.iter().filter(|hit| !hit.is_right()).collect();
    assert!(wrong.is_empty(), "{} failed, among them {:?}", wrong.len(), wrong[0]);
    for server in &servers {
        assert!(server.metric("trustgate_stale_grants_total").await > 0.0);
        eventually("it is fresh again", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_in_the_deny_file_ends_a_key_within_a_second_with_the_database_down() {
    let _turn = exclusive().await;
    let mut fixture = Fixture::with_default_deadlines(&[]).await;
    let file = fixture.test_config.path().join("deny");
    write(&file, "# nobody yet\n");
    fixture.test_config.set("freshness.deny_file", file.display().to_string());
    let by_id = [fixture.test_config.issue("acme", &[]).await, fixture.test_config.issue("acme", &[]).await];
    let by_digest = fixture.test_config.issue("acme", &[]).await;
    let by_trust = [fixture.test_config.issue("globex", &[]).await, fixture.test_config.issue("globex", &[]).await];
    let (over, good) = (fixture.test_config.issue("acme", &[]).await, fixture.test_config.issue("initech", &[]).await);
    let denied: Vec<_> = by_id.iter().chain([&by_digest]).chain(&by_trust).cloned().collect();
    let granted = vec![over.clone(), good];
    let server = fixture.test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    for key in denied.iter().chain(&granted) {
        assert_eq!(client.check(&key.key).await.trust_id.as_ref(), Some(&key.trust_id));
    }
    fixture.postgres.stop();
    sleep(LEASE * 2).await; // what is granted now is granted in the stale window

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
        over.id,
        at(-hour),
    );
    write(&file, &lines);
    let written = Instant::now();
    sleep_until(written + Duration::from_secs(2)).await;
    let [probes, of_others] = probing;
    let (probes, of_others) = (probes.stop().await, of_others.stop().await);
    let late = granted_after(written, &probes);
    println!("last grant began {late:?} after its line was in the deny file");
    assert!(late <= Duration::from_secs(1), "{late:?}");
    for (number, key) in denied.iter().enumerate() {
        let of_key = probes.iter().filter(|probe| probe.key == number);
        assert!(of_key.clone().any(Probe::is_grant), "{} was never granted", key.id);
        assert_eq!(of_key.max_by_key(|probe| probe.began).unwrap().status(), Some(401), "{}", key.id);
    }
    all_granted("not on the list", &of_others, |_| true);

    write(&file, "");
    eventually("who is on the list no more is granted again", PATIENCE, || async {
        client.check(&by_id[0].key).await.status == 200
    })
    .await;
}

/// Puts a file in the place of another, at once.
fn write(file: &Path, text: &str) {
    let new = file.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, file).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_stopped_for_ten_seconds_grants_nothing_that_was_revoked_meanwhile() {
    stopped(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nor_does_one_whose_connections_were_dropped_meanwhile() {
    stopped(true).await;
}

/// That a poll fails after a pause says nothing of the time before: then nobody asked.
async fn stopped(connections_dropped: bool) {
    let _turn = exclusive().await;
    let mut fixture = Fixture::with_default_deadlines(&[]).await;
    let (revoked, good) =
        (fixture.test_config.issue("acme", &[]).await, fixture.test_config.issue("globex", &[]).await);
    let other = fixture.test_config.serve().await;
    let forwarder = Forwarder::start(fixture.postgres.socket()).await;
    fixture.test_config.set("store.management_url", fixture.postgres.url("admin", &fixture.database));
    fixture.test_config.set("store.url", forwarder.url("admin", &fixture.database));
    let paused = fixture.test_config.serve().await;
    let (client, at_other) = (CheckClient::connect(paused.grpc()).await, CheckClient::connect(other.grpc()).await);
    for (client, key) in [(&client, &revoked), (&client, &good), (&at_other, &revoked)] {
        assert_eq!(client.check(&key.key).await.trust_id.as_ref(), Some(&key.trust_id));
    }
    let frozen = paused.freeze();
    let probing = [
        Probing::start(&client, 80, vec![revoked.key.clone()], &[]),
        Probing::start(&client, 20, vec![good.key.clone()], &[]),
    ];
    let start = Instant::now();
    sleep(Duration::from_secs(1)).await;
    let answer = fixture.test_config.run(&["--output", "json", "key", "revoke", &revoked.id]).await;
    println!("told of the revocation: {answer:?}");
    let answer: serde_json::Value = serde_json::from_str(&answer.out).unwrap();
    let effect = &answer["effect"];
    assert_eq!((&effect["replicas"], &effect["applied"]), (&2.into(), &1.into()), "{answer}");
    assert_eq!(effect["missing"].as_array().map(Vec::len), Some(1), "{answer}");
    if connections_dropped {
        forwarder.lead_to(fixture.postgres.socket());
    }
    sleep_until(start + Duration::from_secs(10)).await;
    let resumed = Instant::now();
    drop(frozen);
    sleep(Duration::from_secs(2)).await;
    let [probes, of_good] = probing;
    let (probes, of_good) = (probes.stop().await, of_good.stop().await);

    let sent_while_stopped = probes.iter().filter(|probe| probe.began < resumed).count();
    println!("{sent_while_stopped} checks waited for it, {} came later", probes.len() - sent_while_stopped);
    assert!(sent_while_stopped > 700 && probes.len() - sent_while_stopped > 100);
    let wrong: Vec<_> = probes.iter().filter(|probe| probe.is_grant()).collect();
    assert!(wrong.is_empty(), "{} grants after a revocation: {:?}", wrong.len(), wrong[0]);
    let answered: BTreeSet<_> = probes.iter().map(Probe::status).collect();
    assert!(answered.contains(&Some(401)) && answered.is_subset(&[Some(401), Some(503)].into()), "{answered:?}");
    all_granted("good", &of_good, |probe| probe.began > resumed + Duration::from_millis(500));
}

/// That those were granted, but for faults while the machine stood still.
#[track_caller]
fn all_granted(name: &str, probes: &[Probe], those: impl Fn(&Probe) -> bool) {
    all(name, "granted", probes.iter().filter(|probe| those(probe)), Probe::is_grant, Probe::is_excused);
}

#[track_caller]
fn all_faults(name: &str, probes: &[Probe], those: impl Fn(&Probe) -> bool) {
    all(name, "a fault", probes.iter().filter(|probe| those(probe)), Probe::is_fault, |_| false);
}

#[track_caller]
fn all<'p>(
    name: &str,
    what: &str,
    those: impl Iterator<Item = &'p Probe>,
    is: impl Fn(&Probe) -> bool,
    is_excused: impl Fn(&Probe) -> bool,
) {
    let (right, others): (Vec<_>, Vec<_>) = those.partition(|probe| is(probe));
    assert!(right.len() >= 20, "{name}: only {} are {what}", right.len());
    let wrong: Vec<_> = others.iter().filter(|probe| !is_excused(probe)).collect();
    assert!(
        wrong.is_empty(),
        "{name}: {} of {} are not {what}: {:?}",
        wrong.len(),
        right.len() + others.len(),
        wrong[0]
    );
}
