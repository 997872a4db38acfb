//! Trusts, keys and replicas, as management reads and changes them.

use ipnet::IpNet;

use crate::{
    base::clock::DatabaseTime,
    record::{ApiKeyDigest, Fingerprint, KeyId, Made, Scheme, TrustId, Version},
};

/// The person or program that makes a change, as the audit records it: `cli:USER`, `api:...`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Actor(pub String);

/// A change as the audit records it. Contains neither keys nor digests.
#[derive(Clone, Debug)]
pub(crate) struct AuditEntry {
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
pub struct KeyDetails {
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
pub struct ReplicaStatus {
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
