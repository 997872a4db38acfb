//! The system of record: what the check path reads of it, and what management changes in it.
//!
//! Adapters: `sqlite` (embedded default) and `postgres`. One contract test-suite runs on both. Reads go to the primary.
//! "No such key" is `Ok(None)`; an error is never turned into absence.

pub(crate) mod change_log;
pub mod error;
pub mod existing_table;
pub mod ledger;
pub mod names;
pub mod open;
pub(crate) mod postgres;
pub mod reads;
pub(crate) mod rows;
pub(crate) mod schema;
pub mod settings;
pub(crate) mod sqlite;
pub mod url;

pub use self::error::StoreError;
pub use self::ledger::{Actor, AuditEntry, Ledger};
pub use self::open::{
    Management, attach, describe, detach, grants, management, migrate, new_incarnation, open_history, open_ledger,
    open_lookup, print_attach, print_detach,
};
pub use self::reads::lookup::{Heartbeat, Lookup, Missing, PollError, Polled, Source, Tended};
pub use self::settings::StoreSettings;
pub use self::url::{Env, default_path};
