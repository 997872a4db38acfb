//! [`Ledger`] for both databases: the steps of each operation and their order. The adapters contain the SQL statements.
//!
//! A change and its audit entry are one transaction. Audit entries contain neither keys nor digests.

use std::collections::HashSet;

use async_trait::async_trait;
use serde_json::{Value, json};

use super::{Actor, AuditEntry, Key, Ledger, NewKey, Replica, Trust, TrustRef};
use crate::{
    base::clock::DatabaseTime,
    record::{ApiKeyDigest, Digests, Fingerprint, KeyId, Made, TrustId, Version},
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

/// Selects keys.
#[derive(Clone, Copy, Debug)]
pub(crate) enum KeyFilter<'a> {
    /// Every key.
    All,
    /// The keys of a trust.
    Of(TrustId),
    /// The key with this id.
    Id(KeyId),
    /// The keys stored under one of these digests.
    Digests(&'a Digests),
}

/// A key with its digest, for copying.
#[derive(Debug)]
pub(crate) struct StoredKey {
    /// The key, as management shows it.
    pub(crate) key: Key,
    /// The digest of the key.
    pub(crate) digest: ApiKeyDigest,
}

/// One connection and the statements that management needs. The caller runs them inside a transaction.
#[async_trait]
pub(crate) trait LedgerBackend: Send + Sync {
    async fn begin(&mut self, mode: TxMode) -> Result<(), sqlx::Error>;
    async fn commit(&mut self) -> Result<(), sqlx::Error>;
    async fn rollback(&mut self) -> Result<(), sqlx::Error>;
    /// The database's time, in microseconds since the Unix epoch.
    async fn now(&mut self) -> Result<i64, sqlx::Error>;
    /// Locks the trust until the transaction ends: other transactions can neither change it nor add keys to it.
    async fn lock_trust(&mut self, which: &TrustRef) -> Result<(), sqlx::Error>;
    /// One trust, or all trusts ordered by name.
    async fn trusts(&mut self, which: Option<&TrustRef>) -> Result<Vec<Trust>, sqlx::Error>;
    /// Returns false if the name is taken.
    async fn insert_trust(&mut self, id: TrustId, name: &str) -> Result<bool, sqlx::Error>;
    async fn set_enabled(&mut self, id: TrustId, enabled: bool) -> Result<(), sqlx::Error>;
    async fn delete_trust(&mut self, id: TrustId) -> Result<(), sqlx::Error>;
    async fn delete_keys(&mut self, trust: TrustId) -> Result<(), sqlx::Error>;
    /// The selected keys, newest first.
    async fn keys(&mut self, which: KeyFilter<'_>) -> Result<Vec<Key>, sqlx::Error>;
    /// At most `count_max` keys in the order of their ids, starting after the id `after`.
    async fn stored_keys(&mut self, after: Option<KeyId>, count_max: usize) -> Result<Vec<StoredKey>, sqlx::Error>;
    /// Inserts copies of trusts. Fails if one of them exists.
    async fn put_trusts(&mut self, trusts: &[Trust]) -> Result<(), sqlx::Error>;
    /// Inserts copies of keys. Fails if one of them exists.
    async fn put_keys(&mut self, keys: &[StoredKey]) -> Result<(), sqlx::Error>;
    /// Inserts new keys, except those whose digest is stored already. Returns the number of inserted keys.
    async fn insert_keys(&mut self, trust: TrustId, keys: &[NewKey]) -> Result<u64, sqlx::Error>;
    /// The subset of `digests` under which keys are stored.
    async fn stored_digests(&mut self, digests: &[ApiKeyDigest]) -> Result<Vec<ApiKeyDigest>, sqlx::Error>;
    /// Returns false if the key is already revoked or does not exist.
    async fn revoke_key(&mut self, id: KeyId) -> Result<bool, sqlx::Error>;
    /// Gives this transaction a version "everything changed".
    async fn change_everything(&mut self) -> Result<(), sqlx::Error>;
    /// Records this pepper if none is recorded. Returns the recorded pepper. With `None`, only reads it.
    async fn hold_pepper(&mut self, pepper: Option<Fingerprint>) -> Result<Option<Fingerprint>, sqlx::Error>;
    /// Records this pepper for new keys and returns the one recorded before.
    async fn use_pepper(&mut self, pepper: Fingerprint) -> Result<Option<Fingerprint>, sqlx::Error>;
    /// The newest version.
    async fn newest(&mut self) -> Result<i64, sqlx::Error>;
    /// Replicas that may still grant keys from their caches.
    async fn replicas(&mut self) -> Result<Vec<Replica>, sqlx::Error>;
    async fn insert_audit(&mut self, actor: &Actor, entry: &AuditEntry) -> Result<(), sqlx::Error>;
    /// Translates the error of a failed statement of this transaction.
    fn explain(&self, error: sqlx::Error) -> StoreError {
        error.into()
    }
}

/// [`Ledger`] on one connection.
pub(crate) struct SqlLedger {
    tables: Box<dyn LedgerBackend>,
    /// True while a transaction is open. Still true at the start of the next call if a call was cancelled or its
    /// rollback failed.
    open: bool,
}

impl SqlLedger {
    pub(crate) fn new(tables: Box<dyn LedgerBackend>) -> Self {
        Self { tables, open: false }
    }

    async fn begin(&mut self, mode: TxMode) -> Result<(), StoreError> {
        if self.open {
            self.tables.rollback().await?;
        }
        self.open = true;
        Ok(self.tables.begin(mode).await?)
    }

    /// Commits if `outcome` is `Ok`, else rolls back. Returns `outcome`, or the error of the commit.
    async fn end<R>(&mut self, outcome: Result<R, StoreError>) -> Result<R, StoreError> {
        match outcome {
            Ok(done) => {
                self.tables.commit().await.map_err(|error| self.tables.explain(error))?;
                self.open = false;
                Ok(done)
            }
            Err(error) => {
                // Return the first error. If the rollback also fails, the next call to `begin` repeats it.
                self.open = self.tables.rollback().await.is_err();
                Err(match error {
                    StoreError::Database(error) => self.tables.explain(error),
                    error => error,
                })
            }
        }
    }
}

/// The maximum number of keys in one statement.
pub(crate) const BATCH: usize = 1_000;

#[async_trait]
impl Ledger for SqlLedger {
    async fn create_trust(&mut self, actor: &Actor, id: TrustId, name: &str) -> Result<Trust, StoreError> {
        self.begin(TxMode::Change).await?;
        let outcome = create_trust(&mut *self.tables, actor, id, name).await;
        self.end(outcome).await
    }

    async fn trusts(&mut self) -> Result<Vec<Trust>, StoreError> {
        self.begin(TxMode::Read).await?;
        let outcome = self.tables.trusts(None).await.map_err(StoreError::from);
        self.end(outcome).await
    }

    async fn trust(&mut self, which: &TrustRef) -> Result<Trust, StoreError> {
        self.begin(TxMode::Read).await?;
        let outcome = one_trust(&mut *self.tables, which).await;
        self.end(outcome).await
    }

    async fn enable_trust(&mut self, actor: &Actor, which: &TrustRef, enabled: bool) -> Result<Trust, StoreError> {
        self.begin(TxMode::Change).await?;
        let outcome = enable_trust(&mut *self.tables, actor, which, enabled).await;
        self.end(outcome).await
    }

    async fn delete_trust(&mut self, actor: &Actor, which: &TrustRef, with_keys: bool) -> Result<Trust, StoreError> {
        self.begin(TxMode::Change).await?;
        let outcome = delete_trust(&mut *self.tables, actor, which, with_keys).await;
        self.end(outcome).await
    }

    async fn add_key(&mut self, actor: &Actor, trust: &TrustRef, key: NewKey) -> Result<Key, StoreError> {
        self.begin(TxMode::Change).await?;
        let outcome = add_key(&mut *self.tables, actor, trust, &key).await;
        self.end(outcome).await
    }

    async fn import_keys(&mut self, actor: &Actor, trust: &TrustRef, keys: Vec<NewKey>) -> Result<u64, StoreError> {
        self.begin(TxMode::Change).await?;
        let outcome = import_keys(&mut *self.tables, actor, trust, &keys).await;
        self.end(outcome).await
    }

    async fn keys(&mut self, trust: Option<&TrustRef>) -> Result<Vec<Key>, StoreError> {
        self.begin(TxMode::Read).await?;
        let outcome = keys(&mut *self.tables, trust).await;
        self.end(outcome).await
    }

    async fn key(&mut self, id: KeyId) -> Result<Key, StoreError> {
        self.begin(TxMode::Read).await?;
        let outcome = one_key(&mut *self.tables, id).await;
        self.end(outcome).await
    }

    async fn identify(&mut self, digests: &Digests) -> Result<Option<Key>, StoreError> {
        self.begin(TxMode::Read).await?;
        let outcome = self.tables.keys(KeyFilter::Digests(digests)).await.map_err(StoreError::from);
        Ok(self.end(outcome).await?.into_iter().next())
    }

    async fn revoke_key(&mut self, actor: &Actor, id: KeyId) -> Result<Key, StoreError> {
        self.begin(TxMode::Change).await?;
        let outcome = revoke_key(&mut *self.tables, actor, id).await;
        self.end(outcome).await
    }

    async fn use_pepper(&mut self, actor: &Actor, pepper: Fingerprint) -> Result<Option<Fingerprint>, StoreError> {
        self.begin(TxMode::Change).await?;
        let outcome = use_pepper(&mut *self.tables, actor, pepper).await;
        self.end(outcome).await
    }

    async fn clear_caches(&mut self, actor: &Actor) -> Result<Version, StoreError> {
        self.begin(TxMode::Change).await?;
        let outcome = clear_caches(&mut *self.tables, actor).await;
        self.end(outcome).await?;
        self.newest().await
    }

    async fn newest(&mut self) -> Result<Version, StoreError> {
        self.begin(TxMode::Read).await?;
        let outcome = self.tables.newest().await.map_err(StoreError::from);
        Ok(Version(self.end(outcome).await?.cast_unsigned())) // versions are positive
    }

    async fn replicas(&mut self) -> Result<Vec<Replica>, StoreError> {
        self.begin(TxMode::Read).await?;
        let outcome = self.tables.replicas().await.map_err(StoreError::from);
        self.end(outcome).await
    }

    async fn now(&mut self) -> Result<DatabaseTime, StoreError> {
        self.begin(TxMode::Read).await?;
        let outcome = self.tables.now().await.map(DatabaseTime::from_micros).map_err(StoreError::from);
        self.end(outcome).await
    }
}

// === the steps of the operations, inside a transaction ===

async fn one_trust(tables: &mut dyn LedgerBackend, which: &TrustRef) -> Result<Trust, StoreError> {
    let found = tables.trusts(Some(which)).await?.into_iter().next();
    found.ok_or_else(|| {
        StoreError::NoTrust(match which {
            TrustRef::Id(id) => id.to_string(),
            TrustRef::Name(name) => name.clone(),
        })
    })
}

async fn locked_trust(tables: &mut dyn LedgerBackend, which: &TrustRef) -> Result<Trust, StoreError> {
    tables.lock_trust(which).await?;
    one_trust(tables, which).await
}

async fn one_key(tables: &mut dyn LedgerBackend, id: KeyId) -> Result<Key, StoreError> {
    tables.keys(KeyFilter::Id(id)).await?.into_iter().next().ok_or(StoreError::NoKey(id))
}

async fn create_trust(
    tables: &mut dyn LedgerBackend,
    actor: &Actor,
    id: TrustId,
    name: &str,
) -> Result<Trust, StoreError> {
    if !tables.insert_trust(id, name).await? {
        return Err(StoreError::NameTaken(name.to_owned()));
    }
    let trust = one_trust(tables, &TrustRef::Id(id)).await?;
    note(tables, actor, "trust.create", id, None, Some(trust_json(&trust))).await?;
    Ok(trust)
}

async fn enable_trust(
    tables: &mut dyn LedgerBackend,
    actor: &Actor,
    which: &TrustRef,
    enabled: bool,
) -> Result<Trust, StoreError> {
    let before = locked_trust(tables, which).await?;
    if before.enabled == enabled {
        return Ok(before); // no change, so no audit entry
    }
    tables.set_enabled(before.id, enabled).await?;
    let after = Trust { enabled, ..before.clone() };
    let action = if enabled { "trust.enable" } else { "trust.disable" };
    note(tables, actor, action, after.id, Some(trust_json(&before)), Some(trust_json(&after))).await?;
    Ok(after)
}

async fn delete_trust(
    tables: &mut dyn LedgerBackend,
    actor: &Actor,
    which: &TrustRef,
    with_keys: bool,
) -> Result<Trust, StoreError> {
    let trust = locked_trust(tables, which).await?;
    if trust.keys > 0 {
        if !with_keys {
            return Err(StoreError::HasKeys(trust.keys));
        }
        tables.delete_keys(trust.id).await?;
    }
    tables.delete_trust(trust.id).await?;
    note(tables, actor, "trust.delete", trust.id, Some(trust_json(&trust)), None).await?;
    Ok(trust)
}

async fn add_key(
    tables: &mut dyn LedgerBackend,
    actor: &Actor,
    trust: &TrustRef,
    key: &NewKey,
) -> Result<Key, StoreError> {
    let trust = locked_trust(tables, trust).await?;
    check_pepper(tables, key.made).await?;
    if tables.insert_keys(trust.id, std::slice::from_ref(key)).await? == 0 {
        let digests = Digests { current: key.digest, older: Vec::new() };
        // If another transaction deletes the stored key before this query, its id is unknown: report the id of the new
        // key.
        let taken = tables.keys(KeyFilter::Digests(&digests)).await?.into_iter().next();
        return Err(StoreError::DigestTaken(taken.map_or(key.id, |taken| taken.id)));
    }
    let stored = one_key(tables, key.id).await?;
    note(tables, actor, "key.issue", stored.id, None, Some(key_json(&stored))).await?;
    Ok(stored)
}

/// Rejects new keys hashed under a pepper other than the recorded one: servers could not verify them.
async fn check_pepper(tables: &mut dyn LedgerBackend, made: Made) -> Result<(), StoreError> {
    if made == Made::Elsewhere {
        return Ok(());
    }
    let configured = made.fingerprint();
    match tables.hold_pepper(configured).await? {
        Some(recorded) if configured != Some(recorded) => Err(StoreError::OtherPepper { configured, recorded }),
        _ => Ok(()),
    }
}

async fn use_pepper(
    tables: &mut dyn LedgerBackend,
    actor: &Actor,
    pepper: Fingerprint,
) -> Result<Option<Fingerprint>, StoreError> {
    let before = tables.use_pepper(pepper).await?;
    if before != Some(pepper) {
        let pepper_json = |pepper: Fingerprint| json!({ "fingerprint": pepper.to_string() });
        note(tables, actor, "pepper.use", "pepper", before.map(pepper_json), Some(pepper_json(pepper))).await?;
    }
    Ok(before)
}

async fn import_keys(
    tables: &mut dyn LedgerBackend,
    actor: &Actor,
    trust: &TrustRef,
    keys: &[NewKey],
) -> Result<u64, StoreError> {
    let trust = locked_trust(tables, trust).await?;
    // The digests of one import are all computed in the same way, so one check is enough.
    if let Some(first) = keys.first() {
        check_pepper(tables, first.made).await?;
    }
    let mut stored = 0;
    for batch in keys.chunks(BATCH) {
        let older: Vec<_> = batch.iter().flat_map(|key| key.older.iter().copied()).collect();
        if older.is_empty() {
            stored += tables.insert_keys(trust.id, batch).await?;
            continue;
        }
        // Skip keys that are stored under an older digest. Otherwise one key would have two rows, and revoking one of
        // them would leave the key valid through the other.
        let known: HashSet<_> = tables.stored_digests(&older).await?.into_iter().collect();
        let new: Vec<_> = batch.iter().filter(|key| !key.older.iter().any(|digest| known.contains(digest))).collect();
        stored += tables.insert_keys(trust.id, &new.into_iter().cloned().collect::<Vec<_>>()).await?;
    }
    let after = json!({ "trust_id": trust.id.to_string(), "given": keys.len(), "stored": stored });
    note(tables, actor, "key.import", trust.id, None, Some(after)).await?;
    Ok(stored)
}

async fn keys(tables: &mut dyn LedgerBackend, trust: Option<&TrustRef>) -> Result<Vec<Key>, StoreError> {
    let which = match trust {
        None => KeyFilter::All,
        Some(trust) => KeyFilter::Of(one_trust(tables, trust).await?.id),
    };
    Ok(tables.keys(which).await?)
}

async fn revoke_key(tables: &mut dyn LedgerBackend, actor: &Actor, id: KeyId) -> Result<Key, StoreError> {
    let before = one_key(tables, id).await?;
    if !tables.revoke_key(id).await? {
        return one_key(tables, id).await; // already revoked, perhaps by a concurrent transaction
    }
    let after = one_key(tables, id).await?;
    note(tables, actor, "key.revoke", id, Some(key_json(&before)), Some(key_json(&after))).await?;
    Ok(after)
}

async fn clear_caches(tables: &mut dyn LedgerBackend, actor: &Actor) -> Result<(), StoreError> {
    tables.change_everything().await?;
    Ok(note(tables, actor, "cache.clear", "everything", None, None).await?)
}

/// Writes an audit entry.
pub(crate) async fn note(
    tables: &mut dyn LedgerBackend,
    actor: &Actor,
    action: &'static str,
    object: impl ToString + Send,
    before: Option<Value>,
    after: Option<Value>,
) -> Result<(), sqlx::Error> {
    let entry = AuditEntry { action, object: object.to_string(), before, after };
    tables.insert_audit(actor, &entry).await
}

fn trust_json(trust: &Trust) -> Value {
    let Trust { id, name, enabled, created_at, keys } = trust;
    json!({
        "id": id.to_string(), "name": name, "enabled": enabled, "created_at": time_json(*created_at), "keys": keys,
    })
}

fn key_json(key: &Key) -> Value {
    let Key { id, trust_id, hint, scheme, name, scopes, .. } = key;
    let cidrs: Vec<String> = key.allowed_cidrs.iter().map(ToString::to_string).collect();
    json!({
        "id": id.to_string(), "trust_id": trust_id.to_string(), "hint": hint, "scheme": scheme.as_str(), "name": name,
        "scopes": scopes, "allowed_cidrs": cidrs, "created_at": time_json(key.created_at),
        "not_before": key.not_before.map(time_json), "expires_at": key.expires_at.map(time_json),
        "revoked_at": key.revoked_at.map(time_json),
    })
}

/// A time in RFC 3339 format, or the number of microseconds since the Unix epoch if the format cannot represent it.
fn time_json(time: DatabaseTime) -> Value {
    let format = &time::format_description::well_known::Rfc3339;
    time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(time.micros()) * 1_000)
        .ok()
        .and_then(|time| time.format(format).ok())
        .map_or_else(|| json!(time.micros()), Value::from)
}
