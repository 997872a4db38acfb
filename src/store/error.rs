//! Why the database could not be used, or a change in it was not made.

use crate::{
    base::fault::Fault,
    record::{Fingerprint, KeyId},
};

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no trust of that id or name.
    #[error("there is no trust {0:?}")]
    NoTrust(String),
    /// There is no key of that id.
    #[error("there is no key {0}")]
    NoKey(KeyId),
    /// The name is taken.
    #[error("there already is a trust {0:?}")]
    NameTaken(String),
    /// The digest is stored already.
    #[error("a key with this digest is already stored (key id {0})")]
    DigestTaken(KeyId),
    /// The keys of this database are made under another pepper.
    #[error(
        "pepper mismatch: this configuration has {}, but the database records the pepper {recorded}. Servers without the configured \
         pepper would reject the key. Correct credential.pepper_file. To change the pepper, wait until every server has the new \
         one, then run `trustgate pepper use`",
        configured.map_or_else(|| "no pepper".to_owned(), |pepper| format!("the pepper {pepper}"))
    )]
    OtherPepper {
        /// Of the pepper in the configuration.
        configured: Option<Fingerprint>,
        /// What the database names.
        recorded: Fingerprint,
    },
    /// A trust with keys is not deleted unless that was asked for.
    #[error("the trust still has {0} keys; disable it, or delete it with --with-keys")]
    HasKeys(u64),
    /// There is no SQLite database where one was expected.
    #[error(
        "no database at {path}: start `trustgate serve` or run `trustgate migrate` to create it, or point `store.url` at the database you mean"
    )]
    NoDatabase {
        /// Where it was looked for.
        path: std::path::PathBuf,
    },
    /// The tables are missing, too old, or too new for this release.
    #[error("{0}")]
    Schema(String),
    /// The configured tables are not ours to change.
    #[error(
        "with `store.preset` or `store.table` the keys live in a table of yours: trustgate reads it and never changes it"
    )]
    NotOurs,
    /// The database cannot be used as it is: a network filesystem, wrong permissions, a bad URL.
    #[error("{0}")]
    Unusable(String),
    /// Somebody else held a lock for too long.
    #[error("gave up after waiting {waited:?} for a lock, which is held by: {blockers}")]
    Blocked {
        /// How long.
        waited: std::time::Duration,
        /// Who holds it, in words.
        blockers: String,
    },
    /// The database failed.
    #[error("the database failed: {0}")]
    Database(#[from] sqlx::Error),
    /// The database could not be read.
    #[error("{0}")]
    Fault(#[from] Fault),
}

impl StoreError {
    /// Whether the same may go well later without a change of the configuration: the server comes back, somebody
    /// migrates.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Database(_) | Self::Blocked { .. } | Self::Fault(_) | Self::Schema(_))
    }
}
