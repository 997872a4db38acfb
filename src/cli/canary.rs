//! Implements `trustgate canary`: runs the canary and the listener for its metrics until a signal arrives.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::{runtime::Builder, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    base::{
        clock::{Clock, SystemClock},
        metrics, telemetry,
    },
    canary::{Canary, CanaryDeps, metrics::CanaryMetrics},
    config::Config,
    grpc::tls,
    server::{
        self, AppError,
        admin::{self, Admin, Readiness},
        replica,
        signals::SystemSignals,
    },
    store::{self, Env},
};

/// Runs the canary until SIGTERM, SIGQUIT or SIGINT. The round in progress then deletes its key, unless a second signal
/// ends the process at once.
///
/// # Errors
/// A setting is invalid, a listener cannot be bound, or a second signal arrived. An unreachable database or replica is
/// not an error: the metrics count the failed round.
pub(crate) fn run(config: &Config, env: Env<'_>) -> Result<(), AppError> {
    telemetry::start(&config.log);
    tls::install_provider();
    let failed = |source| AppError::Store { place: store::describe(&config.store, env), source };
    let deps = CanaryDeps {
        management: store::management(&config.store, env).map_err(failed)?,
        clock: Arc::new(SystemClock),
        settings: config.canary.clone(),
        credential: config.credential.clone(),
        freshness: config.freshness.clone(),
        mode: replica::mode(config),
        name: server::host_name(),
    };
    Builder::new_current_thread().enable_all().build()?.block_on(run_until_stopped(config, deps))
}

async fn run_until_stopped(config: &Config, deps: CanaryDeps) -> Result<(), AppError> {
    let mut signals = SystemSignals::listen()?;
    let registry = metrics::registry(env!("CARGO_PKG_VERSION"), env!("TRUSTGATE_COMMIT"))?;
    let metrics = CanaryMetrics::register(&registry, &deps.settings.targets)?;
    let listeners = server::bind_tcp(config, &deps.settings.listen, ("canary", "canary.listen")).await?;
    let addresses = listeners.iter().map(tokio::net::TcpListener::local_addr).collect::<std::io::Result<Vec<_>>>()?;
    tracing::info!(
        metrics = server::listed(&addresses),
        targets = server::listed(&deps.settings.targets),
        interval = ?deps.settings.interval,
        "canary started"
    );
    let (stop, mut serving) = (CancellationToken::new(), JoinSet::new());
    let clock: Arc<dyn Clock> = Arc::clone(&deps.clock);
    let shown = Arc::new(Admin { registry, before_scrape: Box::new(|| ()), readiness: Box::new(AlwaysReady), clock });
    for listener in listeners {
        serving.spawn(admin::run(listener, Arc::clone(&shown), stop.clone()));
    }
    let running = Canary::new(deps, metrics).run(stop.clone());
    let stopping = async {
        signals.stop().await;
        stop.cancel();
        tracing::info!("canary stopping: waiting for the round in progress to delete its key");
        signals.stop().await;
    };
    tokio::select! {
        () = running => {}
        () = stopping => return Err(AppError::Forced),
    }
    tracing::info!("canary stopped");
    Ok(())
}

/// Reports the canary as ready. The canary serves no requests, so it is ready as soon as it listens.
struct AlwaysReady;

#[async_trait]
impl Readiness for AlwaysReady {
    async fn examine(&self) -> (bool, String) {
        (true, "running\n".to_owned())
    }
}
