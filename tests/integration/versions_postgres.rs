//! Tests the change log on PostgreSQL: each committed change has a version, in commit order, regardless of which role
//! makes the change and with which statement.

// Some tests measure wall-clock time, and some are long because each step depends on the previous step.
#![allow(clippy::disallowed_methods, clippy::too_many_lines, clippy::similar_names, clippy::needless_for_each)]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use sqlx::{AssertSqlSafe, Connection, PgConnection, Row, postgres::PgConnectOptions};
use tokio::task::JoinSet;
use trustgate::testing::{
    base::{clock::SystemClock, fault::Fault, secret::Secret},
    record::{Change, ChangeKind, KeyId, Version},
    store::{self, Actor, Missing, Polled, Source, StoreError, StoreSettings},
};
use uuid::Uuid;

use crate::support::postgres::Postgres;

const SECONDS: Duration = Duration::from_secs(1);

/// A database with trustgate's tables, one trust, and the role `writer`, which may change trusts and keys but nothing
/// else.
struct Db {
    server: Arc<Postgres>,
    name: String,
    settings: StoreSettings,
    lookup: Arc<dyn Source>,
}

const TRUST: Uuid = Uuid::from_u128(0xacde);

impl Db {
    async fn new() -> Self {
        Self::on(Postgres::shared().await).await
    }

    async fn on(server: Arc<Postgres>) -> Self {
        let name = server.database().await;
        let url = Some(Secret::new(server.url("admin", &name)));
        // Set timeouts that are long enough for a busy machine.
        let settings = StoreSettings {
            url,
            read_timeout: 20 * SECONDS,
            connect_timeout: 20 * SECONDS,
            ..StoreSettings::default()
        };
        store::migrate(&settings, &|_| None).await.unwrap();
        let lookup = store::open_lookup(&settings, &|_| None, Arc::new(SystemClock)).unwrap();
        lookup.prepare(Missing::Refuse).await.unwrap();
        let db = Self { server, name, settings, lookup };
        db.execute(&format!("INSERT INTO trustgate.trust (id, name) VALUES ('{TRUST}', 'acme')")).await;
        db.execute(
            "DO $$ BEGIN CREATE ROLE writer LOGIN; EXCEPTION WHEN duplicate_object OR unique_violation THEN END $$;
             GRANT USAGE ON SCHEMA trustgate TO writer;
             GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON trustgate.trust, trustgate.api_key TO writer",
        )
        .await;
        // GRANT alters the table, so the triggers must be examined again.
        db.lookup.restore_watch().await.unwrap();
        db
    }

    async fn execute(&self, sql: &str) {
        self.server.execute(&self.name, sql).await;
    }

    async fn admin(&self) -> PgConnection {
        self.server.admin(&self.name).await
    }

    async fn writer(&self) -> PgConnection {
        let options: PgConnectOptions = self.server.url("writer", &self.name).parse().unwrap();
        PgConnection::connect_with(&options).await.unwrap()
    }

    async fn keys(&self, numbers: std::ops::Range<u128>) {
        for number in numbers {
            self.execute(&insert(number)).await;
        }
    }

    async fn newest(&self) -> Version {
        self.lookup.poll(None).await.unwrap().newest.as_of
    }

    async fn since(&self, version: &mut Version) -> Polled {
        let polled = self.lookup.poll(Some(*version)).await.unwrap();
        assert!(polled.triggers_intact && polled.complete, "{polled:?}");
        *version = polled.newest.as_of;
        polled
    }

    /// Returns the changes recorded after `version`, including repeated changes, and the number of new versions.
    /// Advances `version` to the newest version.
    async fn recorded(&self, version: &mut Version) -> (Vec<Change>, usize) {
        let polled = self.since(version).await;
        (polled.changes.into_iter().map(|(_, change)| change).collect(), polled.versions.len() - 1)
    }
}

fn key(number: u128) -> KeyId {
    KeyId(Uuid::from_u128(number))
}

fn digest(number: u128) -> String {
    format!("{number:064x}")
}

fn insert(number: u128) -> String {
    let (id, digest) = (key(number), digest(number));
    format!(
        "INSERT INTO trustgate.api_key (id, trust_id, digest, scheme, hint)
         VALUES ('{id}', '{TRUST}', '\\x{digest}', 0, 'tg')"
    )
}

async fn run(connection: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// Runs a statement that the server must refuse. Returns the SQLSTATE and the message.
async fn refused(connection: &mut PgConnection, sql: &str) -> (String, String) {
    let error = sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.expect_err(sql);
    let error = error.into_database_error().expect("an error from the server");
    (error.code().unwrap().into_owned(), error.message().to_owned())
}

/// A writer's committed transaction: the transaction id, and the string that the transaction wrote to each key.
type Committed = (u64, BTreeMap<Uuid, String>);

const WRITERS: u128 = 4;
const KEYS_EACH: u128 = 8;
/// The distance between the first key numbers of two writers. It is so large that the keys of two writers are not on
/// the same index page, because under SERIALIZABLE a lookup of a key counts as a read of the whole page.
const BETWEEN: u128 = 2_000;

/// Returns the number of the first key of a writer.
const fn first(writer: u128) -> u128 {
    1 + writer * BETWEEN
}
const TRANSACTIONS: u64 = 500;

/// Changes the keys of one writer in transactions of several kinds. Returns the committed transactions.
async fn write(mut connection: PgConnection, writer: u128, isolation: &'static str) -> Vec<Committed> {
    // Force index scans, because under SERIALIZABLE a table scan counts as a read of all keys.
    run(&mut connection, "SET enable_seqscan = off; SET enable_bitmapscan = off").await;
    let mut committed = Vec::new();
    for number in 0..TRANSACTIONS {
        let mut wrote = BTreeMap::new();
        let pick = |of: u64| Uuid::from_u128(first(writer) + u128::from((number * 7 + of) % 8));
        let word = format!("{isolation}:{writer}:{number}");
        let update = |id: Uuid| format!("UPDATE trustgate.api_key SET scopes = ARRAY['{word}'] WHERE id = '{id}'");
        run(&mut connection, &format!("BEGIN ISOLATION LEVEL {isolation}")).await;
        if number % 10 == 0 {
            // In half of these transactions, another change precedes the change that is rolled back.
            if number % 20 == 0 {
                run(&mut connection, &update(pick(0))).await;
                wrote.insert(pick(0), word.clone());
            }
            run(&mut connection, &format!("SAVEPOINT one; {}", update(pick(1)))).await;
            run(&mut connection, "ROLLBACK TO one").await;
            run(&mut connection, &format!("SAVEPOINT two; {}; RELEASE two", update(pick(2)))).await;
            wrote.insert(pick(2), word.clone());
        } else {
            run(&mut connection, &update(pick(0))).await;
            wrote.insert(pick(0), word.clone());
        }
        let id: String =
            sqlx::query("SELECT pg_current_xact_id()::text").fetch_one(&mut connection).await.unwrap().get(0);
        if number % 3 == 2 {
            run(&mut connection, "ROLLBACK").await;
        } else {
            run(&mut connection, "COMMIT").await;
            committed.push((id.parse().unwrap(), wrote));
        }
    }
    committed
}

/// The newest version and the first scope of each key, read in one snapshot of the database. Each transaction sets a
/// different scope, so the scope shows which transactions the snapshot includes.
struct Snapshot {
    newest: i64,
    keys: BTreeMap<Uuid, String>,
}

/// Takes snapshots one after another until `stop` is set.
async fn take_snapshots(mut connection: PgConnection, stop: Arc<AtomicBool>) -> Vec<Snapshot> {
    let mut snapshots = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        run(&mut connection, "BEGIN ISOLATION LEVEL REPEATABLE READ READ WRITE").await;
        let poll = "SELECT newest FROM trustgate.poll(9223372036854775807, 1)";
        let newest = sqlx::query(poll).fetch_one(&mut connection).await.unwrap().get(0);
        let all = sqlx::query("SELECT id, coalesce(scopes[1], '') FROM trustgate.api_key WHERE hint = 'tg'")
            .fetch_all(&mut connection);
        let keys = all.await.unwrap().iter().map(|row| (row.get(0), row.get(1))).collect();
        run(&mut connection, "COMMIT").await;
        snapshots.push(Snapshot { newest, keys });
    }
    snapshots
}

/// Polls like a replica until `stop` is set. Returns each recorded change with its version.
async fn follow(db: Arc<Db>, mut since: Version, stop: Arc<AtomicBool>) -> Vec<(Version, Change)> {
    let mut changes = Vec::new();
    loop {
        let last = stop.load(Ordering::Relaxed);
        let before = since;
        let polled = db.since(&mut since).await;
        assert!(polled.changes.iter().all(|(version, _)| *version > before && *version <= since), "{polled:?}");
        changes.extend(polled.changes);
        if last {
            return changes;
        }
    }
}

#[tokio::test]
async fn versions_follow_the_commit_order_and_no_writer_fails() {
    let db = Arc::new(Db::new().await);
    // Put only a few keys on each heap page, so that two writers do not conflict on a page under SERIALIZABLE.
    db.execute("ALTER TABLE trustgate.api_key SET (fillfactor = 10)").await;
    db.lookup.restore_watch().await.unwrap();
    db.execute(&format!(
        "INSERT INTO trustgate.api_key (id, trust_id, digest, scheme, hint)
         SELECT lpad(to_hex(number), 32, '0')::uuid, '{TRUST}', decode(lpad(to_hex(number), 64, '0'), 'hex'), 0,
            CASE WHEN (number - 1) % {BETWEEN} < {KEYS_EACH} THEN 'tg' ELSE 'between' END
         FROM generate_series(1, {}) AS number",
        WRITERS * BETWEEN
    ))
    .await;
    for isolation in ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] {
        let (begin, stop) = (db.newest().await, Arc::new(AtomicBool::new(false)));
        let following = tokio::spawn(follow(Arc::clone(&db), begin, Arc::clone(&stop)));
        let watching = tokio::spawn(take_snapshots(db.admin().await, Arc::clone(&stop)));
        let mut writing = JoinSet::new();
        for writer in 0..WRITERS {
            // Half of the writers have a role that does not own the tables.
            let connection = if writer % 2 == 0 { db.writer().await } else { db.admin().await };
            writing.spawn(write(connection, writer, isolation));
        }
        let committed: HashMap<u64, _> = writing.join_all().await.into_iter().flatten().collect();
        stop.store(true, Ordering::Relaxed);
        let (changes, snapshots) = (following.await.unwrap(), watching.await.unwrap());

        // Each committed transaction has one version, and there are no other versions.
        let versions = format!("SELECT version, tx::text FROM trustgate.version WHERE version > {}", begin.0);
        let rows = sqlx::query(AssertSqlSafe(versions)).fetch_all(&mut db.admin().await).await.unwrap();
        let versions: BTreeMap<i64, u64> =
            rows.iter().map(|row| (row.get(0), row.get::<String, _>(1).parse().unwrap())).collect();
        assert_eq!(committed.len(), usize::try_from(WRITERS).unwrap() * 334, "a third was rolled back");
        assert_eq!(versions.len(), committed.len());
        assert_eq!(versions.values().collect::<BTreeSet<_>>(), committed.keys().collect::<BTreeSet<_>>());

        // Each version records exactly the keys that its transaction changed, each key once. It records no change that
        // was rolled back.
        let mut recorded: BTreeMap<i64, Vec<Uuid>> = BTreeMap::new();
        for (version, change) in &changes {
            if let Change::Key(id) = change {
                recorded.entry(version.0.cast_signed()).or_default().push(id.0);
            }
        }
        recorded.values_mut().for_each(|ids| ids.sort());
        let changed: BTreeMap<i64, Vec<Uuid>> =
            versions.iter().map(|(version, tx)| (*version, committed[tx].keys().copied().collect())).collect();
        assert_eq!(recorded, changed, "{isolation}");

        // A snapshot contains exactly the changes up to its newest version.
        assert!(snapshots.len() > 20, "{isolation}: only {} snapshots", snapshots.len());
        let mut expected = snapshots[0].keys.clone();
        let mut upcoming = versions.iter().skip_while(|(version, _)| **version <= snapshots[0].newest).peekable();
        for (before, now) in snapshots.iter().zip(&snapshots[1..]) {
            assert!(now.newest >= before.newest);
            while let Some((version, tx)) = upcoming.next_if(|(version, _)| **version <= now.newest) {
                assert!(*version > before.newest, "{isolation}: {version} appeared below {}", before.newest);
                expected.extend(committed[tx].clone());
            }
            assert_eq!(now.keys, expected, "{isolation}: as of {}", now.newest);
        }
        println!("{isolation}: {} versions, {} snapshots, {} changes", versions.len(), snapshots.len(), changes.len());
    }
}

#[tokio::test]
async fn each_kind_of_statement_is_recorded_for_a_role_without_rights_on_the_change_log() {
    let db = Db::new().await;
    db.keys(1..10).await;
    let mut writer = db.writer().await;
    let mut seen = db.newest().await;
    let has = |changes: &[Change], wanted: &[Change]| {
        for change in wanted {
            assert_eq!(changes.iter().filter(|found| *found == change).count(), 1, "{change:?} in {changes:?}");
        }
    };
    let absent = |number| Change::Absent(trustgate::testing::record::ApiKeyDigest::from_hex(&digest(number)).unwrap());
    let gone = |number| Change::Gone(trustgate::testing::record::ApiKeyDigest::from_hex(&digest(number)).unwrap());

    let upsert = format!("{} ON CONFLICT (id) DO UPDATE SET revoked_at = now()", insert(1));
    run(&mut writer, &upsert).await;
    let (changes, versions) = db.recorded(&mut seen).await;
    has(&changes, &[Change::Key(key(1)), gone(1)]);
    assert_eq!((changes.len(), versions), (3, 1));
    run(&mut writer, &format!("{} ON CONFLICT DO NOTHING", insert(1))).await;
    assert_eq!(db.recorded(&mut seen).await, (vec![], 0), "nothing was inserted");

    let merge = format!(
        "MERGE INTO trustgate.api_key k USING (VALUES ('{}'::uuid), ('{}'), ('{}')) AS n (id) ON k.id = n.id
         WHEN MATCHED AND k.id = '{}' THEN DELETE
         WHEN MATCHED THEN UPDATE SET scheme = 1
         WHEN NOT MATCHED THEN INSERT (id, trust_id, digest, scheme, hint) VALUES (n.id, '{TRUST}', '\\x{}', 0, 'tg')",
        key(2),
        key(3),
        key(50),
        key(2),
        digest(50),
    );
    run(&mut writer, &merge).await;
    let (changes, versions) = db.recorded(&mut seen).await;
    has(&changes, &[Change::Key(key(2)), gone(2), Change::Key(key(3)), absent(3), absent(50)]);
    assert_eq!((changes.len(), versions), (5, 1));

    let mut copy =
        writer.copy_in_raw("COPY trustgate.api_key (id, trust_id, digest, scheme, hint) FROM STDIN").await.unwrap();
    for number in 60..63 {
        let line = format!("{}\t{TRUST}\t\\\\x{}\t0\ttg\n", key(number), digest(number));
        copy.send(line.into_bytes()).await.unwrap();
    }
    copy.finish().await.unwrap();
    let (changes, versions) = db.recorded(&mut seen).await;
    has(&changes, &[absent(60), absent(61), absent(62)]);
    assert_eq!((changes.len(), versions), (3, 1));

    // PostgreSQL runs a cascade with the table owner's rights, not with the writer's rights. `key_use` also
    // references the keys.
    db.execute(
        "ALTER TABLE trustgate.api_key DROP CONSTRAINT api_key_trust_id_fkey,
            ADD FOREIGN KEY (trust_id) REFERENCES trustgate.trust (id) ON DELETE CASCADE ON UPDATE CASCADE;
         INSERT INTO trustgate.key_use SELECT id, now() FROM trustgate.api_key",
    )
    .await;
    db.lookup.restore_watch().await.unwrap();
    db.recorded(&mut seen).await;
    let other = Uuid::from_u128(0xb0b);
    run(&mut writer, &format!("UPDATE trustgate.trust SET id = '{other}' WHERE id = '{TRUST}'")).await;
    let (changes, versions) = db.recorded(&mut seen).await;
    has(
        &changes,
        &[
            Change::Trust(trustgate::testing::record::TrustId(TRUST)),
            Change::Trust(trustgate::testing::record::TrustId(other)),
        ],
    );
    has(&changes, &[Change::Key(key(1)), Change::Key(key(3)), Change::Key(key(62))]);
    assert_eq!(versions, 1);
    run(&mut writer, &format!("DELETE FROM trustgate.trust WHERE id = '{other}'")).await;
    let (changes, versions) = db.recorded(&mut seen).await;
    has(
        &changes,
        &[Change::Trust(trustgate::testing::record::TrustId(other)), Change::Key(key(1)), gone(62), gone(50)],
    );
    assert_eq!(versions, 1);

    db.execute(&format!("INSERT INTO trustgate.trust (id, name) VALUES ('{TRUST}', 'acme')")).await;
    db.execute("INSERT INTO trustgate.key_use SELECT id, now() FROM trustgate.api_key").await;
    db.recorded(&mut seen).await;
    db.execute("UPDATE trustgate.key_use SET last_used_at = now(); DELETE FROM trustgate.key_use").await;
    assert_eq!(db.recorded(&mut seen).await, (vec![], 0), "updating the last use of a key records no change");

    // The writer may neither call these functions nor access these tables.
    for sql in [
        "SELECT trustgate.everything()",
        "SELECT trustgate.note('key', 'x')",
        "SELECT trustgate.restore_watch()",
        "SELECT trustgate.renew_incarnation(gen_random_uuid())",
        "SELECT trustgate.prune()",
        "SELECT * FROM trustgate.version",
        "INSERT INTO trustgate.tx VALUES ('1', now(), '')",
        "DO $$ BEGIN LOCK TABLE trustgate.writer_lock IN SHARE ROW EXCLUSIVE MODE; END $$",
        "SELECT nextval('trustgate.version_number')",
    ] {
        assert_eq!(refused(&mut writer, sql).await.0, "42501", "{sql}");
    }
}

#[tokio::test]
async fn no_session_setting_prevents_a_change_from_being_recorded() {
    let db = Db::new().await;
    db.keys(1..10).await;
    let mut seen = db.newest().await;
    let change = "UPDATE trustgate.api_key SET scheme = 1 - scheme WHERE hint = 'tg'";
    for (superuser, sql) in [
        (false, "SET trustgate.trustgate_key = '-5'; SET trustgate.trustgate_absent = '3'"),
        (false, "SET trustgate.trustgate_key = 'garbage'; SET trustgate.trustgate_gone = ''"),
        (false, "SET trustgate.tx = '1'; SET trustgate.stamped = 'on'"),
        // Create temporary objects with names that the trigger functions use.
        (
            false,
            "CREATE TEMPORARY TABLE tx (a int); CREATE TEMPORARY TABLE change (a int);
             CREATE FUNCTION pg_temp.encode(bytea, text) RETURNS text LANGUAGE sql AS $$ SELECT 'x' $$;
             SET search_path = pg_temp, pg_catalog, trustgate",
        ),
        (false, "SET synchronous_commit = off"),
        (false, "SET default_transaction_isolation = 'serializable'"),
        (true, "SET session_replication_role = replica"),
        (true, "SET session_replication_role = local"),
    ] {
        let mut session = if superuser { db.admin().await } else { db.writer().await };
        run(&mut session, sql).await;
        run(&mut session, change).await;
        let (changes, versions) = db.recorded(&mut seen).await;
        let keys: BTreeSet<_> =
            changes.iter().filter(|change| matches!(change, Change::Key(_))).map(|c| format!("{c:?}")).collect();
        assert_eq!((keys.len(), changes.len(), versions), (9, 18, 1), "{sql}");
    }
    // If the session sets the counter too high, the triggers record one change of all keys instead of one change for
    // each key.
    let mut session = db.writer().await;
    run(&mut session, "SET trustgate.trustgate_key = '99999999'").await;
    run(&mut session, change).await;
    let (changes, _) = db.recorded(&mut seen).await;
    assert!(changes.contains(&Change::Whole(ChangeKind::Keys)), "{changes:?}");
    assert_eq!(changes.len(), 10, "the other kinds are listed");
}

#[tokio::test]
async fn a_version_lock_that_is_taken_early_is_released() {
    let db = Db::new().await;
    db.keys(1..4).await;
    let mut seen = db.newest().await;
    let (mut early, mut other) = (db.writer().await, db.writer().await);
    let update = |number| format!("UPDATE trustgate.api_key SET scheme = 1 - scheme WHERE id = '{}'", key(number));
    // A transaction that has already taken the lock can change more keys. All its changes receive one version when it
    // commits.
    run(&mut early, &format!("BEGIN; SET CONSTRAINTS ALL IMMEDIATE; {}", update(1))).await;
    run(&mut early, &update(2)).await;
    assert_eq!(db.recorded(&mut seen).await, (vec![], 0));
    run(&mut early, "COMMIT").await;
    let (changes, versions) = db.recorded(&mut seen).await;
    assert_eq!((changes.len(), versions), (4, 1));

    // ROLLBACK TO releases the lock.
    run(&mut early, &format!("BEGIN; SAVEPOINT one; {}; SET CONSTRAINTS ALL IMMEDIATE; ROLLBACK TO one", update(1)))
        .await;
    run(&mut other, &format!("SET lock_timeout = '50ms'; {}", update(3))).await;
    run(&mut early, &format!("{}; COMMIT", update(2))).await;
    let (changes, versions) = db.recorded(&mut seen).await;
    assert_eq!((changes.len(), versions), (4, 2));

    // PostgreSQL terminates a session that holds the lock and has been idle for 3 s.
    run(&mut early, &format!("BEGIN; SET CONSTRAINTS ALL IMMEDIATE; {}", update(1))).await;
    assert_eq!(refused(&mut other, &update(3)).await.0, "55P03");
    run(&mut other, "SET lock_timeout = '20s'").await;
    let begun = Instant::now();
    run(&mut other, &update(3)).await;
    println!("the lock was free after {:?} and 50 ms", begun.elapsed());
    assert!(sqlx::raw_sql("COMMIT").execute(&mut early).await.is_err(), "PostgreSQL terminated its session");
    let (changes, versions) = db.recorded(&mut seen).await;
    assert_eq!((changes.contains(&Change::Key(key(3))), changes.len(), versions), (true, 2, 1));
}

#[tokio::test]
async fn a_prepared_transaction_cannot_keep_the_version_lock() {
    let mut server = Postgres::start().await;
    server.execute("postgres", "ALTER SYSTEM SET max_prepared_transactions = 5").await;
    server.stop();
    server.resume().await;
    let db = Db::on(Arc::new(server)).await;
    db.keys(1..3).await;
    let mut seen = db.newest().await;
    let mut writer = db.writer().await;
    run(&mut writer, "BEGIN; UPDATE trustgate.api_key SET hint = 'other'; PREPARE TRANSACTION 'harmless'").await;
    run(&mut writer, "COMMIT PREPARED 'harmless'").await;
    for early in ["", "SET CONSTRAINTS ALL IMMEDIATE;"] {
        run(&mut writer, &format!("BEGIN; {early} UPDATE trustgate.api_key SET scheme = 1")).await;
        let (_, problem) = refused(&mut writer, "PREPARE TRANSACTION 'held'").await;
        assert!(problem.contains("NOTIFY"), "{problem}");
        run(&mut writer, "ROLLBACK").await;
    }
    assert_eq!(db.recorded(&mut seen).await, (vec![], 0));
    run(&mut writer, "SET lock_timeout = '50ms'; UPDATE trustgate.api_key SET scheme = 1").await;
    assert_eq!(db.recorded(&mut seen).await.1, 1);
}

#[tokio::test]
async fn huge_and_open_transactions_do_not_block_other_writers() {
    let db = Arc::new(Db::new().await);
    db.execute(&format!(
        "INSERT INTO trustgate.api_key (id, trust_id, digest, scheme, hint)
         SELECT gen_random_uuid(), '{TRUST}', sha256(n::text::bytea), 0, 'huge' FROM generate_series(1, 200000) AS n"
    ))
    .await;
    db.keys(1..3).await;
    let (mut huge, mut open) = (db.writer().await, db.writer().await);
    run(&mut open, &format!("BEGIN; UPDATE trustgate.api_key SET scheme = 1 WHERE id = '{}'", key(2))).await;
    let stop = Arc::new(AtomicBool::new(false));
    let others = tokio::spawn({
        let (db, stop) = (Arc::clone(&db), Arc::clone(&stop));
        async move {
            let mut other = db.writer().await;
            // A statement that waits longer than this for a lock fails, and so does the test.
            run(&mut other, "SET lock_timeout = '50ms'").await;
            let (mut changes, mut longest) = (0, Duration::ZERO);
            while !stop.load(Ordering::Relaxed) {
                let begun = Instant::now();
                let update = format!("UPDATE trustgate.api_key SET scheme = 1 - scheme WHERE id = '{}'", key(1));
                run(&mut other, &update).await;
                longest = longest.max(begun.elapsed());
                changes += 1;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            (changes, longest)
        }
    });
    let mut seen = db.newest().await;
    run(&mut huge, "BEGIN; UPDATE trustgate.api_key SET revoked_at = now() WHERE hint = 'huge'").await;
    let begun = Instant::now();
    run(&mut huge, "COMMIT").await;
    let commit = begun.elapsed();
    stop.store(true, Ordering::Relaxed);
    let (changes, longest) = others.await.unwrap();
    println!(
        "commit of the huge transaction: {commit:?}; {changes} other changes ran, and the slowest took {longest:?}"
    );
    assert!(changes > 100);
    let polled = db.since(&mut seen).await;
    let whole = |kind| polled.changes.iter().filter(|(_, change)| *change == Change::Whole(kind)).count();
    assert_eq!(whole(ChangeKind::Keys), 1, "one change for all keys");
    assert_eq!((whole(ChangeKind::Gone), whole(ChangeKind::Absences), whole(ChangeKind::Trusts)), (1, 1, 0));
    let listed = sqlx::query("SELECT kind, count(*) FROM trustgate.change GROUP BY kind HAVING count(*) > 30000");
    assert!(
        listed.fetch_all(&mut db.admin().await).await.unwrap().is_empty(),
        "a transaction lists at most 10 000 changes of a kind"
    );

    run(&mut open, "COMMIT").await;
    let late = db.since(&mut seen).await;
    assert!(
        late.changes.iter().any(|(_, change)| *change == Change::Key(key(2))),
        "a change is recorded when it is committed"
    );
}

#[tokio::test]
async fn a_poll_lists_imported_keys_up_to_a_limit_and_then_summarizes_them() {
    let db = Db::new().await;
    let mut seen = db.newest().await;
    let before = seen;
    let import = |from: u32, to: u32| {
        format!(
            "INSERT INTO trustgate.api_key (id, trust_id, digest, scheme, hint)
             SELECT gen_random_uuid(), '{TRUST}', sha256(n::text::bytea), 0, 'tg' FROM generate_series({from}, {to}) AS n"
        )
    };
    db.execute(&import(1, 4_000)).await;
    let (changes, _) = db.recorded(&mut seen).await;
    assert_eq!(changes.iter().filter(|change| matches!(change, Change::Absent(_))).count(), 4_000);
    db.execute(&import(4_001, 10_000)).await;
    db.execute(&format!("UPDATE trustgate.trust SET enabled = false WHERE id = '{TRUST}'")).await;
    let (changes, _) = db.recorded(&mut seen).await;
    assert_eq!(changes.len(), 2, "{changes:?}");
    assert!(changes.contains(&Change::Whole(ChangeKind::Absences)));
    assert!(matches!(changes[0], Change::Trust(_)) || matches!(changes[1], Change::Trust(_)), "{changes:?}");
    // The poll summarizes each kind of change separately: for 2 000 revocations, it lists the keys and the removed
    // digests, but returns one change for all negative entries.
    db.execute(
        "UPDATE trustgate.api_key SET revoked_at = now() WHERE id IN (SELECT id FROM trustgate.api_key LIMIT 2000)",
    )
    .await;
    let (changes, _) = db.recorded(&mut seen).await;
    let count = |wanted: fn(&Change) -> bool| changes.iter().filter(|change| wanted(change)).count();
    assert_eq!(count(|change| matches!(change, Change::Key(_))), 2_000);
    assert_eq!(count(|change| matches!(change, Change::Gone(_))), 2_000);
    assert_eq!(changes.len(), 4_001, "plus one change for all negative entries");
    // There are too many changes to list, so the poll returns `Change::Everything`.
    for part in 0..5 {
        db.execute(&import(20_000 + part * 9_000, 28_999 + part * 9_000)).await;
    }
    let (changes, versions) = db.recorded(&mut seen).await;
    assert!(changes.contains(&Change::Everything), "{changes:?}");
    assert_eq!(versions, 5);
    assert!(db.lookup.poll(Some(before)).await.unwrap().complete);
    // Commit more versions than one poll returns.
    db.execute(
        "DO $$ BEGIN FOR i IN 1..5100 LOOP UPDATE trustgate.trust SET enabled = NOT enabled; COMMIT; END LOOP; END $$",
    )
    .await;
    let polled = db.lookup.poll(Some(seen)).await.unwrap();
    assert!(!polled.complete && polled.newest.as_of > seen, "{:?}", polled.newest);
}

#[tokio::test]
async fn versions_that_a_poll_returned_survive_a_crash() {
    let mut server = Postgres::start().await;
    // With these settings, a crash loses each commit that PostgreSQL has not flushed to disk for a different reason.
    for setting in ["wal_writer_delay = '10s'", "synchronous_commit = off"] {
        server.execute("postgres", &format!("ALTER SYSTEM SET {setting}")).await;
    }
    server.stop();
    server.resume().await;
    let server = Arc::new(server);
    let db = Db::on(Arc::clone(&server)).await;
    db.keys(1..3).await;
    db.execute("CREATE TABLE beside (n int)").await;
    let begin = db.newest().await;
    let mut writer = db.writer().await;
    for _ in 0..50 {
        run(&mut writer, "UPDATE trustgate.api_key SET scheme = 1 - scheme").await;
    }
    let before = db.lookup.poll(Some(begin)).await.unwrap();
    assert_eq!(before.versions.len(), 51);
    db.execute("INSERT INTO beside VALUES (1)").await;
    let Db { name, settings, lookup, server: shared } = db;
    lookup.close().await;
    drop((writer, shared));
    let mut server = Arc::into_inner(server).unwrap();
    server.stop();
    server.resume().await;
    let db = Db { server: Arc::new(server), name, lookup: open(&settings), settings };
    let after = db.lookup.poll(Some(begin)).await.unwrap();
    assert_eq!(after.versions, before.versions, "a polled version is on disk");
    assert_eq!(after.newest.lineage, before.newest.lineage);
    let lost = sqlx::query("SELECT n FROM beside").fetch_all(&mut db.admin().await).await.unwrap();
    assert!(lost.is_empty(), "this test needs a crash that loses other commits");
    db.execute("UPDATE trustgate.api_key SET scheme = 1 - scheme").await;
    assert!(db.newest().await > before.newest.as_of);
}

fn open(settings: &StoreSettings) -> Arc<dyn Source> {
    store::open_lookup(settings, &|_| None, Arc::new(SystemClock)).unwrap()
}

#[tokio::test]
async fn a_restored_database_records_changes_even_if_transaction_ids_repeat() {
    let (first, second) = (Arc::new(Postgres::start().await), Arc::new(Postgres::start().await));
    let db = Db::on(Arc::clone(&first)).await;
    db.keys(1..3).await;
    // The dump contains the ids of these transactions, and the second server will assign many of these ids again.
    db.execute(
        "DO $$ BEGIN FOR i IN 1..600 LOOP UPDATE trustgate.api_key SET scheme = 1 - scheme; COMMIT; END LOOP; END $$",
    )
    .await;
    let before = db.lookup.poll(None).await.unwrap();
    let name = second.database().await;
    second.execute("postgres", "CREATE ROLE writer LOGIN").await;
    second.load(&name, &first.dump(&db.name, &[]));
    let settings = StoreSettings { url: Some(Secret::new(second.url("admin", &name))), ..db.settings.clone() };
    let restored = Db { server: Arc::clone(&second), name, lookup: open(&settings), settings };
    let polled = restored.lookup.poll(None).await.unwrap();
    assert_eq!((polled.newest.as_of, polled.newest.nonce), (before.newest.as_of, before.newest.nonce));
    assert_ne!(polled.newest.lineage, before.newest.lineage, "a different server has a different lineage");
    assert!(!polled.triggers_intact, "the restored triggers have not been examined yet");
    restored.lookup.restore_watch().await.unwrap();
    let mut seen = polled.newest.as_of;
    assert_eq!(restored.recorded(&mut seen).await, (vec![Change::Everything], 1));
    let mut writer = restored.admin().await;
    for number in 0..600 {
        run(
            &mut writer,
            &format!("UPDATE trustgate.api_key SET scheme = 1 - scheme WHERE id = '{}'", key(1 + number % 2)),
        )
        .await;
    }
    let (changes, versions) = restored.recorded(&mut seen).await;
    assert_eq!((changes.len(), versions), (1_200, 600));
    let twice = "SELECT count(*) FROM (SELECT id FROM trustgate.tx WHERE whole = '' GROUP BY id HAVING count(*) > 1) t";
    let twice: i64 = sqlx::query(twice).fetch_one(&mut writer).await.unwrap().get(0);
    assert!(twice > 50, "only {twice} transaction ids were repeated, the test needs more than 50");
    store::migrate(&restored.settings, &|_| None).await.unwrap();
    assert_eq!(restored.newest().await, seen, "nothing is left to repair");
}

#[tokio::test]
async fn a_lock_timeout_names_the_blocking_session() {
    let db = Db::new().await;
    db.keys(1..3).await;
    let mut ledger = store::open_ledger(&db.settings, &|_| None).await.unwrap();
    let actor = Actor("test:operator".into());
    let mut writer = db.writer().await;
    let pid: i32 = sqlx::query("SELECT pg_backend_pid()").fetch_one(&mut writer).await.unwrap().get(0);
    run(&mut writer, "SET application_name = 'a billing job'; SET idle_in_transaction_session_timeout = '60s'").await;
    // In the first case, the lock is on a row and blocks a statement. In the second case, it is the version lock and
    // blocks a commit.
    let secret = format!("UPDATE trustgate.api_key SET scheme = 1 WHERE digest = '\\x{}'", digest(1));
    for (sql, id) in [(format!("BEGIN; {secret}"), 1), (format!("BEGIN; SET CONSTRAINTS ALL IMMEDIATE; {secret}"), 2)] {
        run(&mut writer, &sql).await;
        let error = ledger.revoke_key(&actor, key(id)).await.unwrap_err();
        assert!(matches!(error, StoreError::Blocked { .. }), "{error:?}");
        let text = error.to_string();
        for word in [&format!("process {pid}"), "a billing job", "idle in transaction", "2s"] {
            assert!(text.contains(word), "{text}");
        }
        assert!(!text.contains("UPDATE") && !text.contains(&digest(1)), "{text}");
        run(&mut writer, "ROLLBACK").await;
        assert!(ledger.revoke_key(&actor, key(id)).await.unwrap().revoked_at.is_some(), "the next call succeeds");
    }
}

#[tokio::test]
async fn each_commit_sends_a_notification_and_a_lost_connection_is_reported() {
    let db = Db::on(Arc::new(Postgres::start().await)).await;
    db.keys(1..2).await;
    let (sender, mut notifications) = tokio::sync::mpsc::channel(1_000);
    let listen = |lookup: Arc<dyn Source>| {
        let sender = sender.clone();
        tokio::spawn(async move { lookup.listen(&move || sender.try_send(()).unwrap()).await })
    };
    let listening = listen(Arc::clone(&db.lookup));
    notifications.recv().await.unwrap(); // the listener is connected
    for _ in 0..20 {
        db.execute("UPDATE trustgate.api_key SET scheme = 1 - scheme").await;
        notifications.recv().await.unwrap();
    }
    db.execute("UPDATE trustgate.api_key SET hint = 'other'").await;
    db.execute("BEGIN; UPDATE trustgate.api_key SET scheme = 7; ROLLBACK").await;
    db.execute("NOTIFY trustgate").await;
    notifications.recv().await.unwrap();
    assert!(notifications.try_recv().is_err(), "only commits of recorded changes send a notification");

    // The server hangs, but the connection stays open.
    let frozen = db.server.freeze();
    let fault = tokio::time::timeout(15 * SECONDS, listening).await.expect("detected").unwrap();
    assert!(matches!(fault, Fault::Unreachable { .. }), "{fault:?}");
    drop(frozen);
    let listening = listen(Arc::clone(&db.lookup));
    notifications.recv().await.unwrap();
    let others = "FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'";
    db.execute(&format!("SELECT pg_terminate_backend(pid) {others}")).await;
    tokio::time::timeout(5 * SECONDS, listening).await.expect("detected at once").unwrap();
    assert!(notifications.try_recv().is_err(), "`listen` does not reconnect");
}
