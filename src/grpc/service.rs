//! The state that the connections of all listeners share: the checker, the limits and their current use.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use super::{
    body::ByteBudget,
    refused::{Reason, RefusedPeers},
    rpc::Rpc,
    settings::LimitsSettings,
};
use crate::{
    base::{
        clock::Clock,
        metrics::{IntGauge, Opts, Registry, register},
    },
    ext_authz::check::Checker,
};

/// Maximum number of calls with an incomplete message, over all connections. Each takes about 1 KiB. Envoy sends the
/// message directly after the headers; other clients send the headers of all calls in a burst before the first message.
const UNFINISHED_MAX: usize = 8_192;
/// Maximum number of queued answers that callers have not read, over all connections. Each takes about 2 KiB.
const UNREAD_MAX: usize = 2_048;

/// Serves calls. All listeners share one service.
pub(crate) struct Service {
    pub(crate) checker: Arc<Checker>,
    pub(crate) health: Health,
    pub(crate) tls: Option<TlsAcceptor>,
    pub(crate) limits: LimitsSettings,
    pub(crate) budget: ByteBudget,
    pub(crate) checks: Arc<Semaphore>,
    pub(crate) unfinished: Arc<Semaphore>,
    pub(crate) unread: Arc<Semaphore>,
    pub(crate) connections: Arc<Semaphore>,
    pub(crate) connections_open: IntGauge,
    pub(crate) connections_closed: AtomicU64,
    refused: RefusedPeers,
    pub(crate) clock: Arc<dyn Clock>,
}

impl Service {
    /// Creates a service that answers `Check` calls with `checker` and health checks with `health`, which serves
    /// `grpc.health.v1`. If `tls` is set, TCP connections must use TLS.
    ///
    /// # Errors
    /// If `registry` already has one of the metrics.
    pub(crate) fn new(
        checker: Arc<Checker>,
        health: Routes,
        tls: Option<TlsAcceptor>,
        limits: LimitsSettings,
        clock: Arc<dyn Clock>,
        registry: &Registry,
    ) -> prometheus::Result<Self> {
        let open = Opts::new("trustgate_grpc_connections", "Open connections to the gRPC listeners.");
        Ok(Self {
            checker,
            health: Health::new(health),
            tls,
            budget: ByteBudget::new(limits.messages_in_flight_size.length()),
            checks: Arc::new(Semaphore::new(limits.checks_in_flight as usize)),
            unfinished: Arc::new(Semaphore::new(UNFINISHED_MAX)),
            unread: Arc::new(Semaphore::new(UNREAD_MAX)),
            connections: Arc::new(Semaphore::new(limits.connections_max as usize)),
            connections_open: register(registry, IntGauge::with_opts(open))?,
            connections_closed: AtomicU64::new(0),
            refused: RefusedPeers::register(registry)?,
            limits,
            clock,
        })
    }

    /// Returns the number of connections that have closed so far.
    pub(crate) fn connections_closed(&self) -> u64 {
        self.connections_closed.load(Ordering::Relaxed)
    }

    /// Counts a peer that does not speak gRPC as the listener expects, and logs the peer at a limited rate.
    pub(crate) fn refuse_peer(&self, reason: Reason, peer: Option<IpAddr>, detail: impl std::fmt::Display) {
        self.refused.note(reason, peer, detail, &*self.clock);
    }
}

/// Maximum number of concurrent health checks, over all connections. Each takes about 10 KiB.
const CHECKS_MAX: usize = 256;
/// Maximum number of concurrent watches, over all connections. Each takes about 9 KiB until its client ends it.
const WATCHES_MAX: usize = 512;

/// Serves health checks and watches, up to a maximum number of each.
pub(crate) struct Health {
    pub(crate) routes: Routes,
    checks: Arc<Semaphore>,
    watches: Arc<Semaphore>,
}

impl Health {
    /// Creates a health service that answers with `routes`, which serves `grpc.health.v1`.
    pub(crate) fn new(routes: Routes) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        Self { routes, checks: semaphore(CHECKS_MAX), watches: semaphore(WATCHES_MAX) }
    }

    /// Returns a permit for one call of `rpc`; `None` if too many calls are in flight.
    pub(crate) fn admit(&self, rpc: Rpc) -> Option<OwnedSemaphorePermit> {
        let semaphore = if rpc == Rpc::HealthWatch { &self.watches } else { &self.checks };
        Arc::clone(semaphore).try_acquire_owned().ok()
    }
}

/// The shutdown signals for connections: graceful when `drain` is cancelled, immediate when `end` is cancelled.
#[derive(Clone, Default)]
pub(crate) struct Signals {
    /// Accept no new connections or calls, and finish the calls in flight.
    pub drain: CancellationToken,
    /// Close the connections at once.
    pub end: CancellationToken,
}
