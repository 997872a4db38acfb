//! What management holds of the store: everything that changes, each with its audit entry in the same transaction.
//!
//! Never used on the path of a check.

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

/// Who makes a change, for the audit: `cli:USER`, `api:...`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Actor(pub String);

/// What the audit keeps of a change. Never holds a key or a digest.
#[derive(Clone, Debug, Serialize)]
pub struct AuditEntry {
    /// What was done: `trust.create`, `key.revoke`, ...
    pub action: &'static str,
    /// The id of what it was done to.
    pub object: String,
    /// The object before, where there was one.
    pub before: Option<serde_json::Value>,
    /// The object after, where there is one.
    pub after: Option<serde_json::Value>,
}

/// A trust as management sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trust {
    /// Its id.
    pub id: TrustId,
    /// Its name, unique.
    pub name: String,
    /// Whether its keys are granted.
    pub enabled: bool,
    /// When it was created.
    pub created_at: DatabaseTime,
    /// How many keys it has, whatever their state.
    pub keys: u64,
}

/// A key to be stored.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// Its id.
    pub id: KeyId,
    /// Its digest.
    pub digest: ApiKeyDigest,
    /// What its digest would be if it had been stored before, under earlier schemes.
    pub older: Vec<ApiKeyDigest>,
    /// How the digest was made.
    pub made: Made,
    /// What people recognise it by.
    pub hint: String,
    /// What it is for, in somebody's words.
    pub name: Option<String>,
    /// Sorted, without duplicates.
    pub scopes: Vec<String>,
    /// Where it may be used from; empty: anywhere.
    pub allowed_cidrs: Vec<IpNet>,
    /// Not valid before this time.
    pub not_before: Option<DatabaseTime>,
    /// How long it is valid, counted by the database's clock from the commit's transaction start.
    pub expires_in: Option<std::time::Duration>,
}

/// A key as management sees it: everything but its digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Its id.
    pub id: KeyId,
    /// Its trust.
    pub trust_id: TrustId,
    /// Its trust's name.
    pub trust_name: String,
    /// Whether its trust is enabled.
    pub trust_enabled: bool,
    /// What people recognise it by.
    pub hint: String,
    /// How its digest was made.
    pub scheme: Scheme,
    /// The fingerprint of the pepper that made it; `None`: no pepper, or not recorded yet.
    pub pepper: Option<Fingerprint>,
    /// What it is for.
    pub name: Option<String>,
    /// What it may be used for.
    pub scopes: Vec<String>,
    /// Where it may be used from.
    pub allowed_cidrs: Vec<IpNet>,
    /// When it was stored.
    pub created_at: DatabaseTime,
    /// Not valid before.
    pub not_before: Option<DatabaseTime>,
    /// Not valid from then on.
    pub expires_at: Option<DatabaseTime>,
    /// Revoked then.
    pub revoked_at: Option<DatabaseTime>,
}

/// A replica that may still grant what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Its id, new at every start.
    pub id: uuid::Uuid,
    /// The name of its host or pod.
    pub name: String,
    /// The version it has applied.
    pub applied: Version,
    /// Its last sign of life.
    pub seen_at: DatabaseTime,
    /// Without another one it grants nothing it holds from then on.
    pub until: DatabaseTime,
}

/// Which trust is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrustRef {
    /// By id.
    Id(TrustId),
    /// By name.
    Name(String),
}

/// Everything that changes. Every change writes its audit entry in the same transaction and is all or nothing.
#[async_trait]
pub trait Ledger: Send + Sync {
    /// Creates a trust, enabled, named `name`.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], or the database failed.
    async fn create_trust(&mut self, actor: &Actor, id: TrustId, name: &str) -> Result<Trust, StoreError>;
    /// Every trust, by name.
    ///
    /// # Errors
    /// The database failed.
    async fn trusts(&mut self) -> Result<Vec<Trust>, StoreError>;
    /// One trust.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], or the database failed.
    async fn trust(&mut self, which: &TrustRef) -> Result<Trust, StoreError>;
    /// Enables or disables a trust; returns it as it is after.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], or the database failed.
    async fn enable_trust(&mut self, actor: &Actor, which: &TrustRef, enabled: bool) -> Result<Trust, StoreError>;
    /// Deletes a trust, with its keys if `with_keys`; returns it as it was.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], [`StoreError::HasKeys`], or the database failed.
    async fn delete_trust(&mut self, actor: &Actor, which: &TrustRef, with_keys: bool) -> Result<Trust, StoreError>;
    /// Stores one key.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], [`StoreError::DigestTaken`], [`StoreError::OtherPepper`], or the database failed.
    async fn add_key(&mut self, actor: &Actor, trust: &TrustRef, key: NewKey) -> Result<Key, StoreError>;
    /// Stores many keys in one transaction with one audit entry; those of which a digest is stored already are left as they
    /// are. Returns how many were new.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], [`StoreError::OtherPepper`], or the database failed: then none was stored.
    async fn import_keys(&mut self, actor: &Actor, trust: &TrustRef, keys: Vec<NewKey>) -> Result<u64, StoreError>;
    /// Keys, newest first: of one trust, or of all.
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
    /// Revokes a key; a key already revoked stays as it was. Returns it as it is after.
    ///
    /// # Errors
    /// [`StoreError::NoKey`], or the database failed.
    async fn revoke_key(&mut self, actor: &Actor, id: KeyId) -> Result<Key, StoreError>;
    /// Names the pepper that keys are made under from now on; returns the one that was named before.
    ///
    /// # Errors
    /// The database failed.
    async fn use_pepper(&mut self, actor: &Actor, pepper: Fingerprint) -> Result<Option<Fingerprint>, StoreError>;
    /// Draws a version "everything changed", so that no replica uses what it read before.
    ///
    /// # Errors
    /// The database failed.
    async fn clear_caches(&mut self, actor: &Actor) -> Result<Version, StoreError>;
    /// The newest version: whoever applied it has applied every change that was committed before this call.
    ///
    /// # Errors
    /// The database failed.
    async fn newest(&mut self) -> Result<Version, StoreError>;
    /// Replicas that, by their last sign of life and the database's clock, may still grant what they hold.
    ///
    /// # Errors
    /// The database failed.
    async fn replicas(&mut self) -> Result<Vec<Replica>, StoreError>;
    /// The database's present time.
    ///
    /// # Errors
    /// The database failed.
    async fn now(&mut self) -> Result<DatabaseTime, StoreError>;
}
