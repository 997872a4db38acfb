//! Serves one HTTP/2 connection, from its preface until it closes.
//!
//! Calls that arrive together are decided before anything is sent, so that one write sends all their answers. The
//! connection does not wait for a call: a call that cannot be answered at once continues in a separate task.

use std::{
    future::{Future as _, poll_fn},
    net::IpAddr,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use h2::{
    Ping, PingPong, RecvStream,
    server::{self, SendResponse},
};
use http::Request;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{sleep, timeout},
};
use tokio_util::task::TaskTracker;

use super::{
    call::Calls,
    service::{Service, Signals},
    settings::LimitsSettings,
    worker::WorkerLoad,
};

/// Maximum number of queued streams that the peer reset before this server accepted them; one more closes the
/// connection. Envoy resets many streams at once when its timeout expires.
const PENDING_ACCEPT_RESETS_MAX: usize = 1_000;
/// Maximum number of streams that this server resets because of the peer's protocol errors; one more closes the
/// connection.
const LOCAL_ERROR_RESETS_MAX: usize = 1_024;
/// Maximum size of the request headers of one call, in bytes. Envoy accepts 60 KiB of headers from its client and may
/// forward some of them, for example for tracing. h2 refuses a call with larger headers, and `failure_mode_allow` would
/// then let the request pass.
const HEADER_LIST_BYTES_MAX: u32 = 96 << 10;
/// Maximum number of calls in a batch, whose answers are sent together. The frames of all these answers are in memory
/// at the same time, and h2 keeps the memory for the largest batch until the connection closes.
const BATCH_CALLS: usize = 32;
/// Maximum number of batches that are answered before the worker polls its other connections.
const BATCHES_MAX: usize = 32;
/// Size of the flow-control windows, in bytes: how much unread data the peer may send on one stream, and on the whole
/// connection.
const WINDOW_BYTES: u32 = 1 << 20;

/// Serves one connection until it closes. At `age`, or when `signals.drain` is cancelled, shuts the connection down
/// gracefully: waits up to `limits.drain_grace` for calls in flight to finish. When `signals.end` is cancelled, closes
/// the connection at once.
pub(crate) async fn serve(
    service: Arc<Service>,
    io: impl AsyncRead + AsyncWrite + Unpin,
    peer: Option<IpAddr>,
    signals: Signals,
    tasks: TaskTracker,
    age: Duration,
    load: Arc<WorkerLoad>,
) {
    let limits = service.limits.clone();
    let handshake = handshake(&limits, io);
    let Ok(Ok(mut http2)) = timeout(limits.preface_timeout, handshake).await else { return };
    let pings = http2.ping_pong();
    let _open = OpenConnection::count(Arc::clone(&service));
    let calls = Calls::new(service, peer, tasks, load, signals.drain.clone());
    let mut connection = Connection { http2, calls, arrived: Vec::new() };
    let mut lost = pin!(until_lost(pings, &limits));
    let is_over = {
        let mut shutdown_due = pin!(async {
            tokio::select! {
                () = sleep(age) => {}
                () = signals.drain.cancelled() => {}
            }
        });
        poll_fn(|cx| {
            // Protocol errors and disconnects by the peer end the connection and are not logged.
            if connection.poll(cx).is_ready() || lost.as_mut().poll(cx).is_ready() {
                return Poll::Ready(true);
            }
            shutdown_due.as_mut().poll(cx).map(|()| false)
        })
        .await
    };
    if !is_over {
        connection.http2.graceful_shutdown();
        tokio::select! {
            () = poll_fn(|cx| connection.poll(cx)) => {}
            () = lost => {}
            // Limit the wait, because the peer may keep its streams open indefinitely.
            () = sleep(limits.drain_grace) => {}
            () = signals.end.cancelled() => {}
        }
    }
}

/// Counts a connection as open until this guard is dropped, no matter how the connection ends.
struct OpenConnection(Arc<Service>);

impl OpenConnection {
    fn count(service: Arc<Service>) -> Self {
        service.connections_open.inc();
        Self(service)
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.connections_open.dec();
        self.0.connections_closed.fetch_add(1, Ordering::Relaxed);
    }
}

async fn handshake<T: AsyncRead + AsyncWrite + Unpin>(
    limits: &LimitsSettings,
    io: T,
) -> Result<server::Connection<T, Bytes>, h2::Error> {
    server::Builder::new()
        .max_concurrent_streams(limits.streams_per_connection)
        .max_pending_accept_reset_streams(PENDING_ACCEPT_RESETS_MAX)
        .max_local_error_reset_streams(Some(LOCAL_ERROR_RESETS_MAX))
        .max_header_list_size(HEADER_LIST_BYTES_MAX)
        .initial_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .handshake(io)
        .await
}

struct Connection<T> {
    http2: server::Connection<T, Bytes>,
    calls: Calls,
    /// Calls that have arrived but are not handled yet. The vector is a field so that its allocation is reused.
    arrived: Vec<(Request<RecvStream>, SendResponse<Bytes>)>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Connection<T> {
    /// Ready once the connection is closed. Yields after [`BATCHES_MAX`] batches, so that one busy connection cannot
    /// starve the others on this worker.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        for _ in 0..BATCHES_MAX {
            // `poll_accept` also sends the answers of the previous batch.
            while self.arrived.len() < BATCH_CALLS {
                match self.http2.poll_accept(cx) {
                    Poll::Ready(Some(Ok(call))) => self.arrived.push(call),
                    Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(()),
                    Poll::Pending => break,
                }
            }
            if self.arrived.is_empty() {
                return Poll::Pending;
            }
            for (request, respond) in self.arrived.drain(..) {
                self.calls.serve(cx, request, respond);
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Pings the peer at regular intervals; returns when the peer does not answer a ping in time.
async fn until_lost(pings: Option<PingPong>, limits: &LimitsSettings) {
    let Some(mut pings) = pings else { return };
    loop {
        sleep(limits.keepalive_interval).await;
        match timeout(limits.keepalive_timeout, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}
