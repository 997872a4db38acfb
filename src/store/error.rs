//! The errors of the store.

use crate::{
    base::fault::Fault,
    record::{Fingerprint, KeyId},
};

/// Why the database cannot be used, or why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No trust has this id or name.
    #[error("trust {0:?} not found")]
    NoTrust(String),
    /// No key has this id.
    #[error("key {0} not found")]
    NoKey(KeyId),
    /// Another trust has this name.
    #[error("trust {0:?} already exists")]
    NameTaken(String),
    /// The key with this id already has the digest.
    #[error("a key with this digest is already stored (key id {0})")]
    DigestTaken(KeyId),
    /// The configured pepper is not the one that the database records for new keys.
    #[error(
        "pepper mismatch: this configuration has {}, but the database records the pepper {recorded}. Servers without \
         the configured pepper would reject the key. Correct credential.pepper_file. To change the pepper, wait until \
         all servers have the new one, then run `trustgate pepper use`",
        configured.map_or_else(|| "no pepper".to_owned(), |pepper| format!("the pepper {pepper}"))
    )]
    OtherPepper {
        /// Fingerprint of the configured pepper; `None`: no pepper is configured.
        configured: Option<Fingerprint>,
        /// Fingerprint that the database records.
        recorded: Fingerprint,
    },
    /// The trust still has this many keys, and the caller did not ask to delete them.
    #[error("trust not deleted: it still has {0} keys. Disable the trust instead")]
    HasKeys(u64),
    /// There is no SQLite database at the expected path.
    #[error(
        "no database at {path}: start `trustgate serve` or run `trustgate migrate` to create it, or set `store.url` to \
         your database"
    )]
    NoDatabase {
        /// The expected path.
        path: std::path::PathBuf,
    },
    /// The tables are missing, too old, or too new for this release.
    #[error("{0}")]
    Schema(String),
    /// The keys are in the operator's existing table, which trustgate only reads.
    #[error(
        "existing table is read-only: with `store.preset` or `store.table`, the keys are in your existing table, which \
         trustgate does not change. Use your own tools to change its rows"
    )]
    NotOurs,
    /// The role lacks the owner's rights, which are needed to attach or detach a table.
    #[error("{0}")]
    NotOwner(String),
    /// The database cannot be used, for example because of a network filesystem, wrong permissions or an invalid URL.
    #[error("{0}")]
    Unusable(String),
    /// Another database session held a lock for too long.
    #[error(
        "lock timeout: gave up after {waited:?}; the lock is held by: {blockers}. Try again when that transaction has \
         ended"
    )]
    Blocked {
        /// How long this process waited.
        waited: std::time::Duration,
        /// The sessions that hold the lock, described for the operator.
        blockers: String,
    },
    /// The database failed.
    #[error("database error: {0}")]
    Database(#[from] sqlx::Error),
    /// The database could not be read.
    #[error("{0}")]
    Fault(#[from] Fault),
}

impl StoreError {
    /// Returns true if the same call may succeed later without a change to the configuration: the database may become
    /// reachable again, or the operator may run `trustgate migrate`.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Database(_) | Self::Blocked { .. } | Self::Fault(_) | Self::Schema(_))
    }
}
