//! The system of record: the database of trusts and keys. Checks read it through [`Lookup`]; management changes
//! it through [`Ledger`].
//!
//! There are two adapters, `sqlite` (embedded, the default) and `postgres`, and one contract test suite that runs on
//! both. Reads go to the primary. "No such key" is `Ok(None)`, and a failed read is an `Err`, so that a caller cannot
//! mistake an error for "not found".

pub(crate) mod change_log;
pub(crate) mod error;
pub(crate) mod existing_table;
pub(crate) mod ledger;
pub(crate) mod names;
pub(crate) mod open;
pub(crate) mod postgres;
pub(crate) mod reads;
pub(crate) mod rows;
pub(crate) mod schema;
pub(crate) mod settings;
pub(crate) mod sql;
pub(crate) mod sqlite;
pub(crate) mod url;

pub(crate) use self::{
    error::StoreError,
    ledger::{Actor, Ledger},
    open::{
        Management, attach, describe, detach, grants, management, migrate, new_incarnation, open_history, open_ledger,
        open_lookup, print_attach, print_detach,
    },
    reads::lookup::{Heartbeat, Lookup, Missing, PollError, Polled, Source, Tended},
    settings::StoreSettings,
    url::Env,
};
