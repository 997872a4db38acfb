//! The interface between the ledger and a database: the statements of management, which each database implements.

use async_trait::async_trait;

use super::types::{Actor, AuditEntry, KeyDetails, NewKey, ReplicaStatus, Trust, TrustRef};
use crate::{
    record::{ApiKeyDigest, Digests, Fingerprint, KeyId, TrustId},
    store::error::StoreError,
};

/// The access that a transaction needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TxMode {
    /// Reads only. All statements see one snapshot.
    Read,
    /// Reads and writes. SQLite takes its write lock at the start.
    Change,
}

/// A condition that selects keys.
#[derive(Clone, Copy, Debug)]
pub(crate) enum KeyFilter<'a> {
    All,
    Of(TrustId),
    Id(KeyId),
    /// The keys stored under one of these digests.
    Digests(&'a Digests),
}

/// The maximum number of keys in one statement.
pub(crate) const BATCH: usize = 1_000;

/// A key with its digest, for copying.
#[derive(Debug)]
pub(crate) struct StoredKey {
    /// The key, as management shows it.
    pub(crate) key: KeyDetails,
    pub(crate) digest: ApiKeyDigest,
}

/// A connection to one database, with the statements that management needs. The caller runs them inside a transaction.
#[async_trait]
pub(crate) trait LedgerBackend: Send + Sync {
    async fn begin(&mut self, mode: TxMode) -> Result<(), sqlx::Error>;
    async fn commit(&mut self) -> Result<(), sqlx::Error>;
    async fn rollback(&mut self) -> Result<(), sqlx::Error>;
    /// Returns the database's time, in microseconds since the Unix epoch.
    async fn now(&mut self) -> Result<i64, sqlx::Error>;
    /// Locks the trust until the transaction ends: other transactions can neither change it nor add keys to it.
    async fn lock_trust(&mut self, which: &TrustRef) -> Result<(), sqlx::Error>;
    /// Returns one trust, or all trusts ordered by name.
    async fn trusts(&mut self, which: Option<&TrustRef>) -> Result<Vec<Trust>, sqlx::Error>;
    /// Inserts a trust. Returns false if the name is taken.
    async fn insert_trust(&mut self, id: TrustId, name: &str) -> Result<bool, sqlx::Error>;
    async fn set_enabled(&mut self, id: TrustId, enabled: bool) -> Result<(), sqlx::Error>;
    async fn delete_trust(&mut self, id: TrustId) -> Result<(), sqlx::Error>;
    async fn delete_keys(&mut self, trust: TrustId) -> Result<(), sqlx::Error>;
    /// Returns the selected keys, newest first.
    async fn keys(&mut self, which: KeyFilter<'_>) -> Result<Vec<KeyDetails>, sqlx::Error>;
    /// Returns at most [`BATCH`] keys in the order of their ids, starting after the id `after`.
    async fn stored_keys(&mut self, after: Option<KeyId>) -> Result<Vec<StoredKey>, sqlx::Error>;
    /// Inserts copies of trusts. Fails if one of them already exists.
    async fn put_trusts(&mut self, trusts: &[Trust]) -> Result<(), sqlx::Error>;
    /// Inserts copies of keys. Fails if one of them already exists.
    async fn put_keys(&mut self, keys: &[StoredKey]) -> Result<(), sqlx::Error>;
    /// Inserts new keys, except keys whose digest is already stored. Returns the number of inserted keys.
    async fn insert_keys(&mut self, trust: TrustId, keys: &[NewKey]) -> Result<u64, sqlx::Error>;
    /// Returns the subset of `digests` under which keys are stored.
    async fn stored_digests(&mut self, digests: &[ApiKeyDigest]) -> Result<Vec<ApiKeyDigest>, sqlx::Error>;
    /// Revokes a key. Returns false if the key is already revoked or does not exist.
    async fn revoke_key(&mut self, id: KeyId) -> Result<bool, sqlx::Error>;
    /// Gives this transaction a version that marks everything as changed.
    async fn change_everything(&mut self) -> Result<(), sqlx::Error>;
    /// Records `pepper` if no pepper is recorded, and returns the recorded pepper. If `pepper` is `None`, only reads
    /// the recorded pepper.
    async fn hold_pepper(&mut self, pepper: Option<Fingerprint>) -> Result<Option<Fingerprint>, sqlx::Error>;
    /// Records `pepper` as the pepper for new keys, and returns the pepper recorded before.
    async fn use_pepper(&mut self, pepper: Fingerprint) -> Result<Option<Fingerprint>, sqlx::Error>;
    /// Returns the newest version.
    async fn newest(&mut self) -> Result<i64, sqlx::Error>;
    /// Returns the replicas that may still grant keys from their caches.
    async fn replicas(&mut self) -> Result<Vec<ReplicaStatus>, sqlx::Error>;
    async fn insert_audit(&mut self, actor: &Actor, entry: &AuditEntry) -> Result<(), sqlx::Error>;
    /// Converts the error of a failed statement of this transaction to a [`StoreError`].
    fn explain(&self, error: sqlx::Error) -> StoreError {
        error.into()
    }
}
