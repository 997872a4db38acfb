//! The doors to the store: which adapter the settings mean, and how it is opened.

use std::{sync::Arc, time::Duration};

use super::{
    LedgerError, Source, StoreSettings,
    place::{Address, Env, Place, Role},
    postgres::lookup::Postgres,
    reader::Reader,
    sqlite::lookup::Sqlite,
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

/// How much longer than a read's deadline the server may go on with it: the deadline here comes first.
const GRACE: Duration = Duration::from_millis(20);
