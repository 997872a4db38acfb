//! Accepts connections up to `limits.connections_max`. After a failed accept, waits and retries.
//!
//! A failed accept does not end the listener: otherwise one shortage of file descriptors would make the server
//! unreachable until it is restarted.

use std::{sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};
use tokio_util::task::TaskTracker;

use super::{
    connection, http1,
    listener::Listener,
    service::{Service, Signals},
    stream::{Refused, Stream},
    worker::Workers,
};
use crate::base::{jitter, log_limit::LogLimit};

/// Wait after a failed accept, for example when the process is out of file descriptors. Each further failure doubles
/// the wait, up to [`ACCEPT_WAIT_MAX`].
const ACCEPT_WAIT: Duration = Duration::from_millis(10);
const ACCEPT_WAIT_MAX: Duration = Duration::from_secs(1);
/// Minimum interval between two log lines about failed accepts. A shortage of file descriptors can last for hours.
const FAILURE_LOG_INTERVAL: Duration = Duration::from_mins(1);

/// Accepts connections from `listener` until `signals.drain` is cancelled, then closes the listener. Open connections
/// continue in `tasks`, on `workers`.
pub(crate) async fn run(
    listener: Listener,
    service: Arc<Service>,
    workers: Arc<Workers>,
    signals: Signals,
    tasks: TaskTracker,
) {
    let (mut wait, mut number, failures) = (ACCEPT_WAIT, 0_u16, LogLimit::every(FAILURE_LOG_INTERVAL));
    loop {
        let accepted = signals.drain.run_until_cancelled(async {
            // `acquire_owned` fails only if the semaphore is closed, and no code closes it. Stop in that case: without
            // permits, the number of connections would be unlimited.
            let permit = Arc::clone(&service.connections).acquire_owned().await.ok()?;
            Some((permit, listener.accept().await))
        });
        let Some(Some((permit, accepted))) = accepted.await else { return };
        let accepted = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                if let Some(suppressed) = failures.permit(service.clock.now()) {
                    tracing::warn!(%error, suppressed, "gRPC accept failed; retrying in {wait:?}");
                }
                sleep(wait).await;
                wait = (wait * 2).min(ACCEPT_WAIT_MAX);
                continue;
            }
        };
        wait = ACCEPT_WAIT;
        number = number.wrapping_add(1);
        let age = jittered_age(service.limits.connection_age, number);
        let peer = accepted.peer();
        let (service, signals, calls) = (Arc::clone(&service), signals.clone(), tasks.clone());
        workers.serve(&tasks, |load| async move {
            let end = signals.end.clone();
            let serving = async {
                let opened = timeout(service.limits.preface_timeout, Stream::open(accepted, service.tls.as_ref()));
                match opened.await {
                    Ok(Ok(stream)) => connection::serve(service, stream, peer, signals, calls, age, load).await,
                    Ok(Err(Refused::Peer(reason, detail))) => service.refuse_peer(reason, peer, detail),
                    Ok(Err(Refused::NotHttp2(reason, stream))) => {
                        service.refuse_peer(reason, peer, "answered with HTTP 400");
                        http1::refuse(stream, service.limits.preface_timeout).await;
                    }
                    // The peer disconnected, or sent nothing before the timeout: no request to answer or to log.
                    Ok(Err(Refused::Ended)) | Err(_) => {}
                }
            };
            end.run_until_cancelled(serving).await;
            drop(permit);
        });
    }
}

/// Returns `age` varied by up to 20 %, so that connections that were opened at the same time are not all closed at the
/// same time. `number` determines the variation.
fn jittered_age(age: Duration, number: u16) -> Duration {
    // Multiplying by the golden ratio (40 503 / 65 536) distributes consecutive numbers evenly over the range.
    jitter::vary(age, 0.2, f64::from(number.wrapping_mul(40_503)) / f64::from(u16::MAX))
}
