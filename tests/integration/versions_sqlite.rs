//! Tests the change log on SQLite: each committed change is recorded, regardless of which program makes the change and
//! with which statement, and a poll detects that a change may be missing.

// Some tests measure wall-clock time, and some are long because each step depends on the previous step.
#![allow(clippy::disallowed_methods, clippy::too_many_lines, clippy::single_match_else, clippy::result_large_err)]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use sqlx::{AssertSqlSafe, Connection, Row, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::task::JoinSet;
use trustgate::testing::{
    base::{clock::SystemClock, secret::Secret},
    record::{ApiKeyDigest, Change, Digests, KeyId, Nonce, Version},
    store::{self, Heartbeat, Ledger, Missing, PollError, Polled, Source, StoreError, StoreSettings},
};
use uuid::Uuid;

/// A database file in a temporary directory.
struct Db {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Db {
    /// Chooses the path of a database file but does not create the file.
    fn nowhere() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { path: dir.path().join("trustgate.db"), _dir: dir }
    }

    /// Creates a database with trustgate's tables.
    async fn new() -> Self {
        let db = Self::nowhere();
        store::migrate(&settings(&db.path), NO_ENV).await.unwrap();
        db
    }

    /// Creates a database with trusts 1 and 2, and with keys 11 and 12 of trust 1, which have digests 1 and 2.
    async fn with_keys() -> Self {
        let db = Self::new().await;
        let mut writer = db.writer().await;
        for sql in [
            "INSERT INTO trust (id, name, enabled, created_at) VALUES ($t1, 'one', 1, 0), ($t2, 'two', 1, 0)"
                .to_owned(),
            insert("INTO", 11, 1, ""),
            insert("INTO", 12, 2, ""),
        ] {
            writer.run(&sql).await.unwrap();
        }
        writer.0.close().await.unwrap();
        db
    }

    async fn writer(&self) -> Writer {
        Writer::open(&self.path).await
    }

    async fn ledger(&self) -> Ledger {
        store::open_ledger(&settings(&self.path), NO_ENV).await.unwrap()
    }

    fn open(&self) -> Arc<dyn Source> {
        store::open_lookup(&settings(&self.path), NO_ENV, Arc::new(SystemClock)).unwrap()
    }

    /// Returns a follower that has polled once.
    async fn follower(&self) -> Follower {
        let lookup = self.open();
        let start = lookup.poll(None).await.unwrap();
        Follower { lookup, at: (start.newest.as_of, start.newest.nonce), versions_max: 0 }
    }
}

const NO_ENV: store::Env<'static> = &|_| None;

fn settings(path: &Path) -> StoreSettings {
    let second = Duration::from_secs(1);
    StoreSettings {
        url: Some(Secret::new(format!("sqlite://{}", path.display()))),
        connect_timeout: 20 * second, // long enough for a busy machine
        ..StoreSettings::default()
    }
}

/// A connection from another program that writes to the file. Foreign keys are off, which is the SQLite default.
struct Writer(SqliteConnection);

impl Writer {
    async fn open(path: &Path) -> Self {
        let options =
            SqliteConnectOptions::new().filename(path).foreign_keys(false).busy_timeout(Duration::from_mins(1));
        Self(SqliteConnection::connect_with(&options).await.unwrap())
    }

    /// Runs statements in which `$k7` is the id of key 7, `$t7` is the id of trust 7, and `$d7` is digest 7.
    async fn run(&mut self, sql: &str) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(expand(sql))).execute(&mut self.0).await.map(drop)
    }

    async fn number(&mut self, sql: &str) -> i64 {
        sqlx::raw_sql(AssertSqlSafe(sql)).fetch_one(&mut self.0).await.unwrap().get(0)
    }
}

fn expand(sql: &str) -> String {
    let mut parts = sql.split('$');
    let mut expanded = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part[1..].find(|c: char| !c.is_ascii_digit()).map_or(part.len(), |end| end + 1);
        let number: u32 = part[1..end].parse().unwrap();
        let value = match &part[..1] {
            "d" => format!("x'{}'", digest(number).to_hex()),
            _ => format!("'{}'", Uuid::from_u128(number.into())),
        };
        expanded.extend([&value, &part[end..]]);
    }
    expanded
}

fn digest(number: u32) -> ApiKeyDigest {
    let mut bytes = [0; 32];
    bytes[28..].copy_from_slice(&number.to_be_bytes());
    ApiKeyDigest::from_bytes(bytes)
}

/// Returns an `INSERT {how} api_key` statement for a key of trust 1.
fn insert(how: &str, key: u32, digest: u32, conflict: &str) -> String {
    format!(
        "INSERT {how} api_key (id, trust_id, digest, scheme, hint, created_at)
         VALUES ($k{key}, $t1, $d{digest}, 0, 'hint', 0) {conflict}"
    )
}

/// A client that polls the database like a replica.
struct Follower {
    lookup: Arc<dyn Source>,
    at: (Version, Nonce),
    versions_max: usize,
}

impl Follower {
    /// Returns the changes recorded since the last poll.
    async fn recorded(&mut self) -> Vec<String> {
        let polled = self.poll().await;
        assert!(polled.triggers_intact && polled.complete, "{polled:?}");
        polled.changes.iter().map(|(_, change)| describe(change)).collect()
    }

    /// Polls from the last version, checks the result, and advances to the newest version.
    async fn poll(&mut self) -> Polled {
        let (since, nonce) = self.at;
        let polled = self.lookup.poll(Some(since)).await.unwrap();
        let newest = (polled.newest.as_of, polled.newest.nonce);
        assert_eq!(polled.versions.first(), Some(&(since, nonce)), "the version that the poll starts from");
        assert_eq!(polled.versions.last(), Some(&newest), "the newest version");
        assert!(polled.versions.is_sorted_by_key(|(version, _)| *version) && polled.oldest <= since, "{polled:?}");
        assert!(polled.changes.iter().all(|(version, _)| *version > since && *version <= newest.0), "{polled:?}");
        self.at = newest;
        self.versions_max = self.versions_max.max(polled.versions.len());
        polled
    }
}

/// Returns a short description of a change.
fn describe(change: &Change) -> String {
    let number =
        |digest: &ApiKeyDigest| digest.as_bytes()[28..].iter().fold(0, |all, byte| all << 8 | u32::from(*byte));
    match change {
        Change::Key(id) => format!("key {}", id.0.as_u128()),
        Change::Trust(id) => format!("trust {}", id.0.as_u128()),
        Change::Absent(digest) => format!("absent {}", number(digest)),
        Change::Gone(digest) => format!("gone {}", number(digest)),
        Change::Whole(kind) => format!("all {kind:?}"),
        Change::Everything => "everything".to_owned(),
    }
}

/// Runs each statement and asserts that it records the expected changes, in any order.
async fn check(cases: &[(&str, &[&str])], prepare: &str) {
    let db = Db::with_keys().await;
    let (mut writer, mut follower) = (db.writer().await, db.follower().await);
    writer.run(prepare).await.unwrap();
    for (sql, expected) in cases {
        writer.run(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        let before = follower.at.0;
        let mut found = follower.recorded().await;
        found.sort();
        assert_eq!(found, *expected, "{prepare} {sql}");
        assert_eq!(follower.at.0 == before, expected.is_empty(), "only a recorded change has a version: {sql}");
    }
}

#[tokio::test]
async fn only_changes_that_decisions_depend_on_are_recorded() {
    let set = |what: &str| format!("UPDATE api_key SET {what} WHERE id = $k11");
    let (insert, revoked) = (insert("INTO", 13, 3, ""), set("revoked_at = 5"));
    let columns: Vec<String> = [
        "trust_id = $t2",
        "scheme = 1",
        "scopes = '[\"a\"]'",
        "allowed_cidrs = '[\"10.0.0.0/8\"]'",
        "not_before = 1",
        "not_before = NULL",
        "expires_at = 1",
        "expires_at = 2",
    ]
    .map(set)
    .into();
    let mut cases: Vec<(&str, &[&str])> = vec![(&insert, &["absent 3"])];
    cases.extend(columns.iter().map(|sql| (&**sql, &["absent 1", "key 11"][..])));
    cases.extend([
        (&*revoked, &["absent 1", "gone 1", "key 11"][..]),
        // The revocation time of a key that is already revoked changes.
        ("UPDATE api_key SET revoked_at = 6 WHERE id = $k11", &["absent 1", "gone 1", "key 11"]),
        ("UPDATE api_key SET revoked_at = NULL WHERE id = $k11", &["absent 1", "key 11"]),
        ("UPDATE api_key SET digest = $d4 WHERE id = $k11", &["absent 4", "gone 1", "key 11"]),
        ("UPDATE api_key SET id = $k14 WHERE id = $k11", &["absent 4", "key 11", "key 14"]),
        (
            "UPDATE api_key SET revoked_at = 7 WHERE id IN ($k12, $k13)",
            &["absent 2", "absent 3", "gone 2", "gone 3", "key 12", "key 13"],
        ),
        // These statements write unchanged values, or columns that no decision reads.
        ("UPDATE api_key SET digest = digest, id = id, scopes = scopes, revoked_at = revoked_at", &[]),
        ("UPDATE api_key SET name = 'x', hint = 'y', created_at = 9, pepper_fingerprint = x'0102030405060708', metadata = '{}', rotated_from = NULL", &[]),
        ("UPDATE api_key SET rowid = rowid + 100", &[]),
        ("INSERT INTO key_use VALUES ($k14, 1); UPDATE key_use SET last_used_at = 2; DELETE FROM key_use", &[]),
        ("INSERT INTO setting VALUES ('x', x'00'); INSERT INTO replica (id, applied, seen_at) VALUES ('x', 1, 1)", &[]),
        ("INSERT INTO audit (at, actor, action, object) VALUES (1, 'a', 'b', 'c')", &[]),
        ("DELETE FROM api_key WHERE id = $k14", &["gone 4", "key 14"]),
        ("DELETE FROM api_key", &["gone 2", "gone 3", "key 12", "key 13"]),
        ("INSERT INTO trust (id, name, enabled, created_at) VALUES ($t3, 'three', 1, 0)", &["trust 3"]),
        ("UPDATE trust SET enabled = 0 WHERE id = $t3", &["trust 3"]),
        ("UPDATE trust SET enabled = 0, name = 'four' WHERE id = $t3", &[]),
        ("UPDATE trust SET created_at = 9", &[]),
        ("UPDATE trust SET id = $t4 WHERE id = $t3", &["trust 3", "trust 4"]),
        ("DELETE FROM trust", &["trust 1", "trust 2", "trust 4"]),
    ]);
    check(&cases, "").await;
}

#[tokio::test]
async fn rows_removed_by_or_replace_are_recorded_and_rows_kept_by_or_ignore_are_not() {
    let way = |how: &str, key, digest, conflict: &str| insert(how, key, digest, conflict);
    let replace = |key, digest| way("OR REPLACE INTO", key, digest, "");
    let (ignored, nothing) = (way("OR IGNORE INTO", 13, 1, ""), way("INTO", 13, 1, "ON CONFLICT DO NOTHING"));
    let nothing_of_digest = way("INTO", 13, 1, "ON CONFLICT (digest) DO NOTHING");
    let unrelated = way("INTO", 13, 1, "ON CONFLICT (digest) DO UPDATE SET name = 'x'");
    let upsert = way("INTO", 13, 1, "ON CONFLICT (digest) DO UPDATE SET scheme = 1");
    let (same, by_digest, by_id, by_both) = (replace(11, 1), replace(13, 1), replace(13, 3), replace(12, 3));
    let by_rowid = "INSERT OR REPLACE INTO api_key (rowid, id, trust_id, digest, scheme, hint, created_at)
        SELECT rowid, $k14, $t1, $d4, 0, 'hint', 0 FROM api_key WHERE id = $k12";
    let revoked = "INSERT OR REPLACE INTO api_key (id, trust_id, digest, scheme, hint, created_at, revoked_at)
        VALUES ($k14, $t1, $d4, 0, 'hint', 0, 1)";
    let cases = |recursive: bool| -> Vec<(&str, &[&str])> {
        let either = |without: &'static [&str], with: &'static [&str]| if recursive { with } else { without };
        vec![
            (&ignored, &[]),
            (&nothing, &[]),
            (&nothing_of_digest, &[]),
            (&unrelated, &[]),
            (&upsert, &["absent 1", "key 11"]),
            // With recursive triggers, REPLACE also runs the delete trigger, which records the digest as removed.
            (&same, either(&["absent 1", "key 11"], &["absent 1", "gone 1", "key 11"])),
            (&by_digest, either(&["absent 1", "key 11"], &["absent 1", "gone 1", "key 11"])),
            (&by_id, &["absent 3", "gone 1", "key 13"]),
            (
                &by_both,
                either(
                    &["absent 3", "gone 2", "key 12", "key 13"],
                    &["absent 3", "gone 2", "gone 3", "key 12", "key 13"],
                ),
            ),
            (by_rowid, &["absent 4", "gone 3", "key 12"]),
            (revoked, &["absent 4", "gone 4", "key 14"]),
            ("UPDATE api_key SET revoked_at = NULL", &["absent 4", "key 14"]),
            // This statement inserts several rows, one of which is ignored.
            (
                "INSERT OR IGNORE INTO api_key (id, trust_id, digest, scheme, hint, created_at) VALUES
                ($k15, $t1, $d5, 0, 'hint', 0), ($k16, $t1, $d5, 0, 'hint', 0), ($k17, $t1, $d7, 0, 'hint', 0)",
                &["absent 5", "absent 7"],
            ),
            ("UPDATE OR IGNORE api_key SET digest = $d5", &[]),
            (
                "UPDATE OR REPLACE api_key SET digest = $d5 WHERE id = $k14",
                either(
                    &["absent 5", "gone 4", "key 14", "key 15"],
                    &["absent 5", "gone 4", "gone 5", "key 14", "key 15"],
                ),
            ),
            (
                "UPDATE OR REPLACE api_key SET id = $k17 WHERE id = $k14",
                either(
                    &["absent 5", "gone 7", "key 14", "key 17"],
                    &["absent 5", "gone 7", "key 14", "key 17", "key 17"],
                ),
            ),
            (
                "INSERT OR REPLACE INTO trust (id, name, enabled, created_at) VALUES ($t1, 'one', 1, 0)",
                either(&["trust 1"], &["absent 5", "trust 1", "trust 1"]),
            ),
            (
                "INSERT OR REPLACE INTO trust (id, name, enabled, created_at) VALUES ($t3, 'two', 1, 0)",
                &["trust 2", "trust 3"],
            ),
            ("INSERT OR IGNORE INTO trust (id, name, enabled, created_at) VALUES ($t4, 'two', 1, 0)", &[]),
            (
                "INSERT INTO trust (id, name, enabled, created_at) VALUES ($t4, 'two', 0, 0) ON CONFLICT (name) DO UPDATE SET enabled = 0",
                &["trust 3"],
            ),
            ("UPDATE OR REPLACE trust SET name = 'two' WHERE id = $t1", either(&["trust 1", "trust 3"], &["trust 3"])),
            // Without foreign keys, a trust can be deleted while it still has keys, and inserted again. Until it is
            // inserted again, lookups do not find its keys.
            ("DELETE FROM trust", &["trust 1"]),
            ("INSERT INTO trust (id, name, enabled, created_at) VALUES ($t1, 'one', 1, 0)", &["absent 5", "trust 1"]),
            ("UPDATE trust SET id = $t2", &["trust 1", "trust 2"]),
            ("UPDATE trust SET id = $t1", &["absent 5", "trust 1", "trust 2"]),
        ]
    };
    check(&cases(false), "PRAGMA recursive_triggers = OFF").await;
    check(&cases(true), "PRAGMA recursive_triggers = ON").await;
}

#[tokio::test]
async fn changes_that_are_rolled_back_are_not_recorded() {
    let db = Db::with_keys().await;
    let (mut writer, mut follower) = (db.writer().await, db.follower().await);
    let revoke = |key| format!("UPDATE api_key SET revoked_at = 1 WHERE id = $k{key};");
    let (first, second) = (revoke(11), revoke(12));
    let start = follower.at.0;

    writer.run(&format!("BEGIN; {first} {}; DELETE FROM trust; ROLLBACK", insert("INTO", 13, 3, ""))).await.unwrap();
    assert_eq!(follower.recorded().await, [""; 0]);
    assert_eq!(follower.at.0, start);
    // All changes become visible at once, when the transaction commits.
    writer.run(&format!("BEGIN; SAVEPOINT a; {first} ROLLBACK TO a; {second} SAVEPOINT b; {first}")).await.unwrap();
    assert_eq!(follower.recorded().await, [""; 0]);
    writer.run("ROLLBACK TO b; RELEASE a; COMMIT").await.unwrap();
    assert_eq!(follower.recorded().await, ["absent 2", "key 12", "gone 2"], "removed digests come last");
    // SQLite undoes all rows of a failed statement, but with OR FAIL it keeps the rows before the row that failed.
    let three = |how: &str| {
        format!(
            "INSERT {how} INTO api_key (id, trust_id, digest, scheme, hint, created_at) VALUES
                ($k13, $t1, $d3, 0, 'hint', 0), ($k14, $t1, $d4, 0, 'hint', 0), ($k15, $t1, $d4, 0, 'hint', 0)"
        )
    };
    writer.run("BEGIN").await.unwrap();
    writer.run(&three("")).await.unwrap_err();
    writer.run(&format!("{first} COMMIT")).await.unwrap();
    assert_eq!(follower.recorded().await, ["absent 1", "key 11", "gone 1"]);
    writer.run(&three("OR FAIL")).await.unwrap_err();
    assert_eq!(follower.recorded().await, ["absent 3", "absent 4"]);
    writer.run("BEGIN; DELETE FROM api_key WHERE id = $k13").await.unwrap();
    writer.run(&three("OR ROLLBACK")).await.unwrap_err();
    assert_eq!(follower.recorded().await, [""; 0]);
}

/// The distance between the first key numbers of two writers.
const OBJECTS: u32 = 100_000;

/// Runs transactions on the keys of one writer. One third of the transactions are rolled back, and one in ten uses
/// savepoints. Returns the changes that the committed transactions must record.
async fn write(path: PathBuf, writer: u32, transactions: u32) -> Vec<String> {
    let mut connection = Writer::open(&path).await;
    let mut expected = Vec::new();
    let mut object = writer * OBJECTS;
    for transaction in 0..transactions {
        let mut changes = Vec::new();
        let begin = if transaction % 2 == 0 { "BEGIN IMMEDIATE" } else { "BEGIN EXCLUSIVE" };
        connection.run(begin).await.unwrap();
        for _ in 0..=transaction % 3 {
            object += 1;
            if transaction % 10 == 7 {
                let lost = format!("SAVEPOINT s; {}; ROLLBACK TO s", insert("INTO", object, object, ""));
                connection.run(&lost).await.unwrap();
                object += 1;
            }
            connection.run(&insert("INTO", object, object, "")).await.unwrap();
            changes.push(format!("absent {object}"));
            if transaction % 4 == 0 {
                let other = OBJECTS * 50 + object;
                let change = format!("UPDATE api_key SET digest = $d{other}, revoked_at = 1 WHERE id = $k{object}");
                connection.run(&change).await.unwrap();
                changes.extend([format!("key {object}"), format!("absent {other}"), format!("gone {object}")]);
            }
        }
        if transaction % 3 == 1 {
            connection.run("ROLLBACK").await.unwrap();
        } else {
            connection.run("COMMIT").await.unwrap();
            expected.append(&mut changes);
        }
    }
    expected
}

/// A Python program that writes to the database from a separate process. It calls `executemany`, and each of its
/// transactions creates a trust.
const PYTHON: &str = r"
import sqlite3, sys, uuid
path, first, transactions = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
c = sqlite3.connect(path, timeout=60)
for n in range(transactions):
    trust = str(uuid.UUID(int=first + n))
    keys = [(str(uuid.UUID(int=first + n * 10 + k)), trust, (first + n * 10 + k).to_bytes(32, 'big')) for k in range(5)]
    c.execute('INSERT INTO trust (id, name, created_at) VALUES (?, ?, 0)', (trust, trust))
    c.executemany('INSERT INTO api_key (id, trust_id, digest, scheme, hint, created_at) VALUES (?, ?, ?, 0, 0, 0)', keys)
    if n % 3 == 1:
        c.rollback()
        continue
    c.commit()
    print('trust', first + n)
    for k in range(5):
        print('absent', first + n * 10 + k)
";

async fn write_in_another_process(path: PathBuf, writer: u32, transactions: u32) -> Vec<String> {
    let run = move || {
        Command::new("python3")
            .args(["-c", PYTHON])
            .arg(path)
            .args([(writer * OBJECTS).to_string(), transactions.to_string()])
            .stderr(Stdio::inherit())
            .output()
            .expect("cannot run python3, which this test needs")
    };
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn concurrent_polls_miss_no_change_from_several_writers() {
    const WRITERS: u32 = 4;
    const TRANSACTIONS: u32 = 200;
    let db = Db::with_keys().await;
    let mut follower = db.follower().await;
    let mut writing = JoinSet::new();
    for writer in 1..=WRITERS {
        writing.spawn(write(db.path.clone(), writer, TRANSACTIONS));
    }
    writing.spawn(write_in_another_process(db.path.clone(), WRITERS + 1, TRANSACTIONS));

    let (mut expected, mut found, mut polls) = (Vec::new(), Vec::new(), 0_u32);
    loop {
        while let Some(changes) = writing.try_join_next() {
            expected.extend(changes.unwrap());
        }
        let done = writing.is_empty();
        found.extend(follower.recorded().await);
        polls += 1;
        if done {
            break;
        }
    }
    println!("{} changes in {polls} polls, at most {} versions in one", found.len(), follower.versions_max);
    assert!(polls > 20, "only {polls} polls while the writers were running");
    expected.sort();
    found.sort();
    assert!(expected.len() > 1_000 && found == expected, "each change is recorded exactly once");
}

#[tokio::test]
async fn up_to_a_thousand_changes_of_a_kind_are_listed_one_by_one() {
    let db = Db::with_keys().await;
    let (mut writer, mut follower) = (db.writer().await, db.follower().await);
    let many = |from: u32, count: u32| {
        format!(
            "WITH RECURSIVE n (i) AS (SELECT {from} UNION ALL SELECT i + 1 FROM n WHERE i < {from} + {count} - 1)
             INSERT INTO api_key (id, trust_id, digest, scheme, hint, created_at)
             SELECT printf('00000000-0000-0000-0000-%012d', i), $t1, unhex(printf('%064x', i)), 0, 'hint', 0 FROM n"
        )
    };
    writer.run(&many(1_000, 1_000)).await.unwrap();
    let since = follower.at;
    let recorded = follower.recorded().await;
    assert_eq!(recorded.iter().collect::<BTreeSet<_>>().len(), 1_000);
    assert!(recorded.iter().all(|change| change.starts_with("absent ")));
    // Make one more change of this kind and one change of a different kind.
    writer.run(&many(2_000, 1)).await.unwrap();
    writer.run("UPDATE trust SET enabled = 0 WHERE id = $t2").await.unwrap();
    follower.at = since;
    let polled = follower.poll().await;
    let newest = polled.newest.as_of;
    let changes: Vec<(Version, String)> = polled.changes.iter().map(|(at, change)| (*at, describe(change))).collect();
    assert_eq!(changes, [(Version(newest.0 - 1), "all Absences".into()), (newest, "trust 2".into())]);
    assert_eq!(polled.versions.len(), 1_001, "the newest thousand versions, and the version that the poll starts from");

    let started = Instant::now();
    writer.run(&many(100_000, 100_000)).await.unwrap();
    let (inserted, started) = (started.elapsed(), Instant::now());
    assert_eq!(follower.recorded().await, ["all Absences"], "cached records stay valid");
    println!("100 000 keys in {inserted:?}, the poll after them {:?}", started.elapsed());
    assert_eq!(follower.recorded().await, [""; 0]);
    assert_eq!(writer.number("SELECT count(*) FROM api_key").await, 101_003);
    // The first poll of a replica also returns one change for all negative entries.
    let start = follower.lookup.poll(None).await.unwrap();
    assert!(start.triggers_intact && start.complete && start.newest.as_of == follower.at.0);
    assert_eq!(start.versions.len(), 1_001);
    let described: Vec<String> = start.changes.iter().map(|(_, change)| describe(change)).collect();
    assert!(
        described.contains(&"all Absences".to_owned()) && described.contains(&"trust 2".to_owned()),
        "{described:?}"
    );
}

#[tokio::test]
async fn alterations_that_may_hide_a_change_are_detected_and_repaired_or_reported() {
    let db = Db::with_keys().await;
    let (mut writer, mut follower) = (db.writer().await, db.follower().await);
    let text = |name: &str| format!("SELECT sql FROM sqlite_schema WHERE name = '{name}'");
    let update: String =
        sqlx::raw_sql(AssertSqlSafe(text("api_key_update"))).fetch_one(&mut writer.0).await.unwrap().get(0);
    let unseen = "UPDATE api_key SET revoked_at = ifnull(revoked_at, 0) + 1";
    let within_one = format!("BEGIN; DROP TRIGGER api_key_update; {unseen}; {update}; COMMIT");
    let tampered = format!("DROP TRIGGER api_key_update; {}", update.replace("OLD.scopes", "NEW.scopes"));
    // Each case has the alteration, the problem that `restore_watch` reports (`None` if `restore_watch` succeeds), and
    // the SQL that undoes the alteration. If this SQL ends with `migrate`, the test also runs a migration, which must
    // succeed.
    for (alteration, problem, undo) in [
        (&*within_one, None, ""),
        ("VACUUM", None, ""),
        ("ANALYZE", None, ""),
        ("CREATE INDEX theirs ON api_key (hint)", None, ""),
        ("CREATE UNIQUE INDEX unique_as_before ON api_key (digest)", None, ""),
        ("ALTER TABLE api_key ADD COLUMN note TEXT", None, ""),
        ("CREATE TABLE elsewhere (x); CREATE TRIGGER t AFTER INSERT ON elsewhere BEGIN SELECT 1; END", None, ""),
        ("DROP TRIGGER trust_delete", Some("trust_delete is missing"), "migrate"),
        (&*tampered, Some("api_key_update was altered"), "migrate"),
        (
            "CREATE TRIGGER mine BEFORE INSERT ON change BEGIN SELECT RAISE(IGNORE); END",
            Some("\"mine\" is not one of trustgate's"),
            "DROP TRIGGER mine",
        ),
        (
            "CREATE TRIGGER mine AFTER INSERT ON API_KEY BEGIN DELETE FROM displaced; END",
            Some("\"mine\" is not one of trustgate's"),
            "DROP TRIGGER mine",
        ),
        (
            "CREATE UNIQUE INDEX one_name ON api_key (name)",
            Some("\"one_name\" is not one of trustgate's"),
            "DROP INDEX one_name",
        ),
        (
            "CREATE UNIQUE INDEX any_case ON trust (name COLLATE NOCASE)",
            Some("\"any_case\" is not one of trustgate's"),
            "DROP INDEX any_case",
        ),
        ("ALTER TABLE trust RENAME TO away", Some("is missing"), "ALTER TABLE away RENAME TO trust; migrate"),
    ] {
        writer.run(alteration).await.unwrap();
        let polled = follower.poll().await;
        assert!(!polled.triggers_intact, "{alteration}");
        if let Some(problem) = problem {
            let reported = follower.lookup.restore_watch().await.unwrap_err().to_string();
            assert!(reported.contains(problem), "{alteration}: {reported}");
            assert!(!follower.poll().await.triggers_intact, "{alteration}");
            // If a migration cannot repair the alteration, it fails with the same problem.
            match undo.strip_suffix("migrate") {
                Some(undo) => {
                    writer.run(undo).await.unwrap();
                    store::migrate(&settings(&db.path), NO_ENV).await.unwrap();
                }
                None => {
                    let refused = store::migrate(&settings(&db.path), NO_ENV).await.unwrap_err();
                    assert!(matches!(&refused, StoreError::Schema(text) if text.contains(problem)), "{refused}");
                    writer.run(undo).await.unwrap();
                    follower.lookup.restore_watch().await.unwrap();
                }
            }
        } else {
            follower.lookup.restore_watch().await.unwrap();
        }
        assert_eq!(follower.recorded().await, ["everything"], "{alteration}: a change may be missing");
        follower.lookup.restore_watch().await.unwrap();
        assert_eq!(follower.recorded().await, [""; 0], "the second call records nothing");
        writer.run(unseen).await.unwrap();
        assert_eq!(follower.recorded().await.len(), 6, "{alteration}: changes are recorded again");
    }
    // In the last case, a table is missing.
    writer.run("DROP TABLE api_key").await.unwrap();
    assert!(!follower.poll().await.triggers_intact);
    assert!(follower.lookup.restore_watch().await.unwrap_err().to_string().contains("is missing"));
}

/// Replaces the database file `to` with the file `from`, and removes the `-wal` and `-shm` files of `to`.
fn put_in_place(from: &Path, to: &Path) {
    for beside in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(to.with_file_name(format!("trustgate.db{beside}")));
    }
    std::fs::rename(from, to).unwrap();
}

#[tokio::test]
async fn a_restored_copy_with_the_same_version_number_has_a_different_nonce() {
    let db = Db::with_keys().await;
    let (mut writer, follower) = (db.writer().await, db.follower().await);
    let copy = db.path.with_file_name("copy.db");
    writer.run(&format!("VACUUM INTO '{}'", copy.display())).await.unwrap();
    for _ in 0..3 {
        writer.run("UPDATE api_key SET revoked_at = ifnull(revoked_at, 0) + 1 WHERE id = $k11").await.unwrap();
    }
    let known = follower.lookup.poll(Some(follower.at.0)).await.unwrap();
    drop(writer);

    put_in_place(&copy, &db.path);
    let mut writer = db.writer().await;
    writer.run("UPDATE trust SET enabled = 1 - enabled WHERE id = $t2").await.unwrap();
    let behind = follower.lookup.poll(Some(known.newest.as_of)).await.unwrap();
    assert!(behind.newest.as_of < known.newest.as_of && behind.versions.is_empty(), "{behind:?}");
    for _ in 0..2 {
        writer.run("UPDATE trust SET enabled = 1 - enabled WHERE id = $t2").await.unwrap();
    }
    let same = follower.lookup.poll(Some(known.newest.as_of)).await.unwrap();
    assert_eq!((same.newest.as_of, same.newest.lineage), (known.newest.as_of, known.newest.lineage));
    assert_eq!(same.versions, [(same.newest.as_of, same.newest.nonce)]);
    assert_ne!(same.newest.nonce, known.newest.nonce, "the same version number has a different nonce");

    // A replica that detects the lost history gives the database a new incarnation. A second call that names the old
    // incarnation changes nothing.
    let lost = same.newest.lineage.incarnation;
    follower.lookup.renew_incarnation(lost).await.unwrap();
    let renewed = follower.lookup.poll(Some(same.newest.as_of)).await.unwrap();
    assert_ne!(renewed.newest.lineage.incarnation, lost);
    assert_eq!(renewed.changes, [(renewed.newest.as_of, Change::Everything)]);
    follower.lookup.renew_incarnation(lost).await.unwrap();
    let again = follower.lookup.poll(Some(same.newest.as_of)).await.unwrap();
    assert_eq!((again.newest.as_of, again.newest.lineage), (renewed.newest.as_of, renewed.newest.lineage));
}

#[tokio::test]
async fn a_poll_fails_if_the_file_was_removed_and_reads_the_file_that_replaced_it() {
    let (db, other) = (Db::with_keys().await, Db::new().await);
    let follower = db.follower().await;
    let before = follower.lookup.poll(Some(follower.at.0)).await.unwrap();
    // The file is removed. An open connection could still read it, so the poll must check for this case.
    let aside = db.path.with_file_name("aside.db");
    std::fs::rename(&db.path, &aside).unwrap();
    let gone = follower.lookup.poll(Some(follower.at.0)).await;
    assert!(matches!(gone, Err(PollError::NoAnswer(_))), "{gone:?}");
    // A different file replaces the removed file, and the poll reads the new file.
    put_in_place(&other.path, &db.path);
    let swapped = follower.lookup.poll(Some(follower.at.0)).await.unwrap();
    assert_ne!(swapped.newest.lineage.incarnation, before.newest.lineage.incarnation);
    assert!(swapped.newest.as_of < before.newest.as_of);
}

/// The tables and rows that release 0.1 created.
const VERSION_1: &str = "
PRAGMA journal_mode = WAL;
CREATE TABLE schema (
    version INTEGER PRIMARY KEY, compatible_from INTEGER NOT NULL, at INTEGER NOT NULL
) STRICT;
CREATE TABLE meta (
    one INTEGER PRIMARY KEY DEFAULT 1 CHECK (one = 1), incarnation TEXT NOT NULL
) STRICT;
CREATE TABLE version (
    version INTEGER PRIMARY KEY CHECK (version > 0), nonce BLOB NOT NULL CHECK (length(nonce) = 16), at INTEGER NOT NULL
) STRICT;
CREATE TABLE setting (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;
CREATE TABLE trust (
    id TEXT PRIMARY KEY CHECK (length(id) = 36),
    name TEXT NOT NULL UNIQUE CHECK (name <> ''),
    enabled INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    created_at INTEGER NOT NULL
) STRICT;
CREATE TABLE api_key (
    id TEXT PRIMARY KEY CHECK (length(id) = 36),
    trust_id TEXT NOT NULL REFERENCES trust (id),
    digest BLOB NOT NULL UNIQUE CHECK (length(digest) = 32),
    scheme INTEGER NOT NULL,
    hint TEXT NOT NULL,
    name TEXT,
    scopes TEXT NOT NULL DEFAULT '[]' CHECK (json_valid(scopes)),
    allowed_cidrs TEXT NOT NULL DEFAULT '[]' CHECK (json_valid(allowed_cidrs)),
    not_before INTEGER,
    expires_at INTEGER,
    revoked_at INTEGER,
    created_at INTEGER NOT NULL
) STRICT;
CREATE INDEX api_key_trust ON api_key (trust_id);
CREATE TABLE key_use (
    key_id TEXT PRIMARY KEY REFERENCES api_key (id) ON DELETE CASCADE, last_used_at INTEGER NOT NULL
) STRICT;
CREATE TABLE replica (id TEXT PRIMARY KEY, applied INTEGER NOT NULL, seen_at INTEGER NOT NULL) STRICT;
CREATE TABLE audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
    object TEXT NOT NULL, before TEXT, after TEXT
) STRICT;
INSERT INTO schema VALUES (1, 1, 0);
INSERT INTO meta (incarnation) VALUES ('00000000-0000-0000-0000-000000000077');
INSERT INTO version VALUES (1, randomblob(16), 0), (2, randomblob(16), 0);
INSERT INTO setting VALUES ('redis_mac_key', zeroblob(32));
INSERT INTO trust VALUES ($t1, 'one', 1, 0);
INSERT INTO api_key (id, trust_id, digest, scheme, hint, created_at) VALUES ($k11, $t1, $d1, 0, 'hint', 0);
INSERT INTO replica VALUES ('00000000-0000-0000-0000-000000000099', 2, 0);
";

#[tokio::test]
async fn a_database_from_the_first_release_is_upgraded_and_keeps_its_keys() {
    let db = Db::nowhere();
    std::fs::write(&db.path, "").unwrap();
    let mut writer = db.writer().await;
    writer.run(VERSION_1).await.unwrap();
    assert!(store::open_ledger(&settings(&db.path), NO_ENV).await.is_err(), "the database is not upgraded yet");

    // `serve` upgrades the tables at startup. Several servers can start at once.
    let mut preparing = JoinSet::new();
    for _ in 0..4 {
        let lookup = db.open();
        preparing.spawn(async move { lookup.prepare(Missing::Create).await.unwrap() });
    }
    preparing.join_all().await;
    let mut follower = db.follower().await;
    let start = follower.poll().await;
    assert!(start.triggers_intact && start.newest.as_of == Version(3), "{start:?}");
    assert_eq!(start.newest.lineage.incarnation, Uuid::from_u128(0x77));
    let before = follower.lookup.poll(Some(Version(2))).await.unwrap();
    assert_eq!(before.changes, [(Version(3), Change::Everything)], "changes before the upgrade were not recorded");

    let digests = Digests { current: digest(1), older: Vec::new() };
    let record = follower.lookup.find(&digests).await.unwrap().value.expect("kept");
    assert_eq!(record.key_id, KeyId(Uuid::from_u128(11)));
    let mut ledger = db.ledger().await;
    ledger.revoke_key(&store::Actor("test".into()), record.key_id).await.unwrap();
    assert_eq!(follower.recorded().await, ["absent 1", "key 11", "gone 1"]);
    assert_eq!(ledger.newest().await.unwrap(), follower.at.0);
    assert_eq!(writer.number("SELECT count(*) FROM schema").await, 4);
    assert_eq!(ledger.replicas().await.unwrap(), [], "the first release did not store when a heartbeat expires");

    // A second migration changes nothing.
    store::migrate(&settings(&db.path), NO_ENV).await.unwrap();
    assert_eq!(follower.recorded().await, [""; 0]);
}

#[tokio::test]
async fn unusable_answers_and_missing_answers_are_different_errors() {
    let is_unusable = |outcome: Result<Polled, PollError>, part: &str| {
        matches!(&outcome, Err(PollError::Unusable(text)) if text.contains(part)).then_some(()).ok_or(outcome)
    };
    // Another program has locked the whole file, so it may commit changes that this poll cannot see. The answer is
    // therefore unusable, and does not count as missing.
    let db = Db::with_keys().await;
    let mut holder = db.writer().await;
    holder.run("PRAGMA journal_mode = DELETE; BEGIN EXCLUSIVE").await.unwrap();
    let locked = db.open().poll(None).await;
    is_unusable(locked, "locked").unwrap();
    holder.run("ROLLBACK; PRAGMA journal_mode = DELETE").await.unwrap();
    assert!(db.open().poll(None).await.unwrap().triggers_intact);

    // One of trustgate's tables is missing.
    let follower = db.follower().await;
    holder.run("DROP TABLE change").await.unwrap();
    is_unusable(follower.lookup.poll(Some(follower.at.0)).await, "no such table").unwrap();
    holder.0.close().await.unwrap();

    // SQLite opens a file read-only if its header contains a newer write format. Bytes 18 and 19 are the formats for
    // writing and reading (https://www.sqlite.org/fileformat.html#the_database_header).
    let db = Db::with_keys().await;
    let mut writer = db.writer().await;
    writer.run("PRAGMA journal_mode = DELETE").await.unwrap();
    writer.0.close().await.unwrap();
    let mut bytes = std::fs::read(&db.path).unwrap();
    bytes[18] = 3;
    std::fs::write(&db.path, &bytes).unwrap();
    is_unusable(db.open().poll(None).await, "read-only").unwrap();

    // Poll a damaged file, a truncated file, a file that is not a database, an empty file and a removed file.
    let whole = bytes.clone();
    bytes[4_096..].fill(0xff);
    std::fs::write(&db.path, &bytes).unwrap();
    is_unusable(db.open().poll(None).await, "malformed").unwrap();
    std::fs::write(&db.path, &whole[..4_096]).unwrap();
    is_unusable(db.open().poll(None).await, "malformed").unwrap();
    std::fs::write(&db.path, "no database".repeat(1_000)).unwrap();
    is_unusable(db.open().poll(None).await, "not a database").unwrap();
    std::fs::write(&db.path, "").unwrap();
    is_unusable(db.open().poll(None).await, "no such table").unwrap();
    std::fs::remove_file(&db.path).unwrap();
    let gone = db.open().poll(None).await;
    assert!(matches!(gone, Err(PollError::NoAnswer(_))), "{gone:?}");
}

#[tokio::test]
async fn changes_of_unknown_kind_affect_everything_and_invalid_ids_affect_their_whole_kind() {
    let db = Db::with_keys().await;
    let (mut writer, mut follower) = (db.writer().await, db.follower().await);
    let odd = "a text of 36 characters but no UUID.";
    let change = |kind: &str| {
        format!(
            "INSERT INTO version (nonce, at) VALUES (randomblob(16), 0);
             INSERT INTO change SELECT '{kind}', max(version), 'x' FROM version"
        )
    };
    writer.run(&format!("UPDATE api_key SET id = '{odd}' WHERE id = $k11")).await.unwrap();
    assert_eq!(follower.recorded().await, ["absent 1", "key 11", "all Keys"]);
    writer.run("INSERT INTO schema VALUES (5, 1, 0)").await.unwrap();
    for kind in ["user", "a", "~", "gonf"] {
        writer.run(&change(kind)).await.unwrap();
        assert_eq!(follower.recorded().await, ["everything"], "{kind}");
    }
    assert_eq!(follower.recorded().await, [""; 0]);
}

#[tokio::test]
async fn the_oldest_versions_are_pruned_and_the_newest_is_kept() {
    let db = Db::with_keys().await;
    let (mut writer, mut follower) = (db.writer().await, db.follower().await);
    let rows = "SELECT count(*) FROM version";
    follower.lookup.prune().await.unwrap();
    let all = writer.number(rows).await;
    assert!(all > 3, "versions of the last minute are kept");

    let pruned = follower.at.0;
    for _ in 0..1_500 {
        writer.run("UPDATE trust SET enabled = 1 - enabled WHERE id = $t2").await.unwrap();
    }
    follower.recorded().await;
    let newest = follower.at.0;
    // Make all versions but the last ten old. The version before these ten is kept, because it was the newest version
    // until the first of the ten was committed.
    let age = |to: u64| format!("UPDATE version SET at = at - 1210000000 WHERE version <= {to}");
    writer.run(&age(newest.0 - 10)).await.unwrap();
    let total = all + 1_500;
    for left in [total - 1_000, 11, 11] {
        follower.lookup.prune().await.unwrap();
        assert_eq!(writer.number(rows).await, left);
        let changes = "SELECT count(*) FROM change WHERE version < (SELECT min(version) FROM version)";
        assert_eq!(writer.number(changes).await, 0);
        assert_eq!(
            writer.number("SELECT count(DISTINCT version) FROM change").await,
            left,
            "the other versions keep their changes"
        );
    }
    let polled = follower.lookup.poll(Some(pruned)).await.unwrap();
    assert_eq!(polled.oldest, Version(newest.0 - 10));
    assert_ne!(polled.versions.first().unwrap().0, pruned, "the version that the poll starts from was pruned");
    // The first poll returns the oldest version from the last 15 minutes and every later version, even if a later
    // version has an older time.
    writer.run(&format!("UPDATE version SET at = at - 1210000000 WHERE version = {}", newest.0 - 3)).await.unwrap();
    let start = follower.lookup.poll(None).await.unwrap();
    assert_eq!(start.versions.first().unwrap().0, Version(newest.0 - 9));
    assert_eq!((start.versions.len(), start.changes.len()), (10, 10), "the changes of the first version are included");
    // Make all versions old.
    writer.run(&age(newest.0)).await.unwrap();
    follower.lookup.prune().await.unwrap();
    assert_eq!(writer.number(rows).await, 1);
    let start = follower.lookup.poll(None).await.unwrap();
    assert_eq!((start.oldest, start.newest.as_of, start.versions.len()), (newest, newest, 1));
    writer.run("UPDATE trust SET enabled = 1 - enabled WHERE id = $t2").await.unwrap();
    assert_eq!(follower.recorded().await, ["trust 2"]);
    assert_eq!(follower.at.0, Version(newest.0 + 1));
}

#[tokio::test]
async fn a_replica_is_listed_until_its_last_heartbeat_expires() {
    let db = Db::new().await;
    let (lookup, mut ledger, mut writer) = (db.open(), db.ledger().await, db.writer().await);
    let heartbeat = |replica, applied, seconds| Heartbeat {
        replica: Uuid::from_u128(replica),
        name: format!("pod-{replica}"),
        applied: Version(applied),
        lasts: Duration::from_secs(seconds),
    };
    for sent in [heartbeat(1, 1, 60), heartbeat(2, 1, 0), heartbeat(1, 2, 90), heartbeat(3, 2, u64::MAX)] {
        lookup.report(&sent).await.unwrap();
    }
    let mut until = BTreeMap::new();
    for replica in ledger.replicas().await.unwrap() {
        assert_eq!((replica.applied, replica.seen_at <= ledger.now().await.unwrap()), (Version(2), true));
        until.insert(replica.name.clone(), replica.until.since(replica.seen_at).as_secs());
    }
    assert_eq!(until.keys().collect::<Vec<_>>(), ["pod-1", "pod-3"]);
    assert_eq!(until["pod-1"], 90);
    // A row is kept for a day after its heartbeat expires, regardless of how long the heartbeat was valid.
    let mut age = async |hours: i64| {
        let sql = format!(
            "UPDATE replica SET seen_at = seen_at - {hours} * 3600000000,
                until = min(until, seen_at) - {hours} * 3600000000 WHERE name <> 'pod-1'"
        );
        writer.run(&sql).await.unwrap();
        lookup.report(&heartbeat(1, 3, 60)).await.unwrap();
        writer.number("SELECT count(*) FROM replica").await
    };
    assert_eq!(age(23).await, 3);
    assert_eq!(age(2).await, 1);
}

#[tokio::test]
async fn an_existing_table_is_polled_and_not_changed() {
    let db = Db::nowhere();
    std::fs::write(&db.path, "").unwrap();
    let mut writer = db.writer().await;
    writer.run("CREATE TABLE trust (id TEXT PRIMARY KEY, api_key_hash TEXT)").await.unwrap();
    let existing = StoreSettings { preset: Some(store::Preset::TrustTable), ..settings(&db.path) };
    let lookup = store::open_lookup(&existing, NO_ENV, Arc::new(SystemClock)).unwrap();
    lookup.prepare(Missing::Refuse).await.unwrap();
    for since in [None, Some(Version(0))] {
        let polled = lookup.poll(since).await.unwrap();
        assert_eq!((polled.newest.as_of, polled.newest.nonce), (Version(0), Nonce::default()));
        assert!(!polled.triggers_intact && polled.complete && polled.changes.is_empty(), "{polled:?}");
    }
    lookup.restore_watch().await.unwrap();
    lookup.renew_incarnation(Uuid::nil()).await.unwrap();
    lookup.prune().await.unwrap();
    assert_eq!(writer.number("SELECT count(*) FROM sqlite_schema WHERE type = 'table'").await, 1);
    writer.run("DROP TABLE trust").await.unwrap();
    assert!(matches!(lookup.poll(None).await, Err(PollError::Unusable(_))));
}
