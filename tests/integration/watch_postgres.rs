//! Tests that polls on PostgreSQL detect altered triggers, functions and tables. Also tests upgrades, grants, standbys,
//! poolers and session settings.

// Some tests measure wall-clock time, and some are long because each step depends on the previous step.
#![allow(clippy::disallowed_methods, clippy::too_many_lines, clippy::similar_names, clippy::needless_for_each)]

use std::{sync::Arc, time::Duration};

use sqlx::{AssertSqlSafe, Connection, Row};
use tokio::{
    sync::mpsc::{Receiver, channel},
    task::{JoinHandle, JoinSet},
};
use trustgate::testing::{
    base::{clock::SystemClock, fault::Fault, secret::Secret},
    record::{ApiKeyDigest, Change, ChangeKind, Digests, Fingerprint, KeyId, Made, TrustId, Version},
    store::{
        self, Actor, Heartbeat, Missing, PollError, Source, StoreSettings,
        ledger::{NewKey, TrustRef},
    },
};
use uuid::Uuid;

use crate::support::{eventually, pgbouncer::PgBouncer, postgres::Postgres};

const PEPPER: Fingerprint = Fingerprint([0xAB; 8]);
const SECONDS: Duration = Duration::from_secs(1);
const KEY: &str = "00000000-0000-0000-0000-000000000001";

struct Db {
    server: Arc<Postgres>,
    name: String,
    settings: StoreSettings,
    lookup: Arc<dyn Source>,
}

fn settings(url: String) -> StoreSettings {
    // Set timeouts that are long enough for a busy machine.
    StoreSettings {
        url: Some(Secret::new(url)),
        read_timeout: 20 * SECONDS,
        connect_timeout: 20 * SECONDS,
        ..StoreSettings::default()
    }
}

fn open(settings: &StoreSettings) -> Arc<dyn Source> {
    store::open_lookup(settings, &|_| None, Arc::new(SystemClock)).unwrap()
}

/// Receives the notifications of `lookup` until the task is aborted, and passes them to the returned channel.
fn listen(lookup: &Arc<dyn Source>) -> (Receiver<()>, JoinHandle<Fault>) {
    let ((sender, notifications), lookup) = (channel(10), Arc::clone(lookup));
    let woken = move || {
        // If the channel is full, it already contains a notification, and the test needs only one.
        let _ = sender.try_send(());
    };
    (notifications, tokio::spawn(async move { lookup.listen(&woken).await }))
}

impl Db {
    /// Creates a database without tables.
    async fn empty(server: Arc<Postgres>) -> Self {
        let name = server.database().await;
        let settings = settings(server.url("admin", &name));
        Self { server, name, lookup: open(&settings), settings }
    }

    /// Creates a database with one trust and one key.
    async fn new() -> Self {
        let db = Self::empty(Postgres::shared().await).await;
        db.migrate().await;
        db.execute(&format!(
            "INSERT INTO trustgate.trust (id, name) VALUES ('{KEY}', 'acme');
             INSERT INTO trustgate.api_key (id, trust_id, digest, scheme, hint)
                VALUES ('{KEY}', '{KEY}', sha256('a'), 0, 'tg')"
        ))
        .await;
        db
    }

    async fn migrate(&self) {
        store::migrate(&self.settings, &|_| None).await.unwrap();
    }

    async fn execute(&self, sql: &str) {
        self.server.execute(&self.name, sql).await;
    }

    async fn triggers_intact(&self) -> bool {
        self.lookup.poll(None).await.unwrap().triggers_intact
    }

    async fn newest(&self) -> Version {
        self.lookup.poll(None).await.unwrap().newest.as_of
    }

    /// Returns the changes recorded after `version`. Advances `version` to the newest version.
    async fn recorded(&self, version: &mut Version) -> Vec<Change> {
        let polled = self.lookup.poll(Some(*version)).await.unwrap();
        assert!(polled.complete);
        *version = polled.newest.as_of;
        polled.changes.into_iter().map(|(_, change)| change).collect()
    }

    /// Changes the key and asserts that the change is recorded.
    async fn records_a_change(&self, seen: &mut Version) {
        self.execute("UPDATE trustgate.api_key SET scheme = 1 - scheme").await;
        let changes = self.recorded(seen).await;
        assert!(changes.contains(&Change::Key(KeyId(KEY.parse().unwrap()))), "{changes:?}");
    }
}

/// The way to repair an alteration.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repair {
    /// `restore_watch` repairs the alteration and records that everything changed, because changes may have been
    /// missed.
    Restore,
    /// `restore_watch` fails until the test has run this SQL.
    Run(&'static str),
    /// `restore_watch` fails until `trustgate migrate` has repaired the alteration.
    Migrate,
    /// No repair is needed: the alteration does not affect the triggers, and polls do not report it.
    Unneeded,
}

#[tokio::test]
async fn alterations_that_may_hide_changes_are_detected_until_they_are_repaired() {
    const ROW: &str = "TRIGGER trustgate_changed";
    let on = |rest: &str| format!("ALTER TABLE trustgate.api_key {rest}");
    let cases: Vec<(&str, String, Repair)> = vec![
        ("VACUUM, ANALYZE and an index", "VACUUM (FREEZE, ANALYZE) trustgate.api_key; VACUUM (FREEZE, ANALYZE) pg_trigger; CREATE INDEX ON trustgate.api_key (hint); REINDEX TABLE trustgate.api_key".into(), Repair::Unneeded),
        ("a trigger is disabled", on(&format!("DISABLE {ROW}")), Repair::Run("ALTER TABLE trustgate.api_key ENABLE ALWAYS TRIGGER trustgate_changed")),
        (
            "a trigger is disabled for one transaction",
            format!(
                "BEGIN; {}; UPDATE trustgate.api_key SET scheme = 5; {}; COMMIT",
                on(&format!("DISABLE {ROW}")),
                on(&format!("ENABLE ALWAYS {ROW}"))
            ),
            Repair::Restore,
        ),
        ("a trigger is not enabled for every session", on(&format!("ENABLE {ROW}")), Repair::Migrate),
        ("all triggers are disabled and enabled", on("DISABLE TRIGGER ALL, ENABLE TRIGGER ALL"), Repair::Migrate),
        ("a trigger is enabled only for replicas", on(&format!("ENABLE REPLICA {ROW}")), Repair::Migrate),
        ("a trigger is dropped", format!("DROP {ROW} ON trustgate.api_key"), Repair::Migrate),
        ("the trigger for TRUNCATE is dropped", "DROP TRIGGER trustgate_truncated ON trustgate.trust".into(), Repair::Migrate),
        ("the stamp trigger is disabled", "ALTER TABLE trustgate.tx DISABLE TRIGGER trustgate_stamp".into(), Repair::Migrate),
        (
            "the stamp trigger is not deferred",
            "DROP TRIGGER trustgate_stamp ON trustgate.tx; CREATE TRIGGER trustgate_stamp AFTER INSERT ON trustgate.tx
                FOR EACH ROW EXECUTE FUNCTION trustgate.stamp(); ALTER TABLE trustgate.tx ENABLE ALWAYS TRIGGER trustgate_stamp"
                .into(),
            Repair::Migrate,
        ),
        (
            "a trigger is replaced by a different trigger with the same name",
            format!(
                "DROP {ROW} ON trustgate.api_key; CREATE {ROW} AFTER UPDATE OF name ON trustgate.api_key
                    FOR EACH ROW EXECUTE FUNCTION trustgate.api_key_changed(); {}",
                on(&format!("ENABLE ALWAYS {ROW}"))
            ),
            Repair::Migrate,
        ),
        (
            "a function is replaced",
            "CREATE OR REPLACE FUNCTION trustgate.api_key_changed() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
                SET search_path = pg_catalog, pg_temp AS $$ BEGIN RETURN NULL; END $$"
                .into(),
            Repair::Migrate,
        ),
        ("a function attribute is changed", "ALTER FUNCTION trustgate.note(text, text) COST 99".into(), Repair::Restore),
        (
            "the table is replaced by a different table",
            format!("{}; CREATE TABLE trustgate.api_key (LIKE trustgate.away INCLUDING ALL)", on("RENAME TO away")),
            Repair::Run("DROP TABLE trustgate.api_key; ALTER TABLE trustgate.away RENAME TO api_key"),
        ),
        (
            "the table is renamed and renamed back in one transaction",
            format!("BEGIN; {}; UPDATE trustgate.away SET scheme = 6; ALTER TABLE trustgate.away RENAME TO api_key; COMMIT", on("RENAME TO away")),
            Repair::Restore,
        ),
        (
            "a table inherits from trustgate's table",
            "CREATE TABLE trustgate.child () INHERITS (trustgate.api_key)".into(),
            Repair::Run("ALTER TABLE trustgate.child NO INHERIT trustgate.api_key; DROP TABLE trustgate.child"),
        ),
        ("a column is emptied by dropping it", on("DROP COLUMN revoked_at, ADD COLUMN revoked_at timestamptz"), Repair::Restore),
        ("a column is rewritten", on("ALTER COLUMN expires_at TYPE timestamptz USING now()"), Repair::Restore),
        ("VACUUM FULL", "VACUUM FULL trustgate.api_key".into(), Repair::Restore),
        ("TRUNCATE is rolled back", "BEGIN; SAVEPOINT a; TRUNCATE trustgate.api_key CASCADE; ROLLBACK TO a; TRUNCATE trustgate.key_use; COMMIT".into(), Repair::Unneeded),
        ("TRUNCATE is committed", "TRUNCATE trustgate.api_key CASCADE".into(), Repair::Restore),
        (
            "another program adds a trigger",
            "CREATE TRIGGER other BEFORE UPDATE ON trustgate.api_key FOR EACH ROW
                EXECUTE FUNCTION suppress_redundant_updates_trigger()"
                .into(),
            Repair::Restore,
        ),
    ];
    let db = Db::new().await;
    let refill = format!(
        "INSERT INTO trustgate.api_key (id, trust_id, digest, scheme, hint) VALUES ('{KEY}', '{KEY}', sha256('a'), 0, 'tg')
         ON CONFLICT DO NOTHING"
    );
    let mut seen = db.newest().await;
    for (what, sql, repair) in cases {
        // Run the statements one by one, because some of them cannot run in a transaction.
        let whole = sql.contains("BEGIN") || sql.contains("$$");
        for statement in if whole { vec![&*sql] } else { sql.split(';').collect() } {
            db.execute(statement).await;
        }
        assert_eq!(db.triggers_intact().await, repair == Repair::Unneeded, "{what}");
        if let Repair::Run(_) | Repair::Migrate = repair {
            let refused = db.lookup.restore_watch().await;
            let problem = refused.expect_err(what);
            let Fault::Unreachable { source, .. } = &problem else { panic!("{what}: {problem:?}") };
            assert!(source.to_string().contains("trustgate."), "{what}: {source}");
            assert!(!db.triggers_intact().await, "{what}");
        }
        match repair {
            Repair::Run(statements) => {
                db.execute(statements).await;
                assert!(!db.triggers_intact().await, "{what}: changes may have passed unrecorded");
                db.lookup.restore_watch().await.unwrap();
            }
            Repair::Migrate => db.migrate().await,
            Repair::Restore => db.lookup.restore_watch().await.unwrap(),
            Repair::Unneeded => {}
        }
        assert!(db.triggers_intact().await, "{what}");
        let changes = db.recorded(&mut seen).await;
        assert_eq!(changes.contains(&Change::Everything), repair != Repair::Unneeded, "{what}: {changes:?}");
        db.migrate().await;
        assert_eq!(db.recorded(&mut seen).await, [], "{what}: nothing is left to repair");
        db.execute(&refill).await;
        db.recorded(&mut seen).await;
        db.records_a_change(&mut seen).await;
    }
}

#[tokio::test]
async fn changes_in_child_tables_and_partitions_are_recorded_after_they_have_triggers() {
    let db = Db::new().await;
    db.execute("CREATE TABLE trustgate.child () INHERITS (trustgate.api_key)").await;
    db.migrate().await;
    let mut seen = db.newest().await;
    let id = Uuid::from_u128(7);
    db.execute(&format!(
        "INSERT INTO trustgate.child (id, trust_id, digest, scheme, hint) VALUES ('{id}', '{KEY}', sha256('b'), 0, 'tg')"
    ))
    .await;
    db.execute("UPDATE trustgate.child SET scheme = 1").await;
    assert!(db.recorded(&mut seen).await.contains(&Change::Key(KeyId(id))));
    db.execute("TRUNCATE trustgate.child").await;
    assert!(!db.triggers_intact().await);
    assert!(db.recorded(&mut seen).await.contains(&Change::Whole(ChangeKind::Keys)));
    db.lookup.restore_watch().await.unwrap();
    db.execute("BEGIN; ALTER TABLE trustgate.child NO INHERIT trustgate.api_key; ALTER TABLE trustgate.child INHERIT trustgate.api_key; COMMIT").await;
    assert!(!db.triggers_intact().await);
    db.lookup.restore_watch().await.unwrap();
    // Also create a child of the child table.
    db.execute("CREATE TABLE trustgate.grandchild () INHERITS (trustgate.child)").await;
    assert!(db.lookup.restore_watch().await.is_err());
    db.execute("DROP TABLE trustgate.grandchild").await;
    db.lookup.restore_watch().await.unwrap();

    // Move the rows to a partitioned table.
    db.execute(
        "DROP TABLE trustgate.child, trustgate.key_use; ALTER TABLE trustgate.api_key RENAME TO old;
         CREATE TABLE trustgate.api_key (LIKE trustgate.old INCLUDING DEFAULTS) PARTITION BY HASH (id);
         CREATE TABLE trustgate.part0 PARTITION OF trustgate.api_key FOR VALUES WITH (MODULUS 2, REMAINDER 0);
         CREATE TABLE trustgate.part1 PARTITION OF trustgate.api_key FOR VALUES WITH (MODULUS 2, REMAINDER 1);
         INSERT INTO trustgate.api_key SELECT * FROM trustgate.old",
    )
    .await;
    assert!(!db.triggers_intact().await);
    assert!(db.lookup.restore_watch().await.is_err());
    db.migrate().await;
    db.recorded(&mut seen).await;
    db.records_a_change(&mut seen).await;
    let part = "SELECT tableoid::regclass::text FROM trustgate.api_key";
    let part: String = sqlx::query(part).fetch_one(&mut db.server.admin(&db.name).await).await.unwrap().get(0);
    db.execute(&format!("UPDATE {part} SET scheme = 1 - scheme")).await;
    assert!(
        db.recorded(&mut seen).await.contains(&Change::Key(KeyId(KEY.parse().unwrap()))),
        "an update by the name of the partition is recorded"
    );
    db.execute(&format!("ALTER TABLE trustgate.api_key DETACH PARTITION {part}")).await;
    assert!(!db.triggers_intact().await);
    db.lookup.restore_watch().await.unwrap();
    assert_eq!(db.recorded(&mut seen).await, [Change::Everything]);
    let remainder = part.chars().last().unwrap();
    db.execute(&format!(
        "ALTER TABLE {part} DISABLE TRIGGER ALL; UPDATE {part} SET scheme = 9; ALTER TABLE {part} ENABLE ALWAYS TRIGGER trustgate_truncated;
         ALTER TABLE trustgate.api_key ATTACH PARTITION {part} FOR VALUES WITH (MODULUS 2, REMAINDER {remainder})"
    ))
    .await;
    assert!(!db.triggers_intact().await);
    if db.lookup.restore_watch().await.is_err() {
        db.migrate().await;
    }
    assert!(db.recorded(&mut seen).await.contains(&Change::Everything));
    db.records_a_change(&mut seen).await;
    db.execute(&format!("ALTER TABLE {part} DISABLE TRIGGER ALL")).await;
    assert!(!db.triggers_intact().await);
    assert!(db.lookup.restore_watch().await.is_err());
    db.migrate().await;
    db.recorded(&mut seen).await;
    db.records_a_change(&mut seen).await;
}

/// The tables and rows that the first release created.
const FIRST: &str = "
CREATE SCHEMA trustgate; SET search_path = trustgate;
CREATE TABLE schema (version bigint PRIMARY KEY, compatible_from bigint NOT NULL, at timestamptz NOT NULL DEFAULT now());
CREATE TABLE meta (one boolean PRIMARY KEY DEFAULT true CHECK (one), incarnation uuid NOT NULL);
CREATE TABLE version (
    version bigint PRIMARY KEY CHECK (version > 0),
    nonce bytea NOT NULL CHECK (octet_length(nonce) = 16),
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE setting (name text PRIMARY KEY, value bytea NOT NULL);
CREATE TABLE trust (
    id uuid PRIMARY KEY,
    name text NOT NULL UNIQUE CHECK (name <> ''),
    enabled boolean NOT NULL DEFAULT true,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE api_key (
    id uuid PRIMARY KEY,
    trust_id uuid NOT NULL REFERENCES trust (id),
    digest bytea NOT NULL UNIQUE CHECK (octet_length(digest) = 32),
    scheme smallint NOT NULL,
    hint text NOT NULL,
    name text,
    scopes text[] NOT NULL DEFAULT '{}',
    allowed_cidrs cidr[] NOT NULL DEFAULT '{}',
    not_before timestamptz CHECK (isfinite(not_before)),
    expires_at timestamptz CHECK (isfinite(expires_at)),
    revoked_at timestamptz CHECK (isfinite(revoked_at)),
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX api_key_trust ON api_key (trust_id);
CREATE TABLE key_use (key_id uuid PRIMARY KEY REFERENCES api_key (id) ON DELETE CASCADE, last_used_at timestamptz NOT NULL);
CREATE TABLE replica (id uuid PRIMARY KEY, applied bigint NOT NULL, seen_at timestamptz NOT NULL);
CREATE TABLE audit (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor text NOT NULL,
    action text NOT NULL,
    object text NOT NULL,
    before jsonb,
    after jsonb
);
INSERT INTO meta (incarnation) VALUES (gen_random_uuid());
INSERT INTO version (version, nonce) SELECT n, uuid_send(gen_random_uuid()) FROM generate_series(1, 41) AS n;
INSERT INTO setting VALUES ('redis_mac_key', sha256('mac'));
INSERT INTO schema (version, compatible_from) VALUES (1, 1);
INSERT INTO trust (id, name) VALUES ('00000000-0000-0000-0000-000000000001', 'acme');
INSERT INTO api_key (id, trust_id, digest, scheme, hint)
    VALUES ('00000000-0000-0000-0000-000000000001', '00000000-0000-0000-0000-000000000001', sha256('a'), 0, 'tg');
INSERT INTO replica VALUES (gen_random_uuid(), 41, now())";

#[tokio::test]
async fn tables_from_the_first_release_are_upgraded_in_place() {
    let db = Db::empty(Postgres::shared().await).await;
    db.execute(FIRST).await;
    let problem = db.lookup.prepare(Missing::Refuse).await.unwrap_err().to_string();
    assert!(problem.contains("version 1") && problem.contains("trustgate migrate"), "{problem}");
    // A migration waits for a transaction that changes keys, and does not block a transaction that reads.
    let mut writer = db.server.admin(&db.name).await;
    sqlx::raw_sql("BEGIN; UPDATE trustgate.api_key SET scheme = 1").execute(&mut writer).await.unwrap();
    let mut migrating = JoinSet::new();
    for _ in 0..3 {
        let settings = db.settings.clone();
        migrating.spawn(async move { store::migrate(&settings, &|_| None).await.unwrap() });
    }
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    eventually("all migrations wait for the writer", 20 * SECONDS, || async {
        let row = sqlx::query(waits).fetch_one(&mut db.server.admin(&db.name).await).await.unwrap();
        row.get::<i64, _>(0) == 3
    })
    .await;
    let mut admin = db.server.admin(&db.name).await;
    sqlx::raw_sql("SET lock_timeout = '50ms'; SELECT version FROM trustgate.version; SELECT id FROM trustgate.api_key")
        .execute(&mut admin)
        .await
        .unwrap();
    sqlx::raw_sql("COMMIT").execute(&mut writer).await.unwrap();
    migrating.join_all().await;

    db.lookup.prepare(Missing::Refuse).await.unwrap();
    let polled = db.lookup.poll(Some(Version(41))).await.unwrap();
    assert_eq!((polled.newest.as_of, polled.changes), (Version(42), vec![(Version(42), Change::Everything)]));
    assert!(polled.triggers_intact);
    let mut seen = polled.newest.as_of;
    db.records_a_change(&mut seen).await;
    assert_eq!(seen, Version(43));
    db.migrate().await;
    assert_eq!(db.newest().await, seen, "a second migration changes nothing");
    assert!(db.lookup.redis_mac_key().await.unwrap().is_some());
    let mut ledger = store::open_ledger(&db.settings, &|_| None).await.unwrap();
    assert_eq!(ledger.replicas().await.unwrap(), [], "the first release did not store when a heartbeat expires");
}

#[tokio::test]
async fn functions_that_an_upgrade_adds_need_no_new_grants() {
    let db = Db::new().await;
    let (serve, manage) = (format!("serve_{}", db.name), format!("manage-\"{}", db.name));
    let quoted = manage.replace('"', "\"\"");
    db.execute(&format!("CREATE ROLE {serve}; CREATE ROLE \"{quoted}\"")).await;
    db.execute(&store::grants(&db.settings, &serve, &manage)).await;
    db.execute(
        "DROP FUNCTION trustgate.find_key, trustgate.record_peppers, trustgate.hold_pepper, trustgate.use_pepper",
    )
    .await;
    db.migrate().await;
    for (role, function, may) in [
        (&serve, "find_key(bytea[], uuid)", true),
        (&serve, "record_peppers(uuid[], bytea[], bytea)", true),
        (&serve, "hold_pepper(bytea)", false),
        (&manage, "hold_pepper(bytea)", true),
        (&manage, "use_pepper(bytea)", true),
        (&manage, "record_peppers(uuid[], bytea[], bytea)", false),
    ] {
        let sql = format!("SELECT has_function_privilege('{role}', 'trustgate.{function}', 'EXECUTE')");
        assert_eq!(db.server.value::<bool>(&db.name, &sql).await, may, "{role}: {function}");
    }
}

#[tokio::test]
async fn the_printed_grants_are_sufficient_and_not_excessive() {
    let db = Db::new().await;
    let (serve, manage) = (format!("serve_{}", db.name), format!("manage_{}", db.name));
    db.execute(&format!("CREATE ROLE {serve} LOGIN; CREATE ROLE {manage} LOGIN")).await;
    let lookup = open(&settings(db.server.url(&serve, &db.name)));
    let problem = lookup.prepare(Missing::Refuse).await.unwrap_err().to_string();
    assert!(problem.contains("permission denied"), "{problem}");
    db.execute(&store::grants(&db.settings, &serve, &manage)).await;

    lookup.prepare(Missing::Refuse).await.unwrap();
    let heartbeat = Heartbeat { replica: Uuid::nil(), name: "here".into(), applied: Version(1), lasts: 60 * SECONDS };
    lookup.report(&heartbeat).await.unwrap();
    lookup.prune().await.unwrap();
    lookup.redis_mac_key().await.unwrap();
    db.execute("UPDATE trustgate.meta SET fingerprint = NULL").await;
    lookup.restore_watch().await.unwrap();
    let polled = lookup.poll(None).await.unwrap();
    assert!(polled.triggers_intact);
    lookup.renew_incarnation(polled.newest.lineage.incarnation).await.unwrap();
    assert_ne!(lookup.poll(None).await.unwrap().newest.lineage, polled.newest.lineage);
    let (mut notifications, listening) = listen(&lookup);
    notifications.recv().await.unwrap();
    listening.abort();

    let mut ledger = store::open_ledger(&settings(db.server.url(&manage, &db.name)), &|_| None).await.unwrap();
    let actor = Actor("test:operator".into());
    let trust = TrustRef::Id(TrustId(KEY.parse().unwrap()));
    let key = NewKey {
        id: KeyId(Uuid::from_u128(2)),
        digest: ApiKeyDigest::from_bytes([2; 32]),
        older: Vec::new(),
        made: Made::Peppered(PEPPER),
        hint: "tg".into(),
        name: None,
        scopes: Vec::new(),
        allowed_cidrs: Vec::new(),
        not_before: None,
        expires_in: None,
    };
    ledger.add_key(&actor, &trust, key).await.unwrap();
    db.execute("UPDATE trustgate.api_key SET pepper_fingerprint = NULL").await;
    lookup.find(&Digests { current: ApiKeyDigest::from_bytes([2; 32]), older: Vec::new() }).await.unwrap();
    lookup.tend_peppers(&[PEPPER]).await.unwrap();
    assert_eq!(ledger.key(KeyId(Uuid::from_u128(2))).await.unwrap().pepper, Some(PEPPER));
    ledger.use_pepper(&actor, Fingerprint([1; 8])).await.unwrap();
    ledger.revoke_key(&actor, KeyId(Uuid::from_u128(2))).await.unwrap();
    ledger.enable_trust(&actor, &trust, false).await.unwrap();
    ledger.clear_caches(&actor).await.unwrap();
    ledger.delete_trust(&actor, &trust, true).await.unwrap();
    assert_eq!(ledger.replicas().await.unwrap().len(), 1);
    assert_eq!(ledger.newest().await.unwrap(), db.newest().await);

    for (role, sql) in [
        (&serve, "UPDATE trustgate.api_key SET revoked_at = NULL"),
        (&serve, "DELETE FROM trustgate.version"),
        (&serve, "INSERT INTO trustgate.version (version, nonce) VALUES (999, '\\x00')"),
        (&serve, "UPDATE trustgate.meta SET incarnation = gen_random_uuid()"),
        (&serve, "SELECT trustgate.everything()"),
        (&serve, "SELECT trustgate.use_pepper('\\x0102030405060708')"),
        (&serve, "UPDATE trustgate.api_key SET pepper_fingerprint = NULL"),
        (&manage, "INSERT INTO trustgate.version (version, nonce) VALUES (999, '\\x00')"),
        (&manage, "SELECT trustgate.note('key', 'x')"),
        (&manage, "SELECT trustgate.prune()"),
        (&manage, "UPDATE trustgate.audit SET actor = 'other'"),
    ] {
        let mut connection = sqlx::PgConnection::connect(&db.server.url(role, &db.name)).await.unwrap();
        let refused = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap_err();
        assert_eq!(refused.as_database_error().unwrap().code().as_deref(), Some("42501"), "{role}: {sql}");
    }
    // Without a required right, the database answers, but the answer is unusable. An unusable answer must not count as
    // a missing answer, because a missing answer starts stale grants.
    db.execute(&format!("REVOKE SELECT ON trustgate.change FROM {serve}")).await;
    let outcome = lookup.poll(Some(Version(1))).await;
    assert!(
        matches!(&outcome, Err(PollError::Unusable(problem)) if problem.contains("permission denied")),
        "{outcome:?}"
    );
}

#[tokio::test]
async fn only_a_writable_primary_confirms_a_poll() {
    let primary = Arc::new(Postgres::start().await);
    let db = Db::empty(Arc::clone(&primary)).await;
    db.migrate().await;
    let unusable = async |lookup: &Arc<dyn Source>, word: &str| {
        let outcome = lookup.poll(None).await;
        assert!(matches!(&outcome, Err(PollError::Unusable(problem)) if problem.contains(word)), "{word}: {outcome:?}");
    };

    let read_only = format!("ALTER DATABASE {} SET default_transaction_read_only = on", db.name);
    primary.execute("postgres", &read_only).await;
    let lookup = open(&db.settings);
    unusable(&lookup, "read-only").await;
    primary.execute("postgres", &read_only.replace("= on", "= off")).await;
    // A session keeps the settings that it started with, so the lookup must open a new session.
    eventually("a new session", 20 * SECONDS, || async { lookup.poll(None).await.is_ok() }).await;
    // trustgate's reads do not use SERIALIZABLE, even if it is the default in the database.
    let serializable = format!("ALTER DATABASE {} SET default_transaction_isolation = 'serializable'", db.name);
    primary.execute("postgres", &serializable).await;
    open(&db.settings).poll(None).await.unwrap();

    let newest = db.newest().await;
    let standby = primary.standby().await;
    let following = open(&settings(standby.url("admin", &db.name)));
    unusable(&following, "standby").await;
    let outcome = following.find(&Digests { current: ApiKeyDigest::from_bytes([0; 32]), older: Vec::new() }).await;
    assert!(outcome.is_err(), "{outcome:?}");
    standby.promote().await;
    let before = db.lookup.poll(None).await.unwrap().newest;
    eventually("the standby has become a primary", 20 * SECONDS, || async { following.poll(None).await.is_ok() }).await;
    let after = following.poll(None).await.unwrap().newest;
    assert_eq!((after.as_of, after.nonce), (newest, before.nonce));
    assert_eq!((after.lineage.system, after.lineage.incarnation), (before.lineage.system, before.lineage.incarnation));
    assert!(after.lineage.timeline > before.lineage.timeline, "{:?} {:?}", after.lineage, before.lineage);

    for (sql, word) in [
        ("ALTER TABLE trustgate.meta RENAME TO away", "meta"),
        ("DROP FUNCTION trustgate.poll", "poll"),
        ("DROP SCHEMA trustgate CASCADE", "schema"),
    ] {
        db.execute(sql).await;
        unusable(&db.lookup, word).await;
    }
    // A poll gets no answer from a server that is not running.
    let Db { server, lookup, .. } = db;
    drop(primary);
    let mut primary = Arc::into_inner(server).unwrap();
    primary.stop();
    let outcome = lookup.poll(None).await;
    assert!(matches!(outcome, Err(PollError::NoAnswer(_))), "{outcome:?}");
}

#[tokio::test]
async fn everything_except_notifications_works_through_a_pooler() {
    let server = Arc::new(Postgres::start().await);
    let db = Db::empty(Arc::clone(&server)).await;
    db.migrate().await;
    let pooler = PgBouncer::start(&server).await;
    let settings = settings(pooler.url(&db.name));
    store::migrate(&settings, &|_| None).await.unwrap();
    let lookup = open(&settings);
    lookup.prepare(Missing::Refuse).await.unwrap();
    let mut ledger = store::open_ledger(&settings, &|_| None).await.unwrap();
    let actor = Actor("test:operator".into());
    let mut seen = lookup.poll(None).await.unwrap().newest.as_of;
    // Meanwhile, other clients use the same server connections and change their session settings.
    let stop = tokio_util::sync::CancellationToken::new();
    let mut others = JoinSet::new();
    for _ in 0..3 {
        let (url, stop) = (pooler.url(&db.name), stop.clone());
        others.spawn(async move {
            let mut connection = sqlx::PgConnection::connect(&url).await.unwrap();
            while !stop.is_cancelled() {
                sqlx::raw_sql("SET search_path = public; SELECT pg_sleep(0.001)")
                    .execute(&mut connection)
                    .await
                    .unwrap();
            }
        });
    }
    for number in 0..50 {
        let name = format!("trust {number}");
        ledger.create_trust(&actor, TrustId(Uuid::from_u128(number + 10)), &name).await.unwrap();
        let polled = lookup.poll(Some(seen)).await.unwrap();
        assert!(polled.triggers_intact && polled.newest.as_of > seen);
        assert!(
            polled.changes.iter().any(|(_, change)| *change == Change::Trust(TrustId(Uuid::from_u128(number + 10))))
        );
        seen = polled.newest.as_of;
    }
    let heartbeat = Heartbeat { replica: Uuid::nil(), name: "here".into(), applied: seen, lasts: SECONDS * 60 };
    lookup.report(&heartbeat).await.unwrap();
    assert_eq!(ledger.replicas().await.unwrap().len(), 1);
    lookup.prune().await.unwrap();
    lookup.restore_watch().await.unwrap();

    stop.cancel();
    others.join_all().await;

    // A pooler does not forward notifications, and LISTEN would affect other clients of the pooler, so `listen` fails
    // at once.
    let fault =
        tokio::time::timeout(10 * SECONDS, lookup.listen(&|| panic!("an unexpected notification"))).await.unwrap();
    assert!(matches!(fault, Fault::Unreachable { .. }), "{fault:?}");
}

#[tokio::test]
async fn two_schemas_in_one_database_are_independent() {
    let db = Db::new().await;
    let mut other = db.settings.clone();
    other.schema = trustgate::testing::base::settings::Setting::read(
        &trustgate::testing::base::settings::RawValue::One("gate_2".into()),
    )
    .unwrap();
    store::migrate(&other, &|_| None).await.unwrap();
    let lookup = open(&other);
    lookup.prepare(Missing::Refuse).await.unwrap();
    let before = (db.newest().await, lookup.poll(None).await.unwrap().newest.as_of);
    let (mut notifications, listening) = listen(&lookup);
    notifications.recv().await.unwrap();
    db.execute("UPDATE trustgate.api_key SET scheme = 1").await;
    db.execute("INSERT INTO gate_2.trust (id, name) VALUES (gen_random_uuid(), 'acme')").await;
    notifications.recv().await.unwrap();
    assert_eq!(
        (db.newest().await.0, lookup.poll(None).await.unwrap().newest.as_of.0),
        (before.0.0 + 1, before.1.0 + 1)
    );
    assert!(notifications.try_recv().is_err(), "each schema has a separate channel for notifications");
    db.execute("ALTER TABLE trustgate.api_key DISABLE TRIGGER ALL").await;
    assert!(lookup.poll(None).await.unwrap().triggers_intact && !db.triggers_intact().await);
    // If one transaction changes both schemas, each schema records only the change to its own tables.
    db.migrate().await;
    db.execute("BEGIN; UPDATE trustgate.api_key SET scheme = 0; UPDATE gate_2.trust SET enabled = false; COMMIT").await;
    assert_eq!(lookup.poll(Some(Version(before.1.0 + 1))).await.unwrap().changes.len(), 1);
    listening.abort();
}

#[tokio::test]
async fn session_settings_of_a_database_do_not_affect_reads() {
    let db = Db::new().await;
    let digest = ApiKeyDigest::from_hex(
        &db.server.value::<String>(&db.name, "SELECT encode(digest, 'hex') FROM trustgate.api_key").await,
    );
    let digests = Digests { current: digest.unwrap(), older: Vec::new() };
    for setting in [
        "standard_conforming_strings = off",
        "escape_string_warning = on",
        "backslash_quote = off",
        "bytea_output = escape",
        "DateStyle = 'SQL, DMY'",
        "IntervalStyle = iso_8601",
        "TimeZone = 'Pacific/Kiritimati'",
        "default_transaction_isolation = serializable",
        "default_transaction_deferrable = on",
        "search_path = pg_temp",
        "extra_float_digits = -15",
        "lc_monetary = 'C'",
        "transform_null_equals = on",
        "array_nulls = off",
        "quote_all_identifiers = on",
        "row_security = on",
        "synchronous_commit = off",
        "client_min_messages = debug5",
        "statement_timeout = '1h'",
        "lock_timeout = '1h'",
        "jit = on",
        "plan_cache_mode = force_generic_plan",
        "enable_indexscan = off",
    ] {
        db.execute(&format!("ALTER DATABASE {} SET {setting}", db.name)).await;
        let lookup = open(&db.settings);
        lookup.prepare(Missing::Refuse).await.unwrap_or_else(|error| panic!("{setting}: {error}"));
        let found = lookup.find(&digests).await.unwrap_or_else(|error| panic!("{setting}: {error}"));
        assert!(found.value.is_some(), "{setting}");
        lookup.close().await;
        let name = setting.split(' ').next().unwrap();
        db.execute(&format!("ALTER DATABASE {} RESET {name}", db.name)).await;
    }
}

#[tokio::test]
async fn a_database_url_may_contain_an_ipv6_address() {
    let db = Db::new().await;
    let url =
        db.server.tcp_url("trusted", &db.name).replace("127.0.0.1", "[::1]").replace("trusted@", "trusted:secret@");
    db.execute("CREATE ROLE trusted LOGIN SUPERUSER PASSWORD 'secret'").await;
    open(&settings(url)).prepare(Missing::Refuse).await.unwrap();
}
