//! Finds a value through the tiers: L1 in this process, then one flight for everybody through L2 to the store.
//!
//! A hit is synchronous and takes no lock of ours; only a miss is a future. Never decides anything, and never turns an
//! error into an absence.

pub mod api_key;
pub mod cacheable;
pub mod l1;
pub mod l2;
pub mod sampler;
pub mod single_flight;

use std::{sync::Arc, time::Duration};

use tokio::{
    runtime::Handle,
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

use self::{
    cacheable::Cacheable,
    l1::{Entry, L1, Lifetime},
    l2::L2,
    sampler::Samples,
    single_flight::{SingleFlight, LoadPath},
};
use crate::{
    base::{
        breaker::{self, Breaker},
        clock::{Clock, Moment},
        fault::{Fault, Tier},
        metrics::{
            ThreadCounter, ThreadCounters, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
            Opts, Registry, SHORT_SECONDS, register,
        },
        units::ByteSize,
    },
    freshness::{ReplicaView, ReplicaState, history::Provenance, lease::LeaseState},
    record::{Versioned, Version},
    store::Lookup,
};

crate::settings! {
    /// The cache in this process.
    pub struct CacheSettings in "cache" {
        /// Memory for records of keys.
        size: ByteSize = "128MiB",
        /// Memory for absences ("no such key"), apart, so that random keys evict no good one.
        absences_size: ByteSize = "8MiB",
        /// How old a record may get whatever else allows it, +-20 % so that records do not age in step.
        value_age_max: Duration = "15m",
    }
}

/// How old values may get, counted from the database read.
#[derive(Clone, Copy, Debug)]
pub struct Lifetimes {
    /// A record, where its age alone decides.
    pub present: Duration,
    /// An absence, where its age alone decides.
    pub absent: Duration,
    /// Any value, whatever the others say; each value gets this +-20 %.
    pub hard: Duration,
}

/// What a caller may rely on.
#[derive(Clone, Debug)]
pub enum ReadPolicy {
    /// What the view covers: its lease was fresh when the check began, at this moment.
    Lease(Arc<ReplicaView>, Moment),
    /// A read of the store that is sent after the check began, at this moment; what the view knows to be out of date is
    /// refused all the same.
    Store(Arc<ReplicaView>, Moment),
    /// What is young enough.
    Age,
}

/// What bounds the reads that go to the store.
#[derive(Clone, Copy, Debug)]
pub struct StoreLimits {
    /// Reads that may wait or run at one time.
    pub reads_max: u32,
    /// How long one may take.
    pub read_timeout: Duration,
    /// When the store is given a pause.
    pub breaker: breaker::Rules,
}

/// Everything a cache is made of.
pub struct Parts<K: Cacheable> {
    /// The system of record.
    pub store: Arc<dyn Lookup>,
    /// Redis, where it is used.
    pub l2: Option<L2<K>>,
    /// What this replica knows of the store's history.
    pub replica_state: Arc<ReplicaState>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// The runtime on which Redis and the store are asked.
    pub io: Handle,
    /// Bounds on the store.
    pub limits: StoreLimits,
    /// How long values may be used.
    pub lifetimes: Lifetimes,
    /// Sizes.
    pub settings: CacheSettings,
}

/// The tiers of one kind.
pub struct Cache<K: Cacheable> {
    shared: Arc<Shared<K>>,
    single_flight: SingleFlight<K>,
}

/// What a flight needs, and lives on when the caller that began it is gone.
struct Shared<K: Cacheable> {
    l1: L1<K>,
    l2: Option<L2<K>>,
    store: Arc<dyn Lookup>,
    replica_state: Arc<ReplicaState>,
    clock: Arc<dyn Clock>,
    lifetimes: Lifetimes,
    limits: StoreLimits,
    breaker: Breaker,
    slots: Semaphore,
    slots_for_unknown: Semaphore,
    metrics: Metrics,
}

impl<K: Cacheable> Cache<K> {
    /// A cache of `parts`, empty.
    ///
    /// # Errors
    /// When a metric of that name exists already.
    pub fn new(parts: Parts<K>, registry: &Registry, breakers: &IntGaugeVec) -> prometheus::Result<Self> {
        let Parts { store, l2, replica_state, clock, io, limits, lifetimes, settings } = parts;
        let slots = limits.reads_max as usize;
        let shared = Shared {
            l1: L1::new(&settings),
            l2,
            store,
            replica_state,
            clock,
            lifetimes,
            limits,
            breaker: Breaker::new(limits.breaker),
            slots: Semaphore::new(slots),
            slots_for_unknown: Semaphore::new((slots * 3 / 4).max(1)),
            metrics: Metrics::register::<K>(registry, breakers.with_label_values(&[Tier::Store.as_str()]))?,
        };
        Ok(Self { shared: Arc::new(shared), single_flight: SingleFlight::new(io) })
    }

    /// What L1 holds of `key` and `view` covers at `now`; with `by_age` only if it is also young enough. Never waits.
    #[must_use]
    pub fn hit(&self, view: &ReplicaView, key: &K::Key, now: Moment, by_age: bool) -> Option<Arc<Entry<K>>> {
        let Shared { l1, metrics, .. } = &*self.shared;
        let Some(entry) = l1.get(key) else {
            metrics.l1.miss.inc();
            return None;
        };
        if !entry.is_current(view, now) || (by_age && !self.shared.is_young(&entry, now)) {
            metrics.l1.refused.inc();
            return None;
        }
        match entry.value() {
            Some(_) => metrics.l1.hit.inc(),
            None => metrics.l1.negative_hit.inc(),
        }
        Some(entry)
    }

    /// The value asked for by `query`, from L2 or the store, such that `policy` allows its use. However many callers ask
    /// for one key, one flight goes; what it brings is judged by each of them.
    ///
    /// # Errors
    /// A [`Fault`], the same for everybody who waited for that flight.
    ///
    /// # Cancel safety
    /// Safe: the flight goes on and fills the cache for the others. The caller sets the deadline.
    pub async fn find(&self, query: K::Query, policy: &ReadPolicy) -> Result<Loaded<K>, Fault> {
        // The first flight may have been in the air before; the second was not, and only a change that comes between its
        // read and its landing makes a third. More would be a storm of changes.
        for attempt in 0..JOINS_MAX {
            let path = match policy {
                ReadPolicy::Store(..) => LoadPath::Store,
                // What the tiers hold was too old.
                ReadPolicy::Age if attempt > 0 => LoadPath::Store,
                ReadPolicy::Lease(..) | ReadPolicy::Age => LoadPath::Tiers,
            };
            let (loaded, joined) = self.single_flight.join(&self.shared, query.clone(), path).await;
            let loaded = match (loaded, policy) {
                (Ok(loaded), _) => loaded,
                // Somebody else's read failed, which says nothing about one of our own.
                (Err(_), ReadPolicy::Store(..)) if joined && attempt == 0 => continue,
                (Err(fault), _) => return Err(fault),
            };
            if self.shared.allows(policy, &loaded).await {
                return Ok(loaded);
            }
        }
        Err(Fault::Unconfirmed)
    }

    /// Sets the gauges that are read at scrape time.
    pub fn observe_entries(&self) {
        self.shared.metrics.entries.set(self.shared.l1.entries().cast_signed());
    }

    /// Waits until no flight is in the air. Each has a deadline, so this ends.
    pub async fn drain(&self) {
        self.single_flight.drain().await;
    }

    /// Flights in the air.
    #[must_use]
    pub fn loads(&self) -> usize {
        self.single_flight.in_flight()
    }
}

impl<K: Cacheable> Shared<K> {
    /// Whether `policy` allows the use of what a flight brought.
    async fn allows(&self, policy: &ReadPolicy, loaded: &Loaded<K>) -> bool {
        match policy {
            ReadPolicy::Lease(view, began) => {
                if let Some(version) = loaded.ahead_of(view)
                    && !loaded.is_read_after(*began)
                {
                    self.replica_state.reached(view, version).await;
                }
                match loaded.provenance(view) {
                    Provenance::Known => loaded.entry.is_covered(view),
                    // No poll has confirmed its version yet: then it must be this check's own.
                    Provenance::Ahead | Provenance::Foreign => loaded.is_read_after(*began),
                }
            }
            ReadPolicy::Store(view, began) => loaded.is_read_after(*began) && not_refused(view, loaded),
            ReadPolicy::Age => not_refused(&self.replica_state.load(), loaded) && self.is_young(&loaded.entry, self.clock.now()),
        }
    }

    fn is_young(&self, entry: &Entry<K>, now: Moment) -> bool {
        let Lifetimes { present, absent, .. } = self.lifetimes;
        entry.age(now) < if entry.value().is_some() { present } else { absent }
    }

    /// One flight: L2, then the store. What it finds is in L1 when it returns, if its version is known here.
    async fn load(&self, query: &K::Query, path: LoadPath) -> Result<Loaded<K>, Fault> {
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
            // One row by primary key, as long as it still is what was asked for.
            let live = self.read(true, K::load_again(&*self.store, record)).await?;
            if live.value.as_ref().is_some_and(|live| K::is_same(live, record)) {
                return Ok(self.insert_if_confirmed(query, live, Tier::Store));
            }
        }
        let found = self.read(record.is_some(), K::load(&*self.store, query)).await?;
        Ok(self.insert_if_confirmed(query, found, Tier::Store))
    }

    async fn load_from_l2(&self, query: &K::Query) -> Option<Loaded<K>> {
        let found = self.l2.as_ref()?.get(&K::key(query), self.clock.now()).await;
        let outcomes = &self.metrics.l2;
        let found = match found {
            l2::Answer::Found(found) => found,
            l2::Answer::Absent => {
                outcomes.miss.inc();
                return None;
            }
            l2::Answer::Refused => {
                outcomes.refused.inc();
                return None;
            }
            l2::Answer::Down => {
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

    /// One read of the store, within its slots, its deadline and its breaker.
    async fn read<T>(
        &self,
        was_good: bool,
        read: impl Future<Output = Result<Versioned<Option<T>>, Fault>>,
    ) -> Result<Versioned<Option<T>>, Fault> {
        let _slot = self.slot(was_good)?;
        let began = self.clock.now();
        if !self.breaker.admits(began) {
            self.metrics.store.error.inc();
            return Err(Fault::Paused { tier: Tier::Store });
        }
        let limit = self.limits.read_timeout;
        let timer = self.metrics.read_seconds.start_timer();
        let answer = timeout(limit, read).await.unwrap_or(Err(Fault::Timeout { tier: Tier::Store, limit }));
        timer.observe_duration();
        match &answer {
            Ok(versioned) => {
                // One that took longer is of a process that stood still: its time may have been told long ago.
                if self.clock.now().since(versioned.sent_at) <= limit {
                    self.replica_state.database_clock.observe(versioned.sent_at, versioned.read_at);
                }
                self.report(self.breaker.succeeded());
                let outcome = if versioned.value.is_some() { &self.metrics.store.hit } else { &self.metrics.store.miss };
                outcome.inc();
                self.metrics.reads_ok.inc();
            }
            Err(fault) => {
                if fault.blames_tier() {
                    self.report(self.breaker.failed(began, self.clock.now()));
                } else if fault.is_answer() {
                    self.report(self.breaker.succeeded());
                }
                self.metrics.store.error.inc();
                self.metrics.reads_failed.inc();
            }
        }
        answer
    }

    /// A slot for one read; one for a key never seen good leaves a quarter of them free for the others.
    fn slot(&self, was_good: bool) -> Result<(SemaphorePermit<'_>, Option<SemaphorePermit<'_>>), Fault> {
        let overloaded = |_| Fault::Overloaded { limit: "store.reads_max" };
        let unknown = if was_good { None } else { Some(self.slots_for_unknown.try_acquire().map_err(overloaded)?) };
        Ok((self.slots.try_acquire().map_err(overloaded)?, unknown))
    }

    fn report(&self, change: breaker::Change) {
        match change {
            breaker::Change::None => {}
            breaker::Change::Opened => tracing::warn!("the database failed repeatedly and is given a pause"),
            breaker::Change::Closed => tracing::info!("the database is used again"),
        }
        self.metrics.breaker_open.set(i64::from(!self.breaker.is_closed()));
    }

    /// Puts what was found into L1, if its version is known here.
    fn insert_if_confirmed(&self, query: &K::Query, found: Versioned<Option<K::Value>>, tier: Tier) -> Loaded<K> {
        let (view, key) = (self.replica_state.load(), K::key(query));
        let epoch = (view.provenance(&found) == Provenance::Known).then(|| view.epoch());
        let (date, lifetime) = (found.as_ref().map(drop), self.lifetime(K::spread(&key), &found));
        let entry = Arc::new(Entry::new(query, found.value, date.as_of, lifetime, epoch));
        if epoch.is_some() {
            self.l1.put(key, Arc::clone(&entry));
        }
        Loaded { entry, read: Some(Read { date, tier }) }
    }

    /// After a flight has landed: keeps what no poll had confirmed by then, and shares it with other replicas. Absences
    /// never go to Redis.
    async fn publish(&self, query: &K::Query, loaded: Loaded<K>) {
        let Loaded { mut entry, read: Some(Read { date, tier: Tier::Store }) } = loaded else { return };
        let (view, key) = (Arc::clone(&self.replica_state.load()), K::key(query));
        if !entry.is_of(&view) {
            if view.provenance(&date) == Provenance::Ahead && view.lease_state(self.clock.now()) == LeaseState::Fresh {
                // Polls come often: one that takes longer than this has trouble of its own.
                let _ = timeout(self.replica_state.limits().lease, self.replica_state.reached(&view, date.as_of)).await;
            }
            // Also where a poll on another thread confirmed the version after `keep` had looked: nothing was waited for then.
            if view.provenance(&date) == Provenance::Known {
                entry = Arc::new(entry.entered(view.epoch()));
                self.l1.put(key, Arc::clone(&entry));
            }
        }
        let now = self.clock.now();
        if let (Some(l2), Some(value)) = (&self.l2, entry.value())
            && entry.is_current(&view, now)
        {
            l2.put(&key, &date.map(|()| value), entry.deadline().since(now)).await;
        }
    }

    /// How long a value lives. Age is counted from the database read: a value out of Redis has spent part of its life
    /// there.
    fn lifetime(&self, spread: u8, found: &Versioned<Option<K::Value>>) -> Lifetime {
        let age = self.replica_state.database_clock.at(found.sent_at).map_or(Duration::ZERO, |now| now.since(found.read_at));
        Lifetime { born: found.sent_at.before(age), lasts: jittered(self.lifetimes.hard, spread) }
    }
}

/// What a flight brought.
pub struct Loaded<K: Cacheable> {
    /// The value.
    pub entry: Arc<Entry<K>>,
    /// The read that found it; `None`: it was in L1 by then.
    read: Option<Read>,
}

/// Where and when a flight found a value.
#[derive(Clone)]
struct Read {
    date: Versioned<()>,
    /// L2 or the store.
    tier: Tier,
}

impl<K: Cacheable> Loaded<K> {
    /// Where the value belongs in the history of `view`.
    #[must_use]
    pub fn provenance(&self, view: &ReplicaView) -> Provenance {
        match &self.read {
            _ if self.entry.is_of(view) => Provenance::Known,
            Some(read) => view.provenance(&read.date),
            None => Provenance::Foreign,
        }
    }

    /// The version at which the value was read, where no poll of `view` has come to it yet.
    #[must_use]
    pub fn ahead_of(&self, view: &ReplicaView) -> Option<Version> {
        let read = self.read.as_ref()?;
        (self.provenance(view) == Provenance::Ahead).then_some(read.date.as_of)
    }

    /// Whether it comes from a read of the store that was sent after `began`.
    fn is_read_after(&self, began: Moment) -> bool {
        self.read.as_ref().is_some_and(|read| read.tier == Tier::Store && read.date.sent_at >= began)
    }
}

impl<K: Cacheable> Clone for Loaded<K> {
    fn clone(&self) -> Self {
        Self { entry: Arc::clone(&self.entry), read: self.read.clone() }
    }
}

/// Whether no change is known that makes a value out of date. One of a history or a version that no poll has seen yet is
/// newer than all we know.
fn not_refused<K: Cacheable>(view: &ReplicaView, loaded: &Loaded<K>) -> bool {
    loaded.provenance(view) != Provenance::Known || loaded.entry.is_covered(view)
}

/// Flights that one caller joins, at most.
const JOINS_MAX: u32 = 3;

/// `time` +-20 %, by `spread`, so that what was read together does not end together.
fn jittered(time: Duration, spread: u8) -> Duration {
    time.mul_f64(0.8 + 0.4 * f64::from(spread) / 255.0)
}

/// The outcomes of one tier.
struct Outcomes {
    hit: ThreadCounter,
    negative_hit: ThreadCounter,
    miss: ThreadCounter,
    refused: ThreadCounter,
    error: ThreadCounter,
}

struct Metrics {
    l1: Outcomes,
    l2: Outcomes,
    store: Outcomes,
    entries: IntGauge,
    reads_ok: IntCounter,
    reads_failed: IntCounter,
    read_seconds: Histogram,
    breaker_open: IntGauge,
    samples: Samples,
}

impl Metrics {
    fn register<K: Cacheable>(registry: &Registry, breaker_open: IntGauge) -> prometheus::Result<Self> {
        let lookups = ThreadCounters::new(
            Opts::new(
                "trustgate_cache_lookups_total",
                "Lookups by kind of value, tier (l1, l2, store) and outcome (hit, negative_hit, miss, refused, error).",
            ),
            &["kind", "tier", "outcome"],
        );
        let lookups = register(registry, lookups)?;
        let outcomes = |tier: Tier| {
            let outcome = |outcome| lookups.with(&[K::NAME, tier.as_str(), outcome]);
            Outcomes {
                hit: outcome("hit"),
                negative_hit: outcome("negative_hit"),
                miss: outcome("miss"),
                refused: outcome("refused"),
                error: outcome("error"),
            }
        };
        let entries = IntGaugeVec::new(
            Opts::new("trustgate_cache_entries", "Values held in L1, absences included, by kind."),
            &["kind"],
        );
        let reads = IntCounterVec::new(
            Opts::new("trustgate_store_reads_total", "Reads of the database for checks, by outcome (ok, error)."),
            &["outcome"],
        );
        let reads = register(registry, reads)?;
        let seconds = HistogramOpts::new(
            "trustgate_store_read_duration_seconds",
            "How long reads of the database for checks took, in seconds.",
        );
        Ok(Self {
            l1: outcomes(Tier::L1),
            l2: outcomes(Tier::L2),
            store: outcomes(Tier::Store),
            entries: register(registry, entries)?.with_label_values(&[K::NAME]),
            reads_ok: reads.with_label_values(&["ok"]),
            reads_failed: reads.with_label_values(&["error"]),
            read_seconds: register(registry, Histogram::with_opts(seconds.buckets(SHORT_SECONDS.to_vec())))?,
            breaker_open,
            samples: Samples::register::<K>(registry)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::api_key::ApiKey;
    use super::*;
    use crate::{
        base::{
            clock::{DatabaseTime, SystemClock},
            secret::Secret,
        },
        freshness::lease::Limits,
        record::{ApiKeyDigest, Digests, KeyId, Lineage, Nonce, Record, StoredPeppers, TrustId},
        store::{Polled, StoreSettings, open_lookup},
    };

    const LIMITS: Limits = Limits { lease: Duration::from_secs(1), stale: Duration::ZERO };
    const DIGEST: ApiKeyDigest = ApiKeyDigest::from_bytes([1; 32]);

    fn versioned<T>(value: T, version: u64) -> Versioned<T> {
        Versioned {
            value,
            as_of: Version(version),
            nonce: Nonce::default(),
            lineage: Lineage { system: 1, ..Lineage::default() },
            read_at: DatabaseTime::from_micros(0),
            sent_at: SystemClock.now(),
        }
    }

    fn polled(versions: std::ops::RangeInclusive<u64>) -> Polled {
        Polled {
            newest: versioned((), *versions.end()),
            stamped_at: DatabaseTime::from_micros(0),
            oldest: Version(1),
            triggers_intact: true,
            versions: versions.map(|version| (Version(version), Nonce::default())).collect(),
            changes: Vec::new(),
            complete: true,
            peppers: StoredPeppers::default(),
        }
    }

    /// A cache over a store that no test asks.
    fn shared() -> Arc<Shared<ApiKey>> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let url = Some(Secret::new("sqlite:///never/opened".to_owned()));
        let store = open_lookup(&StoreSettings { url, ..StoreSettings::default() }, &|_| None, Arc::clone(&clock));
        let rules = breaker::Rules { failures_max: 5, open_for: Duration::from_secs(1) };
        let parts = Parts {
            store: store.unwrap() as _,
            l2: None,
            replica_state: Arc::new(ReplicaState::new(LIMITS)),
            clock,
            io: Handle::current(),
            limits: StoreLimits { reads_max: 1, read_timeout: Duration::from_secs(1), breaker: rules },
            lifetimes: Lifetimes { present: LIMITS.lease, absent: LIMITS.lease, hard: Duration::from_mins(1) },
            settings: CacheSettings::default(),
        };
        let breakers = IntGaugeVec::new(Opts::new("breakers", "for the test"), &["tier"]).unwrap();
        Cache::new(parts, &Registry::new(), &breakers).unwrap().shared
    }

    #[tokio::test]
    async fn a_value_whose_version_is_confirmed_right_after_its_read_is_kept() {
        let shared = shared();
        let query = Digests { current: DIGEST, older: Vec::new() };
        let record = Record {
            key_id: KeyId(Uuid::from_u128(1)),
            trust_id: TrustId(Uuid::from_u128(2)),
            trust_enabled: true,
            digest: DIGEST,
            scopes: [].into(),
            allowed_cidrs: [].into(),
            not_before: None,
            expires_at: None,
            revoked_at: None,
        };
        shared.replica_state.apply(&polled(5..=5), true);
        for found in [Some(record), None] {
            let newest = shared.replica_state.load().applied().0;
            let loaded = shared.insert_if_confirmed(&query, versioned(found, newest + 1), Tier::Store);
            assert_eq!(loaded.provenance(&shared.replica_state.load()), Provenance::Ahead);
            shared.l1.forget(&DIGEST);
            shared.replica_state.apply(&polled(newest..=newest + 1), true);
            shared.publish(&query, loaded).await;
            let entry = shared.l1.get(&DIGEST).expect("kept");
            assert!(entry.is_current(&shared.replica_state.load(), SystemClock.now()));
        }
    }
}
