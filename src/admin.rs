//! The admin listener: metrics and probes.
//!
//! Has its own thread, so that it answers while checks are many. Nothing here lists or changes anything.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use futures_util::future::join_all;
use tokio::{net::TcpListener, runtime::Handle, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    clock::Clock,
    freshness::{Views, lease::Standing, poll::PollMetrics},
    metrics::{self, Registry},
    net::drain::{Life, Phase},
};

crate::settings! {
    /// The listener for metrics and probes.
    pub struct AdminSettings in "admin" {
        /// Where to listen: one address or a list.
        listen: Vec<SocketAddr> = "127.0.0.1:9180",
    }
}

/// How long the runtimes that serve checks have to answer a probe, all of them.
const PROBE_TIMEOUT: Duration = Duration::from_millis(250);

/// What the admin listener shows.
pub struct Admin {
    /// The metrics.
    pub registry: Registry,
    /// Where this server is in its life.
    pub life: Life,
    /// What this replica knows of the store.
    pub views: Arc<Views>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Whether the store answers.
    pub poll: PollMetrics,
    /// The runtimes that serve checks.
    pub serving: Vec<Handle>,
    /// Called before a scrape.
    pub before_scrape: Box<dyn Fn() + Send + Sync>,
}

/// Serves `listener` until `stop`.
///
/// # Errors
/// When the listener fails for good.
pub async fn run(listener: TcpListener, admin: Arc<Admin>, stop: CancellationToken) -> std::io::Result<()> {
    let routes = Router::new()
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(scrape))
        .with_state(admin);
    axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned()).await
}

/// 200 from the first confirmation of the store until draining. It stays 200 while the database or Redis is down:
/// otherwise all replicas would leave at once. The body says what is lost.
async fn ready(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    let phase = admin.life.phase();
    let probes = admin.serving.iter().map(|core| core.spawn(async {}));
    let answers = timeout(PROBE_TIMEOUT, join_all(probes)).await.is_ok();
    let store = match (admin.views.is_confirmed(), admin.poll.is_store_up()) {
        (_, true) => "ok",
        (false, false) => "cannot be used yet; see the log for the reason",
        (true, false) => "lost",
    };
    let lease = match admin.views.load().standing(admin.clock.now()) {
        Standing::Fresh => "fresh",
        Standing::Stale => "stale; keys that were good are still granted for freshness.stale_if_unconfirmed",
        Standing::Lapsed => "none; checks that would rely on it ask the database",
    };
    let is_ready = phase == Phase::Serve && answers;
    let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let serving = if answers { "ok" } else { "does not answer" };
    (status, format!("{}\nserving: {serving}\ndatabase: {store}\nlease: {lease}\n", phase.as_str()))
}

async fn scrape(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    (admin.before_scrape)();
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics::text(&admin.registry))
}
