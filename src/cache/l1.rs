//! L1: the cache in this process. moka is storage only; whether a value may be used is decided where it is used.
//!
//! Values that may no longer be used stay until they are replaced or evicted: they tell that a key was good before.

use std::{sync::Arc, time::Duration};

use foldhash::fast::RandomState;
use moka::sync::Cache;
use smallvec::SmallVec;

use super::cacheable::Cacheable;
use crate::{
    base::{clock::Moment, units::ByteSize},
    freshness::{Epoch, ReplicaView, lease::stripe},
    record::Version,
};

/// A value as L1 holds it: what checks need of it and no more, since there may be a million of them.
pub struct Entry<K: Cacheable> {
    content: Content<K::Value>,
    /// The newest version when the store was read.
    as_of: Version,
    /// When the store was read, by this machine's clock.
    born: Moment,
    lasts_millis: u32,
    /// The view it entered; `None`: it can only serve those who asked for it.
    epoch: Option<Epoch>,
}

#[derive(Clone)]
enum Content<V> {
    Record(V),
    /// With the stripes of all it was looked for under.
    NotFound(SmallVec<[u16; 2]>),
}

/// How long a value lives.
#[derive(Clone, Copy, Debug)]
pub struct Lifetime {
    /// When the store was read, by this machine's clock.
    pub born: Moment,
    /// For how long from then on it may be used, whatever else allows it. In whole milliseconds.
    pub lasts: Duration,
}

/// What an entry costs beside its value: 326 bytes of moka's own, measured with a million entries (`examples/churn`), the
/// counts of the `Arc`, and what the allocator adds. Less would let the cache outgrow `cache.size`.
const ENTRY_BYTES: usize = 350;

impl<K: Cacheable> Entry<K> {
    /// What was found for `query` at the version `as_of`, in the view of `epoch` if it may be used there by others too.
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
        let lasts_millis = u32::try_from(lifetime.lasts.as_millis()).unwrap_or(u32::MAX);
        Self { content, as_of, born: lifetime.born, lasts_millis, epoch }
    }

    /// The same value in the view of `epoch`.
    #[must_use]
    pub fn entered(&self, epoch: Epoch) -> Self {
        let Self { content, as_of, born, lasts_millis, epoch: _ } = self;
        Self { content: content.clone(), as_of: *as_of, born: *born, lasts_millis: *lasts_millis, epoch: Some(epoch) }
    }

    /// The value; `None`: an absence.
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

    /// Until when it may be used.
    #[must_use]
    pub fn deadline(&self) -> Moment {
        self.born.after(Duration::from_millis(self.lasts_millis.into()))
    }

    /// Whether it entered `view`.
    #[must_use]
    pub fn is_of(&self, view: &ReplicaView) -> bool {
        self.epoch == Some(view.epoch())
    }

    /// Whether it entered `view` and no change concerns it that was applied there, and its deadline has not passed.
    #[must_use]
    pub fn is_current(&self, view: &ReplicaView, now: Moment) -> bool {
        self.is_of(view) && now < self.deadline() && self.is_covered(view)
    }

    /// Whether no change that was applied in `view` concerns it.
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
type Storage<K> = Cache<<K as Cacheable>::Key, Arc<Entry<K>>, RandomState>;

/// Records and absences, apart: however many keys are made up, they evict no good one.
pub struct L1<K: Cacheable> {
    records: Storage<K>,
    absences: Storage<K>,
}

impl<K: Cacheable> L1<K> {
    /// An empty cache of at most `size` bytes of records and `negative_size` bytes of negative entries.
    #[must_use]
    pub fn new(size: ByteSize, negative_size: ByteSize) -> Self {
        let storage = |size: ByteSize| {
            let weigher = |_: &K::Key, entry: &Arc<Entry<K>>| entry.weight();
            Cache::builder().max_capacity(size.bytes()).weigher(weigher).build_with_hasher(RandomState::default())
        };
        Self { records: storage(size), absences: storage(negative_size) }
    }

    /// What is held of `key`, usable or not.
    #[must_use]
    pub fn get(&self, key: &K::Key) -> Option<Arc<Entry<K>>> {
        self.records.get(key).or_else(|| self.absences.get(key))
    }

    /// Holds a value of `key` in place of what was held before.
    pub fn put(&self, key: K::Key, entry: Arc<Entry<K>>) {
        if entry.value().is_some() {
            self.records.insert(key, entry);
            self.absences.invalidate(&key);
        } else {
            self.absences.insert(key, entry);
            self.records.invalidate(&key);
        }
    }

    /// Every record that is held, usable or not, in an order that is another one in each process.
    pub fn records(&self) -> impl Iterator<Item = (K::Key, Arc<Entry<K>>)> {
        self.records.iter().map(|(key, entry)| (*key, entry))
    }

    /// Holds nothing of `key` any more.
    pub fn forget(&self, key: &K::Key) {
        self.records.invalidate(key);
        self.absences.invalidate(key);
    }

    /// How many values are held. Catches up with moka's own book-keeping first: for scrapes, not for checks.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.records.run_pending_tasks();
        self.absences.run_pending_tasks();
        self.records.entry_count() + self.absences.entry_count()
    }
}
