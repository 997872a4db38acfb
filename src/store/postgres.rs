//! Connections and error codes of PostgreSQL, the database for deployments with more than one replica.
//! `trustgate migrate` creates the tables.
//!
//! Reads and writes work through a connection pooler in transaction mode: reads use the simple query protocol, writes
//! stay inside one transaction, and no setting applies to a whole session.

pub(crate) mod blocked;

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::{names::SchemaName, url::StoreUrl};

/// Opens a connection. Reads the files that contain the URL and the password again.
pub(crate) async fn connect(address: &StoreUrl) -> Result<PgConnection, sqlx::Error> {
    // These files may be on a slow network filesystem, so a blocking thread reads them: the poll task's thread must not
    // be blocked.
    let address = address.clone();
    let options = tokio::task::spawn_blocking(move || address.postgres()).await.map_err(std::io::Error::from)?;
    let options = options.map_err(|error| sqlx::Error::Configuration(Box::new(error)))?;
    PgConnection::connect_with(&options).await
}

/// Like [`connect`], but fails with a timeout after `limit`.
pub(crate) async fn connect_within(address: &StoreUrl, limit: Duration) -> Result<PgConnection, sqlx::Error> {
    tokio::time::timeout(limit, connect(address)).await.unwrap_or_else(|_| {
        let problem = format!("connect timeout: no answer within {limit:?}");
        Err(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, problem)))
    })
}

/// Describes the database and the schema, for messages.
pub(crate) fn describe(address: &StoreUrl, schema: &SchemaName) -> String {
    format!("{} (schema {:?})", address.describe_postgres(), schema.as_str())
}

/// Replaces every `{s}` in `text` with the schema, whose name needs no quotes.
pub(crate) fn in_schema(text: &str, schema: &SchemaName) -> AssertSqlSafe<String> {
    AssertSqlSafe(text.replace("{s}", schema.as_str()))
}

/// Returns the SQLSTATE code of a database error: five characters, of which the first two are its class.
pub(crate) fn code(error: &sqlx::Error) -> Option<String> {
    error.as_database_error().and_then(sqlx::error::DatabaseError::code).map(std::borrow::Cow::into_owned)
}

/// Returns true if `error` means that a table or the schema does not exist.
pub(crate) fn is_missing(error: &sqlx::Error) -> bool {
    matches!(code(error).as_deref(), Some("42P01" | "3F000"))
}
