//! The Redis handle that the rest of the server uses, and the task that maintains its connection.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt as _;
use redis::{Cmd, FromRedisValue, RedisError};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    connection::{Link, RedisConnection},
    notifications::CHANNEL,
    reconnect::{Attempts, PING_INTERVAL, timed_out},
    settings::RedisSettings,
};
use crate::base::{
    breaker::{self, Breaker},
    clock::Clock,
    fault::{Fault, Tier},
    metrics::{IntCounter, IntCounterVec, IntGauge, Opts, Registry, register},
};

/// The maximum time for which a connection to a node that refuses commands is kept.
const REPLACE_INTERVAL_MAX: Duration = Duration::from_mins(1);

/// The Redis connection metrics.
#[derive(Clone)]
pub struct RedisMetrics {
    up: IntGauge,
    breaker_open: IntGauge,
    refused: [IntCounter; CommandRefusal::ALL.len()],
}

impl RedisMetrics {
    /// Registers the metrics; `breaker_open` is the gauge of the Redis circuit breaker.
    ///
    /// # Errors
    /// Returns the error of [`register`].
    pub fn register(registry: &Registry, breaker_open: IntGauge) -> prometheus::Result<Self> {
        let up = Opts::new(
            "trustgate_redis_up",
            "1 while Redis (in a Cluster, every master) is connected and answers, otherwise 0.",
        );
        let refused = Opts::new("trustgate_redis_refused_total", "Commands that Redis refused, by reason.");
        let refused = register(registry, IntCounterVec::new(refused, &["reason"]))?;
        Ok(Self {
            up: register(registry, IntGauge::with_opts(up))?,
            breaker_open,
            refused: CommandRefusal::ALL.map(|refusal| refused.with_label_values(&[refusal.as_str()])),
        })
    }
}

/// The reason why a reachable server refuses a command
/// (<https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors>).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CommandRefusal {
    /// The node has become a replica.
    ReadOnly,
    /// The node is a replica that has lost its master.
    MasterDown,
    /// The node is still loading its data.
    Loading,
    /// The memory limit is reached, and the eviction policy does not free any memory.
    OutOfMemory,
    /// The node cannot save its data, or has too few replicas.
    Misconfigured,
}

impl CommandRefusal {
    const ALL: [Self; 5] = [Self::ReadOnly, Self::MasterDown, Self::Loading, Self::OutOfMemory, Self::Misconfigured];

    /// Returns the value of the metric label `reason`.
    const fn as_str(self) -> &'static str {
        match self {
            Self::ReadOnly => "readonly",
            Self::MasterDown => "masterdown",
            Self::Loading => "loading",
            Self::OutOfMemory => "oom",
            Self::Misconfigured => "misconf",
        }
    }

    fn of(error: &RedisError) -> Option<Self> {
        let refusal = |code: &str| match code {
            "READONLY" => Some(Self::ReadOnly),
            "MASTERDOWN" => Some(Self::MasterDown),
            "LOADING" => Some(Self::Loading),
            "OOM" => Some(Self::OutOfMemory),
            "MISCONF" | "NOREPLICAS" => Some(Self::Misconfigured),
            _ => None,
        };
        // Before Redis 7, if a command inside a script fails, its error code follows a dash in the error message.
        let in_script = || {
            let text = error.to_string();
            text.split('-').skip(1).find_map(|part| refusal(part.split_whitespace().next().unwrap_or_default()))
        };
        error.code().and_then(refusal).or_else(in_script)
    }

    /// Returns true if a new connection may lead to a node that accepts the command.
    const fn may_pass_elsewhere(self) -> bool {
        matches!(self, Self::ReadOnly | Self::MasterDown | Self::Loading)
    }
}

/// The state of commands that Redis refuses.
#[derive(Default)]
struct Refusing {
    /// True while Redis refuses commands. Only changes of this flag are logged.
    is_refusing: AtomicBool,
    /// Requests a new connection.
    replace: Notify,
}

/// A handle to Redis, cheap to clone.
#[derive(Clone)]
pub struct Redis {
    connection: watch::Receiver<Option<RedisConnection>>,
    breaker: Arc<Breaker>,
    clock: Arc<dyn Clock>,
    limit: Duration,
    metrics: RedisMetrics,
    /// Requests a notification to the other replicas.
    wake: Arc<Notify>,
    refusing: Arc<Refusing>,
}

/// The reason why a command has no usable reply.
#[derive(Debug)]
pub enum QueryError {
    /// The circuit breaker is open, or there is no connection at the moment.
    Paused,
    /// Redis failed or did not reply within the timeout.
    Failed(Fault),
    /// The value at the Redis key has a different type from the one that the command expects (`WRONGTYPE`).
    WrongType,
    /// The server does not have the script (`NOSCRIPT`).
    NoScript,
}

/// A Lua script. The server runs it by its hash; [`Redis::run`] sends the full source only to a server that does not
/// have the script.
pub struct LuaScript {
    code: &'static str,
    hash: String,
}

impl LuaScript {
    /// Creates a script from its source `code`, which must use exactly one Redis key.
    #[must_use]
    pub fn new(code: &'static str) -> Self {
        Self { code, hash: redis::Script::new(code).get_hash().to_owned() }
    }
}

impl Redis {
    /// Creates a handle, and a task that maintains a connection over `link` and publishes notifications until `stop` is
    /// cancelled. The caller must run the task.
    pub fn new<L: Link>(
        settings: &RedisSettings,
        link: L,
        clock: Arc<dyn Clock>,
        metrics: RedisMetrics,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + use<L>) {
        let rules = breaker::Rules { failures_max: settings.breaker_failures, open_for: settings.breaker_open };
        let labels = breaker::Labels {
            tier: "redis",
            effect: "records are read from the database instead",
            open: metrics.breaker_open.clone(),
        };
        let (sender, connection) = watch::channel(None);
        let handle = Self {
            connection,
            breaker: Arc::new(Breaker::new(rules, labels)),
            clock,
            limit: settings.timeout,
            metrics: metrics.clone(),
            wake: Arc::default(),
            refusing: Arc::default(),
        };
        let publisher = handle.clone();
        let keeper = async move {
            let connected = keep_connected(&link, sender, metrics, &publisher.refusing);
            stop.run_until_cancelled(async { tokio::join!(connected, publish(&publisher)) }).await;
        };
        (handle, keeper)
    }

    /// Sends `command` and waits up to `redis.timeout` for the reply.
    ///
    /// # Errors
    /// Returns a [`QueryError`]. If Redis failed, the circuit breaker has already counted the failure.
    ///
    /// # Cancel safety
    /// Safe: the connection, which all callers share, stays usable.
    pub async fn query<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, QueryError> {
        let began = self.clock.now();
        if !self.breaker.admits(began) {
            return Err(QueryError::Paused);
        }
        let Some(mut connection) = self.connection.borrow().clone() else {
            self.breaker.failed(began, began);
            return Err(QueryError::Paused);
        };
        let fault = match timeout(self.limit, connection.send(command)).await {
            Ok(Ok(value)) => {
                self.breaker.succeeded();
                return Ok(value);
            }
            Ok(Err(error)) => {
                // These errors concern the command and not the server, so the circuit breaker must not count them.
                let answer = match error.code() {
                    Some("WRONGTYPE") => Some(QueryError::WrongType),
                    Some("NOSCRIPT") => Some(QueryError::NoScript),
                    _ => None,
                };
                if let Some(answer) = answer {
                    self.breaker.succeeded();
                    return Err(answer);
                }
                let refusal = CommandRefusal::of(&error);
                if let Some(refusal) = refusal {
                    self.note_refused(refusal, &error);
                }
                let fault = Fault::unreachable(Tier::L2, error);
                if matches!(
                    refusal,
                    Some(CommandRefusal::ReadOnly | CommandRefusal::OutOfMemory | CommandRefusal::Misconfigured)
                ) {
                    // The server still answers reads, so the circuit breaker must count this as a success.
                    self.breaker.succeeded();
                    return Err(QueryError::Failed(fault));
                }
                fault
            }
            Err(_) => Fault::Timeout { tier: Tier::L2, limit: self.limit },
        };
        self.breaker.failed(began, self.clock.now());
        Err(QueryError::Failed(fault))
    }

    /// Runs `script` on the Redis key `key`. Waits up to `redis.timeout`, or twice that time if the server does not
    /// have the script yet.
    ///
    /// # Errors
    /// Returns the same errors as [`Self::query`].
    ///
    /// # Cancel safety
    /// Safe. After a cancelled call, the script may or may not have run.
    pub async fn run<T: FromRedisValue>(
        &self,
        script: &LuaScript,
        key: &str,
        arguments: &[&[u8]],
    ) -> Result<T, QueryError> {
        let call = |command: &str, script: &str| {
            let mut call = redis::cmd(command);
            call.arg(script).arg(1).arg(key).arg(arguments);
            call
        };
        match self.query(&call("EVALSHA", &script.hash)).await {
            Err(QueryError::NoScript) => self.query(&call("EVAL", script.code)).await,
            answer => answer,
        }
    }

    /// Records that Redis accepted a write.
    pub fn note_written(&self) {
        if self.refusing.is_refusing.swap(false, Ordering::Relaxed) {
            tracing::info!("redis accepts writes again");
        }
    }

    fn note_refused(&self, refusal: CommandRefusal, error: &RedisError) {
        self.metrics.refused[refusal as usize].inc();
        if refusal.may_pass_elsewhere() {
            self.refusing.replace.notify_one();
        }
        if !self.refusing.is_refusing.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                reason = refusal.as_str(),
                %error,
                "redis refuses commands: replicas do not share records until Redis accepts writes again"
            );
        }
    }

    /// Asks the background task to notify the other replicas of a change in the database. Returns immediately. Best
    /// effort: requests that arrive while a notification is being sent are combined into one notification, and a
    /// notification that Redis does not accept is lost.
    pub fn publish(&self) {
        self.wake.notify_one();
    }

    /// Returns the timeout of one command.
    #[must_use]
    pub const fn limit(&self) -> Duration {
        self.limit
    }
}

async fn keep_connected(
    link: &impl Link,
    sender: watch::Sender<Option<RedisConnection>>,
    metrics: RedisMetrics,
    refusing: &Refusing,
) {
    let mut attempts = Attempts::new("");
    // The minimum lifetime of a connection whose node refuses commands. This time doubles with each replacement,
    // because the address may always lead to a replica.
    let mut kept_for = PING_INTERVAL;
    loop {
        let Some(connection) = attempts.make(Box::pin(link.connect())).await else { continue };
        metrics.up.set(1);
        // Discard a replacement request that a command on the previous connection may have made.
        let _ = refusing.replace.notified().now_or_never();
        sender.send_replace(Some(connection.clone()));
        let made = Instant::now();
        let broken = tokio::select! {
            error = until_broken(connection) => Some(error),
            () = async {
                refusing.replace.notified().await;
                sleep_until(made + kept_for).await;
            } => None,
        };
        sender.send_replace(None);
        metrics.up.set(0);
        if let Some(error) = broken {
            kept_for = PING_INTERVAL;
            attempts.broke(&error);
        } else {
            kept_for = (kept_for * 2).min(REPLACE_INTERVAL_MAX);
            attempts.replaced();
        }
    }
}

/// Pings the connection until a ping fails. Returns the error.
async fn until_broken(mut connection: RedisConnection) -> RedisError {
    loop {
        sleep(PING_INTERVAL).await;
        match timeout(PING_INTERVAL, connection.ping()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error,
            Err(_) => return timed_out(),
        }
    }
}

/// Publishes a notification after each call of [`Redis::publish`]. Does not return.
async fn publish(redis: &Redis) {
    let mut command = redis::cmd("PUBLISH");
    command.arg(CHANNEL).arg("");
    loop {
        redis.wake.notified().await;
        // Ignore a failure: `query` has reported it to the circuit breaker, and replicas also poll without a
        // notification.
        let _ = redis.query::<()>(&command).await;
    }
}
