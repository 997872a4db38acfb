//! Accepts connections within their bound, and waits a moment where the machine has no more of something.
//!
//! Never ends because accepting failed: a server that stopped listening under load would be down for good.

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

/// The wait after a failed accept (out of file descriptors, say); it doubles up to the longest one.
const ACCEPT_WAIT: Duration = Duration::from_millis(10);
const ACCEPT_WAIT_MAX: Duration = Duration::from_secs(1);

/// Accepts from `listener` until `signals.drain`, then closes it. Connections live on in `tasks`, on `workers`.
pub async fn run(
    listener: Listener,
    service: Arc<Service>,
    workers: Arc<Workers>,
    signals: Signals,
    tasks: TaskTracker,
) {
    let (mut wait, mut number) = (ACCEPT_WAIT, 0_u16);
    loop {
        let accepted = signals.drain.run_until_cancelled(async {
            // The semaphore is never closed; without a permit there would be no bound, so none means stop.
            let permit = Arc::clone(&service.connections).acquire_owned().await.ok()?;
            Some((permit, listener.accept().await))
        });
        let Some(Some((permit, accepted))) = accepted.await else { return };
        let accepted = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted; trying again in {wait:?}");
                sleep(wait).await;
                wait = (wait * 2).min(ACCEPT_WAIT_MAX);
                continue;
            }
        };
        wait = ACCEPT_WAIT;
        number = number.wrapping_add(1);
        let age = spread_age(service.limits.connection_age, number);
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
                    // The peer left, or sent nothing: it asked for nothing.
                    Ok(Err(Refused::Ended)) | Err(_) => {}
                }
            };
            end.run_until_cancelled(serving).await;
            drop(permit);
        });
    }
}

/// `age` +-20 %, so that connections that came together do not leave together.
fn spread_age(age: Duration, number: u16) -> Duration {
    // A multiple of the golden ratio spreads numbers that follow each other.
    age.mul_f64(0.8 + 0.4 * f64::from(number.wrapping_mul(40_503)) / f64::from(u16::MAX))
}
