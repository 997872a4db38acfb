//! Opens the store: picks the adapter that the settings select, and opens it for checks, for management or for a
//! migration.

use std::{num::NonZero, sync::Arc, thread::available_parallelism, time::Duration};

use super::{
    error::StoreError,
    existing_table::{
        ExistingTable,
        attach::{self, AttachAction},
    },
    ledger::{self, Ledger, backend::LedgerBackend},
    names::SchemaName,
    reads::{
        lookup::{Missing, Source},
        postgres::Postgres,
        reader::StoreReader,
        sqlite::Sqlite,
    },
    schema,
    settings::StoreSettings,
    sqlite,
    url::{Backend, Env, Role, StoreUrl},
};
use crate::base::{clock::Clock, saturate::Saturate as _};

/// Describes the configured database for messages: its kind and its host or path, without user, password and URL
/// parameters.
#[must_use]
pub fn describe(settings: &StoreSettings, env: Env<'_>) -> String {
    StoreUrl::of(settings, Role::Serve).describe(env)
}

/// Creates the store reader that checks use. Does not connect, so it succeeds while the database is down;
/// [`Source::prepare`] connects.
///
/// # Errors
/// [`StoreError::Unusable`]: the URL is wrong or does not fit the other settings, or a file that contains a secret
/// cannot be read.
pub fn open_lookup(
    settings: &StoreSettings,
    env: Env<'_>,
    clock: Arc<dyn Clock>,
) -> Result<Arc<dyn Source>, StoreError> {
    let address = StoreUrl::of(settings, Role::Serve);
    if settings.reads_existing() && settings.url.is_none() && settings.url_file.is_none() {
        return Err(StoreError::Unusable(
            "store.preset, store.table: set `store.url` to the database that contains your table".into(),
        ));
    }
    Ok(match address.backend(env)? {
        Backend::Sqlite(_) if settings.table.is_some() || settings.attached => return Err(not_on_sqlite()),
        Backend::Sqlite(path) => {
            let connections_max = settings.connections_max.min(sqlite_connections());
            let settings = StoreSettings { connections_max, ..settings.clone() };
            Arc::new(StoreReader::new(Sqlite::new(path, settings.preset), &settings, clock))
        }
        Backend::Postgres => {
            let statement_timeout = settings.read_timeout + GRACE;
            let (schema, existing) = (settings.schema.clone(), ExistingTable::of(settings));
            // Parse the URL now, so that an error in it is reported at startup and not by the first connect.
            address.postgres()?;
            Arc::new(StoreReader::new(Postgres { address, schema, existing, statement_timeout }, settings, clock))
        }
    })
}

/// Returns the maximum number of useful connections to SQLite: two for each processor. Each read from the file occupies
/// a thread of this process, so more connections would not read faster, and would take processor time from requests
/// that the cache answers.
fn sqlite_connections() -> u32 {
    let processors = available_parallelism().map_or(1, NonZero::get);
    processors.saturate::<u32>().saturating_mul(2)
}

/// Opens the ledger, through which management changes trusts and keys. Connects at once.
///
/// # Errors
/// [`StoreError::NotOurs`] if the keys are in an existing table; [`StoreError::NoDatabase`] or [`StoreError::Schema`]
/// if the database is missing, or its tables are missing or have the wrong version; or the database cannot be reached.
pub async fn open_ledger(settings: &StoreSettings, env: Env<'_>) -> Result<Ledger, StoreError> {
    management(settings, env)?.open().await
}

/// The settings for management connections to the database. One value can open any number of connections.
#[derive(Clone, Debug)]
pub(crate) struct Management {
    address: StoreUrl,
    backend: Backend,
    schema: SchemaName,
    connect_timeout: Duration,
}

/// Prepares the settings for management connections, for a caller that connects repeatedly. Does not connect yet.
///
/// # Errors
/// [`StoreError::NotOurs`] if the keys are in an existing table; [`StoreError::Unusable`] if the URL is wrong or its
/// file cannot be read.
pub(crate) fn management(settings: &StoreSettings, env: Env<'_>) -> Result<Management, StoreError> {
    if settings.reads_existing() {
        return Err(StoreError::NotOurs);
    }
    manage(settings, env)
}

/// Opens the ledger for a caller that uses only versions and replicas and does not change trusts or keys, such as
/// `trustgate cache clear`. Also works with an attached existing table. Connects at once.
///
/// # Errors
/// See [`open_ledger`].
pub(crate) async fn open_history(settings: &StoreSettings, env: Env<'_>) -> Result<Ledger, StoreError> {
    if !settings.tracks_changes() {
        return Err(StoreError::NotOurs);
    }
    manage(settings, env)?.open().await
}

fn manage(settings: &StoreSettings, env: Env<'_>) -> Result<Management, StoreError> {
    let address = StoreUrl::of(settings, Role::Manage);
    let (schema, connect_timeout) = (settings.schema.clone(), settings.connect_timeout);
    Ok(Management { backend: address.backend(env)?, address, schema, connect_timeout })
}

impl Management {
    /// Connects to the database. Reads the files that contain the URL and the password again.
    ///
    /// # Errors
    /// See [`open_ledger`].
    pub(crate) async fn open(&self) -> Result<Ledger, StoreError> {
        Ok(Ledger::new(self.tables().await?))
    }

    async fn tables(&self) -> Result<Box<dyn LedgerBackend>, StoreError> {
        let Self { address, backend, schema, connect_timeout } = self;
        Ok(match backend {
            Backend::Sqlite(path) => Box::new(ledger::sqlite::open(path).await?),
            Backend::Postgres => Box::new(ledger::postgres::open(address, schema, *connect_timeout).await?),
        })
    }
}

/// Opens the tables at `address`. Connects at once.
///
/// # Errors
/// See [`open_ledger`].
pub(crate) async fn open_tables(
    address: &StoreUrl,
    settings: &StoreSettings,
    env: Env<'_>,
) -> Result<Box<dyn LedgerBackend>, StoreError> {
    let (schema, connect_timeout) = (settings.schema.clone(), settings.connect_timeout);
    Management { backend: address.backend(env)?, address: address.clone(), schema, connect_timeout }.tables().await
}

/// Creates the tables, or adds what this release needs to existing tables. Can be repeated, and several processes may
/// run it at once.
///
/// # Errors
/// [`StoreError::NotOurs`] with an existing table and without `store.attached`; [`StoreError::Schema`] if the tables
/// are too new; [`StoreError::Unusable`] if the file cannot be used; or the database cannot be reached.
pub async fn migrate(settings: &StoreSettings, env: Env<'_>) -> Result<(), StoreError> {
    if !settings.tracks_changes() {
        return Err(StoreError::NotOurs);
    }
    let address = StoreUrl::of(settings, Role::Manage);
    match address.backend(env)? {
        Backend::Sqlite(path) => {
            sqlite::file::prepare(&path, Missing::Create)?;
            schema::sqlite::run(&path).await
        }
        Backend::Postgres => schema::postgres::run(&address, &settings.schema, settings.connect_timeout).await,
    }
}

/// Starts a new database history. The operator requests this after restoring a backup or a copy of the database, so
/// that replicas do not use values from the earlier history that are still in their caches or in Redis.
///
/// # Errors
/// See [`open_ledger`].
pub async fn new_incarnation(settings: &StoreSettings, env: Env<'_>) -> Result<(), StoreError> {
    if !settings.tracks_changes() {
        return Err(StoreError::NotOurs);
    }
    let address = StoreUrl::of(settings, Role::Manage);
    match address.backend(env)? {
        Backend::Sqlite(path) => schema::sqlite::new_incarnation(&path).await,
        Backend::Postgres => {
            schema::postgres::new_incarnation(&address, &settings.schema, settings.connect_timeout).await
        }
    }
}

/// Adds triggers to the existing table in one transaction. The triggers record changes to the table in the change log.
/// Returns the name of the table.
///
/// # Errors
/// [`StoreError::Unusable`], whose message lists all problems; [`StoreError::NotOwner`] if a right is missing;
/// [`StoreError::Schema`] if `trustgate migrate` has not been run; or the database cannot be reached. After an error,
/// nothing has changed.
pub(crate) async fn attach(settings: &StoreSettings, env: Env<'_>) -> Result<String, StoreError> {
    action(settings, env, AttachAction::Attach).await
}

/// Removes everything that [`attach()`] added. Returns the name of the table.
///
/// # Errors
/// See [`attach()`].
pub(crate) async fn detach(settings: &StoreSettings, env: Env<'_>) -> Result<String, StoreError> {
    action(settings, env, AttachAction::Detach).await
}

async fn action(settings: &StoreSettings, env: Env<'_>, action: AttachAction) -> Result<String, StoreError> {
    let (address, table) = attachable(settings, env)?;
    attach::run(&address, &settings.schema, &table, action, settings.connect_timeout).await?;
    Ok(table.table.to_string())
}

/// Returns the statements of [`attach()`], each with the role that must run it.
///
/// # Errors
/// See [`attach()`].
pub(crate) async fn print_attach(settings: &StoreSettings, env: Env<'_>) -> Result<String, StoreError> {
    let (address, table) = attachable(settings, env)?;
    attach::print(&address, &settings.schema, &table, AttachAction::Attach, settings.connect_timeout).await
}

/// Returns the statements of [`detach`], each with the role that must run it.
///
/// # Errors
/// See [`detach`].
pub(crate) async fn print_detach(settings: &StoreSettings, env: Env<'_>) -> Result<String, StoreError> {
    let (address, table) = attachable(settings, env)?;
    attach::print(&address, &settings.schema, &table, AttachAction::Detach, settings.connect_timeout).await
}

fn attachable(settings: &StoreSettings, env: Env<'_>) -> Result<(StoreUrl, ExistingTable), StoreError> {
    let address = StoreUrl::of(settings, Role::Manage);
    if matches!(address.backend(env)?, Backend::Sqlite(_)) {
        return Err(not_on_sqlite());
    }
    let table = ExistingTable::of(settings).ok_or_else(|| {
        StoreError::Unusable("store.table is not set: set it to your table with its schema (\"public.trust\")".into())
    })?;
    Ok((address, table))
}

fn not_on_sqlite() -> StoreError {
    StoreError::Unusable(
        "store.table, store.attached: only a table in PostgreSQL can be read by column names or attached: set \
         `store.url` to a PostgreSQL database, or remove these settings"
            .into(),
    )
}

/// Returns the GRANT statements for the roles `serve` and `manage`. The owner of the tables must run them. An SQLite
/// file has no roles, so it needs no grants.
#[must_use]
pub fn grants(settings: &StoreSettings, serve: &str, manage: &str) -> String {
    schema::grants::grants(&settings.schema, ExistingTable::of(settings).as_ref(), serve, manage)
}

/// The time by which the server's limit for a read exceeds `store.read_timeout`, so that the timeout of this process
/// fires first.
const GRACE: Duration = Duration::from_millis(20);
