//! The embedded database: one SQLite file, which `serve` creates and migrates itself.
//!
//! The database is for one `serve` process and the commands on the same machine, on a local disk. Known network
//! filesystems are refused.

pub(crate) mod file;

use std::{path::Path, time::Duration};

use sqlx::{
    ConnectOptions, Connection, Row, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteSynchronous},
};

/// The maximum time that a write waits for a write by another process to finish.
pub(crate) const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
/// The maximum time that a read waits while another process has locked the whole database. It is well below
/// `freshness.poll_timeout`, so that a poll fails with "locked" in time, which counts as an answer. A poll that waited
/// longer would count as unanswered.
pub(crate) const BUSY_TIMEOUT_OF_READS: Duration = Duration::from_millis(50);

/// SQL for the current time in microseconds since the Unix epoch. SQLite's clock has a resolution of one millisecond.
pub(crate) const NOW: &str = "CAST(round(unixepoch('subsec') * 1000) AS INTEGER) * 1000";

/// A minute in microseconds.
pub(crate) const MINUTE: i64 = 60_000_000;

/// Records the pepper with the fingerprint ?2, in hexadecimal, if none is recorded. If keys were issued without a
/// pepper, also records "no pepper" as the previous one. Imported digests have no hint and do not count as issued.
pub(crate) const HOLD_PEPPER: &str = "UPDATE meta SET pepper_fingerprint = unhex(?2),
        previous_pepper_fingerprint = CASE WHEN EXISTS (SELECT 1 FROM api_key WHERE scheme = 0 AND hint <> '') THEN zeroblob(8) END
    WHERE pepper_fingerprint IS NULL";

/// The access mode of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Reads only. Closing a read-only connection does not copy the write-ahead log into the database: SQLite copies
    /// the log when the last connection closes, under an exclusive lock, and the lock needs a file descriptor that is
    /// open for writing. So a connection whose `-shm` was removed can be closed without overwriting later commits by
    /// other processes.
    Read,
    /// Reads and writes.
    Write,
}

/// Opens the database at `path`, which must exist.
pub(crate) async fn connect(path: &Path, access: Access) -> Result<SqliteConnection, sqlx::Error> {
    let busy_timeout = match access {
        Access::Read => BUSY_TIMEOUT_OF_READS,
        Access::Write => BUSY_TIMEOUT,
    };
    let options = SqliteConnectOptions::new()
        .filename(path)
        .read_only(access == Access::Read)
        .foreign_keys(true)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(busy_timeout)
        .disable_statement_logging(); // statements contain digests
    SqliteConnection::connect_with(&options).await
}

/// Returns true if the database uses a write-ahead log. Reads from the database first, so that SQLite opens the files
/// `-wal` and `-shm`.
pub(crate) async fn has_log(connection: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
    sqlx::raw_sql("SELECT count(*) FROM sqlite_schema").execute(&mut *connection).await?;
    let mode = sqlx::raw_sql("PRAGMA journal_mode").fetch_one(connection).await?;
    Ok(mode.try_get::<String, _>(0)? == "wal")
}

/// Returns true if `error` means that a table does not exist.
pub(crate) fn is_missing(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| error.message().starts_with("no such table"))
}

/// Returns true if `error` is `SQLITE_BUSY`: another connection has a lock that this one needs.
pub(crate) fn is_busy(error: &sqlx::Error) -> bool {
    code(error) == Some(5)
}

/// Returns the primary result code of an SQLite error (<https://www.sqlite.org/rescode.html>).
pub(crate) fn code(error: &sqlx::Error) -> Option<u32> {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code)?;
    code.parse::<u32>().ok().map(|code| code & 0xff) // the higher bits of an extended code only add detail
}
