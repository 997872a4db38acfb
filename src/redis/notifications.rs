//! Notifications through Redis: a replica notifies the other replicas that the database has a new version, and the
//! other replicas then poll.
//!
//! The content of a notification is ignored. If a notification is lost, the replicas see the change at their next
//! regular poll.

use futures_util::StreamExt as _;
use redis::{RedisError, aio::PubSub};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{
    connection::Link,
    reconnect::{Attempts, PING_INTERVAL, timed_out},
};

/// The channel of the notifications. In a Cluster, a published message reaches all nodes.
pub(crate) const CHANNEL: &str = "trustgate:hints";

/// Subscribes on a dedicated connection until `stop` is cancelled. Calls `on_notification` for each notification, and
/// after each new connection is established, because notifications may have been missed before that. `on_notification`
/// must not block.
pub async fn listen(link: impl Link, on_notification: impl Fn() + Send + Sync, stop: CancellationToken) {
    let listening = async {
        let mut attempts = Attempts::new(" for notifications");
        // In a Cluster, each attempt uses the next node, so that a node that is down is skipped.
        for turn in 0_usize.. {
            let Some(subscriber) = attempts.make(Box::pin(subscribe(&link, turn))).await else { continue };
            on_notification();
            let error = receive(subscriber, &on_notification).await;
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

/// Calls `on_notification` for each notification until the connection fails. Returns the error.
async fn receive(subscriber: PubSub, on_notification: &(impl Fn() + Sync)) -> RedisError {
    let (mut sender, mut notifications) = subscriber.split();
    let until_ping_fails = async {
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
        while notifications.next().await.is_some() {
            on_notification();
        }
        RedisError::from(std::io::Error::from(std::io::ErrorKind::ConnectionReset))
    };
    tokio::select! {
        biased;
        error = until_ping_fails => error,
        error = until_closed => error,
    }
}
