//! The reads of checks on SQLite.

use std::{
    future, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use sqlx::{AssertSqlSafe, Connection, SqliteConnection, sqlite::SqliteRow};
use uuid::Uuid;

use super::{
    lookup::{Heartbeat, Missing, OTHER_KEYS_MAX},
    pool::Connect,
    reader::{Dialect, OwnTableQueries},
};
use crate::{
    record::{Digests, Fingerprint, KeyId, Version},
    store::{
        change_log::{self, sqlite::IN_FORCE},
        error::StoreError,
        rows, schema,
        settings::Preset,
        sqlite::{
            Access, NOW, code, connect,
            file::{self, Change},
            has_log, is_missing,
        },
        url::describe_sqlite,
    },
};

/// One SQLite file and whose tables it holds.
#[derive(Clone, Debug)]
pub(crate) struct Sqlite {
    /// The file.
    pub(crate) path: PathBuf,
    /// Somebody else's table, if it is one.
    pub(crate) preset: Option<Preset>,
    /// Whether the hard-link warning was already logged.
    has_warned: Arc<AtomicBool>,
    /// The files of connections that have to be closed before the database is opened again, because their log or its index was
    /// replaced.
    replaced: Arc<Mutex<Option<file::Files>>>,
}

impl Sqlite {
    /// The database at `path`.
    pub(crate) fn new(path: PathBuf, preset: Option<Preset>) -> Self {
        Self { path, preset, has_warned: Arc::default(), replaced: Arc::default() }
    }

    /// Warns once when the database file has several hard links, and again only after it had one in between. `serve` refuses to start
    /// on such a file, but a backup tool that makes hard links must not stop a running server.
    fn note_links(&self, links: u64) {
        if self.has_warned.swap(links > 1, Ordering::Relaxed) || links <= 1 {
            return;
        }
        tracing::warn!(
            path = %self.path.display(),
            links,
            "the database has several names (hard links): changes that are made through another name are lost; commands refuse \
             to work until only one is left"
        );
    }

    /// Returns an error while this process still has replaced files open. Does not wait for them to be closed.
    fn check_closed(&self) -> io::Result<()> {
        let mut replaced = self.replaced.lock().unwrap_or_else(PoisonError::into_inner);
        if replaced.as_ref().map(file::is_open).transpose()?.unwrap_or(false) {
            return Err(file::still_open());
        }
        *replaced = None;
        Ok(())
    }

    /// If `error` says that the log or its index was replaced, makes no new connection until every one to `files` is closed.
    fn note_replaced(&self, files: &file::Files, error: sqlx::Error) -> sqlx::Error {
        if file::change(&error) == Some(Change::Beside) {
            *self.replaced.lock().unwrap_or_else(PoisonError::into_inner) = Some(files.clone());
        }
        error
    }

    /// Opens a connection; returns it with its files, once `first_read` has read from it. If an application was killed in the
    /// middle of a commit to a table of its own, only a connection that can write is able to roll the commit back: one is opened
    /// for that and closed again.
    async fn open(
        &self,
        access: Access,
        first_read: &'static str,
    ) -> Result<(SqliteConnection, file::Files), sqlx::Error> {
        match self.open_once(access, first_read).await {
            Err(error) if access == Access::Read && code(&error) == Some(SQLITE_READONLY) => {
                let mut writer = connect(&self.path, Access::Write).await?;
                has_log(&mut writer).await?;
                writer.close().await?;
                self.open_once(access, first_read).await
            }
            opened => opened,
        }
    }

    async fn open_once(
        &self,
        access: Access,
        first_read: &'static str,
    ) -> Result<(SqliteConnection, file::Files), sqlx::Error> {
        self.check_closed()?;
        let mut files = file::Files::before_connect(&self.path)?;
        let mut connection = connect(&self.path, access).await?;
        sqlx::raw_sql(first_read).execute(&mut connection).await?;
        let has_log = has_log(&mut connection).await?;
        match files.after_first_read(&self.path, has_log) {
            Ok(()) => Ok((connection, files)),
            Err(error) => Err(self.note_replaced(&files, error.into())),
        }
    }
}

/// How much of the file a connection that reads keeps for itself: 512 KiB, enough for the inner pages of the indexes. The
/// system keeps all others, once for all connections.
const OWN_PAGES: &str = "PRAGMA cache_size = -512";

/// A connection that reads, and the files it was made to. SQLite would go on reading files that were removed or replaced, and
/// see no change made in the new ones.
pub(crate) struct Opened {
    connection: SqliteConnection,
    files: file::Files,
    writable: bool,
}

/// A statement and its values.
pub(crate) struct Query {
    sql: String,
    values: Vec<Value>,
    access: Access,
}

enum Value {
    Text(String),
    Bytes(Vec<u8>),
    Number(Option<i64>),
    /// Whether the connection can write.
    Writable,
}

impl Query {
    fn new(sql: impl Into<String>, values: impl IntoIterator<Item = Value>) -> Self {
        Self { sql: sql.into(), values: values.into_iter().collect(), access: Access::Read }
    }

    fn writing(sql: impl Into<String>, values: impl IntoIterator<Item = Value>) -> Self {
        Self { access: Access::Write, ..Self::new(sql, values) }
    }

    /// Runs the statements to their end: an unfinished SELECT would pin the snapshot.
    async fn run(&self, connection: &mut SqliteConnection, writable: bool) -> Result<Vec<SqliteRow>, sqlx::Error> {
        // Made of this module's constants and placeholders only.
        let mut bound = sqlx::query(AssertSqlSafe(self.sql.clone()));
        for value in &self.values {
            bound = match value {
                Value::Text(text) => bound.bind(text.as_str()),
                Value::Bytes(bytes) => bound.bind(bytes.as_slice()),
                Value::Number(number) => bound.bind(*number),
                Value::Writable => bound.bind(writable),
            };
        }
        bound.fetch_all(connection).await
    }
}

/// A short-lived connection for one write transaction. It commits only if the paths still lead to the files that it opened.
struct Writer {
    connection: SqliteConnection,
    files: file::Files,
}

impl Sqlite {
    async fn begin(&self) -> Result<Writer, sqlx::Error> {
        let (connection, files) = self.open(Access::Write, "BEGIN IMMEDIATE").await?;
        Ok(Writer { connection, files })
    }

    async fn commit(&self, mut writer: Writer) -> Result<(), sqlx::Error> {
        // Dropped without a commit, the connection undoes the transaction.
        writer.files.verify(&self.path)?;
        sqlx::raw_sql("COMMIT").execute(&mut writer.connection).await?;
        writer.connection.close().await
    }
}

impl Connect for Sqlite {
    type Connection = Opened;
    type Query = Query;
    type Row = SqliteRow;

    async fn connect(&self) -> Result<Opened, sqlx::Error> {
        let (connection, files) = self.open(Access::Read, OWN_PAGES).await?;
        let writable = self.preset.is_none() && can_write(&self.path).await?;
        Ok(Opened { connection, files, writable })
    }

    async fn run(&self, opened: &mut Opened, query: &Query) -> Result<Vec<SqliteRow>, sqlx::Error> {
        match opened.files.verify(&self.path) {
            Ok(links) => self.note_links(links),
            Err(error) => return Err(self.note_replaced(&opened.files, error.into())),
        }
        match query.access {
            Access::Read => query.run(&mut opened.connection, opened.writable).await,
            Access::Write => {
                let mut writer = self.begin().await?;
                let rows = query.run(&mut writer.connection, true).await?;
                self.commit(writer).await?;
                Ok(rows)
            }
        }
    }

    async fn close(opened: Opened) {
        // It is gone either way.
        let _ = opened.connection.close().await;
    }

    fn lost(error: &sqlx::Error) -> bool {
        matches!(error, sqlx::Error::WorkerCrashed | sqlx::Error::Io(_)) && file::change(error) != Some(Change::Beside)
    }
}

impl Dialect for Sqlite {
    fn find(&self, digests: &Digests) -> Query {
        let marks = vec!["?"; digests.all().count()].join(", ");
        match self.preset {
            None => Query::new(
                own(&format!("k.digest IN ({marks})")),
                digests.all().map(|digest| Value::Bytes(digest.as_bytes().to_vec())),
            ),
            Some(Preset::TrustTable) => Query::new(
                trust_table(&format!("t.api_key_hash IN ({marks})")),
                digests.all().map(|digest| Value::Text(digest.to_hex())),
            ),
        }
    }

    fn find_by_id(&self, key: KeyId) -> Query {
        match self.preset {
            None => Query::new(own("k.id = ?"), [Value::Text(key.to_string())]),
            // Ids in somebody else's table may be written in any of the usual ways.
            Some(Preset::TrustTable) => {
                let (hyphens, simple) = (key.0.hyphenated().to_string(), key.0.simple().to_string());
                let forms = [hyphens.to_uppercase(), simple.to_uppercase(), hyphens, simple];
                Query::new(trust_table("t.id IN (?, ?, ?, ?)"), forms.map(Value::Text))
            }
        }
    }

    fn poll(&self, since: Option<Version>, echo: i64) -> Query {
        let sql = match (self.preset, since) {
            (None, Some(_)) => poll(),
            (None, None) => poll_from_start(),
            (Some(Preset::TrustTable), _) => trust_table_poll(),
        };
        let since = since.map(|since| since.0.cast_signed());
        Query::new(sql, [Value::Number(Some(echo)), Value::Number(since), Value::Writable])
    }

    fn answered(error: &sqlx::Error) -> bool {
        // Other files may hold changes that were never seen here: nothing may be granted on what was read before.
        file::change(error).is_some() || code(error).is_some_and(|code| !NO_ANSWER.contains(&code))
    }

    fn is_replaced(error: &sqlx::Error) -> bool {
        file::change(error) == Some(Change::Beside)
    }

    async fn listen(&self, _changed: &(dyn Fn() + Send + Sync)) -> sqlx::Error {
        future::pending().await // SQLite tells nobody of another process's changes
    }

    async fn restore_watch(&self) -> Result<(), sqlx::Error> {
        if self.preset.is_some() {
            return Err(sqlx::Error::InvalidArgument("changes of a table of yours are not named".into()));
        }
        let mut writer = self.begin().await?;
        change_log::sqlite::restore(&mut writer.connection).await?.map_err(sqlx::Error::InvalidArgument)?;
        self.commit(writer).await
    }

    async fn renew_incarnation(&self, lost: Uuid) -> Result<(), sqlx::Error> {
        if self.preset.is_some() {
            return Ok(());
        }
        let mut writer = self.begin().await?;
        schema::sqlite::begin_incarnation(&mut writer.connection, Some(lost)).await?;
        self.commit(writer).await
    }

    fn ours(&self) -> Option<OwnTableQueries<Query>> {
        self.preset.is_none().then(|| OwnTableQueries {
            schema: Query::new(schema::sqlite::SCHEMA, []),
            redis_mac_key: Query::new("SELECT hex(value) FROM setting WHERE name = 'redis_mac_key'", []),
            prune: Query::writing(prune(), []),
            // The oldest is kept: it was the newest until the next one came.
            is_more: Query::new(
                format!("SELECT at < {NOW} - {OLD} - {MINUTE} FROM version ORDER BY version LIMIT 1 OFFSET 1"),
                [],
            ),
        })
    }

    fn record_peppers(&self, proven: &[(KeyId, Fingerprint)], current: Fingerprint) -> Query {
        let list: Vec<_> = proven.iter().map(|(id, fingerprint)| [id.to_string(), fingerprint.to_string()]).collect();
        // No version is drawn: no decision reads this column.
        let sql = format!(
            "UPDATE api_key SET pepper_fingerprint = unhex(p.value ->> 1) FROM json_each(?1) p
                WHERE api_key.id = p.value ->> 0 AND scheme = 1 AND pepper_fingerprint IS NULL;
             {HOLD_PEPPER} AND ?2 IN (SELECT value ->> 1 FROM json_each(?1))"
        );
        Query::writing(sql, [Value::Text(serde_json::json!(list).to_string()), Value::Text(current.to_string())])
    }

    fn fingerprint_literal(fingerprint: Fingerprint) -> String {
        format!("x'{fingerprint}'")
    }

    fn count_keys(&self, conditions: &[String]) -> Query {
        let ranges = conditions.iter().map(|condition| {
            format!(
                "SELECT * FROM (
                    SELECT expires_at FROM api_key WHERE {condition} AND revoked_at IS NULL LIMIT {OTHER_KEYS_MAX}
                 )"
            )
        });
        let ranges = ranges.collect::<Vec<_>>().join(" UNION ALL ");
        let sql = format!(
            "SELECT min(count(*), {OTHER_KEYS_MAX}) FROM ({ranges}) WHERE expires_at IS NULL OR expires_at > {NOW}"
        );
        Query::new(sql, [])
    }

    fn has_own_keys(&self) -> bool {
        self.preset.is_none()
    }

    fn report(&self, sign: &Heartbeat) -> Query {
        let Heartbeat { replica, name, applied, lasts } = sign;
        Query::writing(
            format!(
                "INSERT INTO replica (id, name, applied, seen_at, until) VALUES (?1, ?2, ?3, {NOW}, {NOW} + ?4)
                 ON CONFLICT (id) DO UPDATE SET name = excluded.name, applied = excluded.applied,
                    seen_at = excluded.seen_at, until = excluded.until;
                 DELETE FROM replica WHERE until < {NOW} - {DAY}"
            ),
            [
                Value::Text(replica.to_string()),
                Value::Text(name.clone()),
                Value::Number(Some(applied.0.cast_signed())),
                Value::Number(Some(rows::micros(*lasts))),
            ],
        )
    }

    async fn prepare(&self, missing: Missing) -> Result<(), StoreError> {
        // Somebody else's table is never made.
        let missing = if self.preset.is_some() { Missing::Refuse } else { missing };
        file::prepare(&self.path, missing)?;
        if missing == Missing::Create {
            schema::sqlite::run(&self.path).await?;
        }
        Ok(())
    }

    /// The connections that read leave the write-ahead log as it is. A last one that can write copies it into the database, so that
    /// the file of a stopped server holds everything.
    async fn finish(&self) {
        if self.preset.is_none()
            && let Ok(writer) = self.begin().await
            && let Err(error) = self.commit(writer).await
        {
            tracing::warn!(%error, "the write-ahead log could not be copied into the database; the next start reads it");
        }
    }

    fn backend(&self) -> String {
        describe_sqlite(&self.path)
    }

    fn is_missing(error: &sqlx::Error) -> bool {
        is_missing(error)
    }
}

/// Records the pepper with the fingerprint ?2, in hexadecimal, if none is recorded. Before it, keys were issued without one if there
/// are such keys; imported digests have no hint.
pub(crate) const HOLD_PEPPER: &str = "UPDATE meta SET pepper_fingerprint = unhex(?2),
        previous_pepper_fingerprint = CASE WHEN EXISTS (SELECT 1 FROM api_key WHERE scheme = 0 AND hint <> '') THEN zeroblob(8) END
    WHERE pepper_fingerprint IS NULL";

/// Error codes that do not count as an answer: the database cannot be reached or read now. Every other error is an answer: it is
/// no database, damaged, without our tables, closed to us, or locked by a program that may commit changes.
const NO_ANSWER: [u32; 6] = [
    7,  // SQLITE_NOMEM
    9,  // SQLITE_INTERRUPT
    10, // SQLITE_IOERR
    13, // SQLITE_FULL
    14, // SQLITE_CANTOPEN
    15, // SQLITE_PROTOCOL: locks of the write-ahead log could not be had
];
const SQLITE_READONLY: u32 = 8;

/// SQLite opens a file that it may not write for reading, without an error. Asks for the write lock, and does not wait for
/// it: if another connection holds it, this one could write. Any other error shows where it matters.
async fn can_write(path: &Path) -> Result<bool, sqlx::Error> {
    let mut connection = connect(path, Access::Write).await?;
    let statements = "PRAGMA busy_timeout = 0; DELETE FROM meta WHERE false";
    let attempt = sqlx::raw_sql(statements).execute(&mut connection).await;
    connection.close().await?;
    Ok(!attempt.is_err_and(|error| code(&error) == Some(SQLITE_READONLY)))
}

/// What was committed from version ?2 on, in the columns of [`rows::polled`]: first what there always is, then versions,
/// then what they named. However much there is, it looks at a thousand versions and a thousand rows of each kind. Almost
/// always there is nothing new: so without the temporary tables that would cost most of it.
fn poll() -> String {
    committed("", "?2", "?2")
}

/// The same for a replica that begins: from the first version of the last 15 minutes on, what that named included. Found
/// once for the whole statement, since the clock goes on.
fn poll_from_start() -> String {
    let start = format!(
        "WITH start AS MATERIALIZED (
            SELECT coalesce(
                (SELECT min(version) FROM version WHERE at >= {NOW} - {RECENT}), (SELECT max(version) FROM version)
            ) AS version
         )"
    );
    committed(&start, "(SELECT version FROM start)", "(SELECT version - 1 FROM start)")
}

/// Versions from `first` on and what was named after `known`, which are expressions.
fn committed(with: &str, first: &str, known: &str) -> String {
    const KINDS: &str = "(SELECT '*' AS kind UNION ALL SELECT 'absent' UNION ALL SELECT 'gone' UNION ALL SELECT 'key'
            UNION ALL SELECT 'trust') k";
    let too_many = format!(
        "(SELECT c.version FROM change c WHERE c.kind = k.kind AND c.version > {known}
            ORDER BY c.version LIMIT 1 OFFSET {EACH_MAX}) IS NOT NULL"
    );
    format!(
        "{with}
         SELECT ?1, CASE WHEN ?3 THEN 'primary' ELSE 'read-only' END, (SELECT min(version) FROM version),
            v.version, hex(v.nonce), m.incarnation, 0, 0, {NOW}, {IN_FORCE}, v.at, NULL, NULL, NULL, NULL,
            nullif(hex(m.pepper_fingerprint), ''), nullif(hex(m.previous_pepper_fingerprint), '')
         FROM (SELECT version, nonce, at FROM version ORDER BY version DESC LIMIT 1) v CROSS JOIN meta m
         UNION ALL
         SELECT {NOTHING}, v.version, hex(v.nonce), NULL, NULL, NULL, NULL
         FROM (SELECT version, nonce FROM version WHERE version >= {first} ORDER BY version DESC LIMIT {EACH_MAX}) v
         UNION ALL
         SELECT {NOTHING}, v.version, hex(v.nonce), NULL, NULL, NULL, NULL
         FROM version v WHERE v.version = {first} AND (
            SELECT version FROM version WHERE version >= {first} ORDER BY version LIMIT 1 OFFSET {EACH_MAX}
         ) IS NOT NULL
         UNION ALL
         SELECT {NOTHING}, (SELECT max(c.version) FROM change c WHERE c.kind = k.kind), NULL, k.kind, NULL, NULL, NULL
         FROM {KINDS} WHERE {too_many}
         UNION ALL
         SELECT {NOTHING}, c.version, NULL, c.kind, nullif(c.object, ''), NULL, NULL
         FROM {KINDS} CROSS JOIN change c WHERE NOT {too_many} AND c.kind = k.kind AND c.version > {known}
         UNION ALL
         SELECT {NOTHING}, max(c.version), NULL, '*', NULL, NULL, NULL
         FROM (SELECT 1 FROM schema WHERE version > {version} LIMIT 1) s CROSS JOIN change c
         WHERE c.version > {known} AND c.kind NOT IN ('*', 'absent', 'gone', 'key', 'trust')
         HAVING max(c.version) IS NOT NULL
         LIMIT {rows}",
        version = schema::VERSION,
        rows = rows::POLL_ROWS_MAX + 1,
    )
}

/// The columns that only the first row has.
const NOTHING: &str = "NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL";
/// Rows of one kind that a poll takes one by one, and versions.
const EACH_MAX: usize = 1_000;
/// Longer than any value lives in Redis: 15 minutes in microseconds.
const RECENT: i64 = 15 * MINUTE;
/// A day in microseconds.
const DAY: i64 = 24 * 60 * MINUTE;
const MINUTE: i64 = 60_000_000;

/// Deletes, of the oldest versions, up to a thousand whose successors are older than 20 minutes, then what they named. A
/// poll from one of them on, should there be one, finds it gone, and relies on nothing older than the newest.
fn prune() -> String {
    format!(
        "WITH
         oldest AS MATERIALIZED (SELECT version, at FROM version ORDER BY version LIMIT {EACH_MAX} + 1),
         recent AS (SELECT min(version) AS version FROM oldest WHERE at >= {NOW} - {OLD})
         DELETE FROM version WHERE version < (
            SELECT max(o.version) FROM oldest o CROSS JOIN recent r WHERE r.version IS NULL OR o.version < r.version
         );
         DELETE FROM change WHERE kind IN (
            WITH RECURSIVE kinds (kind) AS (
                SELECT min(kind) FROM change
                UNION ALL
                SELECT (SELECT min(c.kind) FROM change c WHERE c.kind > k.kind) FROM kinds k WHERE k.kind IS NOT NULL
            )
            SELECT kind FROM kinds WHERE kind IS NOT NULL
         ) AND version < (SELECT min(version) FROM version)"
    )
}

/// No poll asks for a version that was superseded this long ago: 20 minutes in microseconds.
const OLD: i64 = 20 * MINUTE;

/// The newest version and, where `condition` holds, a key with its trust: one statement, so one snapshot.
fn own(condition: &str) -> String {
    format!(
        "SELECT v.version, hex(v.nonce), m.incarnation, 0, 0, {NOW},
            k.id, t.id, t.enabled, hex(k.digest), k.scheme, k.scopes, k.allowed_cidrs,
            k.not_before, k.expires_at, k.revoked_at, k.scheme = 1 AND k.pepper_fingerprint IS NULL
         FROM (SELECT version, nonce FROM version ORDER BY version DESC LIMIT 1) v
         CROSS JOIN meta m
         LEFT JOIN (api_key k JOIN trust t ON t.id = k.trust_id) ON {condition}"
    )
}

/// The same columns from a table `trust(id, api_key_hash)`. It has no versions: everything is dated with number 0.
fn trust_table(condition: &str) -> String {
    format!(
        "SELECT 0, '00000000000000000000000000000000', '00000000-0000-0000-0000-000000000000', 0, 0, {NOW},
            t.id, t.id, 1, t.api_key_hash, 0, '[]', '[]', NULL, NULL, NULL, 0
         FROM (SELECT 1) v
         LEFT JOIN trust t ON t.api_key_hash IS NOT NULL AND {condition}"
    )
}

/// The poll of such a table: that it is there, and no more.
fn trust_table_poll() -> String {
    format!(
        "SELECT ?1, 'primary', 0, 0, '00000000000000000000000000000000', '00000000-0000-0000-0000-000000000000', 0, 0,
            {NOW}, 0, 0, NULL, NULL, NULL, NULL, NULL, NULL
         FROM (SELECT 1) v LEFT JOIN trust t ON false"
    )
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    /// What SQLite does to find that there is nothing new, in instructions of its own machine, after `named` changes.
    async fn instructions_of_a_poll(named: u32) -> u64 {
        let directory = tempfile::tempdir().unwrap();
        let sqlite = Sqlite::new(directory.path().join("trustgate.db"), None);
        sqlite.prepare(Missing::Create).await.unwrap();
        let mut opened = sqlite.connect().await.unwrap();
        let name = format!(
            "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {named})
             INSERT INTO change (kind, version, object)
                SELECT kind, (SELECT max(version) FROM version), printf('%064d', n)
                FROM n CROSS JOIN (SELECT 'absent' AS kind UNION ALL SELECT 'gone' UNION ALL SELECT 'key')"
        );
        sqlite.run(&mut opened, &Query::writing(name, [])).await.unwrap();
        let newest = sqlx::query_scalar("SELECT max(version) FROM version").fetch_one(&mut opened.connection).await;
        let newest = Version(u64::try_from(newest.unwrap_or(0_i64)).unwrap());
        let instructions = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&instructions);
        let count = move || {
            counted.fetch_add(1, Ordering::Relaxed);
            true
        };
        opened.connection.lock_handle().await.unwrap().set_progress_handler(1, count);
        let rows = sqlite.run(&mut opened, &sqlite.poll(Some(newest), 1)).await.unwrap();
        assert!(rows.len() < 10, "{} rows", rows.len());
        instructions.load(Ordering::Relaxed)
    }

    #[tokio::test]
    async fn a_poll_that_finds_nothing_new_costs_the_same_whatever_was_named_before() {
        let (few, many) = (instructions_of_a_poll(1).await, instructions_of_a_poll(30_000).await);
        assert!(few > 50 && many <= few + few / 10, "{few} instructions after one change, {many} after 90 000");
    }
}
