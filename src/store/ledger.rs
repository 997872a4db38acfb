//! The operations by which management reads and changes trusts and keys, for both databases.
//!
//! Each change is committed together with its audit entry. Checks do not use this module. [`Ledger`] contains the steps
//! of each operation and their order; the modules `postgres` and `sqlite` contain the statements.

mod audit;
pub(crate) mod backend;
pub(crate) mod copy;
pub(crate) mod postgres;
pub(crate) mod sqlite;
pub(crate) mod types;

use std::collections::HashSet;

use serde_json::json;

pub(crate) use self::types::{Actor, KeyDetails, NewKey, ReplicaStatus, Trust, TrustRef};
use self::{
    audit::{key_json, note, trust_json},
    backend::{BATCH, KeyFilter, LedgerBackend, TxMode},
};
use crate::{
    base::clock::DatabaseTime,
    record::{Digests, Fingerprint, KeyId, Made, TrustId, Version},
    store::error::StoreError,
};

/// Reads and changes trusts and keys, on one connection. A change and its audit entry are one transaction: either both
/// are committed or neither is.
pub struct Ledger {
    backend: Box<dyn LedgerBackend>,
    /// True while a transaction is open. Still true at the start of the next call if a call was cancelled or its
    /// rollback failed.
    open: bool,
}

impl Ledger {
    pub(crate) fn new(backend: Box<dyn LedgerBackend>) -> Self {
        Self { backend, open: false }
    }

    /// Creates an enabled trust named `name`.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], or the database failed.
    pub async fn create_trust(&mut self, actor: &Actor, id: TrustId, name: &str) -> Result<Trust, StoreError> {
        let tables = self.begin(TxMode::Change).await?;
        let outcome = async {
            if !tables.insert_trust(id, name).await? {
                return Err(StoreError::NameTaken(name.to_owned()));
            }
            let trust = one_trust(tables, &TrustRef::Id(id)).await?;
            note(tables, actor, "trust.create", id, None, Some(trust_json(&trust))).await?;
            Ok(trust)
        }
        .await;
        self.end(outcome).await
    }

    /// Returns all trusts, ordered by name.
    ///
    /// # Errors
    /// The database failed.
    pub async fn trusts(&mut self) -> Result<Vec<Trust>, StoreError> {
        let tables = self.begin(TxMode::Read).await?;
        let outcome = tables.trusts(None).await.map_err(StoreError::from);
        self.end(outcome).await
    }

    /// Returns one trust.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], or the database failed.
    pub async fn trust(&mut self, which: &TrustRef) -> Result<Trust, StoreError> {
        let tables = self.begin(TxMode::Read).await?;
        let outcome = one_trust(tables, which).await;
        self.end(outcome).await
    }

    /// Enables or disables a trust; returns the trust after the change.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], or the database failed.
    pub async fn enable_trust(&mut self, actor: &Actor, which: &TrustRef, enabled: bool) -> Result<Trust, StoreError> {
        let tables = self.begin(TxMode::Change).await?;
        let outcome = async {
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
        .await;
        self.end(outcome).await
    }

    /// Deletes a trust, with its keys if `with_keys` is set; returns the trust before the change.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], [`StoreError::HasKeys`], or the database failed.
    pub async fn delete_trust(
        &mut self,
        actor: &Actor,
        which: &TrustRef,
        with_keys: bool,
    ) -> Result<Trust, StoreError> {
        let tables = self.begin(TxMode::Change).await?;
        let outcome = async {
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
        .await;
        self.end(outcome).await
    }

    /// Stores one key.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], [`StoreError::DigestTaken`], [`StoreError::OtherPepper`], or the database failed.
    pub async fn add_key(&mut self, actor: &Actor, trust: &TrustRef, key: NewKey) -> Result<KeyDetails, StoreError> {
        let tables = self.begin(TxMode::Change).await?;
        let outcome = async {
            let trust = locked_trust(tables, trust).await?;
            check_pepper(tables, key.made).await?;
            if tables.insert_keys(trust.id, std::slice::from_ref(&key)).await? == 0 {
                let digests = Digests { current: key.digest, older: Vec::new() };
                // Another transaction may have deleted the stored key before this query, so that its id is unknown. In
                // that case, report the id of the new key.
                let taken = tables.keys(KeyFilter::Digests(&digests)).await?.into_iter().next();
                return Err(StoreError::DigestTaken(taken.map_or(key.id, |taken| taken.id)));
            }
            let stored = one_key(tables, key.id).await?;
            note(tables, actor, "key.issue", stored.id, None, Some(key_json(&stored))).await?;
            Ok(stored)
        }
        .await;
        self.end(outcome).await
    }

    /// Stores many keys in one transaction with one audit entry. Skips keys that are already stored under one of their
    /// digests. Returns the number of keys that were stored.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], [`StoreError::OtherPepper`], or the database failed. No key was stored.
    pub async fn import_keys(&mut self, actor: &Actor, trust: &TrustRef, keys: Vec<NewKey>) -> Result<u64, StoreError> {
        let tables = self.begin(TxMode::Change).await?;
        let outcome = async {
            let trust = locked_trust(tables, trust).await?;
            // All digests in one import are computed in the same way, so one check is enough.
            if let Some(first) = keys.first() {
                check_pepper(tables, first.made).await?;
            }
            let mut stored = 0;
            for batch in keys.chunks(BATCH) {
                stored += insert_new(tables, trust.id, batch).await?;
            }
            let after = json!({ "trust_id": trust.id.to_string(), "given": keys.len(), "stored": stored });
            note(tables, actor, "key.import", trust.id, None, Some(after)).await?;
            Ok(stored)
        }
        .await;
        self.end(outcome).await
    }

    /// Returns the keys of one trust, or all keys, newest first.
    ///
    /// # Errors
    /// [`StoreError::NoTrust`], or the database failed.
    pub async fn keys(&mut self, trust: Option<&TrustRef>) -> Result<Vec<KeyDetails>, StoreError> {
        let tables = self.begin(TxMode::Read).await?;
        let outcome = async {
            let which = match trust {
                None => KeyFilter::All,
                Some(trust) => KeyFilter::Of(one_trust(tables, trust).await?.id),
            };
            Ok(tables.keys(which).await?)
        }
        .await;
        self.end(outcome).await
    }

    /// Returns one key.
    ///
    /// # Errors
    /// [`StoreError::NoKey`], or the database failed.
    pub async fn key(&mut self, id: KeyId) -> Result<KeyDetails, StoreError> {
        let tables = self.begin(TxMode::Read).await?;
        let outcome = one_key(tables, id).await;
        self.end(outcome).await
    }

    /// Returns the key stored under one of `digests`, if any.
    ///
    /// # Errors
    /// The database failed.
    pub async fn identify(&mut self, digests: &Digests) -> Result<Option<KeyDetails>, StoreError> {
        let tables = self.begin(TxMode::Read).await?;
        let outcome = async { Ok(tables.keys(KeyFilter::Digests(digests)).await?.into_iter().next()) }.await;
        self.end(outcome).await
    }

    /// Revokes a key; a key that is already revoked keeps its time of revocation. Returns the key after the change.
    ///
    /// # Errors
    /// [`StoreError::NoKey`], or the database failed.
    pub async fn revoke_key(&mut self, actor: &Actor, id: KeyId) -> Result<KeyDetails, StoreError> {
        let tables = self.begin(TxMode::Change).await?;
        let outcome = async {
            let before = one_key(tables, id).await?;
            if !tables.revoke_key(id).await? {
                return one_key(tables, id).await; // already revoked, perhaps by a concurrent transaction
            }
            let after = one_key(tables, id).await?;
            note(tables, actor, "key.revoke", id, Some(key_json(&before)), Some(key_json(&after))).await?;
            Ok(after)
        }
        .await;
        self.end(outcome).await
    }

    /// Records `pepper` as the pepper for new keys; returns the pepper that was recorded before.
    ///
    /// # Errors
    /// The database failed.
    pub async fn use_pepper(&mut self, actor: &Actor, pepper: Fingerprint) -> Result<Option<Fingerprint>, StoreError> {
        let tables = self.begin(TxMode::Change).await?;
        let outcome = async {
            let before = tables.use_pepper(pepper).await?;
            if before != Some(pepper) {
                let pepper_json = |pepper: Fingerprint| json!({ "fingerprint": pepper.to_string() });
                note(tables, actor, "pepper.use", "pepper", before.map(pepper_json), Some(pepper_json(pepper))).await?;
            }
            Ok(before)
        }
        .await;
        self.end(outcome).await
    }

    /// Commits a version that marks everything as changed, so that replicas discard all cached data. Returns that
    /// version or a newer one.
    ///
    /// # Errors
    /// The database failed.
    pub async fn clear_caches(&mut self, actor: &Actor) -> Result<Version, StoreError> {
        let tables = self.begin(TxMode::Change).await?;
        let outcome = async {
            tables.change_everything().await?;
            Ok(note(tables, actor, "cache.clear", "everything", None, None).await?)
        }
        .await;
        self.end(outcome).await?;
        self.newest().await
    }

    /// Returns the newest version. A replica that has applied this version has applied all changes that were committed
    /// before this call.
    ///
    /// # Errors
    /// The database failed.
    pub async fn newest(&mut self) -> Result<Version, StoreError> {
        let tables = self.begin(TxMode::Read).await?;
        let outcome = tables.newest().await.map_err(StoreError::from);
        let newest = self.end(outcome).await?;
        Ok(Version(newest.cast_unsigned())) // versions are positive
    }

    /// Returns the replicas that may still grant keys from their caches, according to their last heartbeats and the
    /// database's clock.
    ///
    /// # Errors
    /// The database failed.
    pub async fn replicas(&mut self) -> Result<Vec<ReplicaStatus>, StoreError> {
        let tables = self.begin(TxMode::Read).await?;
        let outcome = tables.replicas().await.map_err(StoreError::from);
        self.end(outcome).await
    }

    /// Returns the current time by the database's clock.
    ///
    /// # Errors
    /// The database failed.
    pub async fn now(&mut self) -> Result<DatabaseTime, StoreError> {
        let tables = self.begin(TxMode::Read).await?;
        let outcome = tables.now().await.map(DatabaseTime::from_micros).map_err(StoreError::from);
        self.end(outcome).await
    }

    /// Begins a transaction. The caller runs statements on the returned backend, and then calls [`Self::end`].
    async fn begin(&mut self, mode: TxMode) -> Result<&mut dyn LedgerBackend, StoreError> {
        if self.open {
            self.backend.rollback().await?;
        }
        self.open = true;
        self.backend.begin(mode).await?;
        Ok(&mut *self.backend)
    }

    /// Commits if `outcome` is `Ok`, else rolls back. Returns `outcome`, or the commit error.
    async fn end<R>(&mut self, outcome: Result<R, StoreError>) -> Result<R, StoreError> {
        match outcome {
            Ok(done) => {
                self.backend.commit().await.map_err(|error| self.backend.explain(error))?;
                self.open = false;
                Ok(done)
            }
            Err(error) => {
                // Return the first error. If the rollback also fails, the next call to `begin` repeats it.
                self.open = self.backend.rollback().await.is_err();
                Err(match error {
                    StoreError::Database(error) => self.backend.explain(error),
                    error => error,
                })
            }
        }
    }
}

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

async fn one_key(tables: &mut dyn LedgerBackend, id: KeyId) -> Result<KeyDetails, StoreError> {
    tables.keys(KeyFilter::Id(id)).await?.into_iter().next().ok_or(StoreError::NoKey(id))
}

/// Rejects new keys that were hashed with a pepper different from the recorded one, because servers that have only the
/// recorded pepper could not verify such keys.
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

/// Inserts the keys of which neither the current digest nor an older digest is stored. Returns the number of inserted
/// keys.
async fn insert_new(tables: &mut dyn LedgerBackend, trust: TrustId, keys: &[NewKey]) -> Result<u64, StoreError> {
    let older: Vec<_> = keys.iter().flat_map(|key| key.older.iter().copied()).collect();
    if older.is_empty() {
        return Ok(tables.insert_keys(trust, keys).await?);
    }
    // Skip keys that are stored under an older digest. Otherwise one key would have two rows, and after the revocation
    // of one row the key would still be valid through the other row.
    let known: HashSet<_> = tables.stored_digests(&older).await?.into_iter().collect();
    let new: Vec<_> = keys.iter().filter(|key| !key.older.iter().any(|digest| known.contains(digest))).collect();
    Ok(tables.insert_keys(trust, &new.into_iter().cloned().collect::<Vec<_>>()).await?)
}
