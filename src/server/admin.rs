//! The admin listener: metrics and probes, over HTTP/1.
//!
//! The listener has its own thread, so that it answers while the workers are busy. It lists no keys and changes
//! nothing. Its connections, requests and times are limited, so that unfinished requests can neither exhaust memory and
//! file descriptors nor delay the shutdown.

use std::{collections::VecDeque, convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{
    HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE},
};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Handle,
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::lifecycle::{Life, Phase};
use crate::{
    base::{
        clock::Clock,
        log_limit::LogLimit,
        metrics::{self, Registry},
    },
    freshness::{ReplicaState, lease::LeaseState, poll::PollMetrics},
};

crate::settings! {
    /// The listener for metrics and probes.
    pub struct AdminSettings in "admin" {
        /// Addresses to listen on: one address or a list.
        listen: Vec<SocketAddr> = "127.0.0.1:9180",
    }
}

/// Maximum number of open connections. One more closes the oldest, so that unfinished requests cannot keep a probe out.
const CONNECTIONS_MAX: usize = 64;
/// Timeout for the arrival of a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout for a whole connection, which serves one request. A scrape takes a few milliseconds.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum size of a request's head, in bytes. Hyper accepts no smaller limit.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// Wait after a failed accept (out of file descriptors, for example).
const ACCEPT_WAIT: Duration = Duration::from_secs(1);
/// The interval at which failed accepts are logged: a shortage of file descriptors can last for hours.
const FAILURE_LOG_INTERVAL: Duration = Duration::from_mins(1);

/// Timeout for all workers together to answer a readiness probe.
const PROBE_TIMEOUT: Duration = Duration::from_millis(250);

/// The data that the admin listener exposes.
pub struct Admin {
    /// All metrics.
    pub registry: Registry,
    /// The phase of the server's life.
    pub life: Life,
    /// The replica state.
    pub replica_state: Arc<ReplicaState>,
    /// The clock.
    pub clock: Arc<dyn Clock>,
    /// The metrics of the poll, which show whether the database answers.
    pub poll: PollMetrics,
    /// The runtimes of the workers.
    pub serving: Vec<Handle>,
    /// Called before each scrape.
    pub before_scrape: Box<dyn Fn() + Send + Sync>,
}

/// Serves `listener` until `stop`, then closes its connections.
pub async fn run(listener: TcpListener, admin: Arc<Admin>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    let mut open = VecDeque::<AbortHandle>::new();
    let failures = LogLimit::every(FAILURE_LOG_INTERVAL);
    let accepting = async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    while connections.try_join_next().is_some() {}
                    open.retain(|connection| !connection.is_finished());
                    if open.len() >= CONNECTIONS_MAX
                        && let Some(oldest) = open.pop_front()
                    {
                        oldest.abort();
                    }
                    open.push_back(connections.spawn(serve(stream, Arc::clone(&admin))));
                }
                Err(error) => {
                    if let Some(suppressed) = failures.permit(admin.clock.now()) {
                        tracing::warn!(%error, suppressed, "admin accept failed; trying again in {ACCEPT_WAIT:?}");
                    }
                    sleep(ACCEPT_WAIT).await;
                }
            }
        }
    };
    stop.run_until_cancelled(accepting).await;
    // The connections that are still open wait for slow callers, so do not wait for them.
    connections.shutdown().await;
}

/// Serves one request. Errors of the connection are not logged: the caller causes them.
async fn serve(stream: TcpStream, admin: Arc<Admin>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let admin = Arc::clone(&admin);
        async move { Ok::<_, Infallible>(answer(&request, &admin).await) }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_BYTES_MAX).keep_alive(false);
    let _ = timeout(CONNECTION_TIMEOUT, builder.serve_connection(TokioIo::new(stream), service)).await;
}

async fn answer(request: &Request<Incoming>, admin: &Admin) -> Response<Full<Bytes>> {
    let (status, kind, text) = match request.uri().path() {
        "/livez" | "/readyz" | "/metrics" if !matches!(*request.method(), Method::GET | Method::HEAD) => {
            (StatusCode::METHOD_NOT_ALLOWED, TEXT, "use GET\n".to_owned())
        }
        "/livez" => (StatusCode::OK, TEXT, "alive\n".to_owned()),
        "/readyz" => ready(admin).await,
        "/metrics" => {
            (admin.before_scrape)();
            (StatusCode::OK, METRICS, metrics::text(&admin.registry))
        }
        _ => (StatusCode::NOT_FOUND, TEXT, "there is /livez, /readyz and /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

const TEXT: &str = "text/plain; charset=utf-8";
/// The text format of Prometheus (<https://prometheus.io/docs/instrumenting/exposition_formats/>).
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Answers a readiness probe. The status is 200 from the first confirmed poll until the drain, if the workers respond
/// and this server has the recorded pepper. It stays 200 while the database or Redis is down: otherwise Envoy would
/// lose all replicas at once. The body shows what is unavailable.
async fn ready(admin: &Admin) -> (StatusCode, &'static str, String) {
    let phase = admin.life.phase();
    let probes = admin.serving.iter().map(|worker| worker.spawn(async {}));
    let answers = timeout(PROBE_TIMEOUT, join_all(probes)).await.is_ok();
    let store = match (admin.replica_state.is_confirmed(), admin.poll.is_store_up()) {
        (_, true) => "ok",
        (false, false) => "cannot be used yet; see the log for the reason",
        (true, false) => "lost",
    };
    let lease = match admin.replica_state.load().lease_state(admin.clock.now()) {
        LeaseState::Fresh => "fresh",
        LeaseState::Stale => "stale; keys that were good are still granted for freshness.stale_if_unconfirmed",
        LeaseState::Expired => "none; checks that would rely on it ask the database",
    };
    let fits = admin.replica_state.pepper.fits();
    let is_ready = phase == Phase::Serve && answers && fits;
    let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let serving = if answers { "ok" } else { "does not answer" };
    // The first poll compares the peppers.
    let pepper = match (fits, admin.replica_state.is_confirmed()) {
        (true, _) => "ok",
        (false, true) => "mismatch with the database; both fingerprints are in the log",
        (false, false) => "not compared yet",
    };
    let body = format!(
        "{}\nserving: {serving}\ndatabase: {store}\nlease: {lease}\npepper: {pepper}\n",
        if fits || phase != Phase::Serve { phase.as_str() } else { "not ready" }
    );
    (status, TEXT, body)
}
