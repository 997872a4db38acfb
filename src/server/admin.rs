//! The admin listener: metrics and probes, over HTTP/1.
//!
//! The listener has its own thread, so that it answers even while the workers are busy. It exposes no keys and changes
//! nothing. The number of connections, the size of requests and the time for each request are limited, so that
//! unfinished requests can neither exhaust memory and file descriptors nor delay the shutdown.

use std::{collections::VecDeque, convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE},
};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::base::{
    clock::Clock,
    log_limit::LogLimit,
    metrics::{self, Registry},
};

crate::settings! {
    /// The listener for metrics and probes.
    pub struct AdminSettings in "admin" {
        /// Addresses to listen on: one address or a list.
        listen: Vec<SocketAddr> = "127.0.0.1:9180",
    }
}

/// Maximum number of open connections. A further connection closes the oldest one, so that unfinished requests cannot
/// block a probe.
const CONNECTIONS_MAX: usize = 64;
/// Timeout for receiving the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout for a whole connection, which serves one request. A scrape takes a few milliseconds.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum size of a request's head, in bytes. Hyper accepts no smaller limit.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// Wait after a failed accept, for example because the process has no free file descriptor.
const ACCEPT_WAIT: Duration = Duration::from_secs(1);
/// Minimum interval between log lines about failed accepts, because a shortage of file descriptors can last for hours.
const FAILURE_LOG_INTERVAL: Duration = Duration::from_mins(1);

/// The data that the admin listener exposes.
pub(crate) struct Admin {
    /// All metrics.
    pub registry: Registry,
    /// A function that is called before each scrape.
    pub before_scrape: Box<dyn Fn() + Send + Sync>,
    /// Answers readiness probes.
    pub readiness: Box<dyn Readiness>,
    pub clock: Arc<dyn Clock>,
}

/// Reports whether this process is ready.
#[async_trait]
pub(crate) trait Readiness: Send + Sync {
    /// Returns true if this process is ready, and human-readable details.
    async fn examine(&self) -> (bool, String);
}

/// Serves `listener` until `stop` is cancelled, then closes the connections.
pub(crate) async fn run(listener: TcpListener, admin: Arc<Admin>, stop: CancellationToken) {
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
                        tracing::warn!(%error, suppressed, "admin accept failed; retrying in {ACCEPT_WAIT:?}");
                    }
                    sleep(ACCEPT_WAIT).await;
                }
            }
        }
    };
    stop.run_until_cancelled(accepting).await;
    // Abort the connections that are still open, because they may wait for slow clients.
    connections.shutdown().await;
}

/// Serves one request. Connection errors are not logged, because the client causes them.
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
        "/readyz" => {
            let (is_ready, details) = admin.readiness.examine().await;
            (if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, TEXT, details)
        }
        "/metrics" => {
            (admin.before_scrape)();
            (StatusCode::OK, METRICS, metrics::text(&admin.registry))
        }
        _ => (StatusCode::NOT_FOUND, TEXT, "not found: use /livez, /readyz or /metrics\n".to_owned()),
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
