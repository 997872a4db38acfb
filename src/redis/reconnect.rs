//! Makes connection attempts to Redis, with timeouts and back-off, and logs them.

use std::time::Duration;

use redis::RedisError;
use tokio::time::{sleep, timeout};

/// Timeout of one connection attempt, including the search for the master or the nodes, TLS, authentication and a first
/// reply.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The interval between two PINGs on a connection, and the timeout of each PING.
pub(crate) const PING_INTERVAL: Duration = Duration::from_secs(1);
/// The first back-off after a failed attempt or a broken connection. The back-off doubles up to [`PING_INTERVAL`].
const RECONNECT_WAIT: Duration = Duration::from_millis(50);

/// Makes connection attempts, each with a timeout, and with a back-off after a failure. Logs only changes: the first
/// failure in a row, and a new connection.
pub(crate) struct Attempts {
    purpose: &'static str,
    wait: Option<Duration>,
    was_down: bool,
    /// True if the next connection replaces a working connection whose node refused commands. The refusals are in the
    /// log already, so the new connection is not logged.
    is_replacement: bool,
}

impl Attempts {
    /// Creates the state before the first attempt. `purpose` follows "redis connection" in log messages.
    pub(crate) const fn new(purpose: &'static str) -> Self {
        Self { purpose, wait: None, was_down: false, is_replacement: false }
    }

    /// Makes one attempt, after the back-off that the previous result requires. Returns `None` if the attempt fails.
    pub(crate) async fn make<C>(&mut self, connect: impl Future<Output = Result<C, RedisError>>) -> Option<C> {
        let purpose = self.purpose;
        if let Some(wait) = self.wait {
            sleep(wait).await;
        }
        match timeout(CONNECT_TIMEOUT, connect).await.unwrap_or_else(|_| Err(timed_out())) {
            Ok(connection) => {
                if !self.is_replacement {
                    tracing::info!("redis connection{purpose} established");
                }
                (self.wait, self.was_down, self.is_replacement) = (None, false, false);
                Some(connection)
            }
            Err(error) => {
                if !self.was_down {
                    tracing::warn!(%error, "redis connection{purpose} failed; retrying in the background");
                }
                self.wait = Some(self.wait.map_or(RECONNECT_WAIT, |wait| (wait * 2).min(PING_INTERVAL)));
                self.was_down = true;
                None
            }
        }
    }

    /// Logs that the connection broke, and starts the back-off.
    pub(crate) fn broke(&mut self, error: &RedisError) {
        tracing::warn!(%error, "redis connection{} broke; reconnecting", self.purpose);
        self.wait = Some(RECONNECT_WAIT);
    }

    /// Starts the back-off after the caller has closed the connection in order to replace it.
    pub(crate) fn replaced(&mut self) {
        (self.wait, self.is_replacement) = (Some(RECONNECT_WAIT), true);
    }
}

/// Returns the error for a command or connection attempt that timed out.
pub(crate) fn timed_out() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::TimedOut).into()
}
