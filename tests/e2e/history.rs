//! A database that is not what it was: a copy put back, a standby promoted too early, one asked in its place, triggers
//! disabled, a file replaced. What was read of the other one decides nothing any more, and nothing is missed.

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
        machine,
        postgres::Postgres,
        probe::{Probe, Probing, granted_after},
        server::{IssuedKey, Server, TestConfig, digest},
    },
};

const PATIENCE: Duration = Duration::from_secs(30);
/// How long a revoked key may be granted where polls alone tell of it.
const BY_POLLING: Duration = Duration::from_millis(400);
/// How long whatever happens, as long as a database answers.
const AT_WORST: Duration = Duration::from_millis(1_200);

// === the primary forgets ===

/// Where a primary comes from that does not know the last changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// A copy of the database was put back: the same cluster, timeline and incarnation. Only nonces tell.
    CopyPutBack,
    /// A standby was promoted before it had them.
    StandbyPromoted,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_put_back_is_noticed_at_the_same_version_number() {
    forgotten(Origin::CopyPutBack).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_promoted_too_early_is_noticed_at_the_same_version_number() {
    forgotten(Origin::StandbyPromoted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_started_on_a_copy_put_back_take_nothing_from_before_out_of_redis() {
    forgotten_and_restarted(Origin::CopyPutBack).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_started_on_a_standby_promoted_too_early_take_nothing_from_before_out_of_redis() {
    forgotten_and_restarted(Origin::StandbyPromoted).await;
}

/// A site of which the database forgets.
struct Forgetful {
    fixture: Fixture,
    /// The way of the replicas to the database.
    forwarder: Forwarder,
    origin: Origin,
    standby: Option<Postgres>,
    /// The newest version that the new primary will know of.
    fork: i64,
    /// Revoked, and the new primary does not know it.
    lost: [IssuedKey; 3],
    /// Issued, and the new primary does not know it.
    born: Option<IssuedKey>,
    /// Revoked by the new primary alone.
    doomed: IssuedKey,
    good: IssuedKey,
}

impl Forgetful {
    /// The moment that the new primary will come from.
    async fn new(origin: Origin) -> Self {
        let mut fixture = Fixture::new(&[]).await;
        let issue = async || fixture.test_config.issue("acme", &[]).await;
        let lost = [issue().await, issue().await, issue().await];
        let (doomed, good) = (issue().await, issue().await);
        let fork = newest(&fixture.postgres, &fixture.database).await;
        let standby = match origin {
            Origin::CopyPutBack => {
                fixture.postgres.copy_aside().await;
                None
            }
            Origin::StandbyPromoted => {
                let standby = fixture.postgres.standby().await;
                standby.cut_replication().await;
                Some(standby)
            }
        };
        let forwarder = Forwarder::start(fixture.postgres.socket()).await;
        fixture.test_config.set("store.management_url", fixture.postgres.url("admin", &fixture.database));
        fixture.test_config.set("store.url", forwarder.url("admin", &fixture.database));
        Self { fixture, forwarder, origin, standby, fork, lost, born: None, doomed, good }
    }

    /// What the new primary will not know. Every replica saw it, and Redis holds keys as of its end.
    async fn live_on(&mut self, replicas: &[(Server, CheckClient)]) {
        for (_, client) in replicas {
            for key in self.lost.iter().chain([&self.good]) {
                granted(client, key).await;
            }
        }
        let born = self.fixture.test_config.issue("globex", &[]).await;
        for key in &self.lost {
            self.fixture.postgres.execute(&self.fixture.database, &revocation(key)).await;
        }
        let newest = newest(&self.fixture.postgres, &self.fixture.database).await;
        assert!(newest >= self.fork + 4, "{newest}");
        for (server, client) in replicas {
            eventually("everything is applied", PATIENCE, || async {
                server.metric("trustgate_applied_version").await >= f64::from(i32::try_from(newest).unwrap())
            })
            .await;
            for key in &self.lost {
                refused(client, key, "revoked").await;
            }
            granted(client, &born).await;
            granted(client, &self.doomed).await; // for the first time: as of the newest version
        }
        for key in [&born, &self.doomed] {
            eventually("Redis holds it", PATIENCE, || self.is_in_redis(key)).await;
        }
        self.born = Some(born);
    }

    async fn is_in_redis(&self, key: &IssuedKey) -> bool {
        let mut connection = self.fixture.redis.connection().await;
        let pattern = format!("*{}*", digest(&key.key));
        let names: Vec<String> = redis::cmd("KEYS").arg(pattern).query_async(&mut connection).await.unwrap();
        !names.is_empty()
    }

    /// The new primary takes the place of the old one, which is gone: it does not know what came after the fork, and
    /// as many other changes were made there, so that the number of its newest version is that of the old one.
    async fn forget(&mut self) {
        let database = &self.fixture.database;
        let newest_before = newest(&self.fixture.postgres, database).await;
        self.forwarder.cut();
        self.fixture.postgres.stop();
        match &self.standby {
            None => self.fixture.postgres.put_back().await,
            Some(standby) => standby.promote().await,
        }
        let primary = self.standby.as_ref().unwrap_or(&self.fixture.postgres);
        assert_eq!(newest(primary, database).await, self.fork);
        let sequence = "SELECT format('%I.%I', schemaname, sequencename) FROM pg_sequences
            WHERE schemaname = 'trustgate' AND sequencename LIKE '%version%'";
        let sequence: String = primary.value(database, sequence).await;
        // After a crash a sequence goes on somewhat higher.
        let set: i64 = primary.value(database, &format!("SELECT setval('{sequence}', {})", self.fork)).await;
        assert_eq!(set, self.fork);
        primary.execute(database, &revocation(&self.doomed)).await;
        for number in newest(primary, database).await..newest_before {
            let other = format!("{{\"{number}\"}}");
            let id = &self.good.id;
            primary
                .execute(database, &format!("UPDATE trustgate.api_key SET scopes = '{other}' WHERE id = '{id}'"))
                .await;
        }
        assert_eq!(newest(primary, database).await, newest_before, "{:?}", self.origin);
        let known: i64 =
            primary.value(database, "SELECT count(*) FROM trustgate.api_key WHERE revoked_at IS NULL").await;
        assert_eq!(known, 4, "the new primary knows of no other revocation, and of no key born later");
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

    fn born(&self) -> &IssuedKey {
        self.born.as_ref().unwrap()
    }
}

async fn forgotten(origin: Origin) {
    let _turn = exclusive().await;
    let mut test_config = Forgetful::new(origin).await;
    let replicas = [test_config.replica().await, test_config.replica().await];
    test_config.live_on(&replicas).await;

    let probing: Vec<_> = replicas
        .iter()
        .map(|(_, client)| {
            let lost = Probing::start(client, 150, texts(&test_config.lost), &[]);
            let unlike = Probing::start(client, 100, texts([test_config.born(), &test_config.doomed]), &[]);
            (lost, unlike)
        })
        .collect();
    test_config.forget().await;
    let switched = Instant::now();
    test_config.forwarder.lead_to(test_config.primary().socket());
    for (server, _) in &replicas {
        eventually("it is noticed", PATIENCE, || async { server.metric("trustgate_lost_history_total").await > 0.0 })
            .await;
        let took = machine::elapsed(switched);
        println!("{origin:?}: noticed {took:?} after the new primary could be reached");
        assert!(took <= Duration::from_secs(1), "{took:?}");
    }
    for (server, client) in &replicas {
        eventually("it is fresh again", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
        // Reads that failed while the primary was away have opened the circuit breaker, for 250 ms after the last of them.
        eventually("a good key is granted", PATIENCE, || async {
            client.check(&test_config.good.key).await.status == 200
        })
        .await;
    }
    sleep_until(switched + Duration::from_secs(3)).await;
    for ((_, client), (lost, unlike)) in replicas.iter().zip(probing) {
        let (lost, unlike) = (lost.stop().await, unlike.stop().await);
        // Who saw a revocation remembers it, also where the database has forgotten it.
        let resurrected: Vec<_> = lost.iter().filter(|probe| probe.is_grant()).collect();
        assert!(resurrected.is_empty(), "{} grants of a revoked key: {:?}", resurrected.len(), resurrected[0]);
        for key in &test_config.lost {
            assert_eq!(client.check(&key.key).await.status, 401);
        }
        // What the database of now denies is denied as soon as it can be asked.
        assert!(unlike.iter().any(|probe| probe.began < switched && probe.is_grant()), "nothing was held");
        let late = granted_after(switched, &unlike);
        println!("{origin:?}: last wrong grant began {late:?} after the new primary could be reached");
        assert!(late <= AT_WORST, "{late:?}");
        refused(client, test_config.born(), "unknown").await;
        refused(client, &test_config.doomed, "revoked").await;
    }

    // A change there that names the digest ends the memory of its revocation.
    let id = &test_config.lost[0].id;
    let change = format!("UPDATE trustgate.api_key SET scopes = '{{again}}' WHERE id = '{id}'");
    test_config.primary().execute(&test_config.fixture.database, &change).await;
    for (_, client) in &replicas {
        eventually("it is granted again", PATIENCE, || async {
            client.check(&test_config.lost[0].key).await.status == 200
        })
        .await;
        assert_eq!(client.check(&test_config.lost[1].key).await.status, 401);
    }
}

/// What is wrong here, since nobody is left who saw the revocations: a grant that the database of now denies. Keys that
/// it calls good may be granted, revoked before or not.
async fn forgotten_and_restarted(origin: Origin) {
    let _turn = exclusive().await;
    let mut test_config = Forgetful::new(origin).await;
    let replicas = [test_config.replica().await, test_config.replica().await];
    test_config.live_on(&replicas).await;
    test_config.forwarder.cut();
    drop(replicas);
    test_config.forget().await;
    for key in [test_config.born(), &test_config.doomed] {
        assert!(test_config.is_in_redis(key).await, "Redis was kept");
    }

    let servers =
        [test_config.fixture.test_config.listening().await, test_config.fixture.test_config.listening().await];
    let mut probing = Vec::new();
    for server in &servers {
        let client = CheckClient::connect(server.grpc()).await;
        probing.push((Probing::start(&client, 200, texts([test_config.born(), &test_config.doomed]), &[]), client));
    }
    test_config.forwarder.lead_to(test_config.primary().socket());
    for server in &servers {
        server.until_ready().await;
    }
    sleep(Duration::from_secs(2)).await;
    for ((probing, client), server) in probing.into_iter().zip(&servers) {
        let probes = probing.stop().await;
        let wrong: Vec<_> = probes.iter().filter(|probe| probe.is_grant()).collect();
        assert!(wrong.is_empty(), "{} grants that the database denies: {:?}", wrong.len(), wrong[0]);
        assert!(probes.iter().filter(|probe| probe.status() == Some(401)).count() > 200);
        refused(&client, test_config.born(), "unknown").await;
        refused(&client, &test_config.doomed, "revoked").await;
        granted(&client, &test_config.good).await;
        let (hit, refused, miss) = (server.l2("hit").await, server.l2("refused").await, server.l2("miss").await);
        println!("{origin:?}: look-ups in Redis after the restart: {hit} hits, {refused} refused, {miss} misses");
    }
}

// === a standby in the place of the primary ===

#[tokio::test(flavor = "multi_thread")]
async fn started_at_a_standby_it_grants_nothing_until_the_standby_is_promoted() {
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
    // Two seconds of failed reads have earned the database a pause, which may have a moment to go.
    eventually("it is granted", PATIENCE, || async { client.check(&key.key).await.status == 200 }).await;
    eventually("it is fresh", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn led_to_a_standby_its_lease_ends_and_no_stale_window_opens() {
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
    forwarder.lead_to(standby.socket());
    let led_away = Instant::now();
    fixture.postgres.execute(&fixture.database, &revocation(&revoked)).await;
    sleep(AT_WORST).await;
    while led_away.elapsed() < Duration::from_secs(3) {
        assert!(!is_serving(server.grpc(), "trustgate.fresh").await);
        assert_eq!(server.readiness().await.status, 200);
        sleep(Duration::from_millis(50)).await;
    }
    let back = Instant::now();
    forwarder.lead_to(fixture.postgres.socket());
    eventually("it is fresh again", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
    println!("fresh {:?} after the primary was back", back.elapsed());
    sleep(Duration::from_millis(500)).await;
    let probes = probing.stop().await;
    let at_standby: Vec<_> = probes.iter().filter(|probe| probe.began < back).collect();
    let late = granted_after(led_away, at_standby.iter().copied());
    println!("last grant began {late:?} after the way led to a standby");
    assert!(late <= AT_WORST, "{late:?}");
    let of_revoked = probes.iter().filter(|probe| probe.key == 0 && probe.began >= back);
    assert!(!of_revoked.clone().any(Probe::is_grant));
    refused(&client, &revoked, "revoked").await;
    granted(&client, &good).await;
}

// === triggers ===

#[tokio::test(flavor = "multi_thread")]
async fn with_a_trigger_disabled_the_lease_ends_and_comes_back_with_it() {
    let _turn = exclusive().await;
    let fixture = Fixture::new(&[]).await;
    let database = fixture.database.as_str();
    let issue = async || fixture.test_config.issue("acme", &[]).await;
    let (with_it, after_it, good) = (issue().await, issue().await, issue().await);
    let server = fixture.test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    for key in [&with_it, &after_it, &good] {
        granted(&client, key).await;
    }
    let triggers = "SELECT string_agg(format('ALTER TABLE trustgate.api_key ENABLE ALWAYS TRIGGER %I', tgname), ';')
        FROM pg_trigger WHERE tgrelid = 'trustgate.api_key'::regclass AND NOT tgisinternal";
    let enable_all: String = fixture.postgres.value(database, triggers).await;
    let before = newest(&fixture.postgres, database).await;
    let probing = Probing::start(&client, 600, texts([&with_it, &after_it, &good]), &[]);
    sleep(Duration::from_millis(300)).await;

    // In one transaction, so that no poll can come between.
    let at_once =
        format!("BEGIN; ALTER TABLE trustgate.api_key DISABLE TRIGGER USER; {}; COMMIT", revocation(&with_it));
    fixture.postgres.execute(database, &at_once).await;
    let disabled = Instant::now();
    eventually("the lease ends", PATIENCE, || async { !is_serving(server.grpc(), "trustgate.fresh").await }).await;
    println!("the lease was gone {:?} after the trigger", disabled.elapsed());
    sleep_until(disabled + BY_POLLING).await;
    fixture.postgres.execute(database, &revocation(&after_it)).await;
    let revoked = Instant::now();
    assert_eq!(newest(&fixture.postgres, database).await, before, "nobody was told");
    while disabled.elapsed() < Duration::from_secs(2) {
        assert!(!is_serving(server.grpc(), "trustgate.fresh").await);
        assert_eq!(server.readiness().await.status, 200);
        sleep(Duration::from_millis(50)).await;
    }
    refused(&client, &with_it, "revoked").await;
    refused(&client, &after_it, "revoked").await;
    granted(&client, &good).await; // the database says so

    fixture.postgres.execute(database, &enable_all).await;
    let enabled = Instant::now();
    eventually("the lease is back", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
    println!("the lease was back {:?} after the trigger", enabled.elapsed());
    assert!(newest(&fixture.postgres, database).await > before, "everything is read anew");
    sleep(Duration::from_millis(500)).await;
    let probes = probing.stop().await;
    let of = |key: usize| probes.iter().filter(move |probe| probe.key == key);
    let (late, at_once) = (granted_after(disabled, of(0)), granted_after(revoked, of(1)));
    println!("last grant began {late:?} after the commit that disabled the trigger, {at_once:?} after a later one");
    assert!(late <= BY_POLLING, "{late:?}");
    assert_eq!(at_once, Duration::ZERO, "only the database may grant without a lease");
    assert!(of(2).all(|probe| probe.is_grant() || probe.is_fault()));
    refused(&client, &with_it, "revoked").await;
    held_without_reads(&server, &client, &good).await;

    // A trigger that is gone is one that `migrate` makes again.
    let drop_one = "DO $$ DECLARE name text; BEGIN
        SELECT tgname INTO STRICT name FROM pg_trigger
        WHERE tgrelid = 'trustgate.api_key'::regclass AND NOT tgisinternal ORDER BY tgname LIMIT 1;
        EXECUTE format('DROP TRIGGER %I ON trustgate.api_key', name); END $$";
    fixture.postgres.execute(database, drop_one).await;
    eventually("the lease ends", PATIENCE, || async { !is_serving(server.grpc(), "trustgate.fresh").await }).await;
    fixture.test_config.migrate().await;
    eventually("the lease is back", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
    fixture.postgres.execute(database, &revocation(&good)).await;
    sleep(BY_POLLING).await;
    refused(&client, &good, "revoked").await;
}

/// Under a lease a held key needs no database.
async fn held_without_reads(server: &Server, client: &CheckClient, key: &IssuedKey) {
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

/// What somebody else's program does to the key whose digest is `{digest}`; it knows nothing of foreign keys.
const FOREIGN: &[(&str, &str, &str)] = &[
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
async fn on_sqlite_whatever_another_program_writes_counts_within_the_bound() {
    let _turn = exclusive().await;
    let test_config = TestConfig::new();
    test_config.migrate().await;
    let server = test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    let file = test_config.path().join("trustgate.db");
    let mut late = Vec::new();
    for (name, reason, statement) in FOREIGN {
        test_config.trust(name).await;
        let key = test_config.issue(name, &[]).await;
        let probing = Probing::start(&client, 250, texts([&key]), &[]);
        sleep(Duration::from_millis(200)).await;
        let mut foreign = sqlite(&file).await;
        let digest = format!("x'{}'", digest(&key.key));
        let statement = statement.replace("{digest}", &digest);
        sqlx::raw_sql(AssertSqlSafe(statement.as_str())).execute(&mut foreign).await.unwrap();
        let committed = Instant::now();
        foreign.close().await.unwrap();
        sleep(Duration::from_millis(800)).await;
        let probes = probing.stop().await;
        assert!(probes.iter().any(|probe| probe.began < committed && probe.is_grant()), "{name}: it was not held");
        let last = granted_after(committed, &probes);
        println!("SQLite, {name} by another program: last grant began {last:?} after it");
        refused(&client, &key, reason).await;
        late.push((name, last));
    }
    assert!(late.iter().all(|(_, late)| *late <= BY_POLLING), "{late:?}");

    // The command is another program too, and says when everybody knew.
    test_config.trust("acme").await;
    let key = test_config.issue("acme", &[]).await;
    granted(&client, &key).await;
    let answer = test_config.json(&["key", "revoke", &key.id]).await;
    refused(&client, &key, "revoked").await;
    let effect = &answer["effect"];
    assert_eq!((&effect["replicas"], &effect["applied"]), (&1.into(), &1.into()), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn on_sqlite_a_trigger_that_is_gone_ends_the_lease() {
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
    let mut foreign = sqlite(&test_config.path().join("trustgate.db")).await;
    let all = "SELECT group_concat(format('DROP TRIGGER \"%w\"', name), ';') FROM sqlite_schema
        WHERE type = 'trigger' AND tbl_name = 'api_key'";
    let drop_all: String = sqlx::query_scalar(all).fetch_one(&mut foreign).await.unwrap();
    let revocation = format!("UPDATE api_key SET revoked_at = created_at WHERE id = '{}'", revoked.id);
    let at_once = format!("BEGIN IMMEDIATE; {drop_all}; {revocation}; COMMIT");
    sqlx::raw_sql(AssertSqlSafe(at_once)).execute(&mut foreign).await.unwrap();
    let committed = Instant::now();
    foreign.close().await.unwrap();
    sleep(Duration::from_millis(1_500)).await;
    let late = granted_after(committed, &probing.stop().await);
    println!("SQLite: last grant began {late:?} after the commit that dropped the triggers");
    assert!(late <= BY_POLLING, "{late:?}");
    refused(&client, &revoked, "revoked").await;
    granted(&client, &good).await;
    assert!(!is_serving(server.grpc(), "trustgate.fresh").await);
    assert_eq!(server.readiness().await.status, 200);
    test_config.migrate().await;
    eventually("the lease is back", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
    refused(&client, &revoked, "revoked").await;
    held_without_reads(&server, &client, &good).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_sqlite_a_file_put_in_the_place_of_another_is_noticed() {
    let _turn = exclusive().await;
    let mut test_config = TestConfig::new();
    let (ours, theirs) = (test_config.path().join("ours"), test_config.path().join("theirs"));
    let file = ours.join("trustgate.db");
    test_config.set("store.url", format!("sqlite://{}", file.display()));
    test_config.migrate().await;
    test_config.trust("acme").await;
    let issue = async || test_config.issue("acme", &[]).await;
    let (revoked, lost, good) = (issue().await, issue().await, issue().await);
    // A copy in which one key is revoked, and which does not know that another one is.
    std::fs::create_dir(&theirs).unwrap();
    let copy = theirs.join("trustgate.db");
    let mut foreign = sqlite(&file).await;
    let into = format!("VACUUM INTO '{}'", copy.display());
    sqlx::raw_sql(AssertSqlSafe(into)).execute(&mut foreign).await.unwrap();
    foreign.close().await.unwrap();
    let mut foreign = sqlite(&copy).await;
    let revocation = format!("UPDATE api_key SET revoked_at = created_at WHERE id = '{}'", revoked.id);
    for sql in ["PRAGMA journal_mode = WAL", revocation.as_str()] {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut foreign).await.unwrap();
    }
    foreign.close().await.unwrap();

    let server = test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    for key in [&revoked, &lost, &good] {
        granted(&client, key).await;
    }
    test_config.revoke(&lost).await;
    eventually("it is refused", PATIENCE, || async { client.check(&lost.key).await.status == 401 }).await;
    let probing = Probing::start(&client, 400, texts([&revoked, &lost]), &[]);
    sleep(Duration::from_millis(200)).await;
    renameat_with(CWD, &theirs, CWD, &ours, RenameFlags::EXCHANGE).unwrap();
    let exchanged = Instant::now();
    eventually("it is noticed", PATIENCE, || async { server.metric("trustgate_lost_history_total").await > 0.0 }).await;
    println!("SQLite: another file noticed after {:?}", exchanged.elapsed());
    eventually("it is fresh again", PATIENCE, || is_serving(server.grpc(), "trustgate.fresh")).await;
    sleep_until(exchanged + Duration::from_secs(2)).await;
    let probes = probing.stop().await;
    let late = granted_after(exchanged, probes.iter().filter(|probe| probe.key == 0));
    println!("SQLite: last grant began {late:?} after another file took the place");
    assert!(late <= AT_WORST, "{late:?}");
    assert!(!probes.iter().any(|probe| probe.key == 1 && probe.is_grant()), "a key seen revoked was granted");
    refused(&client, &revoked, "revoked").await;
    granted(&client, &good).await;
}

async fn sqlite(file: &Path) -> SqliteConnection {
    let options = SqliteConnectOptions::new().filename(file).foreign_keys(false).busy_timeout(Duration::from_secs(5));
    SqliteConnection::connect_with(&options).await.unwrap()
}

// === all of them ===

fn revocation(key: &IssuedKey) -> String {
    format!("UPDATE trustgate.api_key SET revoked_at = now() WHERE id = '{}'", key.id)
}

/// The newest version in the database.
async fn newest(postgres: &Postgres, database: &str) -> i64 {
    postgres.value(database, "SELECT max(version) FROM trustgate.version").await
}

fn texts<'k>(keys: impl IntoIterator<Item = &'k IssuedKey>) -> Vec<String> {
    keys.into_iter().map(|key| key.key.clone()).collect()
}
