//! The wiring: makes the parts, hands them to each other, and ends them in order.
//!
//! Never decides anything.

pub mod admin;
pub mod lifecycle;
pub(crate) mod memory;
pub mod replica;
pub(crate) mod signals;

use std::{
    future::pending, io, net::SocketAddr, num::NonZero, sync::Arc, thread::available_parallelism, time::Duration,
};

use futures_util::FutureExt as _;
use tokio::{
    net::TcpListener,
    runtime::{Builder, Handle, Runtime},
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};
use uuid::Uuid;

use self::{
    admin::Admin,
    lifecycle::{Life, Phase},
    replica::{Replica, ReplicaDeps, Tasks},
    signals::SystemSignals,
};
use crate::{
    base::{
        clock::{Clock, DatabaseTime, SystemClock},
        metrics,
        secret::Secret,
        telemetry,
    },
    cache::{Cache, api_key::ApiKey, cacheable::Cacheable as _},
    canary::{self, Canary, CanaryMetrics},
    config::Config,
    ext_authz::{
        check::Checker,
        credential::is_well_formed,
        decision::{Decision, DenyReason, decide},
        framing,
        route::Demands,
    },
    freshness::{ReplicaState, poll::PollMetrics},
    grpc::{
        self, LimitsSettings, Service, Signals,
        listener::{ListenAddress, Listener},
        tls::{self, TlsError},
        worker::Workers,
    },
    record::{KeyId, Record, TrustId},
    store::{self, Env, StoreError, Management, Missing, Source},
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
        source: StoreError,
    },
    /// The operating system refused something.
    #[error("cannot start: {0}")]
    Start(#[from] io::Error),
    /// Two metrics have one name: a mistake in the program.
    #[error("cannot start: {0}")]
    Metrics(#[from] prometheus::Error),
    /// A part ended before it was told to.
    #[error("a task of the server ended, so the server stops: {0}: {1}")]
    Ended(&'static str, String),
    /// Calls in flight did not end within `limits.drain_grace`.
    #[error("{0} connections did not end within limits.drain_grace and were closed")]
    GraceExceeded(usize),
    /// A second signal came while the server stopped.
    #[error("shutdown forced: a second signal ended the server before calls in flight were done")]
    Forced,
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
    /// Where the canary makes its keys, if there is one.
    management: Option<Management>,
}

impl AppBuilder {
    /// A server as `config` says, with the database that it names.
    ///
    /// # Errors
    /// [`AppError::Store`] when the settings of the database cannot be right.
    pub fn new(config: Config, env: Env<'_>) -> Result<Self, AppError> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let place = store::describe(&config.store, env);
        let failed = |source| AppError::Store { place: place.clone(), source };
        let source = store::open_lookup(&config.store, env, Arc::clone(&clock)).map_err(failed)?;
        let has_canary = config.freshness.canary_interval > Duration::ZERO;
        let management = has_canary.then(|| store::management(&config.store, env)).transpose().map_err(failed)?;
        Ok(Self { config, source, place, clock, management })
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
        let Self { config, source, place, clock, management } = self;
        tls::install_provider();
        let tls = tls::acceptor(&config.grpc)?;
        let limits =
            LimitsSettings { connections_max: grpc::descriptors::connections(&config.limits), ..config.limits.clone() };
        let (grpc, admin) = (bind_grpc(&config).await?, bind_admin(&config).await?);
        let addresses = addresses(&grpc, &admin)?;

        let registry = metrics::registry(env!("CARGO_PKG_VERSION"), env!("TRUSTGATE_COMMIT"))?;
        let (life, stop) = (Life::default(), CancellationToken::new());
        let mut parts = Tasks::default();
        let io = OwnedRuntime::start("trustgate-io", 2, Priority::Low)?;
        let poll_runtime = OwnedRuntime::start("trustgate-poll", 1, Priority::Normal)?;
        let id = Uuid::new_v4();
        let deps = ReplicaDeps {
            source: Arc::clone(&source),
            place,
            redis: config.redis.is_configured().then(|| Arc::new(config.redis.clone()) as _),
            clock: Arc::clone(&clock),
            id,
            name: host_name(),
            io: io.handle(),
            poll: poll_runtime.handle(),
            stop: stop.clone(),
        };
        let Replica { checker, cache, replica_state, poll, fresh } = Replica::start(&config, deps, &registry, &mut parts)?;

        let (routes, health) = health().await;
        let announcing = announce(Arc::clone(&replica_state), fresh, life.clone(), health, stop.clone());
        parts.spawn_on("health", announcing, &Handle::current());
        let service = Arc::new(Service::new(Arc::clone(&checker), routes, tls, limits, Arc::clone(&clock), &registry)?);
        parts.spawn_on("memory", memory::give_back(Arc::clone(&service), stop.clone()), &io.handle());
        let (signals, tasks) = (Signals::default(), TaskTracker::new());
        let canary = CanaryMetrics::register(&registry)?;
        if let Some(management) = management {
            let parts_of_it = canary_parts(&config, management, (&checker, &replica_state, &clock), id);
            // It ends with the first calls, so that it takes none of the time that they have.
            let running = Canary::new(parts_of_it, canary).run(signals.drain.clone());
            parts.spawn_on("canary", running.map(Ok), &io.handle());
        }
        // As many as this process may use: its affinity and its share of the machine (cgroup) are counted in.
        let workers = Arc::new(Workers::start(available_parallelism().map_or(1, NonZero::get))?);
        for listener in grpc {
            let (service, workers) = (Arc::clone(&service), Arc::clone(&workers));
            let accepting = grpc::accept::run(listener, service, workers, signals.clone(), tasks.clone());
            parts.spawn_on("gRPC listener", accepting.map(Ok), &Handle::current());
        }
        let shown = Admin {
            registry,
            life: life.clone(),
            before_scrape: observe(&config, &cache, &poll, &replica_state, &clock),
            replica_state,
            poll,
            clock,
            serving: workers.handles(),
        };
        let admin_runtime = start_admin(admin, shown, &stop, &mut parts)?;
        tracing::info!(grpc = listed(&addresses.0), admin = listed(&addresses.1), "listening");
        let runtimes = (io, poll_runtime, admin_runtime);
        Ok(Running { config, addresses, checker, cache, source, life, stop, signals, tasks, parts, workers, runtimes })
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
    parts: Tasks,
    workers: Arc<Workers>,
    runtimes: (OwnedRuntime, OwnedRuntime, OwnedRuntime),
}

/// How long the rest of the shutdown may take after the calls: deregistering the replica and closing the database, for example.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

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
    pub fn loads(&self) -> usize {
        self.cache.loads()
    }

    /// Returns once the server is ready.
    pub async fn ready(&self) {
        // The sender lives as long as `self`.
        let _ = self.life.watch().wait_for(|phase| *phase >= Phase::Serve).await;
    }

    /// Returns when a part ended although nobody asked it to.
    pub async fn ended(&mut self) -> AppError {
        match self.parts.join_next().await {
            Some((_, Err(error))) => error,
            Some((name, Ok(()))) => AppError::Ended(name, "it returned".to_owned()),
            None => AppError::Ended("server", "it has no tasks".to_owned()),
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
        let mut outcome = in_time.map_err(|_| AppError::GraceExceeded(left));
        let ending = async {
            self.tasks.wait().await;
            self.cache.drain().await;
            self.stop.cancel();
            while let Some((_, ended)) = self.parts.join_next().await {
                outcome = std::mem::replace(&mut outcome, Ok(())).and(ended);
            }
            self.source.close().await;
        };
        if timeout(STOP_TIMEOUT, ending).await.is_err() {
            tracing::warn!("shutdown timeout: some tasks did not end within {STOP_TIMEOUT:?}; stopping without them");
        }
        drop((self.workers, self.runtimes));
        tracing::info!("stopped");
        outcome
    }
}

/// Serves as `config` says until SIGTERM, SIGQUIT or SIGINT. A second one of them ends the server at once.
///
/// # Errors
/// When the server cannot start, or ended before it was told to.
pub fn serve(config: Config, env: Env<'_>) -> Result<(), AppError> {
    telemetry::start(&config.log);
    // Checks have their own threads: here connections are accepted, and everything is begun and ended.
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().thread_name("trustgate").build()?;
    runtime.block_on(async {
        let mut signals = SystemSignals::listen()?;
        let mut running = AppBuilder::new(config, env)?.start().await?;
        let (delay, failed) = tokio::select! {
            delay = signals.stop() => (delay, None),
            error = running.ended() => (Delay::None, Some(error)),
        };
        tokio::select! {
            // The error of the part that ended is what the operator needs.
            stopped = running.stop(delay) => failed.map_or(stopped, Err),
            _ = signals.stop() => Err(AppError::Forced),
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
struct OwnedRuntime(Option<Runtime>);

/// Who goes first where the processors do not suffice for all threads.
#[derive(Clone, Copy)]
enum Priority {
    /// As every program.
    Normal,
    /// After the others.
    Low,
}

/// How much lower: half the weight of a thread as every program has it (sched(7), "The nice value"). With much less, what
/// shares the processors with a server and not its control group starves its reads until they are too late.
const LOW: i32 = 3;

impl Priority {
    /// Takes effect for the calling thread. One that cannot be had is not worth ending for.
    fn take(self) {
        // On Linux alone it is a thread's own; elsewhere it would be that of the whole process.
        if let (Self::Low, true) = (self, cfg!(target_os = "linux")) {
            let _ = rustix::process::setpriority_process(None, LOW);
        }
    }
}

impl OwnedRuntime {
    fn start(name: &str, threads: usize, priority: Priority) -> io::Result<Self> {
        Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name(name)
            .on_thread_start(move || priority.take())
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

impl Drop for OwnedRuntime {
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

/// Sets the gauges that are read at scrape time.
fn observe(
    config: &Config,
    cache: &Arc<Cache<ApiKey>>,
    poll: &PollMetrics,
    replica_state: &Arc<ReplicaState>,
    clock: &Arc<dyn Clock>,
) -> Box<dyn Fn() + Send + Sync> {
    let (cache, poll, replica_state, clock) = (Arc::clone(cache), poll.clone(), Arc::clone(replica_state), Arc::clone(clock));
    let (mode, freshness, decided_within) = (replica::mode(config), config.freshness.clone(), config.decision.deadline);
    Box::new(move || {
        cache.observe_entries();
        poll.observe(&replica_state, &*clock, |is_unanswered| freshness.bound(mode, is_unanswered) + decided_within);
    })
}

/// The admin listeners, on a thread of their own.
fn start_admin(
    listeners: Vec<TcpListener>,
    shown: Admin,
    stop: &CancellationToken,
    parts: &mut Tasks,
) -> io::Result<OwnedRuntime> {
    let (runtime, shown) = (OwnedRuntime::start("trustgate-admin", 1, Priority::Normal)?, Arc::new(shown));
    for listener in listeners {
        let listener = listener.into_std()?;
        let (shown, stop) = (Arc::clone(&shown), stop.clone());
        let serving = async move {
            // A listener belongs to the runtime it is made on.
            admin::run(TcpListener::from_std(listener)?, shown, stop).await;
            Ok(())
        };
        parts.spawn_on("admin listener", serving, &runtime.handle());
    }
    Ok(runtime)
}

fn hasher(config: &Config) -> Result<crate::ext_authz::credential::Hasher, AppError> {
    config.credential.hasher().map_err(|source| AppError::SecretFile { setting: "credential.pepper_file", source })
}

fn canary_parts(
    config: &Config,
    management: Management,
    (checker, replica_state, clock): (&Arc<Checker>, &Arc<ReplicaState>, &Arc<dyn Clock>),
    replica: Uuid,
) -> canary::Parts {
    canary::Parts {
        management,
        checker: Arc::clone(checker),
        replica_state: Arc::clone(replica_state),
        clock: Arc::clone(clock),
        credential: config.credential.clone(),
        settings: config.freshness.clone(),
        mode: replica::mode(config),
        replica,
        name: host_name(),
    }
}

/// What people know this machine, or pod, by.
fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The service of the health check that is SERVING only while what is held may be relied on.
const FRESH: &str = "trustgate.fresh";

/// The longest message of a health check that is read.
const HEALTH_MESSAGE_BYTES_MAX: usize = 512;

/// The gRPC health service (`grpc.health.v1`), not serving yet: tonic's own start is SERVING.
async fn health() -> (Routes, HealthReporter) {
    let (reporter, server) = tonic_health::server::health_reporter();
    for service in ["", framing::SERVICE, FRESH] {
        reporter.set_service_status(service, ServingStatus::NotServing).await;
    }
    // It carries the name of a service.
    let server = server.max_decoding_message_size(HEALTH_MESSAGE_BYTES_MAX);
    (Routes::new(server).prepare(), reporter)
}

/// Tells probes and health checks where this server is in its life.
async fn announce(
    replica_state: Arc<ReplicaState>,
    mut fresh: watch::Receiver<bool>,
    life: Life,
    health: HealthReporter,
    stop: CancellationToken,
) -> Result<(), AppError> {
    let (mut phases, mut pepper) = (life.watch(), replica_state.pepper.subscribe());
    let announced = async {
        loop {
            let fits = *pepper.borrow_and_update();
            let serves = *phases.borrow_and_update() == Phase::Serve && fits;
            let status = |serving| if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
            for service in ["", framing::SERVICE] {
                health.set_service_status(service, status(serves)).await;
            }
            let is_fresh = *fresh.borrow_and_update();
            health.set_service_status(FRESH, status(serves && is_fresh)).await;
            tokio::select! {
                () = replica_state.confirmed(), if fits && life.phase() == Phase::Start => {
                    life.advance(Phase::Serve);
                    tracing::info!("ready");
                }
                changed = phases.changed() => if changed.is_err() { return },
                changed = pepper.changed() => if changed.is_err() { return },
                // Without a poll there is no lease, and nothing changes any more.
                changed = fresh.changed() => if changed.is_err() { return pending().await },
            }
        }
    };
    stop.run_until_cancelled(announced).await;
    Ok(())
}
