//! What the connections of all listeners share: the checker, the limits and what is in use of them.

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

/// Calls whose message has begun and not arrived whole, over all connections: each takes about 1 KiB. Envoy sends a message at
/// once; other clients send the heads of all calls of a burst before the first message.
const UNFINISHED_MAX: usize = 8_192;
/// Answers that wait because their callers do not read, over all connections: each takes about 2 KiB.
const UNREAD_MAX: usize = 2_048;

/// What serves calls: shared by all listeners.
pub struct Service {
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
    /// A service that answers Check calls with `checker` and health checks with `health`, which serves `grpc.health.v1`; over
    /// TCP behind `tls`, where there is one.
    ///
    /// # Errors
    /// When a metric of that name exists already.
    pub fn new(
        checker: Arc<Checker>,
        health: Routes,
        tls: Option<TlsAcceptor>,
        limits: LimitsSettings,
        clock: Arc<dyn Clock>,
        registry: &Registry,
    ) -> prometheus::Result<Self> {
        let open = Opts::new("trustgate_grpc_connections", "Connections to the gRPC listeners that are open.");
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

    /// How many connections have ended so far.
    pub fn connections_closed(&self) -> u64 {
        self.connections_closed.load(Ordering::Relaxed)
    }

    /// Counts and, now and then, logs a peer that does not speak gRPC as this listener expects it.
    pub(crate) fn refuse_peer(&self, reason: Reason, peer: Option<IpAddr>, detail: impl std::fmt::Display) {
        self.refused.note(reason, peer, detail, &*self.clock);
    }
}

/// Health checks at one time, over all connections: each takes about 10 KiB.
const CHECKS_MAX: usize = 256;
/// Watches at one time, over all connections: each takes about 9 KiB for as long as the client wants.
const WATCHES_MAX: usize = 512;

/// Answers health checks.
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

    /// Reserves one more call of `rpc` until the permit is dropped; `None` where there are too many.
    pub(crate) fn admit(&self, rpc: Rpc) -> Option<OwnedSemaphorePermit> {
        let semaphore = if rpc == Rpc::HealthWatch { &self.watches } else { &self.checks };
        Arc::clone(semaphore).try_acquire_owned().ok()
    }
}

/// When connections end: gently once `drain` is cancelled, at once when `end` is.
#[derive(Clone, Default)]
pub struct Signals {
    /// Finish what is in flight and take nothing new.
    pub drain: CancellationToken,
    /// Close now.
    pub end: CancellationToken,
}
