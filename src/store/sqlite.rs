//! The embedded database: one SQLite file, made and brought up to date by `serve` itself.
//!
//! For one process that serves and the commands beside it, on a local disk. Never used over a network filesystem.

pub(crate) mod file;

use std::{path::Path, time::Duration};

use sqlx::{
    ConnectOptions, Connection, Row, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteSynchronous},
};

/// How long a write waits for another process's write to end.
pub(crate) const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a read waits where another process has locked the whole database. Well below `freshness.poll_timeout`: that the
/// database is locked is an answer, and a poll that waited longer would seem to get none.
pub(crate) const BUSY_TIMEOUT_OF_READS: Duration = Duration::from_millis(50);

/// The present time in microseconds since the Unix epoch. SQLite's own clock counts milliseconds.
pub(crate) const NOW: &str = "CAST(round(unixepoch('subsec') * 1000) AS INTEGER) * 1000";

/// Whether a connection may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Reads only. Such a connection also never copies the write-ahead log into the database: SQLite takes an exclusive lock for
    /// that when the last connection closes, which needs a descriptor that can write. So a connection whose `-shm` was
    /// removed can be closed without overwriting what others committed since.
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
        .disable_statement_logging(); // they hold digests
    SqliteConnection::connect_with(&options).await
}

/// Whether the database has a write-ahead log. Reads from it, so that the files beside it are open afterwards.
pub(crate) async fn has_log(connection: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
    sqlx::raw_sql("SELECT count(*) FROM sqlite_schema").execute(&mut *connection).await?;
    let mode = sqlx::raw_sql("PRAGMA journal_mode").fetch_one(connection).await?;
    Ok(mode.try_get::<String, _>(0)? == "wal")
}

/// Whether `error` says that a table is not there.
pub(crate) fn is_missing(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| error.message().starts_with("no such table"))
}

/// Whether `error` says that somebody else is writing.
pub(crate) fn is_busy(error: &sqlx::Error) -> bool {
    code(error) == Some(5)
}

/// The primary code of an error of SQLite itself (<https://www.sqlite.org/rescode.html>).
pub(crate) fn code(error: &sqlx::Error) -> Option<u32> {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code)?;
    code.parse::<u32>().ok().map(|code| code & 0xff) // the rest of an extended one says more about the same
}
