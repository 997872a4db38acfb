//! The one connection to Redis or Valkey, be it a single server, the master that Sentinels name or a Cluster: made anew
//! in the background whenever it breaks, given a pause by a breaker. And the hints that replicas send each other.
//!
//! Redis is an optimisation. Never makes a caller wait for a connection, and never stops the start of the server.

pub(crate) mod connection;
pub(crate) mod notifications;

use std::{
    fs, io,
    path::{Path, PathBuf},
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

pub use self::{
    connection::{Connection, Link},
    notifications::listen,
};
use crate::{
    base::{
        breaker::{self, Breaker},
        clock::Clock,
        fault::{Fault, Tier},
        metrics::{IntCounter, IntCounterVec, IntGauge, Opts, Registry, register},
        secret::Secret,
        text,
    },
    record::bytes_from_hex,
};

crate::settings! {
    /// Redis or Valkey, shared between replicas: a single server, the master that Sentinels name, or a Cluster. Unset:
    /// every replica asks the database itself. Its user needs no more than the keys `~trustgate:*`, the channel
    /// `&trustgate:hints` and the commands `+ping +getrange +set +unlink +eval +evalsha +publish +subscribe`; for the deny
    /// list `+time +hlen +hkeys +hstrlen +hget`, and for the user that runs `trustgate deny` also `+hset +hdel`; with Sentinels also `+role`, in a Cluster also `+cluster|slots` and `+asking`, for a database other than 0 also `+select`.
    pub struct RedisSettings in "redis" {
        /// `redis://user@host:6379/0`, or `rediss://` for TLS; `?protocol=resp3` at the end asks for RESP3 instead of RESP2.
        /// Several, as a list, are Sentinels or nodes of a Cluster; one that answers is enough. Unset: Redis is not used.
        url: Vec<Secret> = "",
        /// A file that holds the URL, or several, one a line; read again at every connect.
        url_file: Option<PathBuf> = "",
        /// The password, where the URL holds none.
        password: Option<Secret> = "",
        /// A file that holds the password; read again at every connect.
        password_file: Option<PathBuf> = "",
        /// The name under which the Sentinels at `redis.url` (with their port, usually 26379) know the master. User,
        /// password, database and protocol of the first URL are the master's; TLS goes for both. Unset: no Sentinels.
        sentinel_master: Option<String> = "",
        /// The password that the Sentinels themselves ask for, if they do.
        sentinel_password: Option<Secret> = "",
        /// A file that holds the Sentinels' password; read again at every connect.
        sentinel_password_file: Option<PathBuf> = "",
        /// Whether the servers at `redis.url` are nodes of a Cluster.
        cluster: bool = "false",
        /// A file with 32 bytes (or 64 hexadecimal digits) that authenticate cached values and the deny list. Read at start:
        /// with another one, restart every replica, and add again what `trustgate deny list` showed. Unset: the key that the
        /// first migration put into the database.
        mac_key_file: Option<PathBuf> = "",
        /// A PEM file with the certificate authorities to trust. Unset: those of the system. The certificates must be for
        /// the names or addresses in `redis.url`, and for those that Sentinels and nodes of a Cluster announce.
        ca_file: Option<PathBuf> = "",
        /// How long Redis may take before the database is asked instead.
        timeout: Duration = "20ms",
        /// Failures in a row after which Redis is given a pause; what failed together failed once.
        breaker_failures: u32 = "5",
        /// How long that pause is.
        breaker_open: Duration = "500ms",
    }
}

impl RedisSettings {
    /// Whether Redis is to be used.
    #[must_use]
    pub const fn is_configured(&self) -> bool {
        !self.url.is_empty() || self.url_file.is_some()
    }
}

/// The key of the MAC in the file at `path`: 32 bytes, or 64 hexadecimal digits.
///
/// # Errors
/// What the operating system says, or that the file holds something else.
pub fn read_mac_key(path: &Path) -> io::Result<[u8; 32]> {
    let bytes = fs::read(path)?;
    let from_hex = || bytes_from_hex(text::decode(&bytes).ok()?.trim());
    <[u8; 32]>::try_from(&*bytes).ok().or_else(from_hex).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "expected a file with 32 bytes or 64 hexadecimal digits")
    })
}

/// How long connecting may take: finding the master or the nodes, TLS, authentication and a first answer included.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often an idle connection is tried, and how long it has to answer before it is given up.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// The longest time for which a connection to a node that refuses commands is kept.
const REPLACE_INTERVAL_MAX: Duration = Duration::from_mins(1);
/// The first wait after a connect that failed or a connection that broke; it doubles up to [`PING_INTERVAL`].
const RECONNECT_WAIT: Duration = Duration::from_millis(50);

/// What Redis's state looks like from outside.
#[derive(Clone)]
pub struct RedisMetrics {
    up: IntGauge,
    breaker_open: IntGauge,
    refused: [IntCounter; Refusal::ALL.len()],
}

impl RedisMetrics {
    /// Declares the metrics; `breaker_open` is the gauge of this tier's breaker.
    ///
    /// # Errors
    /// As [`register`].
    pub fn register(registry: &Registry, breaker_open: IntGauge) -> prometheus::Result<Self> {
        let up = Opts::new(
            "trustgate_redis_up",
            "1 while there is a connection to Redis (in a Cluster, to every master) that answers, else 0.",
        );
        let refused =
            Opts::new("trustgate_redis_refused_total", "Commands that Redis answered with a refusal, by its reason.");
        let refused = register(registry, IntCounterVec::new(refused, &["reason"]))?;
        Ok(Self {
            up: register(registry, IntGauge::with_opts(up))?,
            breaker_open,
            refused: Refusal::ALL.map(|refusal| refused.with_label_values(&[refusal.as_str()])),
        })
    }
}

/// Why a server that is there refuses commands (<https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors>).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// The node has become a replica.
    ReadOnly,
    /// The node is a replica that has lost its master.
    MasterDown,
    /// The node loads its data.
    Loading,
    /// There is no memory left, and nothing may be evicted.
    OutOfMemory,
    /// The node cannot save its data, or has too few replicas.
    Misconfigured,
}

impl Refusal {
    const ALL: [Self; 5] = [Self::ReadOnly, Self::MasterDown, Self::Loading, Self::OutOfMemory, Self::Misconfigured];

    /// The label of the metric.
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
        // Before Redis 7, the error code of a failed script follows a dash in the error text.
        let in_script = || {
            let text = error.to_string();
            text.split('-').skip(1).find_map(|part| refusal(part.split_whitespace().next().unwrap_or_default()))
        };
        error.code().and_then(refusal).or_else(in_script)
    }

    /// Whether another connection may lead to a node that accepts the command.
    const fn may_pass_elsewhere(self) -> bool {
        matches!(self, Self::ReadOnly | Self::MasterDown | Self::Loading)
    }
}

/// Whether Redis refuses commands at the moment, so that the log says so once.
#[derive(Default)]
struct Refusing {
    is_refusing: AtomicBool,
    /// Asks for another connection.
    replace: Notify,
}

/// A handle to Redis, cheap to clone.
#[derive(Clone)]
pub struct Redis {
    connection: watch::Receiver<Option<Connection>>,
    breaker: Arc<Breaker>,
    clock: Arc<dyn Clock>,
    limit: Duration,
    metrics: RedisMetrics,
    hint: Arc<Notify>,
    refusing: Arc<Refusing>,
}

/// Why a command got no answer that its caller could use.
#[derive(Debug)]
pub enum QueryError {
    /// Redis is given a pause, or there is no connection at the moment.
    Paused,
    /// Redis failed or was too slow.
    Failed(Fault),
    /// Under that name stands something of another type than the command is for (`WRONGTYPE`).
    WrongType,
    /// The server does not hold that script (`NOSCRIPT`).
    NoScript,
}

/// A Lua script. A server that does not hold it yet is sent it whole, once.
pub struct Script {
    code: &'static str,
    hash: String,
}

impl Script {
    /// The script `code`, which takes one key.
    #[must_use]
    pub fn new(code: &'static str) -> Self {
        Self { code, hash: redis::Script::new(code).get_hash().to_owned() }
    }
}

impl Redis {
    /// A handle, and the task that keeps its connection over `link` and publishes its hints until `stop`; the caller runs
    /// it.
    pub fn new<L: Link>(
        settings: &RedisSettings,
        link: L,
        clock: Arc<dyn Clock>,
        metrics: RedisMetrics,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + use<L>) {
        let rules = breaker::Rules { failures_max: settings.breaker_failures, open_for: settings.breaker_open };
        let (sender, connection) = watch::channel(None);
        let handle = Self {
            connection,
            breaker: Arc::new(Breaker::new(rules)),
            clock,
            limit: settings.timeout,
            metrics: metrics.clone(),
            hint: Arc::default(),
            refusing: Arc::default(),
        };
        let publisher = handle.clone();
        let keeper = async move {
            let connected = keep_connected(&link, sender, metrics, &publisher.refusing);
            stop.run_until_cancelled(async { tokio::join!(connected, notifications::publish(&publisher)) }).await;
        };
        (handle, keeper)
    }

    /// Sends `command`, waiting at most `redis.timeout`.
    ///
    /// # Errors
    /// [`QueryError`]; the breaker has heard of it.
    ///
    /// # Cancel safety
    /// Safe: the connection is shared by all callers and goes on.
    pub async fn query<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, QueryError> {
        let began = self.clock.now();
        if !self.breaker.admits(began) {
            return Err(QueryError::Paused);
        }
        let Some(mut connection) = self.connection.borrow().clone() else {
            self.report(self.breaker.failed(began, began));
            return Err(QueryError::Paused);
        };
        let fault = match timeout(self.limit, connection.send(command)).await {
            Ok(Ok(value)) => {
                self.report(self.breaker.succeeded());
                return Ok(value);
            }
            Ok(Err(error)) => {
                // Answers about the command; the server is well.
                let answer = match error.code() {
                    Some("WRONGTYPE") => Some(QueryError::WrongType),
                    Some("NOSCRIPT") => Some(QueryError::NoScript),
                    _ => None,
                };
                if let Some(answer) = answer {
                    self.report(self.breaker.succeeded());
                    return Err(answer);
                }
                let refusal = Refusal::of(&error);
                if let Some(refusal) = refusal {
                    self.note_refused(refusal, &error);
                }
                let fault = Fault::unreachable(Tier::L2, error);
                if matches!(refusal, Some(Refusal::ReadOnly | Refusal::OutOfMemory | Refusal::Misconfigured)) {
                    // Reads are answered, so the breaker stays closed.
                    self.report(self.breaker.succeeded());
                    return Err(QueryError::Failed(fault));
                }
                fault
            }
            Err(_) => Fault::Timeout { tier: Tier::L2, limit: self.limit },
        };
        self.report(self.breaker.failed(began, self.clock.now()));
        Err(QueryError::Failed(fault))
    }

    /// Runs `script` on `key`. Waits at most `redis.timeout`, and once more where the server has to be sent the script.
    ///
    /// # Errors
    /// As [`Self::query`].
    ///
    /// # Cancel safety
    /// Safe; whether the script ran is then not known.
    pub async fn run<T: FromRedisValue>(
        &self,
        script: &Script,
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

    /// Notes that Redis has taken a write.
    pub fn note_written(&self) {
        if self.refusing.is_refusing.swap(false, Ordering::Relaxed) {
            tracing::info!("redis accepts writes again");
        }
    }

    fn note_refused(&self, refusal: Refusal, error: &RedisError) {
        self.metrics.refused[refusal as usize].inc();
        if refusal.may_pass_elsewhere() {
            self.refusing.replace.notify_one();
        }
        if !self.refusing.is_refusing.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                reason = refusal.as_str(),
                %error,
                "redis refuses commands: records are not shared between replicas until it accepts them"
            );
        }
    }

    /// Tells the other replicas that there is something new in the database. Never waits, and promises nothing: hints
    /// that come while one is on its way become one, and one that Redis does not take at once is lost.
    pub fn publish(&self) {
        self.hint.notify_one();
    }

    /// How long one command may take.
    #[must_use]
    pub const fn limit(&self) -> Duration {
        self.limit
    }

    fn report(&self, change: breaker::Change) {
        match change {
            breaker::Change::None => {}
            breaker::Change::Opened => tracing::warn!("redis failed repeatedly; the database is asked instead"),
            breaker::Change::Closed => tracing::info!("redis is used again"),
        }
        self.metrics.breaker_open.set(i64::from(!self.breaker.is_closed()));
    }
}

async fn keep_connected(
    link: &impl Link,
    sender: watch::Sender<Option<Connection>>,
    metrics: RedisMetrics,
    refusing: &Refusing,
) {
    let mut attempts = Attempts::new("");
    // How long a connection is kept at least, though its node refuses commands: longer each time, since the address may lead to a
    // replica for good.
    let mut kept_for = PING_INTERVAL;
    loop {
        let Some(connection) = attempts.make(Box::pin(link.connect())).await else { continue };
        metrics.up.set(1);
        // Asked for by commands on the connection before this one.
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

/// Attempts to have a connection: each in its time, none right after another, and no word in the log twice.
struct Attempts {
    purpose: &'static str,
    wait: Option<Duration>,
    was_down: bool,
    /// Whether the next connection replaces one that worked: that it refuses commands was logged.
    is_replacement: bool,
}

impl Attempts {
    /// No attempt yet. `purpose` ends what is said of the connection in the log.
    const fn new(purpose: &'static str) -> Self {
        Self { purpose, wait: None, was_down: false, is_replacement: false }
    }

    /// One attempt, after the wait that the one before it asks for.
    async fn make<C>(&mut self, connect: impl Future<Output = Result<C, RedisError>>) -> Option<C> {
        let purpose = self.purpose;
        if let Some(wait) = self.wait {
            sleep(wait).await;
        }
        match timeout(CONNECT_TIMEOUT, connect).await.unwrap_or_else(|_| Err(timed_out())) {
            Ok(connection) => {
                if !self.is_replacement {
                    tracing::info!("connected to redis{purpose}");
                }
                (self.wait, self.was_down, self.is_replacement) = (None, false, false);
                Some(connection)
            }
            Err(error) => {
                if !self.was_down {
                    tracing::warn!(%error, "cannot connect to redis{purpose}; trying again in the background");
                }
                self.wait = Some(self.wait.map_or(RECONNECT_WAIT, |wait| (wait * 2).min(PING_INTERVAL)));
                self.was_down = true;
                None
            }
        }
    }

    /// The connection that was made is there no more.
    fn broke(&mut self, error: &RedisError) {
        tracing::warn!(%error, "the connection to redis{} broke", self.purpose);
        self.wait = Some(RECONNECT_WAIT);
    }

    /// The connection is given up for another one.
    fn replaced(&mut self) {
        (self.wait, self.is_replacement) = (Some(RECONNECT_WAIT), true);
    }
}

/// Returns once the connection no longer answers.
async fn until_broken(mut connection: Connection) -> RedisError {
    loop {
        sleep(PING_INTERVAL).await;
        match timeout(PING_INTERVAL, connection.ping()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error,
            Err(_) => return timed_out(),
        }
    }
}

pub(crate) fn timed_out() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::TimedOut).into()
}
