//! Publishes the server's state to gRPC health checks and readiness probes.

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

/// The health service that is `SERVING` only while the server is ready and its lease is fresh.
const FRESH: &str = "trustgate.fresh";

/// Maximum size of a health check request, in bytes. The request contains only the name of a service.
const HEALTH_MESSAGE_BYTES_MAX: usize = 512;

/// Creates the gRPC health service (`grpc.health.v1`). Its initial status is `NOT_SERVING`, because tonic's default is
/// `SERVING`.
pub(crate) async fn health() -> (Routes, HealthReporter) {
    let (reporter, server) = tonic_health::server::health_reporter();
    for service in ["", framing::SERVICE, FRESH] {
        reporter.set_service_status(service, ServingStatus::NotServing).await;
    }
    let server = server.max_decoding_message_size(HEALTH_MESSAGE_BYTES_MAX);
    (Routes::new(server).prepare(), reporter)
}

/// Publishes every change of the phase, the pepper and the lease to health checks, until `stop` is cancelled. Makes the
/// server ready as soon as a poll has confirmed the replica state and the pepper matches.
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
                // The poll task has ended, so the lease no longer changes.
                changed = fresh.changed() => if changed.is_err() { return pending().await },
            }
        }
    };
    stop.run_until_cancelled(announced).await;
    Ok(())
}
