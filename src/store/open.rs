//! The doors to the store: which adapter the settings mean, and how it is opened.

use std::{num::NonZero, sync::Arc, thread::available_parallelism, time::Duration};

use super::{
    error::StoreError,
    existing_table::{self, ExistingTable, postgres::AttachAction},
    ledger::{
        self, Ledger,
        sql_ledger::{LedgerBackend, SqlLedger},
    },
    names::SchemaName,
    reads::{
        lookup::{Missing, Source},
        postgres::Postgres,
        reader::Reader,
        sqlite::Sqlite,
    },
    schema,
    settings::StoreSettings,
    sqlite,
    url::{Backend, Env, Role, StoreUrl},
};
use crate::base::clock::Clock;

/// The database the settings mean, in words for messages: its kind and place, never a user, a password or a query.
#[must_use]
pub fn describe(settings: &StoreSettings, env: Env<'_>) -> String {
    StoreUrl::of(settings, Role::Serve).describe(env)
}

/// The reads of checks. Connects to nothing yet, so it succeeds with the database down; [`Source::prepare`] finds out.
///
/// # Errors
/// [`StoreError::Unusable`]: a URL or a secret's file that cannot be read.
pub fn open_lookup(
    settings: &StoreSettings,
    env: Env<'_>,
    clock: Arc<dyn Clock>,
) -> Result<Arc<dyn Source>, StoreError> {
    let address = StoreUrl::of(settings, Role::Serve);
    if settings.reads_existing() && settings.url.is_none() && settings.url_file.is_none() {
        return Err(StoreError::Unusable(
            "store.preset, store.table: set `store.url` to the database that holds your table".into(),
        ));
    }
    Ok(match address.backend(env)? {
        Backend::Sqlite(_) if settings.table.is_some() || settings.attached => return Err(not_on_sqlite()),
        Backend::Sqlite(path) => {
            let connections_max = settings.connections_max.min(sqlite_connections());
            let settings = StoreSettings { connections_max, ..settings.clone() };
            Arc::new(Reader::new(Sqlite::new(path, settings.preset), &settings, clock))
        }
        Backend::Postgres => {
            let statement_timeout = settings.read_timeout + GRACE;
            let (schema, existing) = (settings.schema.clone(), ExistingTable::of(settings));
            // A misspelt URL is a mistake to be told at start, not by the first connect.
            address.postgres()?;
            Arc::new(Reader::new(Postgres { address, schema, existing, statement_timeout }, settings, clock))
        }
    })
}

/// Reads of a file are work for the processors of this process, a thread each: with more of them nothing is read
/// sooner, and what is served from the cache gets a smaller share.
fn sqlite_connections() -> u32 {
    let processors = available_parallelism().map_or(1, NonZero::get);
    u32::try_from(processors).unwrap_or(u32::MAX).saturating_mul(2)
}

/// What management changes trusts and keys through. Connects at once.
///
/// # Errors
/// [`StoreError::NotOurs`] with somebody else's table; [`StoreError::NoDatabase`] and [`StoreError::Schema`] where
/// there is nothing to work on; or the database cannot be reached.
pub async fn open_ledger(settings: &StoreSettings, env: Env<'_>) -> Result<Box<dyn Ledger>, StoreError> {
    management(settings, env)?.open().await
}

/// The way to what management works on.
#[derive(Clone, Debug)]
pub struct Management {
    address: StoreUrl,
    place: Backend,
    schema: SchemaName,
    connect_timeout: Duration,
}

/// The way to what management works on, for who goes it again and again. Connects to nothing yet.
///
/// # Errors
/// [`StoreError::NotOurs`] with somebody else's table; [`StoreError::Unusable`]: a URL or its file that cannot be
/// read.
pub fn management(settings: &StoreSettings, env: Env<'_>) -> Result<Management, StoreError> {
    if settings.reads_existing() {
        return Err(StoreError::NotOurs);
    }
    manage(settings, env)
}

/// What replicas remember, for whoever changes no trust and no key: also of somebody else's table, once it is attached.
/// Connects at once.
///
/// # Errors
/// As [`open_ledger`].
pub async fn open_history(settings: &StoreSettings, env: Env<'_>) -> Result<Box<dyn Ledger>, StoreError> {
    if !settings.tracks_changes() {
        return Err(StoreError::NotOurs);
    }
    manage(settings, env)?.open().await
}

fn manage(settings: &StoreSettings, env: Env<'_>) -> Result<Management, StoreError> {
    let address = StoreUrl::of(settings, Role::Manage);
    let (schema, connect_timeout) = (settings.schema.clone(), settings.connect_timeout);
    Ok(Management { place: address.backend(env)?, address, schema, connect_timeout })
}

impl Management {
    /// Connects. Reads the files of secrets anew.
    ///
    /// # Errors
    /// As [`open_ledger`].
    pub async fn open(&self) -> Result<Box<dyn Ledger>, StoreError> {
        Ok(Box::new(SqlLedger::new(self.tables().await?)))
    }

    async fn tables(&self) -> Result<Box<dyn LedgerBackend>, StoreError> {
        let Self { address, place, schema, connect_timeout } = self;
        Ok(match place {
            Backend::Sqlite(path) => Box::new(ledger::sqlite::open(path).await?),
            Backend::Postgres => Box::new(ledger::postgres::open(address, schema, *connect_timeout).await?),
        })
    }
}

/// The tables at `address`. Connects at once.
///
/// # Errors
/// As [`open_ledger`].
pub(crate) async fn open_tables(
    address: &StoreUrl,
    settings: &StoreSettings,
    env: Env<'_>,
) -> Result<Box<dyn LedgerBackend>, StoreError> {
    let (schema, connect_timeout) = (settings.schema.clone(), settings.connect_timeout);
    Management { place: address.backend(env)?, address: address.clone(), schema, connect_timeout }.tables().await
}

/// Makes the tables, or adds what a newer release needs. Can be repeated, and run by several at once.
///
/// # Errors
/// [`StoreError::NotOurs`] with somebody else's table that is not to be attached; [`StoreError::Schema`] where the
/// tables are too new; a file that cannot be used; or the database cannot be reached.
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

/// Begins a new history: for whoever restored a backup or a copy of the database, so that no replica and no Redis ever
/// takes what it holds of the old one for the new one's.
///
/// # Errors
/// As [`open_ledger`].
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

/// Makes somebody else's table name its changes, in one transaction.
///
/// # Errors
/// [`StoreError::Unusable`] with everything that keeps it from that, or the right that is missing;
/// [`StoreError::Schema`] where `migrate` has not been run; or the database cannot be reached. Nothing was changed
/// then.
pub async fn attach(settings: &StoreSettings, env: Env<'_>) -> Result<String, StoreError> {
    action(settings, env, AttachAction::Attach).await
}

/// Takes away what [`attach`] added.
///
/// # Errors
/// As [`attach`].
pub async fn detach(settings: &StoreSettings, env: Env<'_>) -> Result<String, StoreError> {
    action(settings, env, AttachAction::Detach).await
}

async fn action(settings: &StoreSettings, env: Env<'_>, action: AttachAction) -> Result<String, StoreError> {
    let (address, table) = attachable(settings, env)?;
    existing_table::postgres::run(&address, &settings.schema, &table, action, settings.connect_timeout).await?;
    Ok(table.table.to_string())
}

/// The statements of [`attach`], each under the role that has to run it.
///
/// # Errors
/// As [`attach`].
pub async fn print_attach(settings: &StoreSettings, env: Env<'_>) -> Result<String, StoreError> {
    let (address, table) = attachable(settings, env)?;
    existing_table::postgres::print(&address, &settings.schema, &table, AttachAction::Attach, settings.connect_timeout)
        .await
}

/// The statements of [`detach`], each under the role that has to run it.
///
/// # Errors
/// As [`detach`].
pub async fn print_detach(settings: &StoreSettings, env: Env<'_>) -> Result<String, StoreError> {
    let (address, table) = attachable(settings, env)?;
    existing_table::postgres::print(&address, &settings.schema, &table, AttachAction::Detach, settings.connect_timeout)
        .await
}

fn attachable(settings: &StoreSettings, env: Env<'_>) -> Result<(StoreUrl, ExistingTable), StoreError> {
    let address = StoreUrl::of(settings, Role::Manage);
    if matches!(address.backend(env)?, Backend::Sqlite(_)) {
        return Err(not_on_sqlite());
    }
    let table = ExistingTable::of(settings).ok_or_else(|| {
        StoreError::Unusable("store.table: name the table that is meant, with its schema: \"public.trust\"".into())
    })?;
    Ok((address, table))
}

fn not_on_sqlite() -> StoreError {
    StoreError::Unusable(
        "store.table, store.attached: only a table in PostgreSQL can be described by its columns or attached".into(),
    )
}

/// The statements that give the roles of `serve` and of management the rights they need on the tables, for their owner
/// to run. With an SQLite file nobody needs any.
#[must_use]
pub fn grants(settings: &StoreSettings, serve: &str, manage: &str) -> String {
    schema::grants::grants(&settings.schema, ExistingTable::of(settings).as_ref(), serve, manage)
}

/// How much longer than a read's deadline the server may go on with it: the deadline here comes first.
const GRACE: Duration = Duration::from_millis(20);
