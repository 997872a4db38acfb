//! L1: the cache in this process. moka only stores the entries; `cache::policy` decides whether a check may use an
//! entry.
//!
//! An entry that checks may no longer use stays until it is replaced or evicted, because it shows that the key was
//! valid before.

use std::{sync::Arc, time::Duration};

use foldhash::fast::RandomState;
use moka::sync::Cache;
use smallvec::SmallVec;

use super::cacheable::Cacheable;
use crate::{
    base::{clock::Moment, saturate::Saturate as _, units::ByteSize},
    freshness::{Epoch, ReplicaView, lease::stripe},
    record::Version,
};

/// An entry of L1. An entry contains only the data that checks need, because there may be a million entries.
pub struct Entry<K: Cacheable> {
    content: Content<K::Value>,
    /// The newest version at the time of the store read.
    as_of: Version,
    /// When the store was read, by this machine's clock.
    born: Moment,
    lasts_millis: u32,
    /// The epoch of the view in which the entry was inserted into L1. `None` if it was not inserted; in that case, only
    /// the callers that shared its load may use the entry.
    epoch: Option<Epoch>,
}

#[derive(Clone)]
enum Content<V> {
    Record(V),
    /// Contains the stripes of all digests that the query searched for.
    NotFound(SmallVec<[u16; 2]>),
}

/// The lifetime of an entry.
#[derive(Clone, Copy, Debug)]
pub struct Lifetime {
    /// When the store was read, by this machine's clock.
    pub born: Moment,
    /// The maximum time after `born` for which any read policy may use the entry. This time is rounded down to
    /// milliseconds.
    pub lasts: Duration,
}

/// The memory overhead of an entry, in bytes: 326 bytes in moka, measured with a million entries (`benches/churn.rs`),
/// plus the reference counts of the `Arc` and the overhead of the allocator. With a lower number, the cache would use
/// more memory than `cache.size`.
const ENTRY_BYTES: usize = 350;

impl<K: Cacheable> Entry<K> {
    /// Creates an entry from the result of `query` at the version `as_of`. `epoch` is the epoch of the view in which
    /// the entry is inserted into L1, or `None` if only the callers that shared its load may use the entry.
    pub fn new(
        query: &K::Query,
        found: Option<K::Value>,
        as_of: Version,
        lifetime: Lifetime,
        epoch: Option<Epoch>,
    ) -> Self {
        let content = match found {
            Some(value) => Content::Record(value),
            None => Content::NotFound(K::asked(query).map(stripe).collect()),
        };
        // The maximum lifetime is 49 days (2^32 ms). A longer lifetime is shortened, which only makes a check load the
        // value again.
        let lasts_millis = lifetime.lasts.as_millis().saturate();
        Self { content, as_of, born: lifetime.born, lasts_millis, epoch }
    }

    /// Returns a copy for insertion into L1 in the view with `epoch`.
    #[must_use]
    pub fn entered(&self, epoch: Epoch) -> Self {
        let Self { content, as_of, born, lasts_millis, epoch: _ } = self;
        Self { content: content.clone(), as_of: *as_of, born: *born, lasts_millis: *lasts_millis, epoch: Some(epoch) }
    }

    /// Returns the value; `None` for a negative entry.
    #[must_use]
    pub const fn value(&self) -> Option<&K::Value> {
        match &self.content {
            Content::Record(value) => Some(value),
            Content::NotFound(_) => None,
        }
    }

    /// Returns the newest version at the time of the store read.
    #[must_use]
    pub const fn as_of(&self) -> Version {
        self.as_of
    }

    /// Returns the end of the entry's lifetime.
    #[must_use]
    pub fn deadline(&self) -> Moment {
        self.born.after(Duration::from_millis(self.lasts_millis.into()))
    }

    /// Returns true if the entry was inserted into L1 in `view`.
    #[must_use]
    pub fn is_of(&self, view: &ReplicaView) -> bool {
        self.epoch == Some(view.epoch())
    }

    /// Returns true if the entry was inserted into L1 in `view`, no change applied in `view` affects the entry, and its
    /// lifetime has not ended.
    #[must_use]
    pub fn is_current(&self, view: &ReplicaView, now: Moment) -> bool {
        self.is_of(view) && now < self.deadline() && self.is_covered(view)
    }

    /// Returns true if no change that was applied in `view` affects the entry.
    #[must_use]
    pub fn is_covered(&self, view: &ReplicaView) -> bool {
        let lease = view.lease();
        match &self.content {
            Content::Record(value) => {
                lease.covers_record(self.as_of, K::objects(value).map(|id| stripe(id.as_bytes())))
            }
            Content::NotFound(asked) => lease.covers_absence(self.as_of, asked),
        }
    }

    /// Returns the time since the store was read.
    #[must_use]
    pub fn age(&self, now: Moment) -> Duration {
        now.since(self.born)
    }

    fn weight(&self) -> u32 {
        let value = self.value().map_or(0, K::heap_bytes);
        (ENTRY_BYTES + size_of::<Self>() + value).saturate()
    }
}

/// A map of entries. The keys are digests, so a fast hash function is sufficient. Its random seed prevents clients from
/// choosing keys that collide.
type Storage<K> = Cache<<K as Cacheable>::Key, Arc<Entry<K>>, RandomState>;

/// The cache in this process. Records and negative entries are stored separately, so that requests with random keys do
/// not evict records.
pub struct L1<K: Cacheable> {
    records: Storage<K>,
    negatives: Storage<K>,
}

impl<K: Cacheable> L1<K> {
    /// Creates an empty cache of at most `size` bytes of records and `negative_size` bytes of negative entries.
    #[must_use]
    pub fn new(size: ByteSize, negative_size: ByteSize) -> Self {
        let storage = |size: ByteSize| {
            let weigher = |_: &K::Key, entry: &Arc<Entry<K>>| entry.weight();
            Cache::builder().max_capacity(size.bytes()).weigher(weigher).build_with_hasher(RandomState::default())
        };
        Self { records: storage(size), negatives: storage(negative_size) }
    }

    /// Returns the entry for `key`, even if checks may no longer use it.
    #[must_use]
    pub fn get(&self, key: &K::Key) -> Option<Arc<Entry<K>>> {
        self.records.get(key).or_else(|| self.negatives.get(key))
    }

    /// Inserts `entry` for `key`. Replaces the current entry, if there is one.
    pub fn put(&self, key: K::Key, entry: Arc<Entry<K>>) {
        if entry.value().is_some() {
            self.records.insert(key, entry);
            self.negatives.invalidate(&key);
        } else {
            self.negatives.insert(key, entry);
            self.records.invalidate(&key);
        }
    }

    /// Returns all records, including those that checks may no longer use, in an order that differs between processes.
    pub fn records(&self) -> impl Iterator<Item = (K::Key, Arc<Entry<K>>)> {
        self.records.iter().map(|(key, entry)| (*key, entry))
    }

    /// Removes the entry for `key`.
    pub fn forget(&self, key: &K::Key) {
        self.records.invalidate(key);
        self.negatives.invalidate(key);
    }

    /// Returns the number of entries. Runs moka's pending maintenance first, so this is too slow for checks.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.records.run_pending_tasks();
        self.negatives.run_pending_tasks();
        self.records.entry_count() + self.negatives.entry_count()
    }
}
