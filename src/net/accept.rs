//! Accepts connections within their bound, and waits a moment where the machine has no more of something.
//!
//! Never ends because accepting failed: a server that stopped listening under load would be down for good.

use std::{sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};
use tokio_util::task::TaskTracker;

use super::{Service, Signals, connection, core::Cores, stream::Stream};

/// The wait after a failed accept (out of file descriptors, say); it doubles up to the longest one.
const ACCEPT_WAIT: Duration = Duration::from_millis(10);
const ACCEPT_WAIT_MAX: Duration = Duration::from_secs(1);

/// Accepts from `listener` until `signals.drain`, then closes it. Connections live on in `tasks`, on `cores`.
pub async fn run(
    listener: TcpListener,
    service: Arc<Service>,
    cores: Arc<Cores>,
    signals: Signals,
    tasks: TaskTracker,
) {
    let mut wait = ACCEPT_WAIT;
    loop {
        let accepted = signals.drain.run_until_cancelled(async {
            // The semaphore is never closed; without a permit there would be no bound, so none means stop.
            let permit = Arc::clone(&service.connections).acquire_owned().await.ok()?;
            Some((permit, listener.accept().await))
        });
        let Some(Some((permit, accepted))) = accepted.await else { return };
        // On its own core the connection is made anew: it belongs to the runtime where it is made.
        let (stream, peer) = match accepted.and_then(|(stream, peer)| Ok((stream.into_std()?, peer))) {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted; trying again in {wait:?}");
                sleep(wait).await;
                wait = (wait * 2).min(ACCEPT_WAIT_MAX);
                continue;
            }
        };
        wait = ACCEPT_WAIT;
        let age = spread_age(service.limits.connection_age, peer.port());
        let (service, signals, calls) = (Arc::clone(&service), signals.clone(), tasks.clone());
        cores.serve(&tasks, |load| async move {
            let end = signals.end.clone();
            // A descriptor that cannot be watched is closed: the peer tries again.
            if let Ok(stream) = TcpStream::from_std(stream) {
                // Answers are small and must not wait for more; a socket that refuses this still works.
                let _ = stream.set_nodelay(true);
                end.run_until_cancelled(connection::serve(service, Stream::Tcp(stream), signals, calls, age, load))
                    .await;
            }
            drop(permit);
        });
    }
}

/// `age` +-20 %, so that connections that came together do not leave together. The peer's port is random enough.
fn spread_age(age: Duration, port: u16) -> Duration {
    age.mul_f64(0.8 + 0.4 * f64::from(port.wrapping_mul(40_503)) / f64::from(u16::MAX))
}
