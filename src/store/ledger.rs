//! The [`Ledger`] trait: the operations by which management reads and changes trusts and keys.
//!
//! Each change is committed together with its audit entry. Checks do not use this module.

pub mod copy;
pub(crate) mod postgres;
pub(crate) mod sql_ledger;
pub(crate) mod sqlite;

use async_trait::async_trait;
use ipnet::IpNet;
use serde::Serialize;

use crate::{
    base::clock::DatabaseTime,
    record::{ApiKeyDigest, Digests, Fingerprint, KeyId, Made, Scheme, TrustId, Version},
    store::error::StoreError,
};

/// The person or program that makes a change, as the audit records it: `cli:USER`, `api:...`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Actor(pub String);

/// A change as the audit records it. Contains neither keys nor digests.
#[derive(Clone, Debug, Serialize)]
pub struct AuditEntry {
    /// The action: `trust.create`, `key.revoke`, ...
    pub action: &'static str,
    /// The id of the object that the action changed.
    pub object: String,
    /// The object before the change, if it existed.
    pub before: Option<serde_json::Value>,
    /// The object after the change, if it exists.
    pub after: Option<serde_json::Value>,
}

/// A trust, as management shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trust {
    /// Its id.
    pub id: TrustId,
    /// Its name, which is unique.
    pub name: String,
    /// True if its keys may be granted; the keys of a disabled trust are denied.
    pub enabled: bool,
    /// When it was created.
    pub created_at: DatabaseTime,
    /// The number of its keys, including revoked and expired keys.
    pub keys: u64,
}

/// A key to store.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// Its id.
    pub id: KeyId,
    /// Its digest.
    pub digest: ApiKeyDigest,
    /// Its digests under earlier schemes (a previous pepper, or none). An import skips a key that is stored under one
    /// of them.
    pub older: Vec<ApiKeyDigest>,
    /// How the digest was computed.
    pub made: Made,
    /// The key hint: the few leading characters by which people recognise the key. Empty for an imported digest.
    pub hint: String,
    /// Its name: the purpose of the key, in the operator's words.
    pub name: Option<String>,
    /// Its scopes, sorted, without duplicates.
    pub scopes: Vec<String>,
    /// The networks that the key may be used from. If empty, any network.
    pub allowed_cidrs: Vec<IpNet>,
    /// The key is not valid before this time.
    pub not_before: Option<DatabaseTime>,
    /// The time that the key is valid, by the database's clock, from the start of the transaction that stores it.
    pub expires_in: Option<std::time::Duration>,
}

/// A key, as management shows it: everything except its digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Its id.
    pub id: KeyId,
    /// Its trust.
    pub trust_id: TrustId,
    /// The name of its trust.
    pub trust_name: String,
    /// True if its trust is enabled.
    pub trust_enabled: bool,
    /// The key hint: the few leading characters by which people recognise the key.
    pub hint: String,
    /// How its digest was computed.
    pub scheme: Scheme,
    /// The fingerprint of the pepper under which its digest was computed; `None`: no pepper, or a pepper that is not
    /// recorded yet.
    pub pepper: Option<Fingerprint>,
    /// Its name: the purpose of the key, in the operator's words.
    pub name: Option<String>,
    /// Its scopes.
    pub scopes: Vec<String>,
    /// The networks that the key may be used from. If empty, any network.
    pub allowed_cidrs: Vec<IpNet>,
    /// When it was stored.
    pub created_at: DatabaseTime,
    /// The key is not valid before this time.
    pub not_before: Option<DatabaseTime>,
    /// The key is not valid from this time on.
    pub expires_at: Option<DatabaseTime>,
    /// When it was revoked.
    pub revoked_at: Option<DatabaseTime>,
}

/// A replica that may still grant keys from its cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// The id of the replica, which is new at each start of the process.
    pub id: uuid::Uuid,
    /// The name of its host or pod.
    pub name: String,
    /// The version that the replica has applied.
    pub applied: Version,
    /// When its last heartbeat arrived.
    pub seen_at: DatabaseTime,
    /// Unless it sends another heartbeat, the replica grants no cached key after this time.
    pub until: DatabaseTime,
}

/// A reference to a trust.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrustRef {
    /// By id.
    Id(TrustId),
    /// By name.
    Name(String),
}

/// Reads and changes trusts and keys. A change and its audit entry are one transaction: either both are committed or
/// neither.
#[async_trait]
pub trait Ledger: Send + Sync {
    /// Creates an enabled trust with the name `name`.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], or the database failed.
    async fn create_trust(&mut self, actor: &Actor, id: TrustId, name: &str) -> Result<Trust, StoreError>;
    /// Every trust, ordered by name.
    ///
    /// # Errors
    /// The database failed.
    async fn trusts(&mut self) -> Result<Vec<Trust>, StoreError>;
    /// One trust.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], or the database failed.
    async fn trust(&mut self, which: &TrustRef) -> Result<Trust, StoreError>;
    /// Enables or disables a trust; returns the trust after the change.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], or the database failed.
    async fn enable_trust(&mut self, actor: &Actor, which: &TrustRef, enabled: bool) -> Result<Trust, StoreError>;
    /// Deletes a trust, with its keys if `with_keys` is set; returns the trust before the change.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], [`StoreError::HasKeys`], or the database failed.
    async fn delete_trust(&mut self, actor: &Actor, which: &TrustRef, with_keys: bool) -> Result<Trust, StoreError>;
    /// Stores one key.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], [`StoreError::DigestTaken`], [`StoreError::OtherPepper`], or the database failed.
    async fn add_key(&mut self, actor: &Actor, trust: &TrustRef, key: NewKey) -> Result<Key, StoreError>;
    /// Stores many keys in one transaction with one audit entry. Skips keys that are already stored under one of their
    /// digests. Returns the number of keys that were stored.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], [`StoreError::OtherPepper`], or the database failed. No key was stored.
    async fn import_keys(&mut self, actor: &Actor, trust: &TrustRef, keys: Vec<NewKey>) -> Result<u64, StoreError>;
    /// The keys of one trust, or all keys, newest first.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], or the database failed.
    async fn keys(&mut self, trust: Option<&TrustRef>) -> Result<Vec<Key>, StoreError>;
    /// One key.
    ///
    /// # Errors
    /// [`StoreError::NoKey`], or the database failed.
    async fn key(&mut self, id: KeyId) -> Result<Key, StoreError>;
    /// The key stored under one of `digests`, if any.
    ///
    /// # Errors
    /// The database failed.
    async fn identify(&mut self, digests: &Digests) -> Result<Option<Key>, StoreError>;
    /// Revokes a key; a key that is already revoked keeps its time of revocation. Returns the key after the change.
    ///
    /// # Errors
    /// [`StoreError::NoKey`], or the database failed.
    async fn revoke_key(&mut self, actor: &Actor, id: KeyId) -> Result<Key, StoreError>;
    /// Records `pepper` as the pepper for new keys; returns the pepper that was recorded before.
    ///
    /// # Errors
    /// The database failed.
    async fn use_pepper(&mut self, actor: &Actor, pepper: Fingerprint) -> Result<Option<Fingerprint>, StoreError>;
    /// Commits a version "everything changed", which makes all data that replicas have cached out of date. Returns that
    /// version or a newer one.
    ///
    /// # Errors
    /// The database failed.
    async fn clear_caches(&mut self, actor: &Actor) -> Result<Version, StoreError>;
    /// The newest version. A replica that has applied it has applied each change that was committed before this call.
    ///
    /// # Errors
    /// The database failed.
    async fn newest(&mut self) -> Result<Version, StoreError>;
    /// The replicas that may still grant keys from their caches, by their last heartbeats and the database's clock.
    ///
    /// # Errors
    /// The database failed.
    async fn replicas(&mut self) -> Result<Vec<Replica>, StoreError>;
    /// The current time by the database's clock.
    ///
    /// # Errors
    /// The database failed.
    async fn now(&mut self) -> Result<DatabaseTime, StoreError>;
}
