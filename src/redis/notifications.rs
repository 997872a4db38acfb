//! Hints: the word between replicas that there is something new in the database.
//!
//! What a hint holds is never looked at, and one that is lost costs no more than the wait for the next poll.

use futures_util::StreamExt as _;
use redis::{RedisError, aio::PubSub};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{Attempts, Link, PING_INTERVAL, Redis, timed_out};

/// Where hints are sent. In a Cluster a message reaches every node.
pub(crate) const CHANNEL: &str = "trustgate:hints";

/// Calls `on_hint` for every hint, and once after every connect, since what was said before was missed. Goes on until
/// `stop`, on a connection of its own; `on_hint` must not block.
pub async fn listen(link: impl Link, on_hint: impl Fn() + Send + Sync, stop: CancellationToken) {
    let listening = async {
        let mut attempts = Attempts::new(" for hints");
        // The next node of a Cluster each time, so that one that is gone is passed over.
        for turn in 0_usize.. {
            let Some(subscriber) = attempts.make(Box::pin(subscribe(&link, turn))).await else { continue };
            on_hint();
            let error = hear(subscriber, &on_hint).await;
            attempts.broke(&error);
        }
    };
    stop.run_until_cancelled(listening).await;
}

async fn subscribe(link: &impl Link, turn: usize) -> Result<PubSub, RedisError> {
    let mut subscriber = link.subscriber(turn).await?;
    subscriber.subscribe(CHANNEL).await?;
    Ok(subscriber)
}

/// Returns once the connection no longer answers.
async fn hear(subscriber: PubSub, on_hint: &(impl Fn() + Sync)) -> RedisError {
    let (mut sender, mut hints) = subscriber.split();
    let until_silent = async {
        loop {
            sleep(PING_INTERVAL).await;
            match timeout(PING_INTERVAL, sender.ping::<redis::Value>()).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return error,
                Err(_) => return timed_out(),
            }
        }
    };
    let until_closed = async {
        while hints.next().await.is_some() {
            on_hint();
        }
        RedisError::from(std::io::Error::from(std::io::ErrorKind::ConnectionReset))
    };
    tokio::select! {
        biased;
        error = until_silent => error,
        error = until_closed => error,
    }
}

/// Sends a hint whenever there is one to send, for ever.
pub(crate) async fn publish(redis: &Redis) {
    let mut command = redis::cmd("PUBLISH");
    command.arg(CHANNEL).arg("");
    loop {
        redis.hint.notified().await;
        // The breaker has heard of a failure, and the replicas poll without a hint too.
        let _ = redis.query::<()>(&command).await;
    }
}
