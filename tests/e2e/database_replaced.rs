//! Changes to the database that bypass the change log: a restored copy, a standby promoted too early, a standby in
//! place of the primary, disabled triggers, and a replaced SQLite file. The server must detect each of these changes,
//! and must then grant no key from data that it read before the change. Also tests writes to SQLite by other programs.

use std::{path::Path, time::Duration};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use sqlx::{AssertSqlSafe, Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::time::{Instant, sleep, sleep_until};

use crate::{
    fixture::Fixture,
    support::{
        eventually, exclusive,
        forward::Forwarder,
        grpc::{CheckClient, granted, is_serving, refused},
        machine::PAUSE_MARGIN,
        postgres::Postgres,
        probe::{Probe, Probing, granted_after},
        server::{IssuedKey, Server, TestConfig, digest},
    },
};

const PATIENCE: Duration = Duration::from_secs(30);
/// The maximum time for which a revoked key may still be granted if only polls detect the revocation. The tests add
/// [`PAUSE_MARGIN`], because the machine may be paused between two polls.
const BY_POLLING: Duration = Duration::from_millis(400);
/// The maximum time for which a revoked key may still be granted in any of these tests while a database answers.
const AT_WORST: Duration = Duration::from_millis(1_200);

// === a new primary that lacks the newest changes ===

/// How the new primary was created, and therefore why it lacks the newest changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// A restored copy of the data directory. The database cluster, the timeline and the incarnation are the same as
    /// before; only the version nonces differ.
    RestoredCopy,
    /// A standby that was promoted before it had replicated the changes.
    PromotedStandby,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_copy_is_detected_even_if_version_numbers_match() {
    lose_changes(Origin::RestoredCopy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_promoted_too_early_is_detected_even_if_version_numbers_match() {
    lose_changes(Origin::PromotedStandby).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_started_on_a_restored_copy_grant_nothing_from_older_redis_values() {
    lose_changes_and_restart(Origin::RestoredCopy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_started_on_a_standby_promoted_too_early_grant_nothing_from_older_redis_values() {
    lose_changes_and_restart(Origin::PromotedStandby).await;
}

/// The setup of a failover that loses changes: the servers, the configuration and the keys.
struct FailoverWithLoss {
    fixture: Fixture,
    /// The port through which the replicas connect to the database.
    forwarder: Forwarder,
    origin: Origin,
    standby: Option<Postgres>,
    /// The newest version that both primaries have.
    fork: i64,
    /// Revoked keys whose revocations the new primary lacks.
    lost: [IssuedKey; 3],
    /// A key that the new primary lacks, because it was issued after `fork`.
    missing: Option<IssuedKey>,
    /// A key that is revoked on the new primary only.
    revoked_later: IssuedKey,
    good: IssuedKey,
}

impl FailoverWithLoss {
    /// Starts PostgreSQL and Redis, issues keys, and makes the copy or the standby that will become the new primary.
    async fn new(origin: Origin) -> Self {
        let mut fixture = Fixture::new(&[]).await;
        let issue = async || fixture.test_config.issue("acme", &[]).await;
        let lost = [issue().await, issue().await, issue().await];
        let (revoked_later, good) = (issue().await, issue().await);
        let fork = newest(&fixture.postgres, &fixture.database).await;
        let standby = match origin {
            Origin::RestoredCopy => {
                fixture.postgres.back_up().await;
                None
            }
            Origin::PromotedStandby => {
                let standby = fixture.postgres.standby().await;
                standby.cut_replication().await;
                Some(standby)
            }
        };
        let forwarder = Forwarder::start(fixture.postgres.socket()).await;
        fixture.test_config.set("store.management_url", fixture.postgres.url("admin", &fixture.database));
        fixture.test_config.set("store.url", forwarder.url("admin", &fixture.database));
        Self { fixture, forwarder, origin, standby, fork, lost, missing: None, revoked_later, good }
    }

    /// Makes the changes that the new primary will lack. Waits until each replica has applied the changes and Redis has
    /// values with the newest version.
    async fn make_changes(&mut self, replicas: &[(Server, CheckClient)]) {
        for (_, client) in replicas {
            for key in self.lost.iter().chain([&self.good]) {
                granted(client, key).await;
            }
        }
        let missing = self.fixture.test_config.issue("globex", &[]).await;
        for key in &self.lost {
            self.fixture.postgres.execute(&self.fixture.database, &revocation(key)).await;
        }
        let newest = newest(&self.fixture.postgres, &self.fixture.database).await;
        assert!(newest >= self.fork + 4, "{newest}");
        for (server, client) in replicas {
            eventually("the changes are applied", PATIENCE, || async {
                server.metric("trustgate_applied_version").await >= f64::from(i32::try_from(newest).unwrap())
            })
            .await;
            for key in &self.lost {
                refused(client, key, "revoked").await;
            }
            granted(client, &missing).await;
            // No check has used this key before, so the cached value has the newest version.
            granted(client, &self.revoked_later).await;
        }
        for key in [&missing, &self.revoked_later] {
            eventually("the value is in Redis", PATIENCE, || self.is_in_redis(key)).await;
        }
        self.missing = Some(missing);
    }

    async fn is_in_redis(&self, key: &IssuedKey) -> bool {
        let mut connection = self.fixture.redis.connection().await;
        let pattern = format!("*{}*", digest(&key.key));
        let names: Vec<String> = redis::cmd("KEYS").arg(pattern).query_async(&mut connection).await.unwrap();
        !names.is_empty()
    }

    /// Stops the old primary and starts the new primary, which lacks the changes after `fork`. Makes an equal number of
    /// other changes on the new primary, so that the newest version has the same number on both primaries.
    async fn replace_primary(&mut self) {
        let database = &self.fixture.database;
        let newest_before = newest(&self.fixture.postgres, database).await;
        self.forwarder.cut();
        self.fixture.postgres.stop();
        match &self.standby {
            None => self.fixture.postgres.restore().await,
            Some(standby) => standby.promote().await,
        }
        let primary = self.standby.as_ref().unwrap_or(&self.fixture.postgres);
        assert_eq!(newest(primary, database).await, self.fork);
        let sequence = "SELECT format('%I.%I', schemaname, sequencename) FROM pg_sequences
            WHERE schemaname = 'trustgate' AND sequencename LIKE '%version%'";
        let sequence: String = primary.value(database, sequence).await;
        // After a crash, PostgreSQL may continue a sequence at a higher number, so reset the sequence.
        let set: i64 = primary.value(database, &format!("SELECT setval('{sequence}', {})", self.fork)).await;
        assert_eq!(set, self.fork);
        primary.execute(database, &revocation(&self.revoked_later)).await;
        for number in newest(primary, database).await..newest_before {
            let other = format!("{{\"{number}\"}}");
            let id = &self.good.id;
            primary
                .execute(database, &format!("UPDATE trustgate.api_key SET scopes = '{other}' WHERE id = '{id}'"))
                .await;
        }
        assert_eq!(newest(primary, database).await, newest_before, "{:?}", self.origin);
        let unrevoked: i64 =
            primary.value(database, "SELECT count(*) FROM trustgate.api_key WHERE revoked_at IS NULL").await;
        assert_eq!(unrevoked, 4, "the new primary has one revocation, and no key that was issued after the fork");
        self.fixture.test_config.set("store.management_url", primary.url("admin", database));
    }

    fn primary(&self) -> &Postgres {
        self.standby.as_ref().unwrap_or(&self.fixture.postgres)
    }

    async fn replica(&self) -> (Server, CheckClient) {
        let server = self.fixture.test_config.serve().await;
        let client = CheckClient::connect(server.grpc()).await;
        (server, client)
    }

    fn missing(&self) -> &IssuedKey {
        self.missing.as_ref().unwrap()
    }
}

async fn lose_changes(origin: Origin) {
    let _turn = exclusive().await;
    let mut setup = FailoverWithLoss::new(origin).await;
    let replicas = [setup.replica().await, setup.replica().await];
    setup.make_changes(&replicas).await;

    let probing: Vec<_> = replicas
        .iter()
        .map(|(_, client)| {
            let lost = Probing::start(client, 150, texts(&setup.lost), &[]);
            let denied = Probing::start(client, 100, texts([setup.missing(), &setup.revoked_later]), &[]);
            (lost, denied)
        })
        .collect();
    setup.replace_primary().await;
    let switched = Instant::now();
    setup.forwarder.forward_to(setup.primary().socket());
    for (server, _) in &replicas {
        eventually("the loss is detected", PATIENCE, || async {
            server.metric("trustgate_lost_history_total").await > 0.0
        })
        .await;
        let took = switched.elapsed();
        println!("{origin:?}: detected {took:?} after the new primary became reachable");
        assert!(took <= Duration::from_secs(1) + PAUSE_MARGIN, "{took:?}");
    }
    for (server, client) in &replicas {
        eventually("the lease is fresh again", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
        // Wait for the circuit breaker: reads failed while the primary was unreachable, so the breaker may stay open
        // for up to 250 ms.
        let is_granted = || async { client.check(&setup.good.key).await.status == 200 };
        eventually("a valid key is granted", PATIENCE, is_granted).await;
    }
    sleep_until(switched + Duration::from_secs(3)).await;
    for ((_, client), (lost, denied)) in replicas.iter().zip(probing) {
        let (lost, denied) = (lost.stop().await, denied.stop().await);
        // A replica that applied a revocation keeps denying the key, although the new primary lacks the revocation.
        let wrong: Vec<_> = lost.iter().filter(|probe| probe.is_grant()).collect();
        assert!(wrong.is_empty(), "{} grants of a revoked key; the first: {:?}", wrong.len(), wrong[0]);
        for key in &setup.lost {
            assert_eq!(client.check(&key.key).await.status, 401);
        }
        // Soon after a replica can reach the new primary, it denies the keys that the new primary denies.
        assert!(denied.iter().any(|probe| probe.began < switched && probe.is_grant()), "no key was granted before");
        let late = granted_after(switched, &denied);
        println!("{origin:?}: last wrong grant began {late:?} after the new primary became reachable");
        // Add a margin: the stale window may be open, so the lease does not limit this time, and a pause of the machine
        // can delay the next poll.
        assert!(late <= AT_WORST + PAUSE_MARGIN, "{late:?}");
        refused(client, setup.missing(), "unknown").await;
        refused(client, &setup.revoked_later, "revoked").await;
    }

    // Once the new primary records a change to one of these keys, the row on the new primary decides again.
    let id = &setup.lost[0].id;
    let change = format!("UPDATE trustgate.api_key SET scopes = '{{again}}' WHERE id = '{id}'");
    setup.primary().execute(&setup.fixture.database, &change).await;
    for (_, client) in &replicas {
        let is_granted = || async { client.check(&setup.lost[0].key).await.status == 200 };
        eventually("the key is granted again", PATIENCE, is_granted).await;
        assert_eq!(client.check(&setup.lost[1].key).await.status, 401);
    }
}

/// Replaces the replicas with new replicas on the new primary. The new replicas do not know the lost revocations, so
/// they may grant those keys. They must not grant a key that the new primary denies, even though Redis still has an
/// older value for that key.
async fn lose_changes_and_restart(origin: Origin) {
    let _turn = exclusive().await;
    let mut setup = FailoverWithLoss::new(origin).await;
    let replicas = [setup.replica().await, setup.replica().await];
    setup.make_changes(&replicas).await;
    setup.forwarder.cut();
    drop(replicas);
    setup.replace_primary().await;
    for key in [setup.missing(), &setup.revoked_later] {
        assert!(setup.is_in_redis(key).await, "Redis lost the value");
    }

    let test_config = &setup.fixture.test_config;
    let servers = [test_config.listening().await, test_config.listening().await];
    let mut probing = Vec::new();
    for server in &servers {
        let client = CheckClient::connect(server.grpc()).await;
        probing.push((Probing::start(&client, 200, texts([setup.missing(), &setup.revoked_later]), &[]), client));
    }
    setup.forwarder.forward_to(setup.primary().socket());
    for server in &servers {
        server.until_ready().await;
    }
    sleep(Duration::from_secs(2)).await;
    for ((probing, client), server) in probing.into_iter().zip(&servers) {
        let probes = probing.stop().await;
        let wrong: Vec<_> = probes.iter().filter(|probe| probe.is_grant()).collect();
        assert!(wrong.is_empty(), "{} grants that the database denies; the first: {:?}", wrong.len(), wrong[0]);
        assert!(probes.iter().filter(|probe| probe.status() == Some(401)).count() > 200);
        refused(&client, setup.missing(), "unknown").await;
        refused(&client, &setup.revoked_later, "revoked").await;
        granted(&client, &setup.good).await;
        let (hit, refused, miss) = (server.l2("hit").await, server.l2("refused").await, server.l2("miss").await);
        println!("{origin:?}: look-ups in Redis after the restart: {hit} hits, {refused} refused, {miss} misses");
    }
}

// === a standby in place of the primary ===

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_started_on_a_standby_grants_nothing_until_the_standby_is_promoted() {
    let _turn = exclusive().await;
    let mut fixture = Fixture::new(&[]).await;
    let key = fixture.test_config.issue("acme", &[]).await;
    let standby = fixture.postgres.standby().await;
    fixture.test_config.set("store.url", standby.url("admin", &fixture.database));
    let server = fixture.test_config.listening().await;
    let client = CheckClient::connect(server.grpc()).await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        let verdict = client.check(&key.key).await;
        assert_eq!((verdict.status, verdict.reason.as_deref()), (503, Some("fault")));
        assert_eq!(server.readiness().await.status, 503);
        assert!(!is_serving(server.grpc(), "").await && !is_serving(server.grpc(), "trustgate.fresh").await);
        sleep(Duration::from_millis(50)).await;
    }
    fixture.postgres.stop();
    standby.promote().await;
    server.until_ready().await;
    // The failed reads opened the circuit breaker, which may stay open for a moment.
    eventually("the key is granted", PATIENCE, || async { client.check(&key.key).await.status == 200 }).await;
    eventually("the lease is fresh", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_switched_to_a_standby_loses_its_lease_and_opens_no_stale_window() {
    let _turn = exclusive().await;
    let mut fixture = Fixture::new(&[]).await;
    let (revoked, good) = (fixture.test_config.issue("acme", &[]).await, fixture.test_config.issue("acme", &[]).await);
    let standby = fixture.postgres.standby().await;
    standby.cut_replication().await;
    let forwarder = Forwarder::start(fixture.postgres.socket()).await;
    fixture.test_config.set("store.management_url", fixture.postgres.url("admin", &fixture.database));
    fixture.test_config.set("store.url", forwarder.url("admin", &fixture.database));
    let server = fixture.test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    for key in [&revoked, &good] {
        granted(&client, key).await;
    }
    let probing = Probing::start(&client, 200, texts([&revoked, &good]), &[]);
    sleep(Duration::from_millis(300)).await;
    forwarder.forward_to(standby.socket());
    let switched = Instant::now();
    fixture.postgres.execute(&fixture.database, &revocation(&revoked)).await;
    sleep(AT_WORST).await;
    while switched.elapsed() < Duration::from_secs(3) {
        assert!(!is_serving(server.grpc(), "trustgate.fresh").await);
        assert_eq!(server.readiness().await.status, 200);
        sleep(Duration::from_millis(50)).await;
    }
    let back = Instant::now();
    forwarder.forward_to(fixture.postgres.socket());
    eventually("the lease is fresh again", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
    println!("lease fresh {:?} after the primary was back", back.elapsed());
    sleep(Duration::from_millis(500)).await;
    let probes = probing.stop().await;
    let at_standby: Vec<_> = probes.iter().filter(|probe| probe.began < back).collect();
    let late = granted_after(switched, at_standby.iter().copied());
    println!("last grant began {late:?} after the switch to a standby");
    assert!(late <= AT_WORST, "{late:?}");
    let of_revoked = probes.iter().filter(|probe| probe.key == 0 && probe.began >= back);
    assert!(!of_revoked.clone().any(Probe::is_grant));
    refused(&client, &revoked, "revoked").await;
    granted(&client, &good).await;
}

// === triggers ===

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_trigger_ends_the_lease_until_it_is_enabled_again() {
    let _turn = exclusive().await;
    let fixture = Fixture::new(&[]).await;
    let database = fixture.database.as_str();
    let issue = async || fixture.test_config.issue("acme", &[]).await;
    let (revoked_with, revoked_after, good) = (issue().await, issue().await, issue().await);
    let server = fixture.test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    for key in [&revoked_with, &revoked_after, &good] {
        granted(&client, key).await;
    }
    let triggers = "SELECT string_agg(format('ALTER TABLE trustgate.api_key ENABLE ALWAYS TRIGGER %I', tgname), ';')
        FROM pg_trigger WHERE tgrelid = 'trustgate.api_key'::regclass AND NOT tgisinternal";
    let enable_all: String = fixture.postgres.value(database, triggers).await;
    let before = newest(&fixture.postgres, database).await;
    let probing = Probing::start(&client, 600, texts([&revoked_with, &revoked_after, &good]), &[]);
    sleep(Duration::from_millis(300)).await;

    // Disable the triggers and revoke the key in one transaction, so that no poll can run between the two changes.
    let at_once =
        format!("BEGIN; ALTER TABLE trustgate.api_key DISABLE TRIGGER USER; {}; COMMIT", revocation(&revoked_with));
    fixture.postgres.execute(database, &at_once).await;
    let disabled = Instant::now();
    eventually("the lease ends", PATIENCE, || async { !is_serving(server.grpc(), "trustgate.fresh").await }).await;
    println!("the lease ended {:?} after the trigger was disabled", disabled.elapsed());
    sleep_until(disabled + BY_POLLING).await;
    fixture.postgres.execute(database, &revocation(&revoked_after)).await;
    let revoked = Instant::now();
    assert_eq!(newest(&fixture.postgres, database).await, before, "the revocation got a version");
    while disabled.elapsed() < Duration::from_secs(2) {
        assert!(!is_serving(server.grpc(), "trustgate.fresh").await);
        assert_eq!(server.readiness().await.status, 200);
        sleep(Duration::from_millis(50)).await;
    }
    refused(&client, &revoked_with, "revoked").await;
    refused(&client, &revoked_after, "revoked").await;
    granted(&client, &good).await; // without a lease, this check reads the database

    fixture.postgres.execute(database, &enable_all).await;
    let enabled = Instant::now();
    eventually("the lease is fresh again", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
    println!("lease fresh {:?} after the trigger was enabled", enabled.elapsed());
    assert!(newest(&fixture.postgres, database).await > before, "the server recorded no new version");
    sleep(Duration::from_millis(500)).await;
    let probes = probing.stop().await;
    let of = |key: usize| probes.iter().filter(move |probe| probe.key == key);
    let (late, late_after) = (granted_after(disabled, of(0)), granted_after(revoked, of(1)));
    println!("last grant began {late:?} after the commit that disabled the trigger, {late_after:?} after a later one");
    assert!(late <= BY_POLLING + PAUSE_MARGIN, "{late:?}");
    assert_eq!(late_after, Duration::ZERO, "a cached value was granted without a lease");
    assert!(of(2).all(|probe| probe.is_grant() || probe.is_fault()));
    refused(&client, &revoked_with, "revoked").await;
    granted_without_reads(&server, &client, &good).await;

    // `migrate` recreates a dropped trigger.
    let drop_one = "DO $$ DECLARE name text; BEGIN
        SELECT tgname INTO STRICT name FROM pg_trigger
        WHERE tgrelid = 'trustgate.api_key'::regclass AND NOT tgisinternal ORDER BY tgname LIMIT 1;
        EXECUTE format('DROP TRIGGER %I ON trustgate.api_key', name); END $$";
    fixture.postgres.execute(database, drop_one).await;
    eventually("the lease ends", PATIENCE, || async { !is_serving(server.grpc(), "trustgate.fresh").await }).await;
    fixture.test_config.migrate().await;
    eventually("the lease is fresh again", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
    fixture.postgres.execute(database, &revocation(&good)).await;
    sleep(BY_POLLING).await;
    refused(&client, &good, "revoked").await;
}

/// Asserts that the server grants a cached key without reading the database.
async fn granted_without_reads(server: &Server, client: &CheckClient, key: &IssuedKey) {
    granted(client, key).await;
    let reads = async || server.metric("trustgate_store_reads_total{outcome=\"ok\"}").await;
    let before = reads().await;
    for _ in 0..50 {
        granted(client, key).await;
    }
    let read = reads().await - before;
    assert!(read < 1.0, "{read} reads");
}

// === SQLite ===

/// Changes that another program makes to the key with the digest `{digest}`. Each entry has a name, the reason for the
/// expected denial, and the SQL. The other program does not enforce foreign keys.
const STATEMENTS: &[(&str, &str, &str)] = &[
    ("UPDATE", "revoked", "UPDATE api_key SET revoked_at = created_at WHERE digest = {digest}"),
    ("DELETE", "unknown", "DELETE FROM api_key WHERE digest = {digest}"),
    (
        "REPLACE by id",
        "unknown",
        "INSERT OR REPLACE INTO api_key (id, trust_id, digest, scheme, hint, created_at)
         SELECT id, trust_id, randomblob(32), scheme, hint, created_at FROM api_key WHERE digest = {digest}",
    ),
    (
        "REPLACE by digest",
        "revoked",
        "INSERT OR REPLACE INTO api_key (id, trust_id, digest, scheme, hint, created_at, revoked_at)
         SELECT '01234567-89ab-4cde-8f01-23456789abcd', trust_id, digest, scheme, hint, created_at, created_at
         FROM api_key WHERE digest = {digest}",
    ),
    (
        "UPDATE OR REPLACE of an id",
        "revoked",
        "UPDATE OR REPLACE api_key SET id = '11234567-89ab-4cde-8f01-23456789abcd', revoked_at = created_at
         WHERE digest = {digest}",
    ),
    (
        "UPDATE of a trust",
        "trust_disabled",
        "UPDATE trust SET enabled = 0 WHERE id = (SELECT trust_id FROM api_key WHERE digest = {digest})",
    ),
    (
        "REPLACE of a trust by name",
        "unknown",
        "INSERT OR REPLACE INTO trust (id, name, created_at)
         SELECT '21234567-89ab-4cde-8f01-23456789abcd', name, created_at FROM trust
         WHERE id = (SELECT trust_id FROM api_key WHERE digest = {digest})",
    ),
    (
        "two statements in one transaction",
        "unknown",
        "BEGIN IMMEDIATE; CREATE TABLE aside AS SELECT * FROM api_key WHERE digest = {digest};
         DELETE FROM api_key WHERE digest = {digest}; COMMIT",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn on_sqlite_writes_by_another_program_take_effect_within_the_bound() {
    let _turn = exclusive().await;
    let test_config = TestConfig::new();
    test_config.migrate().await;
    let server = test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    let file = test_config.path().join("trustgate.db");
    let mut late = Vec::new();
    for (name, reason, statement) in STATEMENTS {
        test_config.trust(name).await;
        let key = test_config.issue(name, &[]).await;
        let probing = Probing::start(&client, 250, texts([&key]), &[]);
        sleep(Duration::from_millis(200)).await;
        let mut other_program = sqlite(&file).await;
        let digest = format!("x'{}'", digest(&key.key));
        let statement = statement.replace("{digest}", &digest);
        sqlx::raw_sql(AssertSqlSafe(statement.as_str())).execute(&mut other_program).await.unwrap();
        let committed = Instant::now();
        other_program.close().await.unwrap();
        sleep(Duration::from_millis(800)).await;
        let probes = probing.stop().await;
        assert!(probes.iter().any(|probe| probe.began < committed && probe.is_grant()), "{name}: not granted before");
        let last = granted_after(committed, &probes);
        println!("SQLite, {name} by another program: last grant began {last:?} after the commit");
        refused(&client, &key, reason).await;
        late.push((name, last));
    }
    assert!(late.iter().all(|(_, late)| *late <= BY_POLLING + PAUSE_MARGIN), "{late:?}");

    // `key revoke` is also a separate program. It exits once the server has applied the change.
    test_config.trust("acme").await;
    let key = test_config.issue("acme", &[]).await;
    granted(&client, &key).await;
    let answer = test_config.json(&["key", "revoke", &key.id]).await;
    refused(&client, &key, "revoked").await;
    let effect = &answer["effect"];
    assert_eq!((&effect["replicas"], &effect["applied"]), (&1.into(), &1.into()), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn on_sqlite_dropped_triggers_end_the_lease() {
    let _turn = exclusive().await;
    let test_config = TestConfig::new();
    test_config.migrate().await;
    test_config.trust("acme").await;
    let (revoked, good) = (test_config.issue("acme", &[]).await, test_config.issue("acme", &[]).await);
    let server = test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    for key in [&revoked, &good] {
        granted(&client, key).await;
    }
    let probing = Probing::start(&client, 200, texts([&revoked]), &[]);
    sleep(Duration::from_millis(200)).await;
    let mut other_program = sqlite(&test_config.path().join("trustgate.db")).await;
    let all = "SELECT group_concat(format('DROP TRIGGER \"%w\"', name), ';') FROM sqlite_schema
        WHERE type = 'trigger' AND tbl_name = 'api_key'";
    let drop_all: String = sqlx::query_scalar(all).fetch_one(&mut other_program).await.unwrap();
    let revocation = format!("UPDATE api_key SET revoked_at = created_at WHERE id = '{}'", revoked.id);
    let at_once = format!("BEGIN IMMEDIATE; {drop_all}; {revocation}; COMMIT");
    sqlx::raw_sql(AssertSqlSafe(at_once)).execute(&mut other_program).await.unwrap();
    let committed = Instant::now();
    other_program.close().await.unwrap();
    sleep(Duration::from_millis(1_500)).await;
    let late = granted_after(committed, &probing.stop().await);
    println!("SQLite: last grant began {late:?} after the commit that dropped the triggers");
    assert!(late <= BY_POLLING + PAUSE_MARGIN, "{late:?}");
    refused(&client, &revoked, "revoked").await;
    granted(&client, &good).await;
    assert!(!is_serving(server.grpc(), "trustgate.fresh").await);
    assert_eq!(server.readiness().await.status, 200);
    test_config.migrate().await;
    eventually("the lease is fresh again", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
    refused(&client, &revoked, "revoked").await;
    granted_without_reads(&server, &client, &good).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_sqlite_a_replaced_database_file_is_detected() {
    let _turn = exclusive().await;
    let mut test_config = TestConfig::new();
    let (ours, theirs) = (test_config.path().join("ours"), test_config.path().join("theirs"));
    let file = ours.join("trustgate.db");
    test_config.set("store.url", format!("sqlite://{}", file.display()));
    test_config.migrate().await;
    test_config.trust("acme").await;
    let issue = async || test_config.issue("acme", &[]).await;
    let (revoked, lost, good) = (issue().await, issue().await, issue().await);
    // Revoke one key in a copy of the database. Below, the test revokes another key in the original, so the copy lacks
    // that revocation.
    std::fs::create_dir(&theirs).unwrap();
    let copy = theirs.join("trustgate.db");
    let mut other_program = sqlite(&file).await;
    let into = format!("VACUUM INTO '{}'", copy.display());
    sqlx::raw_sql(AssertSqlSafe(into)).execute(&mut other_program).await.unwrap();
    other_program.close().await.unwrap();
    let mut other_program = sqlite(&copy).await;
    let revocation = format!("UPDATE api_key SET revoked_at = created_at WHERE id = '{}'", revoked.id);
    for sql in ["PRAGMA journal_mode = WAL", revocation.as_str()] {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut other_program).await.unwrap();
    }
    other_program.close().await.unwrap();

    let server = test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    for key in [&revoked, &lost, &good] {
        granted(&client, key).await;
    }
    test_config.revoke(&lost).await;
    eventually("the key is denied", PATIENCE, || async { client.check(&lost.key).await.status == 401 }).await;
    let probing = Probing::start(&client, 400, texts([&revoked, &lost]), &[]);
    sleep(Duration::from_millis(200)).await;
    renameat_with(CWD, &theirs, CWD, &ours, RenameFlags::EXCHANGE).unwrap();
    let exchanged = Instant::now();
    let is_noticed = || async { server.metric("trustgate_lost_history_total").await > 0.0 };
    eventually("the replaced file is detected", PATIENCE, is_noticed).await;
    println!("SQLite: replaced file detected after {:?}", exchanged.elapsed());
    eventually("the lease is fresh again", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
    sleep_until(exchanged + Duration::from_secs(2)).await;
    let probes = probing.stop().await;
    let late = granted_after(exchanged, probes.iter().filter(|probe| probe.key == 0));
    println!("SQLite: last grant began {late:?} after the file was replaced");
    assert!(late <= AT_WORST, "{late:?}");
    assert!(!probes.iter().any(|probe| probe.key == 1 && probe.is_grant()), "granted despite the known revocation");
    refused(&client, &revoked, "revoked").await;
    granted(&client, &good).await;
}

async fn sqlite(file: &Path) -> SqliteConnection {
    let options = SqliteConnectOptions::new().filename(file).foreign_keys(false).busy_timeout(Duration::from_secs(5));
    SqliteConnection::connect_with(&options).await.unwrap()
}

// === helpers ===

fn revocation(key: &IssuedKey) -> String {
    format!("UPDATE trustgate.api_key SET revoked_at = now() WHERE id = '{}'", key.id)
}

/// Returns the newest version in the database.
async fn newest(postgres: &Postgres, database: &str) -> i64 {
    postgres.value(database, "SELECT max(version) FROM trustgate.version").await
}

fn texts<'k>(keys: impl IntoIterator<Item = &'k IssuedKey>) -> Vec<String> {
    keys.into_iter().map(|key| key.key.clone()).collect()
}
