//! The wiring: makes the parts, hands them to each other, and ends them in order.
//!
//! Never decides anything.

use std::{
    future::pending,
    io,
    net::SocketAddr,
    num::NonZero,
    sync::{Arc, OnceLock},
    thread::available_parallelism,
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::{
    net::TcpListener,
    runtime::{Builder, Handle, Runtime},
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    admin::{self, Admin},
    breaker,
    cache::{self, Cache, Lifetimes, StoreLimits, api_key::ApiKey, kind::Kind as _, l2::L2, l2::MacKey},
    check::{self, Checker},
    clock::{Clock, DatabaseTime, SystemClock},
    config::Config,
    credential::is_well_formed,
    decision::{Decision, DenyReason, decide},
    demand::{Demands, Freshness},
    fault::{Fault, Tier},
    freshness::{
        Views,
        deny::{DenyList, DenyMetrics, shared::SharedList},
        poll::{Poll, PollMetrics},
    },
    metrics::{self, IntGaugeVec, Opts, Registry, register},
    net::{
        self, Service, Signals,
        core::Cores,
        drain::{Life, Phase},
        listen::{ListenAddress, Listener},
        tls::{self, TlsError},
    },
    record::{KeyId, Record, TrustId},
    redis::{Redis, RedisMetrics, listen, read_mac_key},
    secret::Secret,
    store::{self, Env, LedgerError, Missing, Source},
    telemetry,
    wire::grpc,
};

/// Why the server did not start, or ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// A listener cannot be had.
    #[error("cannot listen on {address} ({setting}{}): {source}", set_in(origin.as_deref()))]
    Listen {
        /// The address.
        address: ListenAddress,
        /// The setting that names it.
        setting: &'static str,
        /// Where that was set.
        origin: Option<String>,
        /// What the operating system says.
        source: io::Error,
    },
    /// A file with a secret cannot be read.
    #[error("{setting}: {source}")]
    SecretFile {
        /// The setting that names it.
        setting: &'static str,
        /// What is wrong with it.
        source: io::Error,
    },
    /// TLS cannot be had.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The file of the deny list cannot be read.
    #[error("freshness.deny_file: {source}")]
    DenyFile {
        /// What is wrong with it.
        source: io::Error,
    },
    /// The database cannot be used, and waiting would not help.
    #[error("{place}: {source}")]
    Store {
        /// Which database.
        place: String,
        /// What is wrong.
        source: LedgerError,
    },
    /// The operating system refused something.
    #[error("cannot start: {0}")]
    Start(#[from] io::Error),
    /// Two metrics have one name: a mistake in the program.
    #[error("cannot start: {0}")]
    Metrics(#[from] prometheus::Error),
    /// A part ended before it was told to.
    #[error("a part of the server ended: {0}")]
    Ended(String),
    /// Calls in flight did not end within `limits.drain_grace`.
    #[error("{0} connections did not end within limits.drain_grace and were closed")]
    GraceExceeded(usize),
}

fn set_in(origin: Option<&str>) -> String {
    origin.map(|origin| format!(", set in {origin}")).unwrap_or_default()
}

/// A server to be started. What is required is an argument of [`Self::new`]; the rest has a natural default.
pub struct AppBuilder {
    config: Config,
    source: Arc<dyn Source>,
    place: String,
    clock: Arc<dyn Clock>,
}

impl AppBuilder {
    /// A server as `config` says, with the database that it names.
    ///
    /// # Errors
    /// [`AppError::Store`] when the settings of the database cannot be right.
    pub fn new(config: Config, env: Env<'_>) -> Result<Self, AppError> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let place = store::describe(&config.store, env);
        let source = store::open_lookup(&config.store, env, Arc::clone(&clock))
            .map_err(|source| AppError::Store { place: place.clone(), source })?;
        Ok(Self { config, source, place, clock })
    }

    /// Puts `wrap` around the database: for tests that hold a read open.
    #[must_use]
    pub fn wrap_store(mut self, wrap: impl FnOnce(Arc<dyn Source>) -> Arc<dyn Source>) -> Self {
        self.source = wrap(self.source);
        self
    }

    /// Another clock than the machine's.
    #[must_use]
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Binds the listeners and starts everything. Returns as soon as calls can come in; ready it is once the database
    /// has answered.
    ///
    /// # Errors
    /// An address that is in use, a secret's file that cannot be read.
    pub async fn start(self) -> Result<Running, AppError> {
        let Self { config, source, place, clock } = self;
        // One provider for every TLS connection; a second start in one process finds it installed.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let tls = tls::acceptor(&config.grpc)?;
        let (grpc, admin) = (bind_grpc(&config).await?, bind_admin(&config).await?);
        let addresses = addresses(&grpc, &admin)?;

        let io = IoRuntime::start("trustgate-io", 2)?;
        let registry = metrics::registry(env!("CARGO_PKG_VERSION"), env!("TRUSTGATE_COMMIT"))?;
        let views = Arc::new(Views::new(config.freshness.limits()));
        let (life, stop) = (Life::default(), CancellationToken::new());
        let mut parts = JoinSet::new();

        let breakers = breaker_gauges(&registry)?;
        let l2 = start_redis(&config, &registry, &breakers, &clock, &stop, (&mut parts, &io.handle()))?;
        let mac_key = l2.as_ref().map(|(_, mac_key)| Arc::clone(mac_key));
        let redis_hints = l2.as_ref().filter(|_| config.freshness.hints).map(|(redis, _)| redis.clone());
        let denials = open_denials(&config, &registry)?;
        let shared_denials = l2.as_ref().map(|(redis, mac_key)| SharedList::new(redis.clone(), Arc::clone(mac_key)));
        parts.spawn_on(keep_denials(Arc::clone(&denials), shared_denials, &views, &clock, &stop), &io.handle());
        let tiers = cache::Parts {
            store: Arc::clone(&source) as _,
            l2: l2.map(|(redis, mac_key)| L2::new(redis, mac_key)),
            views: Arc::clone(&views),
            clock: Arc::clone(&clock),
            io: io.handle(),
            limits: store_limits(&config),
            lifetimes: lifetimes(&config),
            settings: config.cache.clone(),
        };
        let cache = Arc::new(Cache::new(tiers, &registry, &breakers)?);
        let checker = Arc::new(Checker::new(check_parts(&config, &cache, &views, &clock, denials)?, &registry)?);

        let poll_metrics = PollMetrics::register(&registry)?;
        let fresh = watch::Sender::new(false);
        let (routes, health) = health().await;
        parts.spawn(announce(Arc::clone(&views), fresh.subscribe(), life.clone(), health, stop.clone()));
        let poll = Poll {
            store: Arc::clone(&source) as _,
            views: Arc::clone(&views),
            clock: Arc::clone(&clock),
            settings: config.freshness.clone(),
            names_changes: names_changes(&config),
            name: host_name(),
            metrics: poll_metrics.clone(),
            fresh,
            applied: exchange_hints(redis_hints, &config, &views, &stop, (&mut parts, &io.handle())),
        };
        let poll_runtime = IoRuntime::start("trustgate-poll", 1)?;
        let database = Database { place, source: Arc::clone(&source), mac_key, limit: config.store.connect_timeout };
        parts.spawn_on(confirm(database, poll, stop.clone()), &poll_runtime.handle());

        let service = Arc::new(Service::new(Arc::clone(&checker), routes, tls, config.limits.clone(), &registry)?);
        let (signals, tasks) = (Signals::default(), TaskTracker::new());
        // As many as this process may use: its affinity and its share of the machine (cgroup) are counted in.
        let cores = Arc::new(Cores::start(available_parallelism().map_or(1, NonZero::get))?);
        for listener in grpc {
            let (service, cores) = (Arc::clone(&service), Arc::clone(&cores));
            parts.spawn(net::accept::run(listener, service, cores, signals.clone(), tasks.clone()).map(Ok));
        }
        let shown = Admin {
            registry,
            life: life.clone(),
            before_scrape: observe(&cache, &poll_metrics, &views, &clock, config.decision.deadline),
            views,
            poll: poll_metrics,
            clock,
            serving: cores.handles(),
        };
        let admin_runtime = start_admin(admin, shown, &stop, &mut parts)?;
        tracing::info!(grpc = listed(&addresses.0), admin = listed(&addresses.1), "listening");
        let runtimes = (io, poll_runtime, admin_runtime);
        Ok(Running { config, addresses, checker, cache, source, life, stop, signals, tasks, parts, cores, runtimes })
    }
}

/// A server that was started. Dropped without [`Self::stop`], it ends at once.
pub struct Running {
    config: Config,
    addresses: Addresses,
    checker: Arc<Checker>,
    cache: Arc<Cache<ApiKey>>,
    source: Arc<dyn Source>,
    life: Life,
    stop: CancellationToken,
    signals: Signals,
    tasks: TaskTracker,
    parts: JoinSet<Result<(), AppError>>,
    cores: Arc<Cores>,
    runtimes: (IoRuntime, IoRuntime, IoRuntime),
}

/// Whether to serve on for a moment, not ready, before anything closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delay {
    /// For `limits.drain_delay`: Envoys need that long to turn away.
    Full,
    /// Not at all: somebody is waiting at a terminal.
    None,
}

impl Running {
    /// The first TCP address that Envoy can call; port 0 is resolved.
    #[must_use]
    pub fn grpc_address(&self) -> Option<SocketAddr> {
        self.addresses.0.iter().find_map(|address| match address {
            ListenAddress::Tcp(address) => Some(*address),
            ListenAddress::Unix(_) => None,
        })
    }

    /// The first address for metrics and probes; port 0 is resolved.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.addresses.1[0] // the configuration is refused without one
    }

    /// What decides checks, for callers in this process.
    #[must_use]
    pub fn checker(&self) -> Arc<Checker> {
        Arc::clone(&self.checker)
    }

    /// Flights in the air.
    #[must_use]
    pub fn flights(&self) -> usize {
        self.cache.flights()
    }

    /// Returns once the server is ready.
    pub async fn ready(&self) {
        // The sender lives as long as `self`.
        let _ = self.life.watch().wait_for(|phase| *phase >= Phase::Serve).await;
    }

    /// Returns when a part ended although nobody asked it to.
    pub async fn ended(&mut self) -> AppError {
        match self.parts.join_next().await {
            Some(Ok(Err(error))) => error,
            Some(Ok(Ok(()))) | None => AppError::Ended("it returned".to_owned()),
            Some(Err(panic)) => AppError::Ended(panic.to_string()),
        }
    }

    /// Ends the server in order: not ready, delay, no new calls, those in flight, everything else.
    ///
    /// # Errors
    /// [`AppError::GraceExceeded`] when calls had to be cut off, or what a part ended with.
    pub async fn stop(mut self, delay: Delay) -> Result<(), AppError> {
        // Nobody was ever told to come here before it was ready, so nobody needs time to turn away.
        let was_ready = self.life.phase() == Phase::Serve;
        self.life.advance(Phase::Drain);
        tracing::info!("draining: not ready, still serving");
        if delay == Delay::Full && was_ready {
            sleep(self.config.limits.drain_delay).await;
        }
        self.life.advance(Phase::Stop);
        self.signals.drain.cancel();
        self.tasks.close();
        let in_time = timeout(self.config.limits.drain_grace, self.tasks.wait()).await;
        let left = self.tasks.len();
        self.signals.end.cancel();
        self.tasks.wait().await;
        self.cache.drain().await;
        self.stop.cancel();
        let mut outcome = in_time.map_err(|_| AppError::GraceExceeded(left));
        while let Some(ended) = self.parts.join_next().await {
            let ended = ended.unwrap_or_else(|panic| Err(AppError::Ended(panic.to_string())));
            outcome = outcome.and(ended);
        }
        self.source.close().await;
        drop((self.cores, self.runtimes));
        tracing::info!("stopped");
        outcome
    }
}

/// Serves as `config` says until SIGTERM or SIGINT.
///
/// # Errors
/// When the server cannot start, or ended before it was told to.
pub fn serve(config: Config, env: Env<'_>) -> Result<(), AppError> {
    telemetry::start(&config.log);
    // Checks have their own threads: here connections are accepted, and everything is begun and ended.
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().thread_name("trustgate").build()?;
    runtime.block_on(async {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let mut running = AppBuilder::new(config, env)?.start().await?;
        tokio::select! {
            _ = terminate.recv() => running.stop(Delay::Full).await,
            _ = interrupt.recv() => running.stop(Delay::None).await,
            error = running.ended() => {
                // The part's own error is what the operator needs; how the rest ended says nothing more.
                let _ = running.stop(Delay::None).await;
                Err(error)
            }
        }
    })
}

/// What a check of one key came to, and why.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// Whether the key is granted.
    pub allowed: bool,
    /// The word that metrics and metadata use for the outcome: `granted`, `revoked`, ...
    pub reason: &'static str,
    /// The same in a sentence.
    pub sentence: String,
    /// Whose key it is, if it is known.
    pub trust_id: Option<TrustId>,
    /// Which key it is, if it is known.
    pub key_id: Option<KeyId>,
    /// What it may be used for.
    pub scopes: Vec<String>,
}

/// Decides `key` as a request without further demands would be, by what the database holds now.
///
/// # Errors
/// When the database cannot be asked.
pub fn explain(config: Config, env: Env<'_>, key: &Secret) -> Result<Explanation, AppError> {
    let bytes = key.expose().as_bytes();
    if bytes.is_empty() {
        return Ok(explained(&Decision::Deny(DenyReason::Missing), None));
    }
    if !is_well_formed(&config.credential, bytes) {
        return Ok(explained(&Decision::Deny(DenyReason::Malformed), None));
    }
    let hasher = hasher(&config)?;
    let digests = hasher.digests(hasher.current(bytes), bytes);
    let AppBuilder { source, place, .. } = AppBuilder::new(config, env)?;
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let failed = |source| AppError::Store { place: place.clone(), source };
        source.prepare(Missing::Refuse).await.map_err(failed)?;
        let found = ApiKey::load(&*source, &digests).await.map_err(|fault| failed(fault.into()));
        source.close().await;
        let found = found?;
        let record = found.value.as_ref();
        // Where a request comes from is not known here: a key that is bound to networks is explained as if from one.
        let demands = Demands { source: record.and_then(from_an_allowed_network), ..Demands::default() };
        Ok(explained(&decide(record, &demands, found.read_at), record))
    })
}

fn from_an_allowed_network(record: &Record) -> Option<std::net::IpAddr> {
    record.allowed_cidrs.first().map(ipnet::IpNet::addr)
}

fn explained(decision: &Decision<'_>, record: Option<&Record>) -> Explanation {
    let date = |time: Option<DatabaseTime>| time.map(|time| time.to_string()).unwrap_or_default();
    let (reason, sentence) = match decision {
        Decision::Allow(_) => match record.map_or(&[][..], |record| &*record.allowed_cidrs) {
            [] => ("granted", "the key is good".to_owned()),
            cidrs => {
                let cidrs: Vec<String> = cidrs.iter().map(ToString::to_string).collect();
                ("granted", format!("the key is good, from {} alone", cidrs.join(", ")))
            }
        },
        Decision::Anonymous => ("anonymous", "the request passes without a key".to_owned()),
        Decision::Deny(reason) => {
            let sentence = match reason {
                DenyReason::Missing => "nothing was given".to_owned(),
                DenyReason::Malformed => {
                    "this cannot be a key: too short or long, not visible ASCII, or the checksum is wrong".to_owned()
                }
                DenyReason::Unknown => "no such key is stored (under this pepper)".to_owned(),
                DenyReason::Revoked => format!("revoked at {}", date(record.and_then(|record| record.revoked_at))),
                DenyReason::Expired => format!("expired at {}", date(record.and_then(|record| record.expires_at))),
                DenyReason::NotYetValid => format!("valid from {}", date(record.and_then(|record| record.not_before))),
                DenyReason::TrustDisabled => "its trust is disabled".to_owned(),
                other => format!("denied: {}", other.as_str()),
            };
            (reason.as_str(), sentence)
        }
    };
    Explanation {
        allowed: matches!(decision, Decision::Allow(_) | Decision::Anonymous),
        reason,
        sentence,
        trust_id: record.map(|record| record.trust_id),
        key_id: record.map(|record| record.key_id),
        scopes: record.map(|record| record.scopes.to_vec()).unwrap_or_default(),
    }
}

/// A runtime of its own threads. Ends without waiting when dropped, also inside another runtime.
struct IoRuntime(Option<Runtime>);

impl IoRuntime {
    fn start(name: &str, threads: usize) -> io::Result<Self> {
        Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name(name)
            .enable_all()
            .build()
            .map(|runtime| Self(Some(runtime)))
    }

    fn handle(&self) -> Handle {
        // Present until `drop`.
        self.0.as_ref().map_or_else(
            || unreachable!("the runtime is there until it is dropped"),
            |runtime| runtime.handle().clone(),
        )
    }
}

impl Drop for IoRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

async fn bind_grpc(config: &Config) -> Result<Vec<Listener>, AppError> {
    let mut listeners = Vec::new();
    for address in &config.grpc.listen {
        let bound = Listener::bind(address, config.grpc.socket_mode, config.grpc.socket_owner).await;
        listeners
            .push(bound.map_err(|source| cannot_listen(config, address.clone(), ("grpc", "grpc.listen"), source))?);
    }
    Ok(listeners)
}

async fn bind_admin(config: &Config) -> Result<Vec<TcpListener>, AppError> {
    let mut listeners = Vec::new();
    for address in &config.admin.listen {
        let bound = TcpListener::bind(address).await;
        let address = ListenAddress::Tcp(*address);
        listeners.push(bound.map_err(|source| cannot_listen(config, address, ("admin", "admin.listen"), source))?);
    }
    Ok(listeners)
}

fn cannot_listen(
    config: &Config,
    address: ListenAddress,
    (section, setting): (&str, &'static str),
    source: io::Error,
) -> AppError {
    AppError::Listen { address, setting, origin: config.origin(section, "listen").map(str::to_owned), source }
}

/// Where Envoy calls, and where the admin listener is.
type Addresses = (Vec<ListenAddress>, Vec<SocketAddr>);

fn addresses(grpc: &[Listener], admin: &[TcpListener]) -> io::Result<Addresses> {
    let grpc = grpc.iter().map(Listener::address).collect::<io::Result<_>>()?;
    Ok((grpc, admin.iter().map(TcpListener::local_addr).collect::<io::Result<_>>()?))
}

/// Addresses for the log: `[127.0.0.1:1, unix:///s]`.
fn listed(addresses: &[impl ToString]) -> String {
    let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    format!("[{}]", addresses.join(", "))
}

fn breaker_gauges(registry: &Registry) -> prometheus::Result<IntGaugeVec> {
    let opts = Opts::new(
        "trustgate_breaker_state",
        "State of a tier's breaker: 0 closed (the tier is asked), 1 open (it is given a pause).",
    );
    register(registry, IntGaugeVec::new(opts, &["tier"]))
}

/// Redis, if it is configured, with the key of its MAC (which may have to wait for the database).
fn start_redis(
    config: &Config,
    registry: &Registry,
    breakers: &IntGaugeVec,
    clock: &Arc<dyn Clock>,
    stop: &CancellationToken,
    (parts, io): (&mut JoinSet<Result<(), AppError>>, &Handle),
) -> Result<Option<(Redis, MacKey)>, AppError> {
    if !config.redis.is_configured() {
        return Ok(None); // and no metric says that it is down
    }
    let metrics = RedisMetrics::register(registry, breakers.with_label_values(&[Tier::L2.as_str()]))?;
    let mac_key = MacKey::new(OnceLock::new());
    if let Some(file) = &config.redis.mac_key_file {
        let key =
            read_mac_key(file).map_err(|source| AppError::SecretFile { setting: "redis.mac_key_file", source })?;
        mac_key.get_or_init(|| key);
    }
    let (redis, keeper) = Redis::new(config.redis.clone(), Arc::clone(clock), metrics, stop.clone());
    parts.spawn_on(keeper.map(Ok), io);
    Ok(Some((redis, mac_key)))
}

/// Listens to what other replicas tell by Redis, where it is used, and returns how to tell them.
fn exchange_hints(
    redis: Option<Redis>,
    config: &Config,
    views: &Arc<Views>,
    stop: &CancellationToken,
    (parts, io): (&mut JoinSet<Result<(), AppError>>, &Handle),
) -> Box<dyn Fn() + Send + Sync> {
    let Some(redis) = redis else { return Box::new(|| ()) };
    let views = Arc::clone(views);
    let listening = listen(config.redis.clone(), move || views.hint(), stop.clone());
    parts.spawn_on(listening.map(Ok), io);
    Box::new(move || redis.publish())
}

/// Sets the gauges that are read at scrape time.
fn observe(
    cache: &Arc<Cache<ApiKey>>,
    poll: &PollMetrics,
    views: &Arc<Views>,
    clock: &Arc<dyn Clock>,
    decided_within: Duration,
) -> Box<dyn Fn() + Send + Sync> {
    let (cache, poll, views, clock) = (Arc::clone(cache), poll.clone(), Arc::clone(views), Arc::clone(clock));
    Box::new(move || {
        cache.observe_entries();
        poll.observe(&views, &*clock, decided_within);
    })
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
    views: &Arc<Views>,
    clock: &Arc<dyn Clock>,
    stop: &CancellationToken,
) -> impl Future<Output = Result<(), AppError>> + Send + use<> {
    let (views, clock, stop) = (Arc::clone(views), Arc::clone(clock), stop.clone());
    async move {
        denials.run(shared, &|| views.database_clock.at(clock.now()), stop).await;
        Ok(())
    }
}

/// The admin listeners, on a thread of their own.
fn start_admin(
    listeners: Vec<TcpListener>,
    shown: Admin,
    stop: &CancellationToken,
    parts: &mut JoinSet<Result<(), AppError>>,
) -> io::Result<IoRuntime> {
    let (runtime, shown) = (IoRuntime::start("trustgate-admin", 1)?, Arc::new(shown));
    for listener in listeners {
        let listener = listener.into_std()?;
        let (shown, stop) = (Arc::clone(&shown), stop.clone());
        let serving = async move {
            // A listener belongs to the runtime it is made on.
            admin::run(TcpListener::from_std(listener)?, shown, stop).await.map_err(AppError::Start)
        };
        parts.spawn_on(serving, &runtime.handle());
    }
    Ok(runtime)
}

fn store_limits(config: &Config) -> StoreLimits {
    let store = &config.store;
    StoreLimits {
        reads_max: store.reads_max,
        read_timeout: store.read_timeout,
        breaker: breaker::Rules { failures_max: store.breaker_failures, open_for: store.breaker_open },
    }
}

const fn lifetimes(config: &Config) -> Lifetimes {
    let freshness = &config.freshness;
    Lifetimes { present: freshness.ttl, absent: freshness.absence_ttl, hard: config.cache.value_age_max }
}

fn hasher(config: &Config) -> Result<crate::credential::Hasher, AppError> {
    config.credential.hasher().map_err(|source| AppError::SecretFile { setting: "credential.pepper_file", source })
}

fn check_parts(
    config: &Config,
    cache: &Arc<Cache<ApiKey>>,
    views: &Arc<Views>,
    clock: &Arc<dyn Clock>,
    denials: Arc<DenyList>,
) -> Result<check::Parts, AppError> {
    Ok(check::Parts {
        decision: config.decision.clone(),
        credential: config.credential.clone(),
        freshness: config.freshness.mode.unwrap_or(if names_changes(config) {
            Freshness::Lease
        } else {
            Freshness::Ttl
        }),
        names_changes: names_changes(config),
        hasher: hasher(config)?,
        cache: Arc::clone(cache),
        views: Arc::clone(views),
        denials,
        clock: Arc::clone(clock),
    })
}

/// Whether the tables are ours: others name no changes.
const fn names_changes(config: &Config) -> bool {
    config.store.preset.is_none()
}

/// What people know this machine, or pod, by.
fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
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
            let late = || LedgerError::Fault(Fault::Timeout { tier: Tier::Store, limit });
            let attempt = timeout(limit * 2, source.prepare(Missing::Create)).await.unwrap_or_else(|_| Err(late()));
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
    if let Some(mac_key) = mac_key {
        stop.run_until_cancelled(fetch_mac_key(&*source, &mac_key)).await;
    }
    poll.run(stop).await;
    Ok(())
}

/// Gets the key of the Redis MAC from the database, unless a file gave one.
async fn fetch_mac_key(source: &dyn Source, mac_key: &MacKey) {
    while mac_key.get().is_none() {
        match source.redis_mac_key().await {
            Ok(Some(key)) => drop(mac_key.set(key)),
            Ok(None) => {
                tracing::warn!("redis is not used: these tables hold no key for its MAC; set redis.mac_key_file");
                return;
            }
            Err(fault) => {
                tracing::debug!(%fault, "the key of the Redis MAC could not be read; trying again");
                sleep(PREPARE_WAIT).await;
            }
        }
    }
}

/// The service of the health check that is SERVING only while what is held may be relied on.
const FRESH: &str = "trustgate.fresh";

/// The gRPC health service (`grpc.health.v1`), not serving yet: tonic's own start is SERVING.
async fn health() -> (Routes, HealthReporter) {
    let (reporter, server) = tonic_health::server::health_reporter();
    for service in ["", grpc::SERVICE, FRESH] {
        reporter.set_service_status(service, ServingStatus::NotServing).await;
    }
    (Routes::new(server).prepare(), reporter)
}

/// Tells probes and health checks where this server is in its life.
async fn announce(
    views: Arc<Views>,
    mut fresh: watch::Receiver<bool>,
    life: Life,
    health: HealthReporter,
    stop: CancellationToken,
) -> Result<(), AppError> {
    let mut phases = life.watch();
    let announced = async {
        loop {
            let serves = *phases.borrow_and_update() == Phase::Serve;
            let status = |serving| if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
            for service in ["", grpc::SERVICE] {
                health.set_service_status(service, status(serves)).await;
            }
            let is_fresh = *fresh.borrow_and_update();
            health.set_service_status(FRESH, status(serves && is_fresh)).await;
            tokio::select! {
                () = views.confirmed(), if life.phase() == Phase::Start => {
                    life.advance(Phase::Serve);
                    tracing::info!("ready");
                }
                changed = phases.changed() => if changed.is_err() { return },
                // Without a poll there is no lease, and nothing changes any more.
                changed = fresh.changed() => if changed.is_err() { return pending().await },
            }
        }
    };
    stop.run_until_cancelled(announced).await;
    Ok(())
}
