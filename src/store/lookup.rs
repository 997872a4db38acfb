//! What the check path holds of the store: reads, each dated by the statement that made it.
//!
//! Never changes anything but this replica's own sign of life.

use async_trait::async_trait;

use crate::{
    fault::Fault,
    record::{Dated, Digests, KeyId, Record, Version},
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
    async fn find(&self, digests: &Digests) -> Result<Dated<Option<Record>>, Fault>;

    /// The record of a key by primary key: what `live` asks on every request.
    ///
    /// # Errors
    /// As [`Self::find`].
    async fn find_by_id(&self, key: KeyId) -> Result<Dated<Option<Record>>, Fault>;

    /// The date of now: the newest version there is. On a connection of its own, so that it answers while reads are
    /// many.
    ///
    /// # Errors
    /// As [`Self::find`].
    async fn newest(&self) -> Result<Dated<()>, Fault>;

    /// Says that this replica is alive and has applied everything up to `applied`, so that whoever clears the caches
    /// can tell when it took effect. `replica` is the same from start to end of this process. Does nothing on tables that are not ours.
    ///
    /// # Errors
    /// As [`Self::find`].
    async fn report(&self, replica: uuid::Uuid, applied: Version) -> Result<(), Fault>;

    /// The key of the Redis MAC, which the first migration made; `None` where the tables are not ours.
    ///
    /// # Errors
    /// As [`Self::find`].
    async fn redis_mac_key(&self) -> Result<Option<[u8; 32]>, Fault>;
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
    /// right. [`super::LedgerError::is_transient`] says whether waiting may help.
    async fn prepare(&self, missing: Missing) -> Result<(), super::LedgerError>;

    /// Closes every connection and waits for them.
    async fn close(&self);
}
