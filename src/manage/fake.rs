//! A ledger in memory, for the unit tests of management. Other tests run against the databases.
//!
//! It does not check names or trusts: each trust exists and is called "acme".

use async_trait::async_trait;

use crate::{
    base::clock::DatabaseTime,
    record::{ApiKeyDigest, Digests, Fingerprint, KeyId, TrustId, Version},
    store::{
        Actor, Ledger, StoreError,
        ledger::{Key, NewKey, Replica, Trust, TrustRef},
    },
};

/// Keys with their digests, and the results of [`Ledger::replicas`], one per call; the last one is repeated.
#[derive(Default)]
pub(crate) struct FakeLedger {
    pub(crate) keys: Vec<(ApiKeyDigest, Key)>,
    pub(crate) rounds: Vec<Vec<Replica>>,
}

fn acme(name: &str) -> Trust {
    let created_at = DatabaseTime::from_micros(0);
    Trust { id: TrustId(uuid::Uuid::from_u128(1)), name: name.to_owned(), enabled: true, created_at, keys: 0 }
}

fn stored(new: NewKey) -> Key {
    let NewKey { id, made, hint, name, scopes, allowed_cidrs, not_before, expires_in, .. } = new;
    let created_at = DatabaseTime::from_micros(0);
    Key {
        id,
        trust_id: acme("acme").id,
        trust_name: "acme".to_owned(),
        trust_enabled: true,
        hint,
        scheme: made.scheme(),
        pepper: made.fingerprint(),
        name,
        scopes,
        allowed_cidrs,
        created_at,
        not_before,
        expires_at: expires_in.map(|life| created_at.after(life)),
        revoked_at: None,
    }
}

#[async_trait]
impl Ledger for FakeLedger {
    async fn create_trust(&mut self, _: &Actor, _: TrustId, name: &str) -> Result<Trust, StoreError> {
        Ok(acme(name))
    }
    async fn trusts(&mut self) -> Result<Vec<Trust>, StoreError> {
        Ok(vec![acme("acme")])
    }
    async fn trust(&mut self, _: &TrustRef) -> Result<Trust, StoreError> {
        Ok(acme("acme"))
    }
    async fn enable_trust(&mut self, _: &Actor, _: &TrustRef, enabled: bool) -> Result<Trust, StoreError> {
        Ok(Trust { enabled, ..acme("acme") })
    }
    async fn delete_trust(&mut self, _: &Actor, _: &TrustRef, _: bool) -> Result<Trust, StoreError> {
        Ok(acme("acme"))
    }
    async fn add_key(&mut self, _: &Actor, _: &TrustRef, key: NewKey) -> Result<Key, StoreError> {
        let (digest, key) = (key.digest, stored(key));
        self.keys.push((digest, key.clone()));
        Ok(key)
    }
    async fn import_keys(&mut self, _: &Actor, _: &TrustRef, keys: Vec<NewKey>) -> Result<u64, StoreError> {
        let before = self.keys.len();
        for key in keys {
            if self.keys.iter().all(|(digest, _)| *digest != key.digest) {
                self.keys.push((key.digest, stored(key)));
            }
        }
        Ok((self.keys.len() - before) as u64)
    }
    async fn keys(&mut self, _: Option<&TrustRef>) -> Result<Vec<Key>, StoreError> {
        Ok(self.keys.iter().map(|(_, key)| key.clone()).collect())
    }
    async fn key(&mut self, id: KeyId) -> Result<Key, StoreError> {
        let found = self.keys.iter().find(|(_, key)| key.id == id);
        found.map(|(_, key)| key.clone()).ok_or(StoreError::NoKey(id))
    }
    async fn identify(&mut self, digests: &Digests) -> Result<Option<Key>, StoreError> {
        Ok(self.keys.iter().find(|(digest, _)| digests.contains(digest)).map(|(_, key)| key.clone()))
    }
    async fn revoke_key(&mut self, _: &Actor, id: KeyId) -> Result<Key, StoreError> {
        let revoked_at = Some(self.now().await?);
        Ok(Key { revoked_at, ..self.key(id).await? })
    }
    async fn use_pepper(&mut self, _: &Actor, _: Fingerprint) -> Result<Option<Fingerprint>, StoreError> {
        Ok(None)
    }
    async fn clear_caches(&mut self, _: &Actor) -> Result<Version, StoreError> {
        Ok(Version(7))
    }
    async fn newest(&mut self) -> Result<Version, StoreError> {
        Ok(Version(7))
    }
    async fn replicas(&mut self) -> Result<Vec<Replica>, StoreError> {
        Ok(if self.rounds.len() > 1 { self.rounds.remove(0) } else { self.rounds[0].clone() })
    }
    async fn now(&mut self) -> Result<DatabaseTime, StoreError> {
        Ok(DatabaseTime::from_micros(0))
    }
}
