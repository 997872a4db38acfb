//! L1: the cache in this process. moka is storage only; whether a value may be used is decided where it is used.
//!
//! Values that may no longer be used stay until they are replaced or evicted: they tell that a key was good before.

use std::sync::Arc;

use moka::sync::Cache as Storage;

use super::{CacheSettings, kind::Kind};
use crate::{
    clock::Moment,
    freshness::{Epoch, View},
    record::Dated,
};

/// A value as L1 holds it.
pub struct Held<K: Kind> {
    key: K::Key,
    found: Dated<Option<K::Value>>,
    deadline: Moment,
    epoch: Option<Epoch>,
}

/// What an entry costs beside its value: moka's own share, measured at about 270 bytes, and ours.
const ENTRY_BYTES: usize = 320;

impl<K: Kind> Held<K> {
    /// A value that may be used until `deadline`; `epoch`: where it entered the view, `None` where it did not and can
    /// only serve who asked for it.
    pub const fn new(key: K::Key, found: Dated<Option<K::Value>>, deadline: Moment, epoch: Option<Epoch>) -> Self {
        Self { key, found, deadline, epoch }
    }

    /// What it was found by.
    #[must_use]
    pub const fn key(&self) -> &K::Key {
        &self.key
    }

    /// The value; `None`: an absence.
    #[must_use]
    pub const fn value(&self) -> Option<&K::Value> {
        self.found.value.as_ref()
    }

    /// The value with its date.
    #[must_use]
    pub const fn dated(&self) -> &Dated<Option<K::Value>> {
        &self.found
    }

    /// Until when it may be used.
    #[must_use]
    pub const fn deadline(&self) -> Moment {
        self.deadline
    }

    /// Whether it entered the view.
    #[must_use]
    pub const fn entered(&self) -> bool {
        self.epoch.is_some()
    }

    /// Whether it may be used at `now`.
    #[must_use]
    pub fn is_usable(&self, view: &View, now: Moment) -> bool {
        now < self.deadline && self.epoch.is_some_and(|epoch| view.is_current(epoch, self.found.as_of))
    }

    fn weight(&self) -> u32 {
        let value = self.value().map_or(0, K::heap_bytes);
        u32::try_from(ENTRY_BYTES + size_of::<Self>() + value).unwrap_or(u32::MAX)
    }
}

/// Records and absences, apart: however many keys are made up, they evict no good one.
pub struct L1<K: Kind> {
    records: Storage<K::Key, Arc<Held<K>>>,
    absences: Storage<K::Key, Arc<Held<K>>>,
}

impl<K: Kind> L1<K> {
    /// An empty cache of at most the sizes in `settings`.
    #[must_use]
    pub fn new(settings: &CacheSettings) -> Self {
        let storage =
            |bytes| Storage::builder().max_capacity(bytes).weigher(|_, held: &Arc<Held<K>>| held.weight()).build();
        Self { records: storage(settings.size.bytes()), absences: storage(settings.absences_size.bytes()) }
    }

    /// What is held of `key`, usable or not.
    #[must_use]
    pub fn get(&self, key: &K::Key) -> Option<Arc<Held<K>>> {
        self.records.get(key).or_else(|| self.absences.get(key))
    }

    /// Holds a value in place of what was held before.
    pub fn put(&self, held: Arc<Held<K>>) {
        let key = held.key;
        if held.value().is_some() {
            self.records.insert(key, held);
            self.absences.invalidate(&key);
        } else {
            self.absences.insert(key, held);
            self.records.invalidate(&key);
        }
    }

    /// How many values are held. Catches up with moka's own book-keeping first: for scrapes, not for checks.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.records.run_pending_tasks();
        self.absences.run_pending_tasks();
        self.records.entry_count() + self.absences.entry_count()
    }
}
