//! The state that the connections of all listeners share: the checker, the limits, and how much of them is in use.

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

/// Maximum number of calls with an incomplete message, over all connections: each takes about 1 KiB. Envoy sends a
/// message at once; other clients send the headers of all calls of a burst before the first message.
const UNFINISHED_MAX: usize = 8_192;
/// Maximum number of queued answers that their callers do not read, over all connections: each takes about 2 KiB.
const UNREAD_MAX: usize = 2_048;

/// Serves calls. All listeners share it.
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
    /// A service that answers `Check` calls with `checker` and health checks with `health`, which serves
    /// `grpc.health.v1`. With `tls`, TCP connections must use TLS.
    ///
    /// # Errors
    /// If a metric of that name exists already.
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

    /// Number of connections that have closed so far.
    pub(crate) fn connections_closed(&self) -> u64 {
        self.connections_closed.load(Ordering::Relaxed)
    }

    /// Counts a peer that does not speak gRPC as this listener expects it, and logs it at a limited rate.
    pub(crate) fn refuse_peer(&self, reason: Reason, peer: Option<IpAddr>, detail: impl std::fmt::Display) {
        self.refused.note(reason, peer, detail, &*self.clock);
    }
}

/// Maximum number of concurrent health checks, over all connections: each takes about 10 KiB.
const CHECKS_MAX: usize = 256;
/// Maximum number of concurrent watches, over all connections: each takes about 9 KiB until its client ends it.
const WATCHES_MAX: usize = 512;

/// Serves health checks and watches, up to a maximum number of each.
pub(crate) struct Health {
    pub(crate) routes: Routes,
    checks: Arc<Semaphore>,
    watches: Arc<Semaphore>,
}

impl Health {
    /// Answers with `routes`, which serves `grpc.health.v1`.
    pub(crate) fn new(routes: Routes) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        Self { routes, checks: semaphore(CHECKS_MAX), watches: semaphore(WATCHES_MAX) }
    }

    /// Returns a permit for one call of `rpc`; `None` if too many are in flight.
    pub(crate) fn admit(&self, rpc: Rpc) -> Option<OwnedSemaphorePermit> {
        let semaphore = if rpc == Rpc::HealthWatch { &self.watches } else { &self.checks };
        Arc::clone(semaphore).try_acquire_owned().ok()
    }
}

/// The shutdown signals for connections: graceful when `drain` is cancelled, immediate when `end` is cancelled.
#[derive(Clone, Default)]
pub(crate) struct Signals {
    /// Finish the calls in flight and accept no new ones.
    pub drain: CancellationToken,
    /// Close the connections at once.
    pub end: CancellationToken,
}
