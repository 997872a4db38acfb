//! Creates and migrates the tables on PostgreSQL. A migration only adds.

use std::time::Duration;

use sqlx::{Connection, PgConnection, Row};
use uuid::Uuid;

use crate::store::{
    change_log::postgres,
    error::StoreError,
    names::SchemaName,
    postgres::{connect_within, describe, in_schema, is_missing},
    schema,
    url::StoreUrl,
};

/// The query for the version of the tables, newest first.
pub(crate) const SCHEMA: &str = "SELECT version, compatible_from FROM {s}.schema ORDER BY version DESC LIMIT 1";

/// Creates the tables, or adds and repairs what is missing. Several processes may run this at once: one process
/// migrates, and the others wait for its lock.
///
/// # Errors
/// Returns [`StoreError::Schema`] if the tables are too new for this release, or the database error.
pub(crate) async fn run(address: &StoreUrl, name: &SchemaName, connect_timeout: Duration) -> Result<(), StoreError> {
    let mut connection = connect_within(address, connect_timeout).await?;
    let mut transaction = connection.begin().await?;
    sqlx::raw_sql(LOCK).execute(&mut *transaction).await?;
    sqlx::raw_sql(TABLE_LOCK_LIMIT).execute(&mut *transaction).await?;
    if tables(&mut transaction, name).await?.is_none() {
        first(&mut transaction, name).await?;
    }
    if tables(&mut transaction, name).await?.is_some_and(|tables| tables.version == 1) {
        second(&mut transaction, name).await?;
    }
    if tables(&mut transaction, name).await?.is_some_and(|tables| tables.version == 2) {
        third(&mut transaction, name).await?;
    }
    if tables(&mut transaction, name).await?.is_some_and(|tables| tables.version == 3) {
        fourth(&mut transaction, name).await?;
    }
    let tables = tables(&mut transaction, name).await?;
    // If the tables are newer than this release, do not replace their functions and triggers with older ones.
    if tables.is_some_and(|tables| tables.version == schema::VERSION) {
        postgres::mend(&mut transaction, name).await?;
    }
    transaction.commit().await?;
    if tables.is_some_and(|tables| tables.version >= 4) {
        sqlx::raw_sql(in_schema(PEPPER_INDEX, name)).execute(&mut connection).await?;
    }
    connection.close().await?;
    schema::check(tables, &describe(address, name))
}

/// Starts a new database history after the operator has restored a backup, so that replicas do not use data that they
/// or Redis cached from the previous history.
///
/// # Errors
/// The database failed, or has no trustgate tables.
pub(crate) async fn new_incarnation(
    address: &StoreUrl,
    name: &SchemaName,
    connect_timeout: Duration,
) -> Result<(), StoreError> {
    let mut connection = connect_within(address, connect_timeout).await?;
    let sql = "SET LOCAL transaction_isolation = 'read committed'; SET LOCAL lock_timeout = '60s';
        SELECT {s}.renew_incarnation(incarnation) FROM {s}.meta";
    sqlx::raw_sql(in_schema(sql, name)).execute(&mut connection).await?;
    Ok(connection.close().await?)
}

/// Takes one lock for all schemas in the database. A lock for each schema is not needed, because migrations are rare.
/// The number is the first 8 bytes of SHA-256("trustgate migrate").
const LOCK: &str = "SET LOCAL lock_timeout = '60s'; SET LOCAL statement_timeout = 0; SELECT pg_advisory_xact_lock(2242996985564621124)";
/// Limits the wait for a table lock to 5 s. While the migration waits, later statements on that table queue behind it,
/// so the migration gives up early, and the operator can run it again.
const TABLE_LOCK_LIMIT: &str = "SET LOCAL lock_timeout = '5s'; SET LOCAL client_min_messages = warning";

/// Returns the version of the tables, or `None` if there are none.
pub(crate) async fn tables(
    connection: &mut PgConnection,
    name: &SchemaName,
) -> Result<Option<schema::TableVersion>, sqlx::Error> {
    // This nested transaction is a savepoint: the error for a missing table must not abort the outer transaction.
    let mut attempt = connection.begin().await?;
    match sqlx::raw_sql(in_schema(SCHEMA, name)).fetch_all(&mut *attempt).await {
        Ok(rows) => match rows.first() {
            None => Ok(None),
            Some(row) => Ok(Some(schema::TableVersion { version: row.try_get(0)?, compatible_from: row.try_get(1)? })),
        },
        Err(error) if is_missing(&error) => attempt.rollback().await.map(|()| None),
        Err(error) => Err(error),
    }
}

/// Table version 1: creates the tables, the first row of `version` and the MAC key for Redis.
async fn first(connection: &mut PgConnection, name: &SchemaName) -> Result<(), StoreError> {
    // CREATE SCHEMA IF NOT EXISTS needs the right to create a schema even if the schema exists.
    let exists = sqlx::query("SELECT FROM pg_namespace WHERE nspname = $1")
        .bind(name.as_str())
        .fetch_optional(&mut *connection)
        .await?
        .is_some();
    if !exists {
        sqlx::raw_sql(in_schema("CREATE SCHEMA {s}", name)).execute(&mut *connection).await?;
    }
    sqlx::raw_sql(in_schema(FIRST, name)).execute(&mut *connection).await?;
    sqlx::query(in_schema("INSERT INTO {s}.meta (incarnation) VALUES ($1)", name))
        .bind(Uuid::new_v4())
        .execute(&mut *connection)
        .await?;
    sqlx::query(in_schema("INSERT INTO {s}.version (version, nonce) VALUES (1, $1)", name))
        .bind(schema::random::<16>()?.to_vec())
        .execute(&mut *connection)
        .await?;
    sqlx::query(in_schema("INSERT INTO {s}.setting (name, value) VALUES ('redis_mac_key', $1)", name))
        .bind(schema::random::<32>()?.to_vec())
        .execute(&mut *connection)
        .await?;
    sqlx::raw_sql(in_schema("INSERT INTO {s}.schema (version, compatible_from) VALUES (1, 1)", name))
        .execute(connection)
        .await?;
    Ok(())
}

/// Table version 2: adds the change log.
async fn second(connection: &mut PgConnection, name: &SchemaName) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(in_schema(postgres::HOLD_WRITERS, name)).execute(&mut *connection).await?;
    sqlx::raw_sql(in_schema(SECOND, name)).execute(&mut *connection).await?;
    stamp(connection, name, 2).await
}

/// Table version 3: adds the columns that describe the attached table. They are in `meta`, because `serve` has the
/// right to read that table.
async fn third(connection: &mut PgConnection, name: &SchemaName) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(in_schema(THIRD, name)).execute(&mut *connection).await?;
    stamp(connection, name, 3).await
}

/// Table version 4: adds the pepper of each key. None of these statements reads the rows of a large table. The other
/// columns are for later releases: they are added now, so that the tables that checks read change only once.
async fn fourth(connection: &mut PgConnection, name: &SchemaName) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(in_schema(postgres::HOLD_WRITERS, name)).execute(&mut *connection).await?;
    sqlx::raw_sql(in_schema(FOURTH, name)).execute(&mut *connection).await?;
    stamp(connection, name, schema::VERSION).await
}

const FIRST: &str = include_str!("postgres/version_1.sql");

const SECOND: &str = include_str!("postgres/version_2.sql");

const THIRD: &str = "ALTER TABLE {s}.meta ADD COLUMN attached_schema text, ADD COLUMN attached_table text,
    ADD COLUMN attached_digest text, ADD COLUMN attached_identity text";

const FOURTH: &str = include_str!("postgres/version_4.sql");

/// The index that table version 4 adds. `migrate` creates it after the migration has been committed, because building
/// it reads the whole table `api_key`. During that time, only writers wait.
const PEPPER_INDEX: &str = "
CREATE INDEX IF NOT EXISTS api_key_pepper ON {s}.api_key (pepper_fingerprint)
    WHERE pepper_fingerprint IS NOT NULL AND revoked_at IS NULL";

async fn stamp(connection: &mut PgConnection, name: &SchemaName, version: i64) -> Result<(), sqlx::Error> {
    sqlx::query(in_schema("INSERT INTO {s}.schema (version, compatible_from) VALUES ($1, $2)", name))
        .bind(version)
        .bind(schema::COMPATIBLE_FROM)
        .execute(connection)
        .await
        .map(drop)
}
