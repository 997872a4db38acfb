//! Finds a value through the tiers: L1 in this process, then one flight for everybody through L2 to the store.
//!
//! A hit is synchronous and takes no lock of ours; only a miss is a future. Never decides anything, and never turns an
//! error into an absence.

pub mod api_key;
pub mod flight;
pub mod kind;
pub mod l1;
pub mod l2;

use std::{sync::Arc, time::Duration};

use tokio::{
    runtime::Handle,
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

use self::{
    flight::Flights,
    kind::Kind,
    l1::{Held, L1},
    l2::L2,
};
use crate::{
    breaker::{self, Breaker},
    clock::{Clock, Moment},
    fault::{Fault, Tier},
    freshness::View,
    metrics::{
        Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, SHORT_SECONDS,
        register,
    },
    record::Dated,
    store::Lookup,
    units::ByteSize,
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

/// How long values may be used, counted from the database read.
#[derive(Clone, Copy, Debug)]
pub struct Lifetimes {
    /// A record.
    pub present: Duration,
    /// An absence.
    pub absent: Duration,
    /// Any value, whatever the others say; each value gets this +-20 %.
    pub hard: Duration,
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
pub struct Parts<K: Kind> {
    /// The system of record.
    pub store: Arc<dyn Lookup>,
    /// Redis, where it is used.
    pub l2: Option<L2<K>>,
    /// What this replica knows of the store's history.
    pub view: Arc<View>,
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
pub struct Cache<K: Kind> {
    shared: Arc<Shared<K>>,
    flights: Flights<K>,
}

/// What a flight needs, and lives on when the caller that began it is gone.
struct Shared<K: Kind> {
    l1: L1<K>,
    l2: Option<L2<K>>,
    store: Arc<dyn Lookup>,
    view: Arc<View>,
    clock: Arc<dyn Clock>,
    lifetimes: Lifetimes,
    limits: StoreLimits,
    breaker: Breaker,
    slots: Semaphore,
    slots_for_unknown: Semaphore,
    metrics: Metrics,
}

impl<K: Kind> Cache<K> {
    /// A cache of `parts`, empty.
    ///
    /// # Errors
    /// When a metric of that name exists already.
    pub fn new(parts: Parts<K>, registry: &Registry, breakers: &IntGaugeVec) -> prometheus::Result<Self> {
        let Parts { store, l2, view, clock, io, limits, lifetimes, settings } = parts;
        let slots = limits.reads_max as usize;
        let shared = Shared {
            l1: L1::new(&settings),
            l2,
            store,
            view,
            clock,
            lifetimes,
            limits,
            breaker: Breaker::new(limits.breaker),
            slots: Semaphore::new(slots),
            slots_for_unknown: Semaphore::new((slots * 3 / 4).max(1)),
            metrics: Metrics::register::<K>(registry, breakers.with_label_values(&[Tier::Store.as_str()]))?,
        };
        Ok(Self { shared: Arc::new(shared), flights: Flights::new(io) })
    }

    /// What L1 holds of `key`, if it may be used at `now`. Never waits.
    #[must_use]
    pub fn hit(&self, key: &K::Key, now: Moment) -> Option<Arc<Held<K>>> {
        let Shared { l1, view, metrics, .. } = &*self.shared;
        let Some(held) = l1.get(key) else {
            metrics.l1.miss.inc();
            return None;
        };
        if !held.is_usable(view, now) {
            metrics.l1.refused.inc();
            return None;
        }
        match held.value() {
            Some(_) => metrics.l1.hit.inc(),
            None => metrics.l1.negative_hit.inc(),
        }
        Some(held)
    }

    /// The value asked for by `query`, from L2 or the store. However many callers ask for one key, one flight goes.
    ///
    /// # Errors
    /// A [`Fault`], the same for everybody who waited for that flight.
    ///
    /// # Cancel safety
    /// Safe: the flight goes on and fills the cache for the others.
    pub async fn find(&self, query: K::Query) -> Result<Arc<Held<K>>, Fault> {
        // Twice: a clearing may come between a flight's read and its landing. A third time would be a storm of them.
        for _ in 0..2 {
            let held = self.flights.join(&self.shared, query.clone()).await?;
            if self.shared.view.stands(held.dated()) {
                return Ok(held);
            }
        }
        Err(Fault::Unconfirmed)
    }

    /// The value as the store holds it now, from a read that begins after this call: nobody else's flight is joined.
    /// Where L1 holds a record, its row is read by primary key; where that row is not what was held, the full look-up
    /// follows.
    ///
    /// # Errors
    /// A [`Fault`] of the store.
    ///
    /// # Cancel safety
    /// Safe: the read goes on to its deadline and its connection is not lost.
    pub async fn find_live(&self, query: K::Query) -> Result<Arc<Held<K>>, Fault> {
        let shared = Arc::clone(&self.shared);
        let held = shared.l1.get(&K::key(&query)).filter(|held| held.is_usable(&shared.view, shared.clock.now()));
        match &held {
            Some(held) if held.value().is_some() => shared.metrics.l1.hit.inc(),
            Some(_) => shared.metrics.l1.negative_hit.inc(),
            None => shared.metrics.l1.miss.inc(),
        }
        let read = async move {
            if let Some(record) = held.as_deref().and_then(Held::value) {
                let live = shared.read(true, K::load_again(&*shared.store, record)).await?;
                if live.value.as_ref().is_some_and(|live| K::is_same(live, record)) {
                    return Ok(Arc::new(shared.held(K::key(&query), live)));
                }
            }
            let found = shared.read(held.is_some(), K::load(&*shared.store, &query)).await?;
            Ok(shared.keep(K::key(&query), found))
        };
        self.flights.run(read).await
    }

    /// Sets the gauges that are read at scrape time.
    pub fn observe_entries(&self) {
        self.shared.metrics.entries.set(self.shared.l1.entries().cast_signed());
    }

    /// Waits until no flight is in the air. Each has a deadline, so this ends.
    pub async fn drain(&self) {
        self.flights.drain().await;
    }

    /// Flights in the air.
    #[must_use]
    pub fn flights(&self) -> usize {
        self.flights.in_the_air()
    }
}

impl<K: Kind> Shared<K> {
    /// One flight: L2, then the store. What it finds is in L1 when it returns; the tier is where it was found.
    async fn load(&self, query: &K::Query) -> Result<(Arc<Held<K>>, Tier), Fault> {
        let key = K::key(query);
        let was_good = self.l1.get(&key).is_some_and(|held| held.value().is_some());
        if let Some(held) = self.load_from_l2(&key).await {
            return Ok((held, Tier::L2));
        }
        let found = self.read(was_good, K::load(&*self.store, query)).await?;
        Ok((self.keep(key, found), Tier::Store))
    }

    async fn load_from_l2(&self, key: &K::Key) -> Option<Arc<Held<K>>> {
        let found = self.l2.as_ref()?.get(key, self.clock.now()).await;
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
        let held = self.held(*key, found.map(Some));
        if !held.entered() || !held.is_usable(&self.view, self.clock.now()) {
            outcomes.refused.inc();
            return None;
        }
        outcomes.hit.inc();
        let held = Arc::new(held);
        self.l1.put(Arc::clone(&held));
        Some(held)
    }

    /// One read of the store, within its slots, its deadline and its breaker.
    async fn read<T>(
        &self,
        was_good: bool,
        read: impl Future<Output = Result<Dated<Option<T>>, Fault>>,
    ) -> Result<Dated<Option<T>>, Fault> {
        let _slot = self.slot(was_good)?;
        if !self.breaker.admits(self.clock.now()) {
            self.metrics.store.error.inc();
            return Err(Fault::Paused { tier: Tier::Store });
        }
        let limit = self.limits.read_timeout;
        let timer = self.metrics.read_seconds.start_timer();
        let answer = timeout(limit, read).await.unwrap_or(Err(Fault::Timeout { tier: Tier::Store, limit }));
        timer.observe_duration();
        match &answer {
            Ok(dated) => {
                self.view.database_clock.observe(dated.sent_at, dated.read_at);
                self.report(self.breaker.succeeded());
                let outcome = if dated.value.is_some() { &self.metrics.store.hit } else { &self.metrics.store.miss };
                outcome.inc();
                self.metrics.reads_ok.inc();
            }
            Err(fault) => {
                if fault.blames_tier() {
                    self.report(self.breaker.failed(self.clock.now()));
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

    /// Puts what the store said into L1.
    fn keep(&self, key: K::Key, found: Dated<Option<K::Value>>) -> Arc<Held<K>> {
        let held = Arc::new(self.held(key, found));
        if held.entered() {
            self.l1.put(Arc::clone(&held));
        }
        held
    }

    /// A value with the deadline it may be used until.
    fn held(&self, key: K::Key, found: Dated<Option<K::Value>>) -> Held<K> {
        let Lifetimes { present, absent, hard } = self.lifetimes;
        let life = if found.value.is_some() { present } else { absent };
        let life = life.min(jittered(hard, K::spread(&key)));
        // Age is counted from the database read: a value out of Redis has spent part of its life there.
        let age = self.view.database_clock.at(found.sent_at).map_or(Duration::ZERO, |now| now.since(found.read_at));
        let deadline = found.sent_at.after(life.saturating_sub(age));
        let epoch = self.view.admit(&found);
        Held::new(key, found, deadline, epoch)
    }

    /// Shares a value with other replicas. Absences never go to Redis.
    async fn share(&self, held: &Held<K>) {
        if let (Some(l2), true) = (&self.l2, held.entered()) {
            l2.put(held, self.clock.now()).await;
        }
    }
}

/// `time` +-20 %, by `spread`, so that what was read together does not end together.
fn jittered(time: Duration, spread: u8) -> Duration {
    time.mul_f64(0.8 + 0.4 * f64::from(spread) / 255.0)
}

/// The outcomes of one tier.
struct Outcomes {
    hit: IntCounter,
    negative_hit: IntCounter,
    miss: IntCounter,
    refused: IntCounter,
    error: IntCounter,
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
}

impl Metrics {
    fn register<K: Kind>(registry: &Registry, breaker_open: IntGauge) -> prometheus::Result<Self> {
        let lookups = IntCounterVec::new(
            Opts::new(
                "trustgate_cache_lookups_total",
                "Lookups by kind of value, tier (l1, l2, store) and outcome (hit, negative_hit, miss, refused, error).",
            ),
            &["kind", "tier", "outcome"],
        );
        let lookups = register(registry, lookups)?;
        let outcomes = |tier: Tier| {
            let outcome = |outcome| lookups.with_label_values(&[K::NAME, tier.as_str(), outcome]);
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
        })
    }
}
