//! A [`Manager`] with a new SQLite database, for the unit tests of management.

use std::{sync::Arc, time::Duration};

use super::Manager;
use crate::{
    base::{clock::SystemClock, secret::Secret},
    ext_authz::credential::CredentialSettings,
    record::Version,
    store::{self, Actor, Heartbeat, Missing, Source, StoreSettings},
};

/// A manager whose database has the trust "acme" and no keys.
pub(crate) struct Fixture {
    pub(crate) manager: Manager,
    pub(crate) replicas: Replicas,
    /// The directory that contains the database. Dropping this field removes the directory.
    _directory: tempfile::TempDir,
}

/// Represents the replicas that use the same database.
pub(crate) struct Replicas(Arc<dyn Source>);

impl Fixture {
    pub(crate) async fn new(credential: CredentialSettings) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}", directory.path().join("trustgate.db").display());
        let settings = StoreSettings { url: Some(Secret::new(url)), ..StoreSettings::default() };
        let store = store::open_lookup(&settings, &|_| None, Arc::new(SystemClock)).unwrap();
        store.prepare(Missing::Create).await.unwrap();
        let ledger = store::open_ledger(&settings, &|_| None).await.unwrap();
        let mut manager = Manager::new(ledger, Actor("test".to_owned()), credential).unwrap();
        manager.create_trust("acme").await.unwrap();
        Self { manager, replicas: Replicas(store), _directory: directory }
    }
}

impl Replicas {
    /// Sends a heartbeat for the replica with the id `id` and the name `pod-{id}`.
    pub(crate) async fn heartbeat(&self, id: u128, applied: Version, lasts: Duration) {
        let replica = uuid::Uuid::from_u128(id);
        self.0.report(&Heartbeat { replica, name: format!("pod-{id}"), applied, lasts }).await.unwrap();
    }
}
