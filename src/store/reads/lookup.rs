//! What the check path holds of the store: reads, each dated by the statement that made it.
//!
//! Writes only heartbeats and, through one function, the fingerprints of peppers; and prunes old versions.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use uuid::Uuid;

use crate::{
    base::{clock::DatabaseTime, fault::Fault},
    record::{Change, Digests, Fingerprint, KeyId, Nonce, Record, StoredPeppers, Version, Versioned},
    store::error::StoreError,
};

/// The reads a decision rests on. Each is one statement on the primary, so that value and date are of one snapshot.
///
/// # Cancel safety
/// Every method: a dropped call closes the connection it used and leaves nothing behind. The caller sets the deadline.
#[async_trait]
pub trait Lookup: Send + Sync + 'static {
    /// The record stored under one of `digests`, or `None` if no such key was ever issued.
    ///
    /// # Errors
    /// A [`Fault`] of the store; never for an absent key.
    async fn find(&self, digests: &Digests) -> Result<Versioned<Option<Record>>, Fault>;

    /// The record of a key by primary key: what `live` asks on every request.
    ///
    /// # Errors
    /// As [`Self::find`].
    async fn find_by_id(&self, key: KeyId) -> Result<Versioned<Option<Record>>, Fault>;

    /// What was committed from version `since` on, in one statement on a connection of its own; `None`: what a replica
    /// that begins needs, see [`Polled::versions`]. One call at a time.
    ///
    /// # Errors
    /// [`PollError::NoAnswer`] when nothing came back, [`PollError::Unusable`] when what came back confirms nothing.
    async fn poll(&self, since: Option<Version>) -> Result<Polled, PollError>;

    /// Calls `changed` whenever the database says that something was committed, once after it began to listen, and
    /// returns when it cannot listen any longer. A database that never says so: never returns.
    async fn listen(&self, changed: &(dyn Fn() + Send + Sync)) -> Fault;

    /// Says that this replica is alive and what it has applied, so that whoever changes something can tell when it took
    /// effect. Does nothing on tables that are not ours.
    ///
    /// # Errors
    /// As [`Self::find`].
    async fn report(&self, sign: &Heartbeat) -> Result<(), Fault>;

    /// After a poll that was not [`Polled::watched`]: makes sure that every change is named again, and draws a version
    /// "everything changed" for what may have passed unnamed.
    ///
    /// # Errors
    /// A [`Fault`] that says what is missing: a trigger was dropped or disabled, a table replaced.
    async fn restore_watch(&self) -> Result<(), Fault>;

    /// Begins a new history where `lost` is still the incarnation: whoever found history lost calls it, so that nobody
    /// takes up the old one again.
    ///
    /// # Errors
    /// As [`Self::find`].
    async fn renew_incarnation(&self, lost: Uuid) -> Result<(), Fault>;

    /// Deletes versions that no replica needs any more; a bounded number at a call. Says whether there are more.
    ///
    /// # Errors
    /// As [`Self::find`].
    async fn prune(&self) -> Result<bool, Fault>;

    /// Records the pepper of each key that was read since the last call and has none recorded. Then counts the active keys whose
    /// recorded pepper is not among `known`, up to [`OTHER_KEYS_MAX`]. `known`: the fingerprints of this server's peppers, in the
    /// order of [`Digests::all`]. Does nothing on tables that are not ours.
    ///
    /// # Errors
    /// As [`Self::find`].
    async fn tend_peppers(&self, known: &[Fingerprint]) -> Result<Tended, Fault>;

    /// The key of the Redis MAC, which the first migration made; `None` where the tables are not ours.
    ///
    /// # Errors
    /// As [`Self::find`].
    async fn redis_mac_key(&self) -> Result<Option<[u8; 32]>, Fault>;
}

/// What [`Lookup::tend_peppers`] found.
#[derive(Debug, Default)]
pub struct Tended {
    /// Active keys under other peppers.
    pub others: u64,
    /// Why peppers that checks have proven could not be recorded.
    pub unrecorded: Option<Fault>,
}

/// Keys under other peppers are counted up to this number.
pub const OTHER_KEYS_MAX: u64 = 10_000;

/// What a poll found in one snapshot.
#[derive(Clone, Debug)]
pub struct Polled {
    /// The newest version: the date of now.
    pub newest: Versioned<()>,
    /// When the newest version was stamped, by the database's clock.
    pub stamped_at: DatabaseTime,
    /// The oldest version that was not pruned yet; it may be the one that was asked from although older ones are there.
    pub oldest: Version,
    /// Whether changes are named: all triggers are as they were when that was last made sure of. False on tables that
    /// are not ours.
    pub triggers_intact: bool,
    /// Versions from the one that was asked from on, itself included, oldest first; there may be gaps. For a replica that
    /// begins: from the smallest version stamped within the last 15 minutes on, or the newest alone.
    pub versions: Vec<(Version, Nonce)>,
    /// What the versions after the one that was asked from named, oldest first; within a version what is gone comes last.
    pub changes: Vec<(Version, Change)>,
    /// False where there was more than a poll takes: then `changes` and `versions` are not all of them.
    pub complete: bool,
    /// The peppers that the database names; none on tables that are not ours.
    pub peppers: StoredPeppers,
}

/// Why a poll confirmed nothing.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PollError {
    /// No answer: the database is down, or cannot be reached.
    #[error(transparent)]
    NoAnswer(Fault),
    /// An answer that cannot be relied on: a standby, a read-only database, missing tables or rights, nonsense.
    #[error("{0}")]
    Unusable(Arc<str>),
}

/// That a replica is alive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// The same from start to end of a process.
    pub replica: Uuid,
    /// What people know it by: the name of its host or pod.
    pub name: String,
    /// The version it has applied.
    pub applied: Version,
    /// For how long from now on it may grant what it holds without another sign.
    pub lasts: Duration,
}

/// Whether a database that is not there is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// It is made, and brought up to date: for `serve`. Means the embedded database; a server's is made by `migrate`.
    Create,
    /// It is a mistake: for every other command.
    Refuse,
}

/// A [`Lookup`] with a life of its own: made without any I/O, prepared when the database answers, closed at the end.
#[async_trait]
pub trait Source: Lookup {
    /// Finds out whether the database can serve: makes the embedded one if it may, checks the version of the tables, and
    /// sends every read once. Can be repeated until it succeeds.
    ///
    /// # Errors
    /// What is wrong, in words for an operator and without any secret: unreachable, not migrated, too new, a missing
    /// right. [`StoreError::is_transient`] says whether waiting may help.
    async fn prepare(&self, missing: Missing) -> Result<(), StoreError>;

    /// Makes the connections for reads on `runtime`, so that reads that the poll sends (its preparation, heartbeats) do not bring them
    /// to the thread that keeps the lease.
    fn run_reads_on(&self, runtime: tokio::runtime::Handle);

    /// Closes every connection and waits for them.
    async fn close(&self);
}
