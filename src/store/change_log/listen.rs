//! Notifications from PostgreSQL, on a connection that is used only to LISTEN.
//!
//! A notification does not say what changed, so the receiver polls the change log.

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

/// After this time without a notification, a query checks the connection.
const SILENCE: Duration = Duration::from_secs(10);
/// Timeout for connecting, and for each reply.
const ANSWER: Duration = Duration::from_secs(2);

/// Calls `changed` when it starts to listen, and again for each notification.
///
/// # Errors
/// The connection broke, did not reply in time, or leads through a pooler. Notifications are lost until the caller
/// listens again.
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
            Ok(Ok(None)) => return Err(lost("notification connection broke")),
            Ok(Err(error)) => return Err(error),
            // The query did not run in the server process that ran LISTEN. A pooler can choose a different process for
            // each transaction, so notifications to the process that ran LISTEN may not reach this client.
            Err(_) if backend(&mut listener, schema).await? != listening => return Err(lost(POOLER)),
            Err(_) => {}
        }
    }
}

const POOLER: &str =
    "notifications do not pass through a connection pooler: connect to PostgreSQL directly to receive them";

/// Opens a dedicated connection that listens to `channel`.
///
/// # Errors
/// The connection fails, or it goes through a pooler.
pub(crate) async fn open(address: &StoreUrl, channel: &str) -> Result<PgListener, sqlx::Error> {
    // Behind a pooler, LISTEN would stay in effect on a server connection that the pooler hands to other clients, whose
    // drivers may fail on unexpected notifications. So look for a pooler first: set a random session setting when
    // connecting. A pooler rejects the setting or drops it.
    let session = Uuid::new_v4().simple().to_string();
    let options = address.postgres().map_err(|error| sqlx::Error::Configuration(Box::new(error)))?;
    let options = options.options([("trustgate.session", &session)]);
    let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(ANSWER).connect_lazy_with(options);
    let mut listener = PgListener::connect_with(&pool).await?;
    // Otherwise the listener would reconnect automatically and hide the loss of notifications.
    listener.eager_reconnect(false);
    let own = sqlx::raw_sql("SELECT coalesce(current_setting('trustgate.session', true), '')").fetch_one(&mut listener);
    if in_time(own).await?.try_get::<String, _>(0)? != session {
        return Err(lost(POOLER));
    }
    in_time(listener.listen(channel)).await?;
    Ok(listener)
}

/// Returns the id of the server process, and true if that process listens to our channel.
async fn backend(listener: &mut PgListener, schema: &SchemaName) -> Result<(i32, bool), sqlx::Error> {
    let sql = "SELECT pg_backend_pid(), '{s}' IN (SELECT pg_listening_channels())";
    let row = in_time(sqlx::raw_sql(in_schema(sql, schema)).fetch_one(listener)).await?;
    Ok((row.try_get(0)?, row.try_get(1)?))
}

async fn in_time<T>(work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    timeout(ANSWER, work).await.unwrap_or_else(|_| Err(lost("notification connection timed out")))
}

fn lost(problem: &'static str) -> sqlx::Error {
    sqlx::Error::Io(Error::new(ErrorKind::ConnectionAborted, problem))
}
