//! Whoever alters what names changes on PostgreSQL is noticed; and which servers and roles a poll can rely on.

// What a change costs others is measured by the clock on the wall, and each story is told in its order.
#![allow(clippy::disallowed_methods, clippy::too_many_lines, clippy::similar_names, clippy::needless_for_each)]

use std::{sync::Arc, time::Duration};

use sqlx::{AssertSqlSafe, Connection, Row};
use tokio::{
    sync::mpsc::{Receiver, channel},
    task::{JoinHandle, JoinSet},
};
use trustgate::{
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
    // Tests share their machine: no deadline here may fail them.
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

/// Listens to the hints of `lookup`, until the task is aborted; what comes out of it says that there was one.
fn listen(lookup: &Arc<dyn Source>) -> (Receiver<()>, JoinHandle<Fault>) {
    let ((hints, heard), lookup) = (channel(10), Arc::clone(lookup));
    let woken = move || {
        // Full: one is as good as many.
        let _ = hints.try_send(());
    };
    (heard, tokio::spawn(async move { lookup.listen(&woken).await }))
}

impl Db {
    /// Without tables.
    async fn empty(server: Arc<Postgres>) -> Self {
        let name = server.database().await;
        let settings = settings(server.url("admin", &name));
        Self { server, name, lookup: open(&settings), settings }
    }

    /// With one trust and one key.
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

    async fn is_watched(&self) -> bool {
        self.lookup.poll(None).await.unwrap().triggers_intact
    }

    async fn newest(&self) -> Version {
        self.lookup.poll(None).await.unwrap().newest.as_of
    }

    /// What was named since `version`.
    async fn named(&self, version: &mut Version) -> Vec<Change> {
        let polled = self.lookup.poll(Some(*version)).await.unwrap();
        assert!(polled.complete);
        *version = polled.newest.as_of;
        polled.changes.into_iter().map(|(_, change)| change).collect()
    }

    /// A change of the key is named.
    async fn names(&self, seen: &mut Version) {
        self.execute("UPDATE trustgate.api_key SET scheme = 1 - scheme").await;
        let changes = self.named(seen).await;
        assert!(changes.contains(&Change::Key(KeyId(KEY.parse().unwrap()))), "{changes:?}");
    }
}

/// What happens to what was altered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    /// It is all right, and was not for a while: that is made up for.
    Heals,
    /// It stays noticed until this is done.
    Cure(&'static str),
    /// The same, until it is mended by `trustgate migrate`.
    Migrate,
    /// It is none of our business.
    Unnoticed,
}

#[tokio::test]
async fn whatever_keeps_changes_from_being_named_is_noticed_until_it_is_put_right() {
    const ROW: &str = "TRIGGER trustgate_changed";
    let on = |rest: &str| format!("ALTER TABLE trustgate.api_key {rest}");
    let cases: Vec<(&str, String, Then)> = vec![
        ("VACUUM, ANALYZE and an index", "VACUUM (FREEZE, ANALYZE) trustgate.api_key; VACUUM (FREEZE, ANALYZE) pg_trigger; CREATE INDEX ON trustgate.api_key (hint); REINDEX TABLE trustgate.api_key".into(), Then::Unnoticed),
        ("a trigger is disabled", on(&format!("DISABLE {ROW}")), Then::Cure("ALTER TABLE trustgate.api_key ENABLE ALWAYS TRIGGER trustgate_changed")),
        (
            "for the length of one transaction",
            format!(
                "BEGIN; {}; UPDATE trustgate.api_key SET scheme = 5; {}; COMMIT",
                on(&format!("DISABLE {ROW}")),
                on(&format!("ENABLE ALWAYS {ROW}"))
            ),
            Then::Heals,
        ),
        ("enabled, but not for every session", on(&format!("ENABLE {ROW}")), Then::Migrate),
        ("all are disabled and enabled", on("DISABLE TRIGGER ALL, ENABLE TRIGGER ALL"), Then::Migrate),
        ("only for replicas", on(&format!("ENABLE REPLICA {ROW}")), Then::Migrate),
        ("dropped", format!("DROP {ROW} ON trustgate.api_key"), Then::Migrate),
        ("the one that sees TRUNCATE", "DROP TRIGGER trustgate_truncated ON trustgate.trust".into(), Then::Migrate),
        ("the stamp", "ALTER TABLE trustgate.tx DISABLE TRIGGER trustgate_stamp".into(), Then::Migrate),
        (
            "the stamp, not deferred",
            "DROP TRIGGER trustgate_stamp ON trustgate.tx; CREATE TRIGGER trustgate_stamp AFTER INSERT ON trustgate.tx
                FOR EACH ROW EXECUTE FUNCTION trustgate.stamp(); ALTER TABLE trustgate.tx ENABLE ALWAYS TRIGGER trustgate_stamp"
                .into(),
            Then::Migrate,
        ),
        (
            "another trigger of the same name",
            format!(
                "DROP {ROW} ON trustgate.api_key; CREATE {ROW} AFTER UPDATE OF name ON trustgate.api_key
                    FOR EACH ROW EXECUTE FUNCTION trustgate.api_key_changed(); {}",
                on(&format!("ENABLE ALWAYS {ROW}"))
            ),
            Then::Migrate,
        ),
        (
            "a function",
            "CREATE OR REPLACE FUNCTION trustgate.api_key_changed() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
                SET search_path = pg_catalog, pg_temp AS $$ BEGIN RETURN NULL; END $$"
                .into(),
            Then::Migrate,
        ),
        ("how a function is run", "ALTER FUNCTION trustgate.note(text, text) COST 99".into(), Then::Heals),
        (
            "the table is swapped for another",
            format!("{}; CREATE TABLE trustgate.api_key (LIKE trustgate.away INCLUDING ALL)", on("RENAME TO away")),
            Then::Cure("DROP TABLE trustgate.api_key; ALTER TABLE trustgate.away RENAME TO api_key"),
        ),
        (
            "and back, in one transaction",
            format!("BEGIN; {}; UPDATE trustgate.away SET scheme = 6; ALTER TABLE trustgate.away RENAME TO api_key; COMMIT", on("RENAME TO away")),
            Then::Heals,
        ),
        (
            "a table inherits from ours",
            "CREATE TABLE trustgate.child () INHERITS (trustgate.api_key)".into(),
            Then::Cure("ALTER TABLE trustgate.child NO INHERIT trustgate.api_key; DROP TABLE trustgate.child"),
        ),
        ("a column is emptied by dropping it", on("DROP COLUMN revoked_at, ADD COLUMN revoked_at timestamptz"), Then::Heals),
        ("a column is rewritten", on("ALTER COLUMN expires_at TYPE timestamptz USING now()"), Then::Heals),
        ("VACUUM FULL", "VACUUM FULL trustgate.api_key".into(), Then::Heals),
        ("TRUNCATE", "BEGIN; SAVEPOINT a; TRUNCATE trustgate.api_key CASCADE; ROLLBACK TO a; TRUNCATE trustgate.key_use; COMMIT".into(), Then::Unnoticed),
        ("TRUNCATE for good", "TRUNCATE trustgate.api_key CASCADE".into(), Then::Heals),
        (
            "a trigger of somebody else",
            "CREATE TRIGGER other BEFORE UPDATE ON trustgate.api_key FOR EACH ROW
                EXECUTE FUNCTION suppress_redundant_updates_trigger()"
                .into(),
            Then::Heals,
        ),
    ];
    let db = Db::new().await;
    let refill = format!(
        "INSERT INTO trustgate.api_key (id, trust_id, digest, scheme, hint) VALUES ('{KEY}', '{KEY}', sha256('a'), 0, 'tg')
         ON CONFLICT DO NOTHING"
    );
    let mut seen = db.newest().await;
    for (what, sql, then) in cases {
        // One by one: some cannot be part of a transaction.
        let whole = sql.contains("BEGIN") || sql.contains("$$");
        for statement in if whole { vec![&*sql] } else { sql.split(';').collect() } {
            db.execute(statement).await;
        }
        assert_eq!(db.is_watched().await, then == Then::Unnoticed, "{what}");
        if let Then::Cure(_) | Then::Migrate = then {
            let refused = db.lookup.restore_watch().await;
            let problem = refused.expect_err(what);
            let Fault::Unreachable { source, .. } = &problem else { panic!("{what}: {problem:?}") };
            assert!(source.to_string().contains("trustgate."), "{what}: {source}");
            assert!(!db.is_watched().await, "{what}");
        }
        match then {
            Then::Cure(cure) => {
                db.execute(cure).await;
                assert!(!db.is_watched().await, "{what}: nobody has looked what passed meanwhile");
                db.lookup.restore_watch().await.unwrap();
            }
            Then::Migrate => db.migrate().await,
            Then::Heals => db.lookup.restore_watch().await.unwrap(),
            Then::Unnoticed => {}
        }
        assert!(db.is_watched().await, "{what}");
        let changes = db.named(&mut seen).await;
        assert_eq!(changes.contains(&Change::Everything), then != Then::Unnoticed, "{what}: {changes:?}");
        db.migrate().await;
        assert_eq!(db.named(&mut seen).await, [], "{what}: nothing was left to mend");
        db.execute(&refill).await;
        db.named(&mut seen).await;
        db.names(&mut seen).await;
    }
}

#[tokio::test]
async fn children_and_partitions_are_watched_once_they_have_triggers() {
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
    assert!(db.named(&mut seen).await.contains(&Change::Key(KeyId(id))));
    db.execute("TRUNCATE trustgate.child").await;
    assert!(!db.is_watched().await);
    assert!(db.named(&mut seen).await.contains(&Change::Whole(ChangeKind::Keys)));
    db.lookup.restore_watch().await.unwrap();
    db.execute("BEGIN; ALTER TABLE trustgate.child NO INHERIT trustgate.api_key; ALTER TABLE trustgate.child INHERIT trustgate.api_key; COMMIT").await;
    assert!(!db.is_watched().await);
    db.lookup.restore_watch().await.unwrap();
    // A child of the child.
    db.execute("CREATE TABLE trustgate.grandchild () INHERITS (trustgate.child)").await;
    assert!(db.lookup.restore_watch().await.is_err());
    db.execute("DROP TABLE trustgate.grandchild").await;
    db.lookup.restore_watch().await.unwrap();

    // The same rows in partitions.
    db.execute(
        "DROP TABLE trustgate.child, trustgate.key_use; ALTER TABLE trustgate.api_key RENAME TO old;
         CREATE TABLE trustgate.api_key (LIKE trustgate.old INCLUDING DEFAULTS) PARTITION BY HASH (id);
         CREATE TABLE trustgate.part0 PARTITION OF trustgate.api_key FOR VALUES WITH (MODULUS 2, REMAINDER 0);
         CREATE TABLE trustgate.part1 PARTITION OF trustgate.api_key FOR VALUES WITH (MODULUS 2, REMAINDER 1);
         INSERT INTO trustgate.api_key SELECT * FROM trustgate.old",
    )
    .await;
    assert!(!db.is_watched().await);
    assert!(db.lookup.restore_watch().await.is_err());
    db.migrate().await;
    db.named(&mut seen).await;
    db.names(&mut seen).await;
    let part = "SELECT tableoid::regclass::text FROM trustgate.api_key";
    let part: String = sqlx::query(part).fetch_one(&mut db.server.admin(&db.name).await).await.unwrap().get(0);
    db.execute(&format!("UPDATE {part} SET scheme = 1 - scheme")).await;
    assert!(
        db.named(&mut seen).await.contains(&Change::Key(KeyId(KEY.parse().unwrap()))),
        "by the partition's own name"
    );
    db.execute(&format!("ALTER TABLE trustgate.api_key DETACH PARTITION {part}")).await;
    assert!(!db.is_watched().await);
    db.lookup.restore_watch().await.unwrap();
    assert_eq!(db.named(&mut seen).await, [Change::Everything]);
    let remainder = part.chars().last().unwrap();
    db.execute(&format!(
        "ALTER TABLE {part} DISABLE TRIGGER ALL; UPDATE {part} SET scheme = 9; ALTER TABLE {part} ENABLE ALWAYS TRIGGER trustgate_truncated;
         ALTER TABLE trustgate.api_key ATTACH PARTITION {part} FOR VALUES WITH (MODULUS 2, REMAINDER {remainder})"
    ))
    .await;
    assert!(!db.is_watched().await);
    if db.lookup.restore_watch().await.is_err() {
        db.migrate().await;
    }
    assert!(db.named(&mut seen).await.contains(&Change::Everything));
    db.names(&mut seen).await;
    db.execute(&format!("ALTER TABLE {part} DISABLE TRIGGER ALL")).await;
    assert!(!db.is_watched().await);
    assert!(db.lookup.restore_watch().await.is_err());
    db.migrate().await;
    db.named(&mut seen).await;
    db.names(&mut seen).await;
}

/// What the first release made.
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
async fn tables_of_the_first_release_are_upgraded_in_place() {
    let db = Db::empty(Postgres::shared().await).await;
    db.execute(FIRST).await;
    let problem = db.lookup.prepare(Missing::Refuse).await.unwrap_err().to_string();
    assert!(problem.contains("version 1") && problem.contains("trustgate migrate"), "{problem}");
    // Whoever changes something meanwhile is waited for, and whoever reads does not wait.
    let mut writer = db.server.admin(&db.name).await;
    sqlx::raw_sql("BEGIN; UPDATE trustgate.api_key SET scheme = 1").execute(&mut writer).await.unwrap();
    let mut migrating = JoinSet::new();
    for _ in 0..3 {
        let settings = db.settings.clone();
        migrating.spawn(async move { store::migrate(&settings, &|_| None).await.unwrap() });
    }
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    eventually("all wait for the writer", 20 * SECONDS, || async {
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
    db.names(&mut seen).await;
    assert_eq!(seen, Version(43));
    db.migrate().await;
    assert_eq!(db.newest().await, seen, "nothing to do");
    assert!(db.lookup.redis_mac_key().await.unwrap().is_some());
    let mut ledger = store::open_ledger(&db.settings, &|_| None).await.unwrap();
    assert_eq!(ledger.replicas().await.unwrap(), [], "nobody knows until when it counts");
}

#[tokio::test]
async fn functions_that_an_upgrade_adds_need_no_new_rights() {
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
async fn the_rights_that_are_printed_are_enough_and_no_more() {
    let db = Db::new().await;
    let (serve, manage) = (format!("serve_{}", db.name), format!("manage_{}", db.name));
    db.execute(&format!("CREATE ROLE {serve} LOGIN; CREATE ROLE {manage} LOGIN")).await;
    let lookup = open(&settings(db.server.url(&serve, &db.name)));
    let problem = lookup.prepare(Missing::Refuse).await.unwrap_err().to_string();
    assert!(problem.contains("permission denied"), "{problem}");
    db.execute(&store::grants(&db.settings, &serve, &manage)).await;

    lookup.prepare(Missing::Refuse).await.unwrap();
    let sign = Heartbeat { replica: Uuid::nil(), name: "here".into(), applied: Version(1), lasts: 60 * SECONDS };
    lookup.report(&sign).await.unwrap();
    lookup.prune().await.unwrap();
    lookup.redis_mac_key().await.unwrap();
    db.execute("UPDATE trustgate.meta SET fingerprint = NULL").await;
    lookup.restore_watch().await.unwrap();
    let polled = lookup.poll(None).await.unwrap();
    assert!(polled.triggers_intact);
    lookup.renew_incarnation(polled.newest.lineage.incarnation).await.unwrap();
    assert_ne!(lookup.poll(None).await.unwrap().newest.lineage, polled.newest.lineage);
    let (mut heard, listening) = listen(&lookup);
    heard.recv().await.unwrap();
    listening.abort();

    let mut ledger = store::open_ledger(&settings(db.server.url(&manage, &db.name)), &|_| None).await.unwrap();
    let actor = Actor("test:somebody".into());
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
        (&manage, "UPDATE trustgate.audit SET actor = 'nobody'"),
    ] {
        let mut connection = sqlx::PgConnection::connect(&db.server.url(role, &db.name)).await.unwrap();
        let refused = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap_err();
        assert_eq!(refused.as_database_error().unwrap().code().as_deref(), Some("42501"), "{role}: {sql}");
    }
    // A right that is taken away later is an answer: it opens no window of stale grants.
    db.execute(&format!("REVOKE SELECT ON trustgate.change FROM {serve}")).await;
    let outcome = lookup.poll(Some(Version(1))).await;
    assert!(
        matches!(&outcome, Err(PollError::Unusable(problem)) if problem.contains("permission denied")),
        "{outcome:?}"
    );
}

#[tokio::test]
async fn a_poll_relies_on_a_primary_that_can_be_written_to_and_on_nothing_else() {
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
    // Sessions keep what they began with, whatever became of the database or of the way to it: they are left for others.
    eventually("a new session", 20 * SECONDS, || async { lookup.poll(None).await.is_ok() }).await;
    // Where every transaction is SERIALIZABLE by default, our reads are not.
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
    eventually("it is a primary", 20 * SECONDS, || async { following.poll(None).await.is_ok() }).await;
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
    // No answer at all.
    let Db { server, lookup, .. } = db;
    drop(primary);
    let mut primary = Arc::into_inner(server).unwrap();
    primary.stop();
    let outcome = lookup.poll(None).await;
    assert!(matches!(outcome, Err(PollError::NoAnswer(_))), "{outcome:?}");
}

#[tokio::test]
async fn through_a_pooler_everything_works_but_hints() {
    let server = Arc::new(Postgres::start().await);
    let db = Db::empty(Arc::clone(&server)).await;
    db.migrate().await;
    let pooler = PgBouncer::start(&server).await;
    let settings = settings(pooler.url(&db.name));
    store::migrate(&settings, &|_| None).await.unwrap();
    let lookup = open(&settings);
    lookup.prepare(Missing::Refuse).await.unwrap();
    let mut ledger = store::open_ledger(&settings, &|_| None).await.unwrap();
    let actor = Actor("test:somebody".into());
    let mut seen = lookup.poll(None).await.unwrap().newest.as_of;
    // Others use the same connections of the server meanwhile, each with its own idea of a session.
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
    let sign = Heartbeat { replica: Uuid::nil(), name: "here".into(), applied: seen, lasts: SECONDS * 60 };
    lookup.report(&sign).await.unwrap();
    assert_eq!(ledger.replicas().await.unwrap().len(), 1);
    lookup.prune().await.unwrap();
    lookup.restore_watch().await.unwrap();

    stop.cancel();
    others.join_all().await;

    // Hints do not pass through one, and to listen there would fall on others: that is told at once.
    let told = tokio::time::timeout(10 * SECONDS, lookup.listen(&|| panic!("nobody listens"))).await.unwrap();
    assert!(matches!(told, Fault::Unreachable { .. }), "{told:?}");
}

#[tokio::test]
async fn a_schema_of_another_name_has_everything_of_its_own() {
    let db = Db::new().await;
    let mut other = db.settings.clone();
    other.schema =
        trustgate::base::settings::Setting::read(&trustgate::base::settings::RawValue::One("gate_2".into())).unwrap();
    store::migrate(&other, &|_| None).await.unwrap();
    let lookup = open(&other);
    lookup.prepare(Missing::Refuse).await.unwrap();
    let before = (db.newest().await, lookup.poll(None).await.unwrap().newest.as_of);
    let (mut heard, listening) = listen(&lookup);
    heard.recv().await.unwrap();
    db.execute("UPDATE trustgate.api_key SET scheme = 1").await;
    db.execute("INSERT INTO gate_2.trust (id, name) VALUES (gen_random_uuid(), 'acme')").await;
    heard.recv().await.unwrap();
    assert_eq!(
        (db.newest().await.0, lookup.poll(None).await.unwrap().newest.as_of.0),
        (before.0.0 + 1, before.1.0 + 1)
    );
    assert!(heard.try_recv().is_err(), "each has its own channel");
    db.execute("ALTER TABLE trustgate.api_key DISABLE TRIGGER ALL").await;
    assert!(lookup.poll(None).await.unwrap().triggers_intact && !db.is_watched().await);
    // Both in one transaction, each of them counted by itself.
    db.migrate().await;
    db.execute("BEGIN; UPDATE trustgate.api_key SET scheme = 0; UPDATE gate_2.trust SET enabled = false; COMMIT").await;
    assert_eq!(lookup.poll(Some(Version(before.1.0 + 1))).await.unwrap().changes.len(), 1);
    listening.abort();
}

#[tokio::test]
async fn session_settings_of_a_database_do_no_harm() {
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
async fn a_url_with_an_ipv6_address_leads_to_the_database() {
    let db = Db::new().await;
    let url =
        db.server.tcp_url("trusted", &db.name).replace("127.0.0.1", "[::1]").replace("trusted@", "trusted:secret@");
    db.execute("CREATE ROLE trusted LOGIN SUPERUSER PASSWORD 'secret'").await;
    open(&settings(url)).prepare(Missing::Refuse).await.unwrap();
}
