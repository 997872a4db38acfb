//! Accepts connections within their bound, and waits a moment where the machine has no more of something.
//!
//! Never ends because accepting failed: a server that stopped listening under load would be down for good.

use std::{sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};
use tokio_util::task::TaskTracker;

use super::{Service, Signals, connection, core::Cores, listen::Listener, stream::Stream};

/// The wait after a failed accept (out of file descriptors, say); it doubles up to the longest one.
const ACCEPT_WAIT: Duration = Duration::from_millis(10);
const ACCEPT_WAIT_MAX: Duration = Duration::from_secs(1);

/// Accepts from `listener` until `signals.drain`, then closes it. Connections live on in `tasks`, on `cores`.
pub async fn run(listener: Listener, service: Arc<Service>, cores: Arc<Cores>, signals: Signals, tasks: TaskTracker) {
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
        let (service, signals, calls) = (Arc::clone(&service), signals.clone(), tasks.clone());
        cores.serve(&tasks, |load| async move {
            let end = signals.end.clone();
            let serving = async {
                // A peer that cannot be understood is left: what is wrong with it is not ours to tell.
                let opened = timeout(service.limits.preface_timeout, Stream::open(accepted, service.tls.as_ref()));
                if let Ok(Ok(stream)) = opened.await {
                    connection::serve(service, stream, signals, calls, age, load).await;
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
