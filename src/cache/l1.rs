//! L1: the cache in this process. moka only stores the entries; `cache::policy` decides whether a check may use one.
//!
//! Entries that may no longer be used stay until they are replaced or evicted, because they show that a key was good
//! before.

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

/// An entry of L1. It contains only the data that checks need, because there may be a million entries.
pub struct Entry<K: Cacheable> {
    content: Content<K::Value>,
    /// The newest version when the store was read.
    as_of: Version,
    /// When the store was read, by this machine's clock.
    born: Moment,
    lasts_millis: u32,
    /// The view in which it entered the cache; `None`: it is not in the cache, and only the callers of its load may use
    /// it.
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
    /// The maximum time after `born` for which any read policy may use the entry. Rounded down to milliseconds.
    pub lasts: Duration,
}

/// The memory overhead of an entry, in bytes: 326 bytes in moka, measured with a million entries (`benches/churn.rs`),
/// the counts of the `Arc`, and the overhead of the allocator. With a lower number, the cache would use more memory
/// than `cache.size`.
const ENTRY_BYTES: usize = 350;

impl<K: Cacheable> Entry<K> {
    /// The result of `query` at the version `as_of`. `epoch`: the view in which it enters the cache; `None` if only the
    /// callers of its load may use it.
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
        // The largest value is 49 days; an entry that ends earlier than its lifetime is only loaded again.
        let lasts_millis = lifetime.lasts.as_millis().saturate();
        Self { content, as_of, born: lifetime.born, lasts_millis, epoch }
    }

    /// A copy that enters the cache in the view of `epoch`.
    #[must_use]
    pub fn entered(&self, epoch: Epoch) -> Self {
        let Self { content, as_of, born, lasts_millis, epoch: _ } = self;
        Self { content: content.clone(), as_of: *as_of, born: *born, lasts_millis: *lasts_millis, epoch: Some(epoch) }
    }

    /// The value; `None` for a negative entry.
    #[must_use]
    pub const fn value(&self) -> Option<&K::Value> {
        match &self.content {
            Content::Record(value) => Some(value),
            Content::NotFound(_) => None,
        }
    }

    /// The newest version when the store was read.
    #[must_use]
    pub const fn as_of(&self) -> Version {
        self.as_of
    }

    /// The end of its lifetime.
    #[must_use]
    pub fn deadline(&self) -> Moment {
        self.born.after(Duration::from_millis(self.lasts_millis.into()))
    }

    /// True if it entered the cache in `view`.
    #[must_use]
    pub fn is_of(&self, view: &ReplicaView) -> bool {
        self.epoch == Some(view.epoch())
    }

    /// True if it entered the cache in `view`, no change applied there concerns it, and its lifetime has not ended.
    #[must_use]
    pub fn is_current(&self, view: &ReplicaView, now: Moment) -> bool {
        self.is_of(view) && now < self.deadline() && self.is_covered(view)
    }

    /// True if no change that was applied in `view` concerns it.
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

    /// The time since the store was read.
    #[must_use]
    pub fn age(&self, now: Moment) -> Duration {
        now.since(self.born)
    }

    fn weight(&self) -> u32 {
        let value = self.value().map_or(0, K::heap_bytes);
        (ENTRY_BYTES + size_of::<Self>() + value).saturate()
    }
}

/// Keys of L1 are digests, so a fast hash is enough. Its random seed keeps clients from choosing keys that collide.
type Storage<K> = Cache<<K as Cacheable>::Key, Arc<Entry<K>>, RandomState>;

/// The storage of records and of negative entries. They are separate, so that requests with random keys do not evict
/// records.
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

    /// The entry of `key`, usable or not.
    #[must_use]
    pub fn get(&self, key: &K::Key) -> Option<Arc<Entry<K>>> {
        self.records.get(key).or_else(|| self.negatives.get(key))
    }

    /// Puts `entry` in place of the current entry of `key`, if any.
    pub fn put(&self, key: K::Key, entry: Arc<Entry<K>>) {
        if entry.value().is_some() {
            self.records.insert(key, entry);
            self.negatives.invalidate(&key);
        } else {
            self.negatives.insert(key, entry);
            self.records.invalidate(&key);
        }
    }

    /// All records, usable or not, in an order that differs between processes.
    pub fn records(&self) -> impl Iterator<Item = (K::Key, Arc<Entry<K>>)> {
        self.records.iter().map(|(key, entry)| (*key, entry))
    }

    /// Removes the entry of `key`.
    pub fn forget(&self, key: &K::Key) {
        self.records.invalidate(key);
        self.negatives.invalidate(key);
    }

    /// The number of entries. First runs moka's pending maintenance, which is too slow for checks.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.records.run_pending_tasks();
        self.negatives.run_pending_tasks();
        self.records.entry_count() + self.negatives.entry_count()
    }
}
