//! The interface between checks and the store: reads, each with the database version at which its statement ran.
//!
//! This interface cannot change trusts or keys, except that it records the pepper of a key. Its other writes are
//! heartbeats, versions that mark everything as changed, new incarnations, and the deletion of old versions.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use uuid::Uuid;

use crate::{
    base::{clock::DatabaseTime, fault::Fault},
    record::{Change, Digests, Fingerprint, KeyId, Nonce, Record, StoredPeppers, Version, Versioned},
    store::error::StoreError,
};

/// The reads that a decision depends on. Each is one statement on the primary, so that a value and its version come
/// from one snapshot.
///
/// # Cancel safety
/// If the future of a method is dropped while its query runs, the connection of the query is closed. The caller sets
/// the deadline.
#[async_trait]
pub trait Lookup: Send + Sync + 'static {
    /// Returns the record stored under one of `digests`, or `None` if there is no such key.
    ///
    /// # Errors
    /// A [`Fault`] of the store. A key that does not exist is not an error.
    async fn find(&self, digests: &Digests) -> Result<Versioned<Option<Record>>, Fault>;

    /// Returns the record of the key with this id. The read policy `live` uses this method for each request.
    ///
    /// # Errors
    /// See [`Self::find`].
    async fn find_by_id(&self, key: KeyId) -> Result<Versioned<Option<Record>>, Fault>;

    /// Reads the versions from `since` on and their changes, in one statement on a separate connection. `since` is
    /// `None` if this replica has applied no version yet; see [`Polled::versions`]. Only one call may run at a time.
    ///
    /// # Errors
    /// [`PollError::NoAnswer`] if the database does not answer; [`PollError::Unusable`] if its answer cannot renew the
    /// lease.
    async fn poll(&self, since: Option<Version>) -> Result<Polled, PollError>;

    /// Listens for notifications. Calls `changed` once when it has started to listen, and then for each notification of
    /// a commit. Returns when it can no longer listen. Does not return if the database sends no notifications, which is
    /// the case for SQLite and for an existing table that is not attached.
    async fn listen(&self, changed: &(dyn Fn() + Send + Sync)) -> Fault;

    /// Sends one heartbeat, which reports that this replica is alive and which version it has applied. A command that
    /// changes keys uses the heartbeats to determine when its change has taken effect. Does nothing if changes are not
    /// tracked.
    ///
    /// # Errors
    /// See [`Self::find`].
    async fn report(&self, heartbeat: &Heartbeat) -> Result<(), Fault>;

    /// Checks the triggers of the change log and records them as intact. The poll task calls this after a poll in which
    /// [`Polled::triggers_intact`] was false. Also commits a version that marks everything as changed, because the
    /// change log may lack changes made while the triggers were not intact.
    ///
    /// # Errors
    /// A [`Fault`] that describes the problem: a trigger was dropped or disabled, or a table was replaced.
    async fn restore_watch(&self) -> Result<(), Fault>;

    /// Commits a new incarnation if the current one is still `lost`. A replica calls this when it detects that the
    /// database has lost committed versions, so that no replica continues with the earlier history.
    ///
    /// # Errors
    /// See [`Self::find`].
    async fn renew_incarnation(&self, lost: Uuid) -> Result<(), Fault>;

    /// Deletes versions that no replica needs any more, a limited number in each call. Returns true if more versions
    /// remain to be deleted.
    ///
    /// # Errors
    /// See [`Self::find`].
    async fn prune(&self) -> Result<bool, Fault>;

    /// Records the pepper of each key that was read since the last call and whose pepper is not recorded yet. Then
    /// counts the active keys whose recorded pepper is not among `known`, up to [`OTHER_KEYS_MAX`]. `known` contains
    /// the fingerprints of this server's peppers, in the order of [`Digests::all`]. Does nothing if the keys are in an
    /// existing table.
    ///
    /// # Errors
    /// See [`Self::find`].
    async fn tend_peppers(&self, known: &[Fingerprint]) -> Result<Tended, Fault>;

    /// Returns the key for MACs in Redis, which the first migration generated; `None` if changes are not tracked,
    /// because trustgate then has no tables in this database.
    ///
    /// # Errors
    /// See [`Self::find`].
    async fn redis_mac_key(&self) -> Result<Option<[u8; 32]>, Fault>;
}

/// The result of [`Lookup::tend_peppers`].
#[derive(Debug, Default)]
pub struct Tended {
    /// The number of active keys whose recorded pepper this server does not have, at most [`OTHER_KEYS_MAX`].
    pub others: u64,
    /// The fault that kept the peppers of keys from being recorded, if any.
    pub unrecorded: Option<Fault>,
}

/// The number at which [`Lookup::tend_peppers`] stops counting keys hashed with other peppers.
pub(crate) const OTHER_KEYS_MAX: u64 = 10_000;

/// The answer to a poll, from one snapshot.
#[derive(Clone, Debug)]
pub struct Polled {
    /// The newest version.
    pub newest: Versioned<()>,
    /// When the newest version was recorded, by the database's clock.
    pub stamped_at: DatabaseTime,
    /// The oldest version that is not pruned yet, or the version that the poll started from if that version still
    /// exists.
    pub oldest: Version,
    /// True if the triggers that fill the change log have not changed since a migration or [`Lookup::restore_watch`]
    /// last checked them. False if changes are not tracked.
    pub triggers_intact: bool,
    /// The versions from the one that the poll started from, including that version, oldest first; there may be gaps.
    /// If the poll had no version to start from: the versions of the last 15 minutes, or only the newest version if
    /// there are none.
    pub versions: Vec<(Version, Nonce)>,
    /// The changes of the versions after the one that the poll started from, oldest first. Within a version,
    /// [`Change::Gone`] comes last.
    pub changes: Vec<(Version, Change)>,
    /// False if there were more rows than a poll accepts: `changes` and `versions` are then incomplete.
    pub complete: bool,
    /// The peppers that the database records; none if the keys are in an existing table.
    pub peppers: StoredPeppers,
}

/// Why a poll cannot renew the lease.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PollError {
    /// The database is down or cannot be reached.
    #[error(transparent)]
    NoAnswer(Fault),
    /// The database answers, but is a standby or read-only, lacks tables or rights, or sends an answer in the wrong
    /// format.
    #[error("{0}")]
    Unusable(Arc<str>),
}

/// A report that a replica is alive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// The id of the replica. Each start of the process generates a new id.
    pub replica: Uuid,
    /// The name of the host or pod on which the replica runs, for operators.
    pub name: String,
    /// The version that the replica has applied.
    pub applied: Version,
    /// How long, from now, the replica may grant keys from its cache without another heartbeat.
    pub lasts: Duration,
}

/// How to treat an embedded database that does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// Create the database, and migrate a database that exists (`serve` and `migrate`). On PostgreSQL, `serve` creates
    /// no tables.
    Create,
    /// Return an error (the other commands).
    Refuse,
}

/// A [`Lookup`] with a lifecycle: created without I/O, prepared once the database answers, and closed at shutdown.
#[async_trait]
pub trait Source: Lookup {
    /// Checks that the database can be used: creates an embedded database if `missing` allows it, checks the version of
    /// the tables, and runs each kind of read once. Can be repeated until it succeeds.
    ///
    /// # Errors
    /// The problem, described for the operator and without secrets: the database is unreachable, not migrated or too
    /// new, or a right is missing. [`StoreError::is_transient`] is true if waiting may help.
    async fn prepare(&self, missing: Missing) -> Result<(), StoreError>;

    /// Opens the connections for reads on `runtime`. Otherwise a read that the poll thread sends (during preparation,
    /// or for a heartbeat) could open connections on that thread, which must stay free to renew the lease.
    fn run_reads_on(&self, runtime: tokio::runtime::Handle);

    /// Closes all connections and waits until they are closed.
    async fn close(&self);
}
