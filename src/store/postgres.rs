//! PostgreSQL: for more than one replica. Its tables are made by `trustgate migrate`.
//!
//! Everything works through a pooler in transaction mode: reads use the simple protocol, writers stay inside one
//! transaction, and nothing is set for a whole session.

pub(crate) mod blocked;

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::{names::SchemaName, url::StoreUrl};

/// Opens a connection. Reads the URL and the password anew.
pub(crate) async fn connect(address: &StoreUrl) -> Result<PgConnection, sqlx::Error> {
    // Files of secrets may be on a network filesystem: reading them must not hold up the thread of the poll.
    let address = address.clone();
    let options = tokio::task::spawn_blocking(move || address.postgres()).await.map_err(std::io::Error::from)?;
    let options = options.map_err(|error| sqlx::Error::Configuration(Box::new(error)))?;
    PgConnection::connect_with(&options).await
}

/// As [`connect`], given up after `limit`.
pub(crate) async fn connect_within(address: &StoreUrl, limit: Duration) -> Result<PgConnection, sqlx::Error> {
    tokio::time::timeout(limit, connect(address)).await.unwrap_or_else(|_| {
        let problem = format!("no answer within {limit:?} while connecting");
        Err(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, problem)))
    })
}

/// The database and the schema in words.
pub(crate) fn describe(address: &StoreUrl, schema: &SchemaName) -> String {
    format!("{}, schema {:?},", address.describe_postgres(), schema.as_str())
}

/// `text` with every `{s}` replaced by the schema, whose name needs no quotes.
pub(crate) fn in_schema(text: &str, schema: &SchemaName) -> AssertSqlSafe<String> {
    AssertSqlSafe(text.replace("{s}", schema.as_str()))
}

/// The code of a database error: five characters, of which the first two are its class.
pub(crate) fn code(error: &sqlx::Error) -> Option<String> {
    error.as_database_error().and_then(sqlx::error::DatabaseError::code).map(std::borrow::Cow::into_owned)
}

/// Whether `error` says that a table, or the schema, is not there.
pub(crate) fn is_missing(error: &sqlx::Error) -> bool {
    matches!(code(error).as_deref(), Some("42P01" | "3F000"))
}
