//! The state of the server for gRPC health checks and probes.

use std::{future::pending, sync::Arc};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};

use super::{
    error::AppError,
    lifecycle::{Life, Phase},
};
use crate::{ext_authz::framing, freshness::ReplicaState};

/// The service of the health check that is SERVING only while what is held may be relied on.
const FRESH: &str = "trustgate.fresh";

/// The longest message of a health check that is read.
const HEALTH_MESSAGE_BYTES_MAX: usize = 512;

/// The gRPC health service (`grpc.health.v1`), not serving yet: tonic's own start is SERVING.
pub(crate) async fn health() -> (Routes, HealthReporter) {
    let (reporter, server) = tonic_health::server::health_reporter();
    for service in ["", framing::SERVICE, FRESH] {
        reporter.set_service_status(service, ServingStatus::NotServing).await;
    }
    // It carries the name of a service.
    let server = server.max_decoding_message_size(HEALTH_MESSAGE_BYTES_MAX);
    (Routes::new(server).prepare(), reporter)
}

/// Tells probes and health checks where this server is in its life.
pub(crate) async fn announce(
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
