//! Builds the server from its parts, starts the server, and shuts it down gracefully.

pub(crate) mod admin;
pub(crate) mod error;
pub(crate) mod health;
pub(crate) mod lifecycle;
pub(crate) mod memory;
pub(crate) mod readiness;
pub(crate) mod replica;
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
    readiness::ServerReadiness,
    replica::{Replica, ReplicaDeps, Tasks},
    runtime::{OwnedRuntime, Priority},
    signals::SystemSignals,
};
pub(crate) use self::{error::AppError, lifecycle::Delay};
use crate::{
    base::{
        clock::{Clock, SystemClock},
        metrics, telemetry,
    },
    cache::{Cache, api_key::ApiKey},
    config::Config,
    ext_authz::check::Checker,
    freshness::{ReplicaState, poll::PollMetrics},
    grpc::{
        self, LimitsSettings, Service, Signals,
        listener::{ListenAddress, Listener},
        tls,
        worker::Workers,
    },
    store::{self, Env, Source},
};

/// Builds and starts a server. [`Self::new`] takes all required inputs.
pub struct AppBuilder {
    config: Config,
    source: Arc<dyn Source>,
    place: String,
    clock: Arc<dyn Clock>,
}

impl AppBuilder {
    /// Creates a builder for a server with the settings and the database from `config`. Does not connect to the
    /// database.
    ///
    /// # Errors
    /// [`AppError::Store`] if the database settings are invalid.
    pub fn new(config: Config, env: Env<'_>) -> Result<Self, AppError> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let place = store::describe(&config.store, env);
        let failed = |source| AppError::Store { place: place.clone(), source };
        let source = store::open_lookup(&config.store, env, Arc::clone(&clock)).map_err(failed)?;
        Ok(Self { config, source, place, clock })
    }

    /// Wraps access to the database with `wrap`, for tests that delay a read.
    #[must_use]
    pub fn wrap_store(mut self, wrap: impl FnOnce(Arc<dyn Source>) -> Arc<dyn Source>) -> Self {
        self.source = wrap(self.source);
        self
    }

    /// Binds the listeners and starts all tasks. Returns as soon as clients can connect. The server becomes ready
    /// later, once a poll has succeeded.
    ///
    /// # Errors
    /// For example, if an address is in use or a secret file cannot be read.
    pub async fn start(self) -> Result<Running, AppError> {
        let Self { config, source, place, clock } = self;
        tls::install_provider();
        let tls = tls::acceptor(&config.grpc)?;
        let limits =
            LimitsSettings { connections_max: grpc::descriptors::connections(&config.limits), ..config.limits.clone() };
        let admin = bind_tcp(&config, &config.admin.listen, ("admin", "admin.listen")).await?;
        let grpc = bind_grpc(&config).await?;
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
        // One worker for each processor that the CPU affinity and the cgroup quota of this process allow.
        let workers = Arc::new(Workers::start(available_parallelism().map_or(1, NonZero::get))?);
        for listener in grpc {
            let (service, workers) = (Arc::clone(&service), Arc::clone(&workers));
            let accepting = grpc::accept::run(listener, service, workers, signals.clone(), tasks.clone());
            parts.spawn_on("gRPC listener", accepting.map(Ok), &Handle::current());
        }
        let shown = Admin {
            registry,
            before_scrape: observe(&config, &cache, &poll, &replica_state, &clock),
            clock: Arc::clone(&clock),
            readiness: Box::new(ServerReadiness {
                life: life.clone(),
                replica_state,
                clock,
                poll,
                workers: workers.handles(),
            }),
        };
        let admin_runtime = start_admin(admin, shown, &stop, &mut parts)?;
        tracing::info!(grpc = listed(&addresses.0), admin = listed(&addresses.1), "listening");
        let runtimes = (io, poll_runtime, admin_runtime);
        Ok(Running { config, addresses, checker, cache, source, life, stop, signals, tasks, parts, workers, runtimes })
    }
}

/// A running server. Dropping it without [`Self::stop`] ends the server at once.
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

/// Timeout for the shutdown after the last call has ended. In this time, the server deregisters the replica and closes
/// the database connections, for example.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

impl Running {
    /// Returns the first TCP address of the gRPC listeners, with the actual port if port 0 is configured.
    #[must_use]
    pub fn grpc_address(&self) -> Option<SocketAddr> {
        self.addresses.0.iter().find_map(|address| match address {
            ListenAddress::Tcp(address) => Some(*address),
            ListenAddress::Unix(_) => None,
        })
    }

    /// Returns the first address of the admin listeners, with the actual port if port 0 is configured.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.addresses.1[0] // a configuration without an address is refused
    }

    /// Returns the checker, for callers in this process.
    #[must_use]
    pub fn checker(&self) -> Arc<Checker> {
        Arc::clone(&self.checker)
    }

    /// Returns the number of loads in flight.
    #[must_use]
    pub fn loads(&self) -> usize {
        self.cache.loads()
    }

    /// Returns once the server is ready.
    pub async fn ready(&self) {
        // The wait cannot fail: `self` owns the sender.
        let _ = self.life.watch().wait_for(|phase| *phase >= Phase::Serve).await;
    }

    /// Waits until a server task ends before shutdown begins, and returns the reason.
    pub async fn ended(&mut self) -> AppError {
        match self.parts.join_next().await {
            Some((_, Err(error))) => error,
            Some((name, Ok(()))) => AppError::Ended(name, "the task returned".to_owned()),
            None => AppError::Ended("server", "no task is left".to_owned()),
        }
    }

    /// Shuts the server down: reports not ready, waits for `delay`, stops accepting connections, waits for the calls in
    /// flight, and then ends the other tasks.
    ///
    /// # Errors
    /// [`AppError::GraceExceeded`] if connections had to be closed while calls were in flight; otherwise the first
    /// error with which a task ended.
    pub async fn stop(mut self, delay: Delay) -> Result<(), AppError> {
        // If the server has never been ready, Envoy sends it no calls, so no delay is needed.
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

/// Runs a server with `config` until SIGTERM, SIGQUIT or SIGINT. A second such signal ends the server at once.
///
/// # Errors
/// If the server cannot start, ends without a signal, or does not shut down gracefully.
pub(crate) fn serve(config: Config, env: Env<'_>) -> Result<(), AppError> {
    telemetry::start(&config.log);
    // This runtime accepts connections, and starts and ends the tasks. Checks run on the workers.
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().thread_name("trustgate").build()?;
    runtime.block_on(async {
        let mut signals = SystemSignals::listen()?;
        let mut running = AppBuilder::new(config, env)?.start().await?;
        let (delay, failed) = tokio::select! {
            delay = signals.stop() => (delay, None),
            error = running.ended() => (Delay::None, Some(error)),
        };
        tokio::select! {
            // If a task has ended, its error is the cause, so it takes precedence over shutdown errors.
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

/// Binds the TCP addresses of a setting. `setting` contains the section and the full name of the setting, for errors.
pub(crate) async fn bind_tcp(
    config: &Config,
    addresses: &[SocketAddr],
    setting: (&str, &'static str),
) -> Result<Vec<TcpListener>, AppError> {
    let mut listeners = Vec::new();
    for address in addresses {
        let bound = TcpListener::bind(address).await;
        let address = ListenAddress::Tcp(*address);
        listeners.push(bound.map_err(|source| cannot_listen(config, address, setting, source))?);
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

/// The addresses of the gRPC listeners and of the admin listeners.
type Addresses = (Vec<ListenAddress>, Vec<SocketAddr>);

fn addresses(grpc: &[Listener], admin: &[TcpListener]) -> io::Result<Addresses> {
    let grpc = grpc.iter().map(Listener::address).collect::<io::Result<_>>()?;
    Ok((grpc, admin.iter().map(TcpListener::local_addr).collect::<io::Result<_>>()?))
}

/// Formats addresses for the log: `[127.0.0.1:1, unix:///s]`.
pub(crate) fn listed(addresses: &[impl ToString]) -> String {
    let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    format!("[{}]", addresses.join(", "))
}

/// Returns the function that the admin listener calls before each scrape. The function sets the gauges whose values
/// are computed only for a scrape.
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

/// Starts the admin listeners on a separate thread.
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
            // A tokio listener belongs to the runtime that creates it, so create it here.
            admin::run(TcpListener::from_std(listener)?, shown, stop).await;
            Ok(())
        };
        parts.spawn_on("admin listener", serving, &runtime.handle());
    }
    Ok(runtime)
}

/// Returns the host name of this machine or pod.
pub(crate) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
