//! The gRPC listener: connections in, Check calls and health checks answered, bounds kept.
//!
//! Never decides and never reads a message: `check` does. The caller passes the listener and the signals to stop.

pub mod accept;
pub(crate) mod body;
pub(crate) mod call;
pub(crate) mod connection;
pub mod descriptors;
pub(crate) mod health;
pub(crate) mod http1;
pub mod listener;
pub(crate) mod protocol;
pub(crate) mod refused;
pub(crate) mod rpc;
pub(crate) mod stream;
pub mod tls;
pub mod worker;

use std::{
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use self::{
    body::ByteBudget,
    health::Health,
    listener::{ListenAddress, SocketMode, SocketOwner},
    refused::{Reason, RefusedPeers},
};
use crate::{
    base::{
        clock::Clock,
        metrics::{IntGauge, Opts, Registry, register},
        units::ByteSize,
    },
    ext_authz::check::Checker,
};

crate::settings! {
    /// The listener that Envoy calls.
    pub struct GrpcSettings in "grpc" {
        /// Where to listen: one address or a list. `unix:///PATH` is a Unix socket, for an Envoy on the same machine.
        listen: Vec<ListenAddress> = "127.0.0.1:50051",
        /// The permission bits of a Unix socket: who may call.
        socket_mode: SocketMode = "0660",
        /// Who owns a Unix socket: the number of a user, or of a user and a group (`101:101`). Unset: whoever runs this
        /// server.
        socket_owner: Option<SocketOwner> = "",
        /// A PEM file with our certificate and those between it and its authority. Set: every TCP address in `listen` speaks
        /// TLS (1.2 or 1.3) alone. Read at start.
        tls_certificate_file: Option<PathBuf> = "",
        /// A PEM file with the key of that certificate. Read at start.
        tls_key_file: Option<PathBuf> = "",
        /// A PEM file with certificate authorities. Set: only who shows a certificate of theirs may call (mTLS). Read at
        /// start.
        tls_client_ca_file: Option<PathBuf> = "",
    }
}

crate::settings! {
    /// Bounds. Everything that waits, queues or grows does so within one of them.
    pub struct LimitsSettings in "limits" {
        /// Calls at one time on one connection; Envoy opens another connection where it needs more. A connection takes about 1 KiB for
        /// each, until it ends.
        streams_per_connection: u32 = "64",
        /// A larger `CheckRequest` is denied with 431, unread. Envoy's headers are at most 60 KiB unless configured.
        message_size: ByteSize = "256KiB",
        /// Messages held at one time, over all connections, for checks that wait or are not read to their end.
        messages_in_flight_size: ByteSize = "64MiB",
        /// Checks that wait at one time, over all connections; beyond it they are answered as faults at once.
        checks_in_flight: u32 = "16384",
        /// Connections at one time; further ones wait in the kernel's queue. Fewer where this process may have fewer
        /// descriptors (`RLIMIT_NOFILE`), of which it keeps some for everything else.
        connections_max: u32 = "4096",
        /// How long a client may take for what comes first: the TLS handshake, the connection preface, and the whole of one
        /// message.
        preface_timeout: Duration = "2s",
        /// How often an idle connection is asked whether it is still there.
        keepalive_interval: Duration = "20s",
        /// How long it has for the answer.
        keepalive_timeout: Duration = "5s",
        /// How old a connection gets, +-20 %, before Envoy is told to open another: how a scale-out is found.
        connection_age: Duration = "30m",
        /// How long to serve on after SIGTERM while not ready, so that Envoys have turned away before we stop accepting.
        drain_delay: Duration = "5s",
        /// How long calls in flight then have to end.
        drain_grace: Duration = "20s",
    }
}

/// Calls whose message has begun and not arrived whole, over all connections: each takes about 1 KiB. Envoy sends a message at
/// once; other clients send the heads of all calls of a burst before the first message.
const UNFINISHED_MAX: usize = 8_192;
/// Answers that wait because their callers do not read, over all connections: each takes about 2 KiB.
const UNREAD_MAX: usize = 2_048;

/// What serves calls: shared by all listeners.
pub struct Service {
    checker: Arc<Checker>,
    health: Health,
    tls: Option<TlsAcceptor>,
    limits: LimitsSettings,
    budget: ByteBudget,
    checks: Arc<Semaphore>,
    unfinished: Arc<Semaphore>,
    unread: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    connections_open: IntGauge,
    connections_closed: AtomicU64,
    refused: RefusedPeers,
    clock: Arc<dyn Clock>,
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
    fn refuse_peer(&self, reason: Reason, peer: Option<IpAddr>, detail: impl std::fmt::Display) {
        self.refused.note(reason, peer, detail, &*self.clock);
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
