//! L1: the cache in this process. moka is storage only; whether a value may be used is decided where it is used.
//!
//! Values that may no longer be used stay until they are replaced or evicted: they tell that a key was good before.

use std::{sync::Arc, time::Duration};

use foldhash::fast::RandomState;
use moka::sync::Cache;
use smallvec::SmallVec;

use super::{CacheSettings, kind::Kind};
use crate::{
    clock::Moment,
    fault::Tier,
    freshness::{Epoch, View, lease::stripe},
    record::Dated,
};

/// A value as it was found, and as L1 holds it.
pub struct Held<K: Kind> {
    key: K::Key,
    found: Dated<Option<K::Value>>,
    /// Where it was found: L2 or the store.
    tier: Tier,
    /// When the store was read, by this machine's clock.
    born: Moment,
    deadline: Moment,
    /// The view it entered; `None`: it can only serve those who asked for it.
    epoch: Option<Epoch>,
    /// The stripes of what an absence was looked for under; empty for a record.
    asked: SmallVec<[u16; 2]>,
}

/// How long a value lives.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    /// When the store was read.
    pub born: Moment,
    /// Until when it may be used, whatever else allows it.
    pub deadline: Moment,
}

/// What an entry costs beside its value: moka's own share, measured at about 270 bytes, and ours.
const ENTRY_BYTES: usize = 320;

impl<K: Kind> Held<K> {
    /// A value that was found in `tier` for `query`.
    pub fn new(query: &K::Query, found: Dated<Option<K::Value>>, tier: Tier, life: Life) -> Self {
        let asked = if found.value.is_none() { K::asked(query).map(stripe).collect() } else { SmallVec::new() };
        let Life { born, deadline } = life;
        Self { key: K::key(query), found, tier, born, deadline, epoch: None, asked }
    }

    /// The same value in the view of `epoch`.
    #[must_use]
    pub fn entered(self, epoch: Epoch) -> Self {
        Self { epoch: Some(epoch), ..self }
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

    /// The view it entered, if it did.
    #[must_use]
    pub const fn epoch(&self) -> Option<Epoch> {
        self.epoch
    }

    /// Whether it was read from the store, not out of Redis.
    #[must_use]
    pub fn is_from_store(&self) -> bool {
        self.tier == Tier::Store
    }

    /// Whether it comes from a read of the store that was sent after `began`.
    #[must_use]
    pub fn is_read_after(&self, began: Moment) -> bool {
        self.is_from_store() && self.found.sent_at >= began
    }

    /// Whether it entered `view` and no change concerns it that was applied there, and its deadline has not passed.
    #[must_use]
    pub fn is_current(&self, view: &View, now: Moment) -> bool {
        self.epoch == Some(view.epoch()) && now < self.deadline && self.is_covered(view)
    }

    /// Whether no change that was applied in `view` concerns it.
    #[must_use]
    pub fn is_covered(&self, view: &View) -> bool {
        let (lease, as_of) = (view.lease(), self.found.as_of);
        match self.value() {
            Some(value) => lease.covers_record(as_of, K::objects(value).map(|id| stripe(id.as_bytes()))),
            None => lease.covers_absence(as_of, &self.asked),
        }
    }

    /// How long ago the store was read.
    #[must_use]
    pub fn age(&self, now: Moment) -> Duration {
        now.since(self.born)
    }

    fn weight(&self) -> u32 {
        let value = self.value().map_or(0, K::heap_bytes);
        u32::try_from(ENTRY_BYTES + size_of::<Self>() + value).unwrap_or(u32::MAX)
    }
}

/// Keys of L1 are digests: they need no strong hash, only a seed that nobody outside knows.
type Storage<K> = Cache<<K as Kind>::Key, Arc<Held<K>>, RandomState>;

/// Records and absences, apart: however many keys are made up, they evict no good one.
pub struct L1<K: Kind> {
    records: Storage<K>,
    absences: Storage<K>,
}

impl<K: Kind> L1<K> {
    /// An empty cache of at most the sizes in `settings`.
    #[must_use]
    pub fn new(settings: &CacheSettings) -> Self {
        let storage = |bytes| {
            let weigher = |_: &K::Key, held: &Arc<Held<K>>| held.weight();
            Cache::builder().max_capacity(bytes).weigher(weigher).build_with_hasher(RandomState::default())
        };
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
