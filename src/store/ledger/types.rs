//! Trusts, keys and replicas, as management reads and changes them.

use ipnet::IpNet;

use crate::{
    base::clock::DatabaseTime,
    record::{ApiKeyDigest, Fingerprint, KeyId, Made, Scheme, TrustId, Version},
};

/// The person or program that makes a change, as the audit records it, such as `cli:USER`.
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
    /// The id of the trust.
    pub id: TrustId,
    /// The name of the trust, which is unique.
    pub name: String,
    /// True if keys of the trust may be granted. Keys of a disabled trust are denied.
    pub enabled: bool,
    /// When the trust was created.
    pub created_at: DatabaseTime,
    /// The number of keys of the trust, including revoked and expired keys.
    pub keys: u64,
}

/// A key to store.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// The id of the key.
    pub id: KeyId,
    /// The digest of the key.
    pub digest: ApiKeyDigest,
    /// The key's digests under earlier schemes (a previous pepper, or none). An import skips a key that is already
    /// stored under one of these digests.
    pub older: Vec<ApiKeyDigest>,
    /// How the digest was computed.
    pub made: Made,
    /// The key hint: the few leading characters by which operators recognise the key. Empty for an imported digest.
    pub hint: String,
    /// The name of the key: its purpose, in the operator's words.
    pub name: Option<String>,
    /// The scopes of the key, sorted, without duplicates.
    pub scopes: Vec<String>,
    /// The networks from which the key may be used. An empty list allows any network.
    pub allowed_cidrs: Vec<IpNet>,
    /// The key is not valid before this time.
    pub not_before: Option<DatabaseTime>,
    /// How long the key is valid, by the database's clock, from the start of the transaction that stores the key.
    /// `None`: the key does not expire.
    pub expires_in: Option<std::time::Duration>,
}

/// A key, as management shows it: everything except its digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyDetails {
    /// The id of the key.
    pub id: KeyId,
    /// The id of the trust that the key belongs to.
    pub trust_id: TrustId,
    /// The name of the trust that the key belongs to.
    pub trust_name: String,
    /// True if the key's trust is enabled.
    pub trust_enabled: bool,
    /// The key hint: the few leading characters by which operators recognise the key.
    pub hint: String,
    /// How the key's digest was computed.
    pub scheme: Scheme,
    /// The fingerprint of the pepper with which the digest was computed; `None` if there was no pepper, or if the
    /// pepper is not recorded yet.
    pub pepper: Option<Fingerprint>,
    /// The name of the key: its purpose, in the operator's words.
    pub name: Option<String>,
    /// The scopes of the key.
    pub scopes: Vec<String>,
    /// The networks from which the key may be used. An empty list allows any network.
    pub allowed_cidrs: Vec<IpNet>,
    /// When the key was stored.
    pub created_at: DatabaseTime,
    /// The key is not valid before this time.
    pub not_before: Option<DatabaseTime>,
    /// The key is not valid from this time on.
    pub expires_at: Option<DatabaseTime>,
    /// When the key was revoked.
    pub revoked_at: Option<DatabaseTime>,
}

/// A replica that may still grant keys from its cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// The id of the replica. Each start of the process generates a new id.
    pub id: uuid::Uuid,
    /// The name of the host or pod on which the replica runs.
    pub name: String,
    /// The version that the replica has applied.
    pub applied: Version,
    /// When the replica's last heartbeat arrived.
    pub seen_at: DatabaseTime,
    /// After this time, the replica grants no cached key unless the replica has sent another heartbeat.
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
