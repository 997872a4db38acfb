//! Looks up values in the cache tiers: first in L1 in this process, then in L2 (Redis) and the store, through one load
//! that concurrent callers share.
//!
//! A hit in L1 is synchronous and takes none of this crate's locks; only a miss needs a future. The cache makes no
//! decisions about requests, and it does not turn an error into "not found" (`tests/e2e/outage.rs`).

pub(crate) mod api_key;
pub(crate) mod cacheable;
pub(crate) mod l1;
pub(crate) mod l2;
pub(crate) mod loaded;
pub(crate) mod loader;
pub(crate) mod metrics;
pub(crate) mod policy;
pub(crate) mod sampler;
pub(crate) mod single_flight;

use std::{sync::Arc, time::Duration};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use self::{
    cacheable::Cacheable,
    l1::{Entry, L1},
    l2::L2,
    loader::{LoadPath, Loader, StoreReads},
    metrics::CacheMetrics,
    policy::{Candidate, is_usable},
    single_flight::{Joined, SingleFlight},
};
pub(crate) use self::{
    loaded::Loaded,
    loader::StoreLimits,
    policy::{AgeLimits, ReadPolicy},
};
use crate::{
    base::{
        clock::{Clock, Moment},
        fault::{Fault, Tier},
        jitter::Jitter,
        metrics::{IntGaugeVec, Registry},
        units::ByteSize,
    },
    freshness::{ReplicaState, ReplicaView},
    store::Lookup,
};

crate::settings! {
    /// The cache in the memory of this process (L1).
    pub struct CacheSettings in "cache" {
        /// Memory for cached key records. When this memory is full, entries are evicted.
        size: ByteSize = "128MiB",
        /// Memory for negative entries ("not found"). This memory is separate from `size`, so that requests with random
        /// keys do not evict the records of valid keys.
        negative_size: ByteSize = "8MiB",
        /// The maximum age of a cache entry in any mode, counted from the database read. It varies from entry to entry
        /// by up to 20 % in either direction, so that entries do not all expire at the same time.
        value_age_max: Duration = "15m",
    }
}

/// The dependencies and settings of a cache.
pub struct CacheParts<K: Cacheable> {
    /// The database.
    pub store: Arc<dyn Lookup>,
    /// L2; `None` if Redis is not configured.
    pub l2: Option<L2<K>>,
    /// The view of the change log, and the data that survives when the view is replaced.
    pub replica_state: Arc<ReplicaState>,
    pub clock: Arc<dyn Clock>,
    /// The runtime on which loads read from Redis and the store.
    pub io: Handle,
    /// The limits on store reads.
    pub limits: StoreLimits,
    /// The maximum ages of values.
    pub ages: AgeLimits,
    /// The sizes of L1.
    pub settings: CacheSettings,
}

/// The cache for one kind of value. Reads L1, Redis and the store, with one load shared by concurrent callers.
pub struct Cache<K: Cacheable> {
    loader: Arc<Loader<K>>,
    loads: SingleFlight<(K::Key, LoadPath), Loaded<K>>,
}

/// The inputs of the freshness rule that stay the same during one check.
#[derive(Clone, Debug)]
pub struct ReadContext {
    /// The check's read policy.
    pub policy: ReadPolicy,
    /// The replica's view when the check began.
    pub view: Arc<ReplicaView>,
    /// When the check began.
    pub began: Moment,
}

impl<K: Cacheable> Cache<K> {
    /// Creates an empty cache.
    ///
    /// # Errors
    /// Returns an error if a metric with the same name is already registered.
    pub fn new(parts: CacheParts<K>, registry: &Registry, breakers: &IntGaugeVec) -> prometheus::Result<Self> {
        let CacheParts { store, l2, replica_state, clock, io, limits, ages, settings } = parts;
        let breaker_open = breakers.with_label_values(&[Tier::Store.as_str()]);
        let loader = Loader {
            l1: L1::new(settings.size, settings.negative_size),
            l2,
            store,
            replica_state,
            clock,
            ages,
            metrics: CacheMetrics::register::<K>(registry)?,
            reads: StoreReads::new(limits, breaker_open),
        };
        Ok(Self { loader: Arc::new(loader), loads: SingleFlight::new(io) })
    }

    /// Returns the L1 entry for `key` if a check with `policy` and `view` may use that entry at `now`. Does not wait.
    #[must_use]
    pub fn hit(&self, policy: ReadPolicy, view: &ReplicaView, key: &K::Key, now: Moment) -> Option<Arc<Entry<K>>> {
        if policy == ReadPolicy::Store {
            return None; // no cache entry is usable under this policy, so do not count a lookup
        }
        let Loader { l1, metrics, ages, .. } = &*self.loader;
        let Some(entry) = l1.get(key) else {
            metrics.l1.miss.inc();
            return None;
        };
        if !is_usable(policy, &Candidate::Cached(&entry), view, ages, now) {
            metrics.l1.refused.inc();
            return None;
        }
        match entry.value() {
            Some(_) => metrics.l1.hit.inc(),
            None => metrics.l1.negative_hit.inc(),
        }
        Some(entry)
    }

    /// Loads the value for `query` from L2 or the store, and loads it again if `context` does not allow the use of the
    /// result. Concurrent callers share one load, and each caller judges the result by its own context.
    ///
    /// # Errors
    /// Returns the [`Fault`] of a load, which all callers that waited for that load share, or [`Fault::Unconfirmed`] if
    /// none of `JOINS_MAX` loads returned a usable value.
    ///
    /// # Cancel safety
    /// Safe: the load continues and fills the cache for later checks. The caller sets the deadline.
    pub async fn find(&self, query: K::Query, context: &ReadContext) -> Result<Loaded<K>, Fault> {
        for attempt in 0..JOINS_MAX {
            let path = match context.policy {
                ReadPolicy::GrantOnly | ReadPolicy::Store => LoadPath::Store,
                // The first load, which may read from L2, returned a value that is too old.
                ReadPolicy::Age if attempt > 0 => LoadPath::Store,
                ReadPolicy::Lease | ReadPolicy::Age => LoadPath::Tiers,
            };
            let loaded = match self.join_or_load(query.clone(), path).await {
                (Ok(loaded), _) => loaded,
                // A load that another caller started has failed. A new load may succeed.
                (Err(_), Joined::Other) if attempt == 0 && path == LoadPath::Store => continue,
                (Err(fault), _) => return Err(fault),
            };
            if self.allows(context, &loaded).await {
                return Ok(loaded);
            }
        }
        Err(Fault::Unconfirmed)
    }

    async fn join_or_load(&self, query: K::Query, path: LoadPath) -> (Result<Loaded<K>, Fault>, Joined) {
        let key = K::key(&query);
        let cached = || {
            let Loader { l1, replica_state, clock, .. } = &*self.loader;
            let (view, now) = (replica_state.load(), clock.now());
            let entry = l1.get(&key).filter(|entry| path == LoadPath::Tiers && entry.is_current(&view, now))?;
            Some(Loaded { entry, read: None })
        };
        let start = || {
            let (loader, publisher, loaded_query) = (Arc::clone(&self.loader), Arc::clone(&self.loader), query.clone());
            let load = async move { loader.load(&loaded_query, path).await };
            let publish = move |loaded| async move { publisher.publish(&query, loaded).await };
            (load, publish)
        };
        self.loads.join_or_start((key, path), cached, start).await
    }

    /// Returns true if `context` allows the use of `loaded`, the result of a load. May wait until a poll confirms the
    /// version of `loaded`.
    async fn allows(&self, context: &ReadContext, loaded: &Loaded<K>) -> bool {
        let Loader { replica_state, clock, ages, .. } = &*self.loader;
        let ReadContext { policy, view, began } = context;
        let candidate = Candidate::Loaded { loaded, began: *began };
        if *policy == ReadPolicy::Age {
            // Under this policy, the state when the check began does not matter, so use the current view and time.
            return is_usable(*policy, &candidate, &replica_state.load(), ages, clock.now());
        }
        if *policy == ReadPolicy::Lease
            && let Some(version) = loaded.ahead_of(view)
            && !loaded.is_read_after(*began)
        {
            // Wait for a poll, which either confirms the version or shows that it belongs to a different history.
            replica_state.reached(view, version).await;
        }
        is_usable(*policy, &candidate, view, ages, clock.now())
    }

    /// Compares cached records with the database, one record per `interval`, until `stop` is cancelled.
    pub async fn sample(&self, interval: Duration, jitter: Jitter, stop: CancellationToken) {
        sampler::sample(&self.loader, interval, jitter, stop).await;
    }

    /// Sets the gauge of cache entries, whose value is computed at scrape time.
    pub fn observe_entries(&self) {
        self.loader.metrics.entries.set(self.loader.l1.entries().cast_signed());
    }

    /// Waits until no load is in flight. Each load has a timeout, so this wait ends.
    pub async fn drain(&self) {
        self.loads.drain().await;
    }

    /// Returns the number of loads in flight, including loads whose value is still being published.
    #[must_use]
    pub fn loads(&self) -> usize {
        self.loads.tasks()
    }
}

/// The maximum number of loads that one call to [`Cache::find`] joins or starts. The first load may have started before
/// the call, but the second starts after it. A third load is needed only if a change is applied while the second is
/// running.
const JOINS_MAX: u32 = 3;

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::api_key::ApiKey;
    use super::*;
    use crate::{
        base::{
            breaker,
            clock::{DatabaseTime, SystemClock},
            metrics::Opts,
            secret::Secret,
        },
        freshness::{history::Provenance, lease::LeaseLimits, replica_state::ChangeLog},
        record::{ApiKeyDigest, Digests, KeyId, Lineage, Nonce, Record, StoredPeppers, TrustId, Version, Versioned},
        store::{Polled, StoreSettings, open_lookup},
    };

    const LIMITS: LeaseLimits = LeaseLimits { lease: Duration::from_secs(1), stale: Duration::ZERO };
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

    /// Creates a cache loader. The tests do not read from its store.
    fn loader() -> Arc<Loader<ApiKey>> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let url = Some(Secret::new("sqlite:///never/opened".to_owned()));
        let store = open_lookup(&StoreSettings { url, ..StoreSettings::default() }, &|_| None, Arc::clone(&clock));
        let rules = breaker::Rules { failures_max: 5, open_for: Duration::from_secs(1) };
        let parts = CacheParts {
            store: store.unwrap() as _,
            l2: None,
            replica_state: Arc::new(ReplicaState::new(LIMITS)),
            clock,
            io: Handle::current(),
            limits: StoreLimits { reads_max: 1, read_timeout: Duration::from_secs(1), breaker: rules },
            ages: AgeLimits { record: LIMITS.lease, negative: LIMITS.lease, any: Duration::from_mins(1) },
            settings: CacheSettings::default(),
        };
        let breakers = IntGaugeVec::new(Opts::new("breakers", "for the test"), &["tier"]).unwrap();
        Cache::new(parts, &Registry::new(), &breakers).unwrap().loader
    }

    #[tokio::test]
    async fn value_that_a_poll_confirms_right_after_its_read_enters_l1() {
        let loader = loader();
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
        loader.replica_state.apply(&polled(5..=5), ChangeLog::Present);
        for found in [Some(record), None] {
            let newest = loader.replica_state.load().applied().0;
            let result = loader.insert_if_confirmed(&query, versioned(found, newest + 1), Tier::Store);
            assert_eq!(result.provenance(&loader.replica_state.load()), Provenance::Ahead);
            loader.l1.forget(&DIGEST);
            loader.replica_state.apply(&polled(newest..=newest + 1), ChangeLog::Present);
            loader.publish(&query, result).await;
            let entry = loader.l1.get(&DIGEST).expect("in L1");
            assert!(entry.is_current(&loader.replica_state.load(), SystemClock.now()));
        }
    }
}
