//! The gRPC listener: connections in, Check calls and health checks answered, bounds kept.
//!
//! Never decides and never reads a message: `check` does. The caller passes the listener and the signals to stop.

pub mod accept;
pub mod body;
pub mod core;
pub mod drain;
pub mod preface;

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use http::{Request, Response};
use hyper::{body::Incoming, rt::Executor, server::conn::http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::TcpStream,
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;
use tower_service::Service as _;

use self::{
    body::{ReplyBody, Room},
    core::Load,
};
use crate::{
    check::Checker,
    metrics::{IntGauge, Opts, Registry, register},
    units::ByteSize,
    wire::grpc::CHECK_PATH,
};

crate::settings! {
    /// The listener that Envoy calls.
    pub struct GrpcSettings in "grpc" {
        /// Where to listen: one address or a list.
        listen: Vec<SocketAddr> = "127.0.0.1:50051",
    }
}

crate::settings! {
    /// Bounds. Everything that waits, queues or grows does so within one of them.
    pub struct LimitsSettings in "limits" {
        /// Calls at one time on one connection. Envoy's own default for its side is the same.
        streams_per_connection: u32 = "1024",
        /// A larger `CheckRequest` is denied with 431, unread. Envoy's headers are at most 60 KiB unless configured.
        message_size: ByteSize = "256KiB",
        /// Messages held at one time, over all connections.
        messages_in_flight_size: ByteSize = "64MiB",
        /// Checks at one time, over all connections; beyond it they are answered as faults at once.
        checks_in_flight: u32 = "16384",
        /// Connections at one time; further ones wait in the kernel's queue.
        connections_max: u32 = "4096",
        /// How long a client may take for what comes first: the connection preface, and the whole of one message.
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

/// Resets that a peer may leave pending: Envoy resets en masse when its own timeout passes.
const PENDING_ACCEPT_RESETS_MAX: usize = 1_000;
/// Streams that we may have reset because the peer was wrong.
const LOCAL_ERROR_RESETS_MAX: usize = 1_024;
/// Bytes of request headers of one call.
const HEADER_LIST_BYTES_MAX: u32 = 16 << 10;
/// The largest message whose rest is read and thrown away, so that the connection stays in order; beyond it the call
/// is answered and reset.
const DISCARD_BYTES_MAX: u64 = 4 << 20;

/// What serves calls: shared by all listeners.
pub struct Service {
    checker: Arc<Checker>,
    others: Routes,
    limits: LimitsSettings,
    room: Room,
    checks: Semaphore,
    connections: Arc<Semaphore>,
    connections_open: IntGauge,
}

impl Service {
    /// A service that answers Check calls with `checker` and hands every other path to `others`.
    ///
    /// # Errors
    /// When a metric of that name exists already.
    pub fn new(
        checker: Arc<Checker>,
        others: Routes,
        limits: LimitsSettings,
        registry: &Registry,
    ) -> prometheus::Result<Self> {
        let open = Opts::new("trustgate_grpc_connections", "Connections to the gRPC listeners that are open.");
        Ok(Self {
            checker,
            others,
            room: Room::new(limits.messages_in_flight_size.length()),
            checks: Semaphore::new(limits.checks_in_flight as usize),
            connections: Arc::new(Semaphore::new(limits.connections_max as usize)),
            connections_open: register(registry, IntGauge::with_opts(open))?,
            limits,
        })
    }

    async fn call(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<ReplyBody>, Infallible> {
        if request.uri().path() == CHECK_PATH {
            return Ok(body::response(self.check(request.into_body()).await));
        }
        self.others.clone().call(request).await.map(|response| response.map(ReplyBody::other))
    }

    /// Reads one message, within its bounds, and decides it. Whatever the bytes are, the answer is a `CheckResponse`.
    async fn check(&self, mut incoming: Incoming) -> crate::wire::response::Reply {
        let read = body::read(&mut incoming, self.limits.message_size.bytes(), DISCARD_BYTES_MAX, &self.room);
        let message = match timeout(self.limits.preface_timeout, read).await {
            Ok(Ok(message)) => message,
            Ok(Err(body::Refused::Denied(reason))) => return self.checker.refuse(reason),
            Ok(Err(body::Refused::NoRoom)) => return self.checker.shed("limits.messages_in_flight_size"),
            Err(_) => return self.checker.refuse(crate::decision::DenyReason::Undecodable),
        };
        let Ok(_permit) = self.checks.try_acquire() else { return self.checker.shed("limits.checks_in_flight") };
        self.checker.check(message.bytes()).await
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

/// Serves one connection to its end.
async fn connection(
    service: Arc<Service>,
    mut stream: TcpStream,
    signals: Signals,
    tasks: TaskTracker,
    age: Duration,
    load: Arc<Load>,
) {
    // Answers are small and must not wait for more; a socket that refuses this still works.
    let _ = stream.set_nodelay(true);
    let limits = &service.limits;
    let Ok(Ok(preface)) = timeout(limits.preface_timeout, preface::read(&mut stream)).await else { return };
    let io = TokioIo::new(preface::Prefaced::new(preface, stream));
    let mut builder = http2::Builder::new(Supervised(tasks));
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams_per_connection)
        .max_pending_accept_reset_streams(PENDING_ACCEPT_RESETS_MAX)
        .max_local_error_reset_streams(LOCAL_ERROR_RESETS_MAX)
        .max_header_list_size(HEADER_LIST_BYTES_MAX)
        .keep_alive_interval(limits.keepalive_interval)
        .keep_alive_timeout(limits.keepalive_timeout);
    let shared = Arc::clone(&service);
    let call = hyper::service::service_fn(move |request| {
        let (stream, call) = (load.stream(), Arc::clone(&shared).call(request));
        async move {
            let answer = call.await;
            drop(stream);
            answer
        }
    });
    let mut serving = std::pin::pin!(builder.serve_connection(io, call));
    service.connections_open.inc();
    let ended_early = tokio::select! {
        // The peer's mistakes and departures are its own business: they end the connection and are no news.
        _ = &mut serving => true,
        () = sleep(age) => false,
        () = signals.drain.cancelled() => false,
    };
    if !ended_early {
        serving.as_mut().graceful_shutdown();
        tokio::select! {
            _ = &mut serving => {}
            // hyper may wait without end for a peer that never closes its streams.
            () = sleep(limits.drain_grace) => {}
            () = signals.end.cancelled() => {}
        }
    }
    service.connections_open.dec();
}

/// Runs the tasks that hyper makes for calls where somebody waits for their end.
#[derive(Clone)]
struct Supervised(TaskTracker);

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Supervised {
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}
