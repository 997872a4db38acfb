//! Loads values: L2 first, then the store. A loaded value enters L1 once a poll has confirmed its version.
//!
//! Checks read the store only through this module, so it also enforces the limits, the timeout and the circuit breaker
//! of store reads.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

use super::{
    cacheable::Cacheable,
    l1::{Entry, L1, Lifetime},
    l2::{self, L2},
    loaded::{Loaded, TierRead},
    metrics::CacheMetrics,
    policy::AgeLimits,
};
use crate::{
    base::{
        breaker::{self, Breaker},
        clock::Clock,
        fault::{Fault, Tier},
        jitter,
        metrics::IntGauge,
    },
    freshness::{ReplicaState, history::Provenance, lease::LeaseState},
    record::Versioned,
    store::Lookup,
};

/// The limits on store reads.
#[derive(Clone, Copy, Debug)]
pub struct StoreLimits {
    /// The maximum number of reads that may wait or run at the same time.
    pub reads_max: u32,
    /// The timeout of one read.
    pub read_timeout: Duration,
    /// The rules of the circuit breaker.
    pub breaker: breaker::Rules,
}

/// The tiers that a load reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum LoadPath {
    /// L2, then the store.
    Tiers,
    /// Only the store.
    Store,
}

/// Indicates whether L1 has a record of the key for which the store is read. A quarter of the slots is reserved for
/// keys with a record in L1, so that a flood of unknown keys cannot use all slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// L1 has a record of the key.
    Good,
    /// L1 has no record of the key.
    Unknown,
}

/// The dependencies of loads. Each load runs in a separate task, which shares this loader, so that the load continues
/// even if the caller that started it is cancelled.
pub(crate) struct Loader<K: Cacheable> {
    pub(crate) l1: L1<K>,
    pub(crate) l2: Option<L2<K>>,
    pub(crate) store: Arc<dyn Lookup>,
    pub(crate) replica_state: Arc<ReplicaState>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) ages: AgeLimits,
    pub(crate) metrics: CacheMetrics,
    pub(crate) reads: StoreReads,
}

/// The slots, the timeout and the circuit breaker of store reads.
pub(crate) struct StoreReads {
    timeout: Duration,
    breaker: Breaker,
    slots: Semaphore,
    slots_for_unknown: Semaphore,
}

impl StoreReads {
    /// Creates free slots and a closed circuit breaker, whose gauge is `breaker_open`.
    pub(crate) fn new(limits: StoreLimits, breaker_open: IntGauge) -> Self {
        let slots = limits.reads_max as usize;
        let labels =
            breaker::Labels { tier: "database", effect: "checks that need a read get a fault", open: breaker_open };
        Self {
            timeout: limits.read_timeout,
            breaker: Breaker::new(limits.breaker, labels),
            slots: Semaphore::new(slots),
            slots_for_unknown: Semaphore::new((slots * 3 / 4).max(1)),
        }
    }

    fn slot(&self, seen: Seen) -> Result<(SemaphorePermit<'_>, Option<SemaphorePermit<'_>>), Fault> {
        let overloaded = |_| Fault::Overloaded { limit: "store.reads_max" };
        let unknown = match seen {
            Seen::Good => None,
            Seen::Unknown => Some(self.slots_for_unknown.try_acquire().map_err(overloaded)?),
        };
        Ok((self.slots.try_acquire().map_err(overloaded)?, unknown))
    }
}

impl<K: Cacheable> Loader<K> {
    /// Runs one load. When this returns, the value is in L1 if a poll has already confirmed its version.
    pub(crate) async fn load(&self, query: &K::Query, path: LoadPath) -> Result<Loaded<K>, Fault> {
        let before = self.l1.get(&K::key(query));
        let record = before.as_deref().and_then(Entry::value);
        if path == LoadPath::Tiers
            && let Some(loaded) = self.load_from_l2(query).await
        {
            return Ok(loaded);
        }
        if path == LoadPath::Store
            && let Some(record) = record
        {
            // First read the row by its primary key, which is cheaper. Use the row only if it still answers the query.
            let live = self.read(Seen::Good, K::load_again(&*self.store, record)).await?;
            if live.value.as_ref().is_some_and(|live| K::is_same(live, record)) {
                return Ok(self.insert_if_confirmed(query, live, Tier::Store));
            }
        }
        let seen = if record.is_some() { Seen::Good } else { Seen::Unknown };
        let found = self.read(seen, K::load(&*self.store, query)).await?;
        Ok(self.insert_if_confirmed(query, found, Tier::Store))
    }

    async fn load_from_l2(&self, query: &K::Query) -> Option<Loaded<K>> {
        let found = self.l2.as_ref()?.get(&K::key(query), self.clock.now()).await;
        let outcomes = &self.metrics.l2;
        let found = match found {
            l2::L2Lookup::Found(found) => found,
            l2::L2Lookup::Absent => {
                outcomes.miss.inc();
                return None;
            }
            l2::L2Lookup::Refused => {
                outcomes.refused.inc();
                return None;
            }
            l2::L2Lookup::Down => {
                outcomes.error.inc();
                return None;
            }
        };
        let loaded = self.insert_if_confirmed(query, found.map(Some), Tier::L2);
        if !loaded.entry.is_current(&self.replica_state.load(), self.clock.now()) {
            outcomes.refused.inc();
            return None;
        }
        outcomes.hit.inc();
        Some(loaded)
    }

    /// Runs one read of the store, subject to the slots, the timeout and the circuit breaker.
    pub(crate) async fn read<T>(
        &self,
        seen: Seen,
        read: impl Future<Output = Result<Versioned<Option<T>>, Fault>>,
    ) -> Result<Versioned<Option<T>>, Fault> {
        let _slot = self.reads.slot(seen)?;
        let began = self.clock.now();
        if !self.reads.breaker.admits(began) {
            self.metrics.store.error.inc();
            return Err(Fault::Paused { tier: Tier::Store });
        }
        let limit = self.reads.timeout;
        let timer = self.metrics.read_seconds.start_timer();
        let answer = timeout(limit, read).await.unwrap_or(Err(Fault::Timeout { tier: Tier::Store, limit }));
        timer.observe_duration();
        match &answer {
            Ok(found) => {
                // If the reply took longer than `limit`, this process was paused and `read_at` may be old, so do not
                // set the database clock from it.
                if self.clock.now().since(found.sent_at) <= limit {
                    self.replica_state.database_clock.observe(found.sent_at, found.read_at);
                }
                self.reads.breaker.succeeded();
                let outcome = if found.value.is_some() { &self.metrics.store.hit } else { &self.metrics.store.miss };
                outcome.inc();
                self.metrics.reads_ok.inc();
            }
            Err(fault) => {
                if fault.blames_tier() {
                    self.reads.breaker.failed(began, self.clock.now());
                } else if fault.is_answer() {
                    self.reads.breaker.succeeded();
                }
                self.metrics.store.error.inc();
                self.metrics.reads_failed.inc();
            }
        }
        answer
    }

    /// Creates an entry from the result of a read, and puts the entry into L1 if a poll has confirmed the version of
    /// the read.
    pub(crate) fn insert_if_confirmed(
        &self,
        query: &K::Query,
        found: Versioned<Option<K::Value>>,
        tier: Tier,
    ) -> Loaded<K> {
        let (view, key) = (self.replica_state.load(), K::key(query));
        let epoch = (view.provenance(&found) == Provenance::Known).then(|| view.epoch());
        let (version, lifetime) = (found.as_ref().map(drop), self.lifetime(K::spread(&key), &found));
        let entry = Arc::new(Entry::new(query, found.value, version.as_of, lifetime, epoch));
        if epoch.is_some() {
            self.l1.put(key, Arc::clone(&entry));
        }
        Loaded { entry, read: Some(TierRead { version, tier }) }
    }

    /// Runs after the waiters of a load have received their value. If no poll has confirmed the version of the value
    /// yet, waits for a poll and then puts the value into L1. Also writes records to Redis, where other replicas find
    /// them, but does not write negative entries to Redis.
    pub(crate) async fn publish(&self, query: &K::Query, loaded: Loaded<K>) {
        let Loaded { mut entry, read: Some(TierRead { version, tier: Tier::Store }) } = loaded else { return };
        let (view, key) = (Arc::clone(&self.replica_state.load()), K::key(query));
        if !entry.is_of(&view) {
            if view.provenance(&version) == Provenance::Ahead && view.lease_state(self.clock.now()) == LeaseState::Fresh
            {
                // Wait no longer than the duration of the lease: if no poll succeeds in that time, the lease has
                // expired.
                let lease = self.replica_state.limits().lease;
                let _ = timeout(lease, self.replica_state.reached(&view, version.as_of)).await;
            }
            // Test again even if this function did not wait: a poll on another thread may have confirmed the version
            // after `insert_if_confirmed` tested it.
            if view.provenance(&version) == Provenance::Known {
                entry = Arc::new(entry.entered(view.epoch()));
                self.l1.put(key, Arc::clone(&entry));
            }
        }
        let now = self.clock.now();
        if let (Some(l2), Some(value)) = (&self.l2, entry.value())
            && entry.is_current(&view, now)
        {
            l2.put(&key, &version.map(|()| value), entry.deadline().since(now)).await;
        }
    }

    /// Returns the lifetime of an entry. The lifetime starts at the database read, so it includes the time that the
    /// value spent in Redis.
    fn lifetime(&self, spread: u8, found: &Versioned<Option<K::Value>>) -> Lifetime {
        let now = self.replica_state.database_clock.at(found.sent_at);
        let age = now.map_or(Duration::ZERO, |now| now.since(found.read_at));
        // Add jitter, so that entries that were read at the same time do not expire at the same time.
        let lasts = jitter::vary(self.ages.any, 0.2, f64::from(spread) / 255.0);
        Lifetime { born: found.sent_at.before(age), lasts }
    }
}
