//! The wiring: makes the parts, hands them to each other, and ends them in order.
//!
//! Never decides anything.

pub mod admin;
pub(crate) mod error;
pub(crate) mod health;
pub mod lifecycle;
pub(crate) mod memory;
pub mod replica;
pub(crate) mod runtime;
pub(crate) mod signals;

use std::{io, net::SocketAddr, num::NonZero, sync::Arc, thread::available_parallelism, time::Duration};

use futures_util::FutureExt as _;
use tokio::{
    net::TcpListener,
    runtime::{Builder, Handle},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use self::{
    admin::Admin,
    health::{announce, health},
    lifecycle::{Life, Phase},
    replica::{Replica, ReplicaDeps, Tasks},
    runtime::{OwnedRuntime, Priority},
    signals::SystemSignals,
};
pub use self::{error::AppError, lifecycle::Delay};
use crate::{
    base::{
        clock::{Clock, SystemClock},
        metrics, telemetry,
    },
    cache::{Cache, api_key::ApiKey},
    canary::{self, Canary, CanaryMetrics},
    config::Config,
    ext_authz::check::Checker,
    freshness::{ReplicaState, poll::PollMetrics},
    grpc::{
        self, LimitsSettings, Service, Signals,
        listener::{ListenAddress, Listener},
        tls,
        worker::Workers,
    },
    store::{self, Env, Management, Source},
};

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
        let Replica { checker, cache, replica_state, poll, fresh } =
            Replica::start(&config, deps, &registry, &mut parts)?;

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
    let (cache, poll, replica_state, clock) =
        (Arc::clone(cache), poll.clone(), Arc::clone(replica_state), Arc::clone(clock));
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
