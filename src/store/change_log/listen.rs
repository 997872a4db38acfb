//! Hints from PostgreSQL: a connection that only listens.
//!
//! Never tells what changed: whoever hears a hint polls.

use std::{
    convert::Infallible,
    io::{Error, ErrorKind},
    time::Duration,
};

use sqlx::{
    Row,
    postgres::{PgListener, PgPoolOptions},
};
use tokio::time::timeout;
use uuid::Uuid;

use crate::store::{names::SchemaName, postgres::in_schema, url::StoreUrl};

/// A connection over which nothing came for so long is asked whether it is still there.
const SILENCE: Duration = Duration::from_secs(10);
/// How long connecting may take, and how long each answer.
const ANSWER: Duration = Duration::from_secs(2);

/// Calls `changed` once it listens, and for every hint.
///
/// # Errors
/// The connection broke, does not answer any longer, or turns out to lead through a pooler: what was said meanwhile is
/// lost.
pub(crate) async fn attend(
    address: &StoreUrl,
    schema: &SchemaName,
    changed: &(dyn Fn() + Send + Sync),
) -> Result<Infallible, sqlx::Error> {
    let mut listener = open(address, schema.as_str()).await?;
    let listening = backend(&mut listener, schema).await?;
    changed();
    loop {
        match timeout(SILENCE, listener.try_recv()).await {
            Ok(Ok(Some(_))) => changed(),
            Ok(Ok(None)) => return Err(lost("the connection for hints broke")),
            Ok(Err(error)) => return Err(error),
            // A pooler gives each transaction another server, of which only one listens, to nobody.
            Err(_) if backend(&mut listener, schema).await? != listening => {
                return Err(lost("a pooler is in between: no hints"));
            }
            Err(_) => {}
        }
    }
}

/// A connection of its own that listens to `channel`.
///
/// # Errors
/// There is none to be had, or it leads through a pooler.
pub(crate) async fn open(address: &StoreUrl, channel: &str) -> Result<PgListener, sqlx::Error> {
    // A pooler would let this session's LISTEN fall on a server that others use next, and their drivers would choke on
    // what it hears. A setting of the session alone does not pass through one: it is refused, or not there afterwards.
    let session = Uuid::new_v4().simple().to_string();
    let options = address.postgres().map_err(|error| sqlx::Error::Configuration(Box::new(error)))?;
    let options = options.options([("trustgate.session", &session)]);
    let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(ANSWER).connect_lazy_with(options);
    let mut listener = PgListener::connect_with(&pool).await?;
    // It would connect anew by itself, which hides that something was lost.
    listener.eager_reconnect(false);
    let own = sqlx::raw_sql("SELECT coalesce(current_setting('trustgate.session', true), '')").fetch_one(&mut listener);
    if in_time(own).await?.try_get::<String, _>(0)? != session {
        return Err(lost("a pooler is in between: no hints"));
    }
    in_time(listener.listen(channel)).await?;
    Ok(listener)
}

/// The process on the other side, and whether it listens.
async fn backend(listener: &mut PgListener, schema: &SchemaName) -> Result<(i32, bool), sqlx::Error> {
    let sql = "SELECT pg_backend_pid(), '{s}' IN (SELECT pg_listening_channels())";
    let row = in_time(sqlx::raw_sql(in_schema(sql, schema)).fetch_one(listener)).await?;
    Ok((row.try_get(0)?, row.try_get(1)?))
}

async fn in_time<T>(work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    timeout(ANSWER, work).await.unwrap_or_else(|_| Err(lost("the connection for hints does not answer")))
}

fn lost(problem: &'static str) -> sqlx::Error {
    sqlx::Error::Io(Error::new(ErrorKind::ConnectionAborted, problem))
}
