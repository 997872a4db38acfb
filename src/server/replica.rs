//! The wiring of what decides checks, without a listener: the view and the poll that keeps it, the caches, the checker.
//!
//! Simulations run it as it is, in a world of their own. Never decides anything.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::{
    runtime::Handle,
    sync::watch,
    task::{Id, JoinError, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::error::AppError;
use crate::{
    base::{
        breaker,
        clock::Clock,
        fault::{Fault, Tier},
        jitter::Jitter,
        metrics::{IntGaugeVec, Opts, Registry, register},
    },
    cache::{
        AgeLimits, Cache, CacheParts, StoreLimits,
        api_key::ApiKey,
        l2::{L2, MacKey},
    },
    config::Config,
    ext_authz::{
        check::{Checker, CheckerParts},
        credential::Hasher,
    },
    freshness::{
        Freshness, ReplicaState,
        deny_list::{DenyList, DenyMetrics, redis::SharedList},
        pepper::{PepperMetrics, Peppers, Reread},
        poll::{Poll, PollMetrics},
    },
    redis::{Link, Redis, RedisMetrics, listen, read_mac_key},
    store::{self, Missing, Source, StoreError},
};

/// What is around a replica.
pub struct ReplicaDeps {
    /// The database.
    pub source: Arc<dyn Source>,
    /// What people know the database by.
    pub place: String,
    /// The way to Redis, where it is used.
    pub redis: Option<Arc<dyn Link>>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// The replica, from its start to its end.
    pub id: Uuid,
    /// What people know it by.
    pub name: String,
    /// Where the database and Redis are asked.
    pub io: Handle,
    /// Where the poll runs.
    pub poll: Handle,
    /// Ends all of it.
    pub stop: CancellationToken,
}

/// What decides checks.
pub struct Replica {
    /// What decides.
    pub checker: Arc<Checker>,
    /// Where records are found.
    pub cache: Arc<Cache<ApiKey>>,
    /// What is known of the store's history.
    pub replica_state: Arc<ReplicaState>,
    /// What the poll looks like from outside.
    pub poll: PollMetrics,
    /// Whether the lease is fresh.
    pub fresh: watch::Receiver<bool>,
}

/// Tasks that run until the server stops, each with its name. One that ends before ends the server.
#[derive(Default)]
pub struct Tasks {
    running: JoinSet<Result<(), AppError>>,
    names: HashMap<Id, &'static str>,
}

impl Tasks {
    /// Runs `task` on `runtime`.
    pub fn spawn_on(
        &mut self,
        name: &'static str,
        task: impl Future<Output = Result<(), AppError>> + Send + 'static,
        runtime: &Handle,
    ) {
        let task = self.running.spawn_on(task, runtime);
        self.names.insert(task.id(), name);
    }

    /// Returns the next task that ends, with what it returned; `None` once there is none left.
    ///
    /// # Cancel safety
    /// Safe: no task is lost.
    pub async fn join_next(&mut self) -> Option<(&'static str, Result<(), AppError>)> {
        let ended = self.running.join_next_with_id().await?;
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        // `spawn_on` gave it one.
        let name = self.names.remove(&id).unwrap_or("task");
        let outcome = ended.map_or_else(|panic| Err(AppError::Ended(name, panic.to_string())), |(_, outcome)| outcome);
        Some((name, outcome))
    }
}

impl Replica {
    /// Starts everything that a replica does by itself, as `tasks` that end with `deps.stop`.
    ///
    /// # Errors
    /// A file with a secret or the deny list cannot be read.
    pub fn start(config: &Config, deps: ReplicaDeps, registry: &Registry, tasks: &mut Tasks) -> Result<Self, AppError> {
        let ReplicaDeps { source, place, redis, clock, id, name, io, poll: poll_runtime, stop } = deps;
        let replica_state = Arc::new(ReplicaState::new(config.freshness.limits()));
        let breakers = breaker_gauges(registry)?;
        let l2 = match &redis {
            Some(link) => Some(start_redis(config, link, registry, &breakers, &clock, &stop, (tasks, &io))?),
            None => None, // and no metric says that it is down
        };
        let mac_key = l2.as_ref().map(|(_, mac_key)| Arc::clone(mac_key));
        let hints = redis.zip(l2.as_ref().map(|(redis, _)| redis.clone())).filter(|_| config.freshness.hints);
        let denials = open_denials(config, registry)?;
        let shared_denials = l2.as_ref().map(|(redis, mac_key)| SharedList::new(redis.clone(), Arc::clone(mac_key)));
        tasks.spawn_on(
            "deny list",
            keep_denials(Arc::clone(&denials), shared_denials, &replica_state, &clock, &stop),
            &io,
        );
        let table = store::existing_table::identity_of(&config.store, &place);
        let tiers = CacheParts {
            store: Arc::clone(&source) as _,
            l2: l2.map(|(redis, mac_key)| L2::new(redis, mac_key, table.as_deref())),
            replica_state: Arc::clone(&replica_state),
            clock: Arc::clone(&clock),
            io: io.clone(),
            limits: store_limits(config),
            ages: age_limits(config),
            settings: config.cache.clone(),
        };
        let cache = Arc::new(Cache::new(tiers, registry, &breakers)?);
        let hasher = hasher(config)?;
        let peppers = peppers(config, &hasher, registry)?;
        let checker = check_parts(config, hasher, &cache, &replica_state, &clock, denials);
        let checker = Arc::new(Checker::new(checker, registry)?);
        let metrics = PollMetrics::register(registry)?;
        let (fresh, is_fresh) = watch::channel(false);
        let poll = Poll {
            store: Arc::clone(&source) as _,
            replica_state: Arc::clone(&replica_state),
            clock,
            settings: config.freshness.clone(),
            tracks_changes: config.store.tracks_changes(),
            replica: id,
            name,
            peppers,
            metrics: metrics.clone(),
            fresh,
            applied: exchange_hints(hints, &replica_state, &stop, (tasks, &io)),
        };
        sample(config, (&cache, Jitter::of(id)), &stop, (tasks, &io));
        source.run_reads_on(io.clone());
        let database = Database { place, source, mac_key, limit: config.store.connect_timeout };
        tasks.spawn_on("poll", confirm(database, poll, stop), &poll_runtime);
        Ok(Self { checker, cache, replica_state, poll: metrics, fresh: is_fresh })
    }
}

fn breaker_gauges(registry: &Registry) -> prometheus::Result<IntGaugeVec> {
    let opts = Opts::new(
        "trustgate_breaker_state",
        "State of a tier's breaker: 0 closed (the tier is asked), 1 open (it is given a pause).",
    );
    register(registry, IntGaugeVec::new(opts, &["tier"]))
}

/// Redis, with the key of its MAC (which may have to wait for the database).
fn start_redis(
    config: &Config,
    link: &Arc<dyn Link>,
    registry: &Registry,
    breakers: &IntGaugeVec,
    clock: &Arc<dyn Clock>,
    stop: &CancellationToken,
    (tasks, io): (&mut Tasks, &Handle),
) -> Result<(Redis, MacKey), AppError> {
    let metrics = RedisMetrics::register(registry, breakers.with_label_values(&[Tier::L2.as_str()]))?;
    let mac_key = MacKey::new(OnceLock::new());
    if let Some(file) = &config.redis.mac_key_file {
        let key =
            read_mac_key(file).map_err(|source| AppError::SecretFile { setting: "redis.mac_key_file", source })?;
        mac_key.get_or_init(|| key);
    }
    let (redis, keeper) = Redis::new(&config.redis, Arc::clone(link), Arc::clone(clock), metrics, stop.clone());
    tasks.spawn_on("Redis connection", keeper.map(Ok), io);
    Ok((redis, mac_key))
}

/// Listens to what other replicas tell by Redis, where it is used, and returns how to tell them.
fn exchange_hints(
    redis: Option<(Arc<dyn Link>, Redis)>,
    replica_state: &Arc<ReplicaState>,
    stop: &CancellationToken,
    (tasks, io): (&mut Tasks, &Handle),
) -> Box<dyn Fn() + Send + Sync> {
    let Some((link, redis)) = redis else { return Box::new(|| ()) };
    let replica_state = Arc::clone(replica_state);
    let listening = listen(link, move || replica_state.wake(), stop.clone());
    tasks.spawn_on("Redis notifications", listening.map(Ok), io);
    Box::new(move || redis.publish())
}

fn open_denials(config: &Config, registry: &Registry) -> Result<Arc<DenyList>, AppError> {
    let metrics = DenyMetrics::register(registry)?;
    let opened = DenyList::open(config.freshness.deny_file.clone(), metrics);
    opened.map(Arc::new).map_err(|source| AppError::DenyFile { source })
}

/// Keeps the deny list as its sources have it.
fn keep_denials(
    denials: Arc<DenyList>,
    shared: Option<SharedList>,
    replica_state: &Arc<ReplicaState>,
    clock: &Arc<dyn Clock>,
    stop: &CancellationToken,
) -> impl Future<Output = Result<(), AppError>> + Send + use<> {
    let (replica_state, clock, stop) = (Arc::clone(replica_state), Arc::clone(clock), stop.clone());
    async move {
        denials.run(shared, &|| replica_state.database_clock.at(clock.now()), stop).await;
        Ok(())
    }
}

fn store_limits(config: &Config) -> StoreLimits {
    let store = &config.store;
    StoreLimits {
        reads_max: store.reads_max,
        read_timeout: store.read_timeout,
        breaker: breaker::Rules { failures_max: store.breaker_failures, open_for: store.breaker_open },
    }
}

const fn age_limits(config: &Config) -> AgeLimits {
    let freshness = &config.freshness;
    AgeLimits { record: freshness.ttl, negative: freshness.absence_ttl, any: config.cache.value_age_max }
}

/// Compares what is held with the database now and then, where that is asked for.
fn sample(
    config: &Config,
    (cache, jitter): (&Arc<Cache<ApiKey>>, Jitter),
    stop: &CancellationToken,
    (tasks, io): (&mut Tasks, &Handle),
) {
    let (interval, cache, stop) = (config.freshness.sample_interval, Arc::clone(cache), stop.clone());
    if interval > Duration::ZERO && config.store.tracks_changes() {
        let sampling = async move {
            cache.sample(interval, jitter, stop).await;
            Ok(())
        };
        tasks.spawn_on("sampler", sampling, io);
    }
}

/// The peppers, to be compared with what the database and the files say.
fn peppers(config: &Config, hasher: &Hasher, registry: &Registry) -> prometheus::Result<Peppers> {
    let credential = config.credential.clone();
    let reread: Reread = Arc::new(move || Ok(credential.hasher_again()?.fingerprints().to_vec()));
    Ok(Peppers {
        known: hasher.fingerprints().to_vec(),
        reread: config.credential.has_pepper_files().then_some(reread),
        metrics: PepperMetrics::register(registry)?,
    })
}

fn check_parts(
    config: &Config,
    hasher: Hasher,
    cache: &Arc<Cache<ApiKey>>,
    replica_state: &Arc<ReplicaState>,
    clock: &Arc<dyn Clock>,
    denials: Arc<DenyList>,
) -> CheckerParts {
    CheckerParts {
        decision: config.decision.clone(),
        credential: config.credential.clone(),
        freshness: mode(config),
        tracks_changes: config.store.tracks_changes(),
        hasher,
        cache: Arc::clone(cache),
        replica_state: Arc::clone(replica_state),
        denials,
        clock: Arc::clone(clock),
    }
}

/// How fresh records must be where a route does not say so.
pub(crate) fn mode(config: &Config) -> Freshness {
    let usual = if config.store.tracks_changes() { Freshness::Lease } else { Freshness::Ttl };
    config.freshness.mode.unwrap_or(usual)
}

/// The wait between attempts to prepare the database.
const PREPARE_WAIT: Duration = Duration::from_millis(250);

/// What the task that watches the database works with.
struct Database {
    place: String,
    source: Arc<dyn Source>,
    mac_key: Option<MacKey>,
    limit: Duration,
}

/// Prepares the database, however long that takes, then polls it.
async fn confirm(
    Database { place, source, mac_key, limit }: Database,
    poll: Poll,
    stop: CancellationToken,
) -> Result<(), AppError> {
    let mut told = String::new();
    let prepared = stop.run_until_cancelled(async {
        loop {
            let late = || StoreError::Fault(Fault::Timeout { tier: Tier::Store, limit });
            let attempt = timeout(limit.saturating_mul(2), source.prepare(Missing::Create)).await.unwrap_or_else(|_| Err(late()));
            match attempt {
                Ok(()) => return Ok(()),
                Err(error) if error.is_transient() => {
                    let problem = error.to_string();
                    if problem != told {
                        tracing::warn!(%error, database = place, "not ready: the database cannot be used yet; trying again");
                        told = problem;
                    }
                    sleep(PREPARE_WAIT).await;
                }
                Err(source) => return Err(AppError::Store { place: place.clone(), source }),
            }
        }
    });
    match prepared.await {
        None => return Ok(()),
        Some(prepared) => prepared?,
    }
    let Some(mac_key) = mac_key else {
        poll.run(stop).await;
        return Ok(());
    };
    // The first attempt comes before the first poll, so that Redis is of use from the first check on; where there is no
    // key, everything else goes on without.
    let mut fetch = Fetch { source, mac_key, limit: limit.saturating_mul(2), told: String::new() };
    stop.run_until_cancelled(fetch.once()).await;
    tokio::join!(stop.run_until_cancelled(fetch.until_done()), poll.run(stop.clone()));
    Ok(())
}

/// Gets the key of the Redis MAC from the database, unless a file gave one.
struct Fetch {
    source: Arc<dyn Source>,
    mac_key: MacKey,
    limit: Duration,
    told: String,
}

impl Fetch {
    async fn until_done(&mut self) {
        while self.mac_key.get().is_none() && self.told != NO_MAC_KEY {
            sleep(PREPARE_WAIT).await;
            self.once().await;
        }
    }

    async fn once(&mut self) {
        if self.mac_key.get().is_some() {
            return;
        }
        let problem = match timeout(self.limit, self.source.redis_mac_key()).await {
            Ok(Ok(Some(key))) => {
                let _ = self.mac_key.set(key); // whoever else knew one knew this one
                return;
            }
            Ok(Ok(None)) => NO_MAC_KEY.to_owned(),
            Ok(Err(fault)) => fault.to_string(),
            Err(_) => Fault::Timeout { tier: Tier::Store, limit: self.limit }.to_string(),
        };
        if problem != self.told {
            tracing::warn!(problem, "redis is not used for records until the key of its MAC is known");
            self.told = problem;
        }
    }
}

/// Why there is nothing to wait for.
const NO_MAC_KEY: &str = "these tables hold none: set redis.mac_key_file";

pub(crate) fn hasher(config: &Config) -> Result<Hasher, AppError> {
    config.credential.hasher().map_err(|source| AppError::SecretFile { setting: "credential.pepper_file", source })
}
