//! Starts a replica without listeners: the replica state and the poll that updates it, the caches, and the checker.
//!
//! The simulation tests run this code with a simulated database, network and clock.

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

/// The dependencies of a replica.
pub struct ReplicaDeps {
    /// The database.
    pub source: Arc<dyn Source>,
    /// A description of the database, for log and error messages.
    pub place: String,
    /// Connects to Redis; `None` if Redis is not used.
    pub redis: Option<Arc<dyn Link>>,
    /// The clock that the replica reads.
    pub clock: Arc<dyn Clock>,
    /// The replica id. Each start generates a new one.
    pub id: Uuid,
    /// The human-readable name of the replica.
    pub name: String,
    /// The runtime for requests to the database and Redis.
    pub io: Handle,
    /// The runtime for the poll.
    pub poll: Handle,
    /// Ends all of the replica's tasks when it is cancelled.
    pub stop: CancellationToken,
}

/// A running replica.
pub struct Replica {
    /// Decides checks.
    pub checker: Arc<Checker>,
    /// Loads and caches the records of keys.
    pub cache: Arc<Cache<ApiKey>>,
    /// The replica state, which the poll updates.
    pub replica_state: Arc<ReplicaState>,
    /// The poll's metrics.
    pub poll: PollMetrics,
    /// True while the lease is fresh.
    pub fresh: watch::Receiver<bool>,
}

/// The named tasks that run until the server stops. If a task ends earlier, the server stops.
#[derive(Default)]
pub struct Tasks {
    running: JoinSet<Result<(), AppError>>,
    names: HashMap<Id, &'static str>,
}

impl Tasks {
    /// Runs `task` on `runtime` under `name`.
    pub fn spawn_on(
        &mut self,
        name: &'static str,
        task: impl Future<Output = Result<(), AppError>> + Send + 'static,
        runtime: &Handle,
    ) {
        let task = self.running.spawn_on(task, runtime);
        self.names.insert(task.id(), name);
    }

    /// Waits for the next task to end, and returns the task's name and result; `None` if no task is left.
    ///
    /// # Cancel safety
    /// Safe: no task is lost.
    pub async fn join_next(&mut self) -> Option<(&'static str, Result<(), AppError>)> {
        let ended = self.running.join_next_with_id().await?;
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        // `spawn_on` has recorded the name.
        let name = self.names.remove(&id).unwrap_or("task");
        let outcome = ended.map_or_else(|panic| Err(AppError::Ended(name, panic.to_string())), |(_, outcome)| outcome);
        Some((name, outcome))
    }
}

impl Replica {
    /// Starts a replica. Adds the replica's background tasks to `tasks`. The tasks end when `deps.stop` is cancelled.
    ///
    /// # Errors
    /// If a secret file or the deny list file cannot be read.
    pub fn start(config: &Config, deps: ReplicaDeps, registry: &Registry, tasks: &mut Tasks) -> Result<Self, AppError> {
        let ReplicaDeps { source, place, redis, clock, id, name, io, poll: poll_runtime, stop } = deps;
        let replica_state = Arc::new(ReplicaState::new(config.freshness.limits()));
        let breakers = breaker_gauges(registry)?;
        let l2 = match &redis {
            Some(link) => Some(start_redis(config, link, registry, &breakers, &clock, &stop, (tasks, &io))?),
            None => None, // register no Redis metrics: `trustgate_redis_up` must not report an unused Redis as down
        };
        let mac_key = l2.as_ref().map(|(_, mac_key)| Arc::clone(mac_key));
        let notified =
            redis.zip(l2.as_ref().map(|(redis, _)| redis.clone())).filter(|_| config.freshness.notifications);
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
            applied: start_notifications(notified, &replica_state, &stop, (tasks, &io)),
        };
        sample(config, (&cache, Jitter::of(id)), &stop, (tasks, &io));
        source.run_reads_on(io.clone());
        let database = Database { place, source, mac_key, limit: config.store.connect_timeout };
        tasks.spawn_on("poll", prepare_and_poll(database, poll, stop), &poll_runtime);
        Ok(Self { checker, cache, replica_state, poll: metrics, fresh: is_fresh })
    }
}

fn breaker_gauges(registry: &Registry) -> prometheus::Result<IntGaugeVec> {
    let opts = Opts::new(
        "trustgate_breaker_state",
        "State of a tier's circuit breaker: 0 closed (requests pass), 1 open or half-open (requests are skipped).",
    );
    register(registry, IntGaugeVec::new(opts, &["tier"]))
}

/// Starts the connection to Redis. Returns the connection and the MAC key for Redis values. If the key must be read
/// from the database, the key is set later.
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

/// Starts to listen for notifications from other replicas through Redis, if Redis is used. Returns the function that
/// notifies the other replicas.
fn start_notifications(
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

/// Keeps the deny list up to date with the deny file and Redis, until `stop` is cancelled.
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
    AgeLimits { record: freshness.ttl, negative: freshness.negative_ttl, any: config.cache.value_age_max }
}

/// Starts the sampler if its interval is longer than zero and the tables track changes.
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

/// Returns this server's peppers. The poll compares them with the pepper that the database records, and reads the
/// pepper files again.
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

/// Returns the freshness mode for routes that do not set a mode.
pub(crate) fn mode(config: &Config) -> Freshness {
    let usual = if config.store.tracks_changes() { Freshness::Lease } else { Freshness::Ttl };
    config.freshness.mode.unwrap_or(usual)
}

/// Wait between attempts to prepare the database, or to read the MAC key from it.
const PREPARE_WAIT: Duration = Duration::from_millis(250);

/// The inputs of the task that prepares and polls the database.
struct Database {
    place: String,
    source: Arc<dyn Source>,
    mac_key: Option<MacKey>,
    limit: Duration,
}

/// Prepares the database, then polls it until `stop` is cancelled. Retries the preparation after transient errors,
/// without a limit on the number of attempts.
async fn prepare_and_poll(
    Database { place, source, mac_key, limit }: Database,
    poll: Poll,
    stop: CancellationToken,
) -> Result<(), AppError> {
    let mut reported = String::new();
    let prepared = stop.run_until_cancelled(async {
        loop {
            let prepared = timeout(limit.saturating_mul(2), source.prepare(Missing::Create)).await;
            let timed_out = || Err(StoreError::Fault(Fault::Timeout { tier: Tier::Store, limit }));
            match prepared.unwrap_or_else(|_| timed_out()) {
                Ok(()) => return Ok(()),
                Err(error) if error.is_transient() => {
                    let problem = error.to_string();
                    if problem != reported {
                        tracing::warn!(
                            %error,
                            database = place,
                            "database not usable yet: the server is not ready; trying again"
                        );
                        reported = problem;
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
    // Try to read the MAC key before the first poll makes the server ready, so that L2 is available for the first
    // checks. If that fails, the server works without L2 until a later attempt succeeds.
    let mut fetch = MacKeyFetch { source, mac_key, limit: limit.saturating_mul(2), reported: String::new() };
    stop.run_until_cancelled(fetch.once()).await;
    tokio::join!(stop.run_until_cancelled(fetch.until_done()), poll.run(stop.clone()));
    Ok(())
}

/// Reads the MAC key for Redis values from the database, unless the key came from a file.
struct MacKeyFetch {
    source: Arc<dyn Source>,
    mac_key: MacKey,
    limit: Duration,
    /// The problem that was logged last, so that it is not logged again.
    reported: String,
}

impl MacKeyFetch {
    async fn until_done(&mut self) {
        while self.mac_key.get().is_none() && self.reported != NO_MAC_KEY {
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
                let _ = self.mac_key.set(key); // fails only if the key is already set
                return;
            }
            Ok(Ok(None)) => NO_MAC_KEY.to_owned(),
            Ok(Err(fault)) => fault.to_string(),
            Err(_) => Fault::Timeout { tier: Tier::Store, limit: self.limit }.to_string(),
        };
        if problem != self.reported {
            tracing::warn!(problem, "redis cache disabled: the MAC key is not available");
            self.reported = problem;
        }
    }
}

/// The problem that is not retried: the database has no MAC key.
const NO_MAC_KEY: &str = "these tables have no MAC key: set redis.mac_key_file";

pub(crate) fn hasher(config: &Config) -> Result<Hasher, AppError> {
    config.credential.hasher().map_err(|source| AppError::SecretFile { setting: "credential.pepper_file", source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_ends_or_panics_is_reported_by_name() {
        let mut tasks = Tasks::default();
        tasks.spawn_on("poll", async { Ok(()) }, &Handle::current());
        assert!(matches!(tasks.join_next().await, Some(("poll", Ok(())))));
        tasks.spawn_on("deny list", async { panic!("for the test") }, &Handle::current());
        let ended = tasks.join_next().await;
        assert!(matches!(&ended, Some(("deny list", Err(AppError::Ended("deny list", _))))), "{ended:?}");
        assert!(tasks.join_next().await.is_none());
    }
}
