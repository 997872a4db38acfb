//! Redis and PostgreSQL are killed, restarted or paused under load through Envoy, or are down when the server starts.
//!
//! The tests take the duration of a check from Envoy's access log: the time from when Envoy's filter sent the check
//! until the filter had the answer.

use std::time::Duration;

use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::{Instant, sleep, sleep_until};

use crate::{
    fixture::Fixture,
    support::{
        envoy::Envoy,
        eventually, exclusive,
        grpc::CheckClient,
        http,
        load::{self, KeyCase, LoadResult},
        machine::{self, PAUSE_MARGIN, Sample, keep_undisturbed},
        server::{Server, made_up_key},
        shared,
    },
};

/// The maximum time that one check may take, even in an outage.
const CHECK_MAX: Duration = Duration::from_millis(150);

/// The maximum time that the tests wait for a condition, far longer than any documented bound.
const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn redis_outages_do_not_change_answers_or_delay_checks() {
    // Send fewer than 1 000 requests per second: at that rate, the servers, Envoy and the load generator would need
    // most of two processors, and the measured times would exceed the limits below if another program used half a
    // processor.
    const PER_SECOND: u32 = 400;
    const LENGTH: Duration = Duration::from_secs(20);
    let _turn = exclusive().await;
    let mut fixture = Fixture::with_default_deadlines(&[]).await;
    // Half of the requests use 20 hot keys, and half use 20 cold keys. Ten times a second, the load moves to 20 other
    // cold keys, which no check has used before.
    let mut hot = fixture.keys(18).await;
    hot.extend([fixture.revoked_key().await, fixture.revoked_key().await]);
    let mut cold = fixture.keys(200 * 20).await;
    cold.iter_mut().step_by(20).for_each(|case| *case = KeyCase { key: made_up_key(), trust_id: None });
    let (one, other) = (fixture.test_config.serve().await, fixture.test_config.serve().await);
    let envoy = Envoy::start(http::application().await, &[one.grpc(), other.grpc()]).await;

    let mut number = 0;
    let aim = move |due: Duration| {
        number += 1;
        let of_twenty = number / 2 % 20;
        if number % 2 == 0 {
            hot[of_twenty].clone()
        } else {
            let tenth = usize::try_from(due.as_millis() / 100).unwrap();
            cold[tenth * 20 + of_twenty].clone()
        }
    };
    let start = Instant::now();
    let firing = tokio::spawn(load::send_requests(envoy.address(), PER_SECOND, LENGTH, aim));
    let at = |seconds| sleep_until(start + Duration::from_secs(seconds));

    at(3).await;
    fixture.redis.kill();
    at(7).await;
    fixture.redis.resume().await;
    at(10).await;
    let frozen = fixture.redis.freeze();
    let mut new_keys = Vec::new();
    for half_second in 21..31 {
        sleep_until(start + Duration::from_millis(500) * half_second).await;
        let new = fixture.test_config.issue("globex", &[]).await;
        let asked = Instant::now();
        let answer = envoy.get("/new", &[("x-api-key", &new.key)]).await;
        new_keys.push(Sample::new(asked, Instant::now(), asked.elapsed()));
        assert_eq!((answer.status, answer.saw("x-trust-id")), (200, Some(new.trust_id)));
    }
    at(16).await;
    drop(frozen);
    let hits = firing.await.unwrap();

    for (name, from, to) in
        [("healthy", 0, 3), ("killed", 3, 7), ("restarted", 7, 10), ("hung", 10, 16), ("healthy again", 16, 20)]
    {
        let within = Duration::from_secs(from)..Duration::from_secs(to);
        load::print_times(&format!("Redis {name}"), hits.iter().filter(|hit| within.contains(&hit.due)));
    }
    let slowest = new_keys.iter().map(|sample| sample.value).max().unwrap();
    println!("{} new keys while Redis hangs, the slowest in {slowest:?}", new_keys.len());
    assert_eq!(hits.len(), 8_000);
    for server in [&one, &other] {
        server.log().lines().filter(|line| line.contains("could not be decided")).for_each(|line| println!("{line}"));
    }
    load::assert_expected(hits.iter());
    quick_checks(&envoy.access_log(hits.len() + new_keys.len()).await, hits.len() + new_keys.len());
    let is_slow = |took: &Duration| *took >= Duration::from_millis(200);
    let kept = keep_undisturbed("new keys while Redis hangs", new_keys, is_slow);
    assert!(!kept.iter().any(is_slow), "{kept:?}");

    // Each server has used Redis, has logged the failure of Redis, and uses Redis again.
    for server in [&one, &other] {
        assert!(server.l2("hit").await > 0.0 && server.l2("error").await > 0.0);
        for text in ["redis connection broke", "redis circuit breaker opened", "redis circuit breaker closed"] {
            server.until_logged(text).await;
        }
    }
}

/// How PostgreSQL fails.
enum Loss {
    Killed,
    Hung,
}

#[tokio::test(flavor = "multi_thread")]
async fn with_postgresql_killed_cached_keys_pass_until_the_stale_window_ends() {
    postgresql_lost(Loss::Killed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_postgresql_hung_cached_keys_pass_until_the_stale_window_ends() {
    postgresql_lost(Loss::Hung).await;
}

#[allow(clippy::too_many_lines, reason = "one sequence of steps")]
async fn postgresql_lost(loss: Loss) {
    const LEASE: Duration = Duration::from_secs(1);
    const STALE: Duration = Duration::from_secs(2);
    /// The maximum time from the start of the last lease to the failure: the wait for the next poll plus the poll in
    /// flight.
    const POLL: Duration = Duration::from_millis(250);
    const LENGTH: Duration = Duration::from_secs(7);
    let _turn = exclusive().await;
    let mut fixture = Fixture::with_default_deadlines(&[("freshness.stale_if_unconfirmed", "2s")]).await;
    let (hot, cold) = (fixture.keys(20).await, fixture.keys(800).await);
    let revoked = fixture.revoked_key().await;
    let server = fixture.test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    assert_eq!(client.check(&revoked.key).await.status, 401);
    let envoy = Envoy::start(http::application().await, &[server.grpc()]).await;

    for case in &hot {
        assert_eq!(envoy.get("/", &[("x-api-key", &case.key)]).await.status, 200);
    }
    // Half of the requests use the hot keys in turn. Each of the other requests uses a cold key that no check has used
    // before.
    let (hot_keys, mut new, mut number) = (hot.clone(), cold.clone().into_iter(), 0);
    let aim = move |_| {
        number += 1;
        if number % 2 == 0 { hot_keys[number / 2 % 20].clone() } else { new.next().unwrap() }
    };
    let start = Instant::now();
    let firing = tokio::spawn(load::send_requests(envoy.address(), 200, LENGTH, aim));
    sleep_until(start + Duration::from_secs(1)).await;
    let losing = Instant::now();
    let frozen = match loss {
        Loss::Killed => {
            fixture.postgres.stop();
            None
        }
        Loss::Hung => Some(fixture.postgres.freeze()),
    };
    let gone = Instant::now();
    let mut reported_stale = false;
    while start.elapsed() < LENGTH {
        let readiness = server.readiness().await;
        assert_eq!(readiness.status, 200, "{readiness:?}");
        if readiness.body.contains("lease: stale; keys that were valid are still granted") {
            reported_stale = true;
            assert_eq!(client.check(&revoked.key).await.status, 503, "a cached denial was served in the stale window");
        }
        assert!(server.is_running(), "{}", server.log());
        sleep(Duration::from_millis(100)).await;
    }
    assert!(reported_stale, "{:?}", server.readiness().await);
    let hits = firing.await.unwrap();

    let is_hot = |hit: &&LoadResult| hot.iter().any(|case| case.key == hit.case.key);
    let due = |hit: &LoadResult| start + hit.due;
    let answered = |hit: &LoadResult| start + hit.due + hit.took;
    let before_failure: Vec<_> = hits.iter().filter(|hit| answered(hit) < losing).collect();
    let cached: Vec<_> =
        hits.iter().filter(is_hot).filter(|hit| answered(hit) < losing + LEASE + STALE - POLL).collect();
    let after_stale: Vec<_> = hits.iter().filter(is_hot).filter(|hit| due(hit) > gone + LEASE + STALE).collect();
    let uncached: Vec<_> = hits.iter().filter(|hit| !is_hot(hit) && due(hit) > gone).collect();
    for (name, hits) in [
        ("up", &before_failure),
        ("down, cached", &cached),
        ("down, stale window over", &after_stale),
        ("down, uncached", &uncached),
    ] {
        load::print_times(&format!("PostgreSQL {name}"), hits.iter().copied());
        assert!(hits.len() > 100, "{name}: only {} requests", hits.len());
    }
    load::assert_expected(before_failure.into_iter().chain(cached));
    let wrong: Vec<_> = after_stale.into_iter().chain(uncached).filter(|hit| !hit.is_fault()).take(5).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    quick_checks(&envoy.access_log(20 + hits.len()).await, 20 + hits.len());
    let fault = envoy.get("/", &[("x-api-key", &hot[0].key)]).await;
    assert_eq!((fault.status, fault.headers["retry-after"].as_str()), (503, "1"), "{fault:?}");
    match frozen {
        Some(frozen) => drop(frozen),
        None => fixture.postgres.resume().await,
    }
    eventually("the database is used again", PATIENCE, || async {
        envoy.get("/", &[("x-api-key", &hot[0].key)]).await.saw_or_none("x-trust-id") == hot[0].trust_id
    })
    .await;
    let is_ok = || async { server.readiness().await.body.contains("database: ok") };
    eventually("/readyz reports the database as ok", PATIENCE, is_ok).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_started_with_redis_and_postgresql_down_serves_within_a_second_of_their_return() {
    let _turn = exclusive().await;
    let mut fixture = Fixture::with_default_deadlines(&[]).await;
    let case = fixture.keys(1).await.remove(0);
    fixture.redis.kill();
    fixture.postgres.stop();
    let server = fixture.test_config.listening().await;
    let client = CheckClient::connect(server.grpc()).await;
    not_ready(&server, &client, &case).await;
    server.until_logged("redis connection failed").await;

    fixture.redis.resume().await;
    not_ready(&server, &client, &case).await;
    fixture.postgres.resume().await;
    serves_within_a_second(&server, &client, &case).await;
    eventually("Redis is used", PATIENCE, || async { server.metric("trustgate_redis_up").await > 0.0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_started_with_redis_and_postgresql_hung_serves_within_a_second_of_their_return() {
    let _turn = exclusive().await;
    let fixture = Fixture::with_default_deadlines(&[]).await;
    let case = fixture.keys(1).await.remove(0);
    let (redis, postgres) = (fixture.redis.freeze(), fixture.postgres.freeze());
    let server = fixture.test_config.listening().await;
    let client = CheckClient::connect(server.grpc()).await;
    not_ready(&server, &client, &case).await;
    server.until_logged("redis connection failed").await;

    drop((redis, postgres));
    serves_within_a_second(&server, &client, &case).await;
    eventually("Redis is used", PATIENCE, || async { server.metric("trustgate_redis_up").await > 0.0 }).await;
}

/// Asserts that the server runs, is not ready, reports the reason, and answers checks with faults.
async fn not_ready(server: &Server, client: &CheckClient, case: &KeyCase) {
    let readiness = server.readiness().await;
    assert_eq!(readiness.status, 503, "{readiness:?}");
    assert!(readiness.body.contains("starting") && readiness.body.contains("see the log for the reason"));
    assert_eq!(http::get(server.admin(), "/livez", &[]).await.status, 200);
    server.until_logged("database not usable yet").await;
    let verdict = client.check(&case.key).await;
    assert_eq!((verdict.status, verdict.reason.as_deref()), (503, Some("fault")));
}

/// Asserts that the server grants the key and is ready within a second, plus a margin for a pause of the machine.
async fn serves_within_a_second(server: &Server, client: &CheckClient, case: &KeyCase) {
    let back = Instant::now();
    eventually("a key is granted", PATIENCE, || async { client.check(&case.key).await.trust_id == case.trust_id })
        .await;
    eventually("the server is ready", PATIENCE, || async { server.readiness().await.status == 200 }).await;
    let took = back.elapsed();
    println!("serving {took:?} after Redis and PostgreSQL returned");
    assert!(took < Duration::from_secs(1) + PAUSE_MARGIN, "{took:?}\n{}", server.log());
}

/// Asserts that `count` requests in the access log had a check, and that no check took longer than [`CHECK_MAX`]. A
/// longer check is excused if the machine was disturbed during the check.
fn quick_checks(log: &[Value], count: usize) {
    let check = |line: &Value| {
        let began = OffsetDateTime::parse(line["time"].as_str()?, &Rfc3339).ok()?;
        Some((machine::moment(began.into()), Duration::from_micros(line["check_us"].as_str()?.parse().ok()?)))
    };
    let checks: Vec<_> = log.iter().filter_map(check).collect();
    assert_eq!(checks.len(), count, "some requests had no check");
    let mut took: Vec<_> = checks.iter().map(|(_, took)| *took).collect();
    took.sort();
    load::print_quantiles("checks", &took);
    let samples = checks.iter().map(|(began, took)| Sample::new(*began, *began + *took, *took));
    let is_slow = |took: &Duration| *took > CHECK_MAX;
    let kept = keep_undisturbed("checks in the access log", samples, is_slow);
    assert!(!kept.iter().any(is_slow), "the longest checks took {:?}", &took[count - 5..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_mac_key_the_server_decides_checks_without_redis() {
    let _turn = shared().await;
    let fixture = Fixture::with_default_deadlines(&[]).await;
    fixture.postgres.execute(&fixture.database, "DELETE FROM trustgate.setting WHERE name = 'redis_mac_key'").await;
    let key = fixture.test_config.issue("acme", &[]).await;
    let server = fixture.test_config.serve().await;
    assert_eq!(CheckClient::connect(server.grpc()).await.check(&key.key).await.status, 200);
    server.until_logged("redis cache disabled").await;
    let used = server.metric("trustgate_cache_lookups_total{kind=\"api_key\",outcome=\"hit\",tier=\"l2\"}").await;
    assert!(used < 1.0, "{used}");
}
