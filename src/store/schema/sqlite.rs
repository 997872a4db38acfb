//! Creates and migrates the tables on SQLite. A migration only adds.

use std::{path::Path, time::Duration};

use sqlx::{Connection, Row, SqliteConnection};
use uuid::Uuid;

use crate::store::{
    change_log::{
        problem::{NotIntact, TrackingProblem},
        sqlite,
    },
    error::StoreError,
    reads::lookup::Missing,
    schema,
    sqlite::{Access, NOW, connect, file, is_busy, is_missing},
    url::describe_sqlite,
};

/// The query for the newest version of the tables.
pub(crate) const SCHEMA: &str = "SELECT version, compatible_from FROM schema ORDER BY version DESC LIMIT 1";

/// Creates the tables, or adds what is missing. The file must exist. Several processes may run this at once.
///
/// # Errors
/// Returns [`StoreError::Schema`] if the tables are too new for this release, or the database error.
pub(crate) async fn run(path: &Path) -> Result<(), StoreError> {
    let mut left = ATTEMPTS;
    loop {
        match attempt(path).await {
            // If two processes turn on the write-ahead log at once, SQLite returns "busy" without waiting for the busy
            // timeout.
            Err(StoreError::Database(error)) if is_busy(&error) && left > 0 => {
                left -= 1;
                tokio::time::sleep(PAUSE).await;
            }
            outcome => return outcome,
        }
    }
}

/// The maximum number of times that a migration is retried while another process writes.
const ATTEMPTS: u32 = 100;
/// The time between two attempts.
const PAUSE: Duration = Duration::from_millis(20);

async fn attempt(path: &Path) -> Result<(), StoreError> {
    let mut connection = connect(path, Access::Write).await?;
    if !is_done(&mut connection).await? {
        // The database file stores this mode. In this mode, readers do not wait for the writer.
        sqlx::raw_sql("PRAGMA journal_mode = WAL").execute(&mut connection).await?;
        let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
        // Another process may have migrated the database before this one got the write lock.
        if !is_done(&mut transaction).await? {
            let version = tables(&mut transaction).await?.map_or(0, |tables| tables.version);
            if version < 1 {
                first(&mut transaction).await?;
            }
            if version < 2 {
                second(&mut transaction).await?;
            }
            if version < 3 {
                // Version 3 changes the tables only on PostgreSQL.
                stamp(&mut transaction, 3).await?;
            }
            if version < 4 {
                fourth(&mut transaction).await?;
            }
            sqlite::install(&mut transaction).await.map_err(|error| match error {
                NotIntact::Problem(problem) => triggers_broken(path, &problem),
                NotIntact::Database(error) => error.into(),
            })?;
        }
        transaction.commit().await?;
    }
    let tables = self::tables(&mut connection).await?;
    connection.close().await?;
    schema::check(tables, &describe_sqlite(path))
}

/// Returns true if no migration is needed: the tables have the version of this release and their triggers are intact,
/// or the tables are newer.
async fn is_done(connection: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
    match tables(connection).await? {
        Some(tables) if tables.version == schema::VERSION => sqlite::in_force(connection).await,
        tables => Ok(tables.is_some_and(|tables| tables.version > schema::VERSION)),
    }
}

fn triggers_broken(path: &Path, problem: &TrackingProblem) -> StoreError {
    StoreError::Schema(format!("{}: {problem}", describe_sqlite(path)))
}

/// Starts a new database history after the operator has restored a copy, so that replicas do not use values from the
/// earlier history that are still in their caches or in Redis.
///
/// # Errors
/// Returns [`StoreError::NoDatabase`], [`StoreError::Schema`] or the database error.
pub(crate) async fn new_incarnation(path: &Path) -> Result<(), StoreError> {
    file::prepare(path, Missing::Refuse)?;
    let mut connection = connect(path, Access::Write).await?;
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
    schema::check(tables(&mut transaction).await?, &describe_sqlite(path))?;
    begin_incarnation(&mut transaction, None).await?;
    transaction.commit().await?;
    Ok(connection.close().await?)
}

/// Writes a new incarnation and a version that marks everything as changed. If `lost` is given, does so only if `lost`
/// is still the current incarnation.
pub(crate) async fn begin_incarnation(
    connection: &mut SqliteConnection,
    lost: Option<Uuid>,
) -> Result<(), sqlx::Error> {
    let written = sqlx::query("UPDATE meta SET incarnation = ?1 WHERE incarnation = ?2 OR ?2 IS NULL")
        .bind(Uuid::new_v4().to_string())
        .bind(lost.map(|lost| lost.to_string()))
        .execute(&mut *connection)
        .await?;
    if written.rows_affected() > 0 {
        sqlite::everything(connection).await?;
    }
    Ok(())
}

/// Returns the version of the tables, or `None` if there are none.
pub(crate) async fn tables(connection: &mut SqliteConnection) -> Result<Option<schema::TableVersion>, sqlx::Error> {
    match sqlx::raw_sql(SCHEMA).fetch_all(connection).await {
        Ok(rows) => match rows.first() {
            None => Ok(None),
            Some(row) => Ok(Some(schema::TableVersion { version: row.try_get(0)?, compatible_from: row.try_get(1)? })),
        },
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Table version 1: creates the tables, the first row of `version` and the MAC key for Redis.
async fn first(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    sqlx::raw_sql(FIRST).execute(&mut *connection).await?;
    sqlx::query("INSERT INTO meta (incarnation) VALUES (?)")
        .bind(Uuid::new_v4().to_string())
        .execute(&mut *connection)
        .await?;
    sqlx::query(sqlx::AssertSqlSafe(format!("INSERT INTO version (version, nonce, at) VALUES (1, ?, {NOW})")))
        .bind(schema::random::<16>()?.to_vec())
        .execute(&mut *connection)
        .await?;
    sqlx::query("INSERT INTO setting (name, value) VALUES ('redis_mac_key', ?)")
        .bind(schema::random::<32>()?.to_vec())
        .execute(connection)
        .await?;
    Ok(())
}

/// Table version 2: adds the column that records the schema for which the triggers were found intact, and the name and
/// the expiry of heartbeats.
async fn second(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(SECOND).execute(&mut *connection).await?;
    stamp(connection, 2).await
}

/// Table version 4: adds the pepper of each key. The other columns are for later releases: they are added now, so that
/// the tables that checks read change only once.
async fn fourth(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(FOURTH).execute(&mut *connection).await?;
    stamp(connection, schema::VERSION).await
}

async fn stamp(connection: &mut SqliteConnection, version: i64) -> Result<(), sqlx::Error> {
    sqlx::query(sqlx::AssertSqlSafe(format!("INSERT INTO schema (version, compatible_from, at) VALUES (?, ?, {NOW})")))
        .bind(version)
        .bind(schema::COMPATIBLE_FROM)
        .execute(connection)
        .await
        .map(drop)
}

const FIRST: &str = include_str!("sqlite/version_1.sql");

const SECOND: &str = include_str!("sqlite/version_2.sql");

const FOURTH: &str = include_str!("sqlite/version_4.sql");
