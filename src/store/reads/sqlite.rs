//! The reads that checks and the poll task make on SQLite.

mod query;

use std::{
    future, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use sqlx::{Connection, SqliteConnection, sqlite::SqliteRow};
use uuid::Uuid;

use self::query::{BoundValue, DAY, Query, own, poll, poll_from_start, trust_table, trust_table_poll};
use super::{
    lookup::{Heartbeat, Missing, OTHER_KEYS_MAX},
    pool::Connect,
    reader::{Dialect, OwnTableQueries},
};
use crate::{
    record::{Digests, Fingerprint, KeyId, Version},
    store::{
        change_log::{self, problem::NotIntact},
        error::StoreError,
        rows, schema,
        settings::Preset,
        sqlite::{
            Access, HOLD_PEPPER, NOW, code, connect,
            file::{self, FileChange},
            has_log, is_missing,
        },
        url::describe_sqlite,
    },
};

/// An SQLite file, with our own tables or with an existing table.
#[derive(Clone, Debug)]
pub(crate) struct Sqlite {
    pub(crate) path: PathBuf,
    /// The layout of the existing table, if the file contains such a table and not our own tables.
    pub(crate) preset: Option<Preset>,
    /// True if the warning about hard links was logged.
    has_warned: Arc<AtomicBool>,
    /// Files whose log or index was replaced. All connections to them must be closed before the database is opened
    /// again.
    replaced: Arc<Mutex<Option<file::OpenFiles>>>,
}

impl Sqlite {
    /// Creates a reader for the database at `path`. Does not open the file.
    pub(crate) fn new(path: PathBuf, preset: Option<Preset>) -> Self {
        Self { path, preset, has_warned: Arc::default(), replaced: Arc::default() }
    }

    /// Warns once when the database file has several hard links, and again only after the file has had a single link in
    /// between. `serve` refuses to start on such a file, but a backup tool that makes hard links must not stop a
    /// running server.
    fn note_links(&self, links: u64) {
        if self.has_warned.swap(links > 1, Ordering::Relaxed) || links <= 1 {
            return;
        }
        tracing::warn!(
            path = %self.path.display(),
            links,
            "database file has several names (hard links): changes made through another name are lost; remove the \
             other names: commands refuse to run until only one name is left"
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

    /// Refuses new connections until all connections to `files` are closed, if `error` means that the log or its index
    /// was replaced. Returns `error`.
    fn note_replaced(&self, files: &file::OpenFiles, error: sqlx::Error) -> sqlx::Error {
        if file::change(&error) == Some(FileChange::Beside) {
            *self.replaced.lock().unwrap_or_else(PoisonError::into_inner) = Some(files.clone());
        }
        error
    }

    /// Opens a connection, runs `first_read` on it, and returns it with its files. If an application was killed in the
    /// middle of a commit, only a connection that can write can roll that commit back. In that case this function opens
    /// such a connection, reads from it, closes it, and tries again.
    async fn open(
        &self,
        access: Access,
        first_read: &'static str,
    ) -> Result<(SqliteConnection, file::OpenFiles), sqlx::Error> {
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
    ) -> Result<(SqliteConnection, file::OpenFiles), sqlx::Error> {
        self.check_closed()?;
        let mut files = file::OpenFiles::before_connect(&self.path)?;
        let mut connection = connect(&self.path, access).await?;
        sqlx::raw_sql(first_read).execute(&mut connection).await?;
        let has_log = has_log(&mut connection).await?;
        match files.after_first_read(&self.path, has_log) {
            Ok(()) => Ok((connection, files)),
            Err(error) => Err(self.note_replaced(&files, error.into())),
        }
    }
}

/// Sets the page cache of a read connection to 512 KiB, which is enough for the inner pages of the indexes. The
/// operating system caches the other pages once for all connections.
const PAGE_CACHE: &str = "PRAGMA cache_size = -512";

/// A read connection and the files that it has open. Each query first checks these files, because SQLite would continue
/// to read files that were removed or replaced, and would not see changes in the new files.
pub(crate) struct Opened {
    connection: SqliteConnection,
    files: file::OpenFiles,
    writable: bool,
}

/// A short-lived connection for one write transaction. It commits only if the paths still lead to the files that it
/// opened.
struct Writer {
    connection: SqliteConnection,
    files: file::OpenFiles,
}

impl Sqlite {
    async fn begin(&self) -> Result<Writer, sqlx::Error> {
        let (connection, files) = self.open(Access::Write, "BEGIN IMMEDIATE").await?;
        Ok(Writer { connection, files })
    }

    async fn commit(&self, mut writer: Writer) -> Result<(), sqlx::Error> {
        // If this check fails, dropping the connection rolls the transaction back.
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
        let (connection, files) = self.open(Access::Read, PAGE_CACHE).await?;
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
        // The connection is closed even after an error.
        let _ = opened.connection.close().await;
    }

    fn lost(error: &sqlx::Error) -> bool {
        matches!(error, sqlx::Error::WorkerCrashed | sqlx::Error::Io(_))
            && file::change(error) != Some(FileChange::Beside)
    }
}

impl Dialect for Sqlite {
    fn find(&self, digests: &Digests) -> Query {
        let marks = vec!["?"; digests.all().count()].join(", ");
        match self.preset {
            None => Query::new(
                own(&format!("k.digest IN ({marks})")),
                digests.all().map(|digest| BoundValue::Bytes(digest.as_bytes().to_vec())),
            ),
            Some(Preset::TrustTable) => Query::new(
                trust_table(&format!("t.api_key_hash IN ({marks})")),
                digests.all().map(|digest| BoundValue::Text(digest.to_hex())),
            ),
        }
    }

    fn find_by_id(&self, key: KeyId) -> Query {
        match self.preset {
            None => Query::new(own("k.id = ?"), [BoundValue::Text(key.to_string())]),
            // The UUIDs of an existing table may be in either case, with or without hyphens.
            Some(Preset::TrustTable) => {
                let (hyphens, simple) = (key.0.hyphenated().to_string(), key.0.simple().to_string());
                let forms = [hyphens.to_uppercase(), simple.to_uppercase(), hyphens, simple];
                Query::new(trust_table("t.id IN (?, ?, ?, ?)"), forms.map(BoundValue::Text))
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
        Query::new(sql, [BoundValue::Number(Some(echo)), BoundValue::Number(since), BoundValue::Writable])
    }

    fn answered(error: &sqlx::Error) -> bool {
        // The new files may contain revocations that this process has not seen. So this error counts as an answer,
        // which allows no stale grants.
        file::change(error).is_some() || code(error).is_some_and(|code| !NO_ANSWER.contains(&code))
    }

    fn is_replaced(error: &sqlx::Error) -> bool {
        file::change(error) == Some(FileChange::Beside)
    }

    async fn listen(&self, _changed: &(dyn Fn() + Send + Sync)) -> sqlx::Error {
        future::pending().await // SQLite does not notify processes of each other's changes
    }

    async fn restore_watch(&self) -> Result<(), sqlx::Error> {
        if self.preset.is_some() {
            return Err(sqlx::Error::InvalidArgument("an existing table in SQLite has no change log".into()));
        }
        let mut writer = self.begin().await?;
        change_log::sqlite::restore(&mut writer.connection).await.map_err(|error| match error {
            NotIntact::Problem(problem) => sqlx::Error::InvalidArgument(problem.to_string()),
            NotIntact::Database(error) => error,
        })?;
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
            prune: Query::writing(change_log::sqlite::prune(), []),
            is_more: Query::new(change_log::sqlite::is_more(), []),
        })
    }

    fn record_peppers(&self, proven: &[(KeyId, Fingerprint)], current: Fingerprint) -> Query {
        let list: Vec<_> = proven.iter().map(|(id, fingerprint)| [id.to_string(), fingerprint.to_string()]).collect();
        // The change gets no version, because no decision reads this column.
        let sql = format!(
            "UPDATE api_key SET pepper_fingerprint = unhex(p.value ->> 1) FROM json_each(?1) p
                WHERE api_key.id = p.value ->> 0 AND scheme = 1 AND pepper_fingerprint IS NULL;
             {HOLD_PEPPER} AND ?2 IN (SELECT value ->> 1 FROM json_each(?1))"
        );
        Query::writing(
            sql,
            [BoundValue::Text(serde_json::json!(list).to_string()), BoundValue::Text(current.to_string())],
        )
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

    fn report(&self, heartbeat: &Heartbeat) -> Query {
        let Heartbeat { replica, name, applied, lasts } = heartbeat;
        Query::writing(
            format!(
                "INSERT INTO replica (id, name, applied, seen_at, until) VALUES (?1, ?2, ?3, {NOW}, {NOW} + ?4)
                 ON CONFLICT (id) DO UPDATE SET name = excluded.name, applied = excluded.applied,
                    seen_at = excluded.seen_at, until = excluded.until;
                 DELETE FROM replica WHERE until < {NOW} - {DAY}"
            ),
            [
                BoundValue::Text(replica.to_string()),
                BoundValue::Text(name.clone()),
                BoundValue::Number(Some(applied.0.cast_signed())),
                BoundValue::Number(Some(rows::micros(*lasts))),
            ],
        )
    }

    async fn prepare(&self, missing: Missing) -> Result<(), StoreError> {
        // The database of an existing table must already exist, so do not create one.
        let missing = if self.preset.is_some() { Missing::Refuse } else { missing };
        file::prepare(&self.path, missing)?;
        if missing == Missing::Create {
            schema::sqlite::run(&self.path).await?;
        }
        Ok(())
    }

    /// Copies the write-ahead log into the database, so that the file of a stopped server is complete. SQLite copies
    /// the log when a connection that can write is the last one to close; the read connections do not copy the log.
    async fn finish(&self) {
        if self.preset.is_none()
            && let Ok(writer) = self.begin().await
            && let Err(error) = self.commit(writer).await
        {
            tracing::warn!(%error, "write-ahead log not copied into the database: the next start reads the log");
        }
    }

    fn backend(&self) -> String {
        describe_sqlite(&self.path)
    }

    fn is_missing(error: &sqlx::Error) -> bool {
        is_missing(error)
    }
}

/// Error codes that do not count as an answer: the database cannot be reached or read now. Other errors count as an
/// answer: the file is not a database or is damaged, lacks our tables, cannot be opened with this process's rights, or
/// is locked by a program that may commit changes.
const NO_ANSWER: [u32; 6] = [
    7,  // SQLITE_NOMEM
    9,  // SQLITE_INTERRUPT
    10, // SQLITE_IOERR
    13, // SQLITE_FULL
    14, // SQLITE_CANTOPEN
    15, // SQLITE_PROTOCOL: could not lock the write-ahead log
];
const SQLITE_READONLY: u32 = 8;

/// Returns true if this process can write to the database. SQLite opens a file without write permission for reading and
/// reports no error, so this function requests the write lock, without waiting. If another connection has the lock,
/// this process is able to write. Other errors are ignored here, because the next use of the database reports them.
async fn can_write(path: &Path) -> Result<bool, sqlx::Error> {
    let mut connection = connect(path, Access::Write).await?;
    let statements = "PRAGMA busy_timeout = 0; DELETE FROM meta WHERE false";
    let attempt = sqlx::raw_sql(statements).execute(&mut connection).await;
    connection.close().await?;
    Ok(!attempt.is_err_and(|error| code(&error) == Some(SQLITE_READONLY)))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    /// Returns the number of virtual-machine instructions that SQLite runs for a poll that reads no new version, after
    /// `named` changes of each kind.
    async fn instructions_of_a_poll(named: u32) -> u64 {
        let directory = tempfile::tempdir().unwrap();
        let sqlite = Sqlite::new(directory.path().join("trustgate.db"), None);
        sqlite.prepare(Missing::Create).await.unwrap();
        let mut opened = sqlite.connect().await.unwrap();
        let insert = format!(
            "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {named})
             INSERT INTO change (kind, version, object)
                SELECT kind, (SELECT max(version) FROM version), printf('%064d', n)
                FROM n CROSS JOIN (SELECT 'absent' AS kind UNION ALL SELECT 'gone' UNION ALL SELECT 'key')"
        );
        sqlite.run(&mut opened, &Query::writing(insert, [])).await.unwrap();
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
    async fn cost_of_an_empty_poll_does_not_grow_with_the_change_log() {
        let (few, many) = (instructions_of_a_poll(1).await, instructions_of_a_poll(30_000).await);
        assert!(few > 50 && many <= few + few / 10, "{few} instructions after one change, {many} after 90 000");
    }
}
