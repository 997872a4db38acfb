//! The doors to the store: which adapter the settings mean, and how it is opened.

use std::{sync::Arc, time::Duration};

use super::{
    Ledger, LedgerError, Missing, Source, StoreSettings,
    book::{Book, Tables},
    place::{Address, Env, Place, Role},
    postgres::{self, lookup::Postgres},
    reader::Reader,
    sqlite::{self, lookup::Sqlite},
};
use crate::clock::Clock;

/// The database the settings mean, in words for messages: its kind and place, never a user, a password or a query.
#[must_use]
pub fn describe(settings: &StoreSettings, env: Env<'_>) -> String {
    Address::of(settings, Role::Serve).describe(env)
}

/// The reads of checks. Connects to nothing yet, so it succeeds with the database down; [`Source::prepare`] finds out.
///
/// # Errors
/// [`LedgerError::Unusable`]: a URL or a secret's file that cannot be read.
pub fn open_lookup(
    settings: &StoreSettings,
    env: Env<'_>,
    clock: Arc<dyn Clock>,
) -> Result<Arc<dyn Source>, LedgerError> {
    let address = Address::of(settings, Role::Serve);
    if settings.preset.is_some() && settings.url.is_none() && settings.url_file.is_none() {
        return Err(LedgerError::Unusable(
            "store.preset: set `store.url` to the database that holds your table".into(),
        ));
    }
    Ok(match address.place(env)? {
        Place::Sqlite(path) => Arc::new(Reader::new(Sqlite { path, preset: settings.preset }, settings, clock)),
        Place::Postgres => {
            let statement_timeout = settings.read_timeout + GRACE;
            let (schema, preset) = (settings.schema.clone(), settings.preset);
            // A misspelt URL is a mistake to be told at start, not by the first connect.
            address.postgres()?;
            Arc::new(Reader::new(Postgres { address, schema, preset, statement_timeout }, settings, clock))
        }
    })
}

/// What management changes trusts and keys through. Connects at once.
///
/// # Errors
/// [`LedgerError::NotOurs`] with a preset; [`LedgerError::NoDatabase`] and [`LedgerError::Schema`] where there is nothing
/// to work on; or the database cannot be reached.
pub async fn open_ledger(settings: &StoreSettings, env: Env<'_>) -> Result<Box<dyn Ledger>, LedgerError> {
    if settings.preset.is_some() {
        return Err(LedgerError::NotOurs);
    }
    let tables = open_tables(&Address::of(settings, Role::Manage), settings, env).await?;
    Ok(Box::new(Book::new(tables)))
}

/// The tables at `address`. Connects at once.
///
/// # Errors
/// As [`open_ledger`].
pub(super) async fn open_tables(
    address: &Address,
    settings: &StoreSettings,
    env: Env<'_>,
) -> Result<Box<dyn Tables>, LedgerError> {
    Ok(match address.place(env)? {
        Place::Sqlite(path) => Box::new(sqlite::ledger::open(&path).await?),
        Place::Postgres => Box::new(postgres::ledger::open(address, &settings.schema, settings.connect_timeout).await?),
    })
}

/// Makes the tables, or adds what a newer release needs. Can be repeated, and run by several at once.
///
/// # Errors
/// [`LedgerError::NotOurs`] with a preset; [`LedgerError::Schema`] where the tables are too new; a file that cannot be
/// used; or the database cannot be reached.
pub async fn migrate(settings: &StoreSettings, env: Env<'_>) -> Result<(), LedgerError> {
    if settings.preset.is_some() {
        return Err(LedgerError::NotOurs);
    }
    let address = Address::of(settings, Role::Manage);
    match address.place(env)? {
        Place::Sqlite(path) => {
            sqlite::file::prepare(&path, Missing::Create)?;
            sqlite::migrate::run(&path).await
        }
        Place::Postgres => postgres::migrate::run(&address, &settings.schema, settings.connect_timeout).await,
    }
}

/// Begins a new history: for whoever restored a backup or a copy of the database, so that no replica and no Redis ever
/// takes what it holds of the old one for the new one's.
///
/// # Errors
/// As [`open_ledger`].
pub async fn new_incarnation(settings: &StoreSettings, env: Env<'_>) -> Result<(), LedgerError> {
    if settings.preset.is_some() {
        return Err(LedgerError::NotOurs);
    }
    let address = Address::of(settings, Role::Manage);
    match address.place(env)? {
        Place::Sqlite(path) => sqlite::migrate::new_incarnation(&path).await,
        Place::Postgres => {
            postgres::migrate::new_incarnation(&address, &settings.schema, settings.connect_timeout).await
        }
    }
}

/// The statements that give the roles of `serve` and of management the rights they need on the tables, for their owner to
/// run. With an SQLite file nobody needs any.
#[must_use]
pub fn grants(settings: &StoreSettings, serve: &str, manage: &str) -> String {
    postgres::migrate::grants(&settings.schema, serve, manage)
}

/// How much longer than a read's deadline the server may go on with it: the deadline here comes first.
const GRACE: Duration = Duration::from_millis(20);
