//! The one connection to Redis or Valkey: made anew in the background whenever it breaks, given a pause by a breaker.
//!
//! Redis is an optimisation. Never makes a caller wait for a connection, and never stops the start of the server.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use redis::{
    AsyncConnectionConfig, Client, ConnectionInfo, FromRedisValue, IntoConnectionInfo, RedisError, TlsCertificates,
    aio::MultiplexedConnection,
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    breaker::{self, Breaker},
    clock::Clock,
    fault::{Fault, Tier},
    metrics::{IntGauge, Opts, Registry, register},
    record::bytes_from_hex,
    secret::Secret,
};

crate::settings! {
    /// Redis or Valkey, shared between replicas. Unset: every replica asks the database itself.
    pub struct RedisSettings in "redis" {
        /// `redis://user@host:6379/0`, or `rediss://` for TLS. Unset: Redis is not used.
        url: Option<Secret> = "",
        /// A file that holds the URL; read again at every connect.
        url_file: Option<PathBuf> = "",
        /// The password, where the URL holds none.
        password: Option<Secret> = "",
        /// A file that holds the password; read again at every connect.
        password_file: Option<PathBuf> = "",
        /// A file with 32 bytes (or 64 hexadecimal digits) that authenticate cached values. Unset: the key that the first
        /// migration put into the database.
        mac_key_file: Option<PathBuf> = "",
        /// A PEM file with the certificate authorities to trust. Unset: those of the system.
        ca_file: Option<PathBuf> = "",
        /// How long Redis may take before the database is asked instead.
        timeout: Duration = "20ms",
        /// Failures in a row after which Redis is given a pause.
        breaker_failures: u32 = "5",
        /// How long that pause is.
        breaker_open: Duration = "500ms",
    }
}

impl RedisSettings {
    /// Whether Redis is to be used.
    #[must_use]
    pub const fn is_configured(&self) -> bool {
        self.url.is_some() || self.url_file.is_some()
    }
}

/// The key of the MAC in the file at `path`: 32 bytes, or 64 hexadecimal digits.
///
/// # Errors
/// What the operating system says, or that the file holds something else.
pub fn read_mac_key(path: &Path) -> io::Result<[u8; 32]> {
    let bytes = fs::read(path)?;
    let from_hex = || bytes_from_hex(std::str::from_utf8(&bytes).ok()?.trim());
    <[u8; 32]>::try_from(&*bytes).ok().or_else(from_hex).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "expected a file with 32 bytes or 64 hexadecimal digits")
    })
}

/// How long connecting may take, TLS and authentication included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often an idle connection is tried, and how long it has to answer before it is given up.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// The first wait after a failed connect; it doubles up to [`PING_INTERVAL`].
const RECONNECT_WAIT: Duration = Duration::from_millis(50);

/// What Redis's state looks like from outside.
#[derive(Clone)]
pub struct RedisMetrics {
    up: IntGauge,
    breaker_closed: IntGauge,
}

impl RedisMetrics {
    /// Declares the metrics; `breaker_open` is the gauge of this tier's breaker.
    ///
    /// # Errors
    /// As [`register`].
    pub fn register(registry: &Registry, breaker_open: IntGauge) -> prometheus::Result<Self> {
        let up = Opts::new("trustgate_redis_up", "1 while there is a connection to Redis that answers, else 0.");
        Ok(Self { up: register(registry, IntGauge::with_opts(up))?, breaker_closed: breaker_open })
    }
}

/// A handle to Redis, cheap to clone.
#[derive(Clone)]
pub struct Redis {
    connection: watch::Receiver<Option<MultiplexedConnection>>,
    breaker: Arc<Breaker>,
    clock: Arc<dyn Clock>,
    limit: Duration,
    metrics: RedisMetrics,
}

/// Why Redis gave nothing.
#[derive(Debug)]
pub enum RedisDown {
    /// It is given a pause, or there is no connection at the moment.
    Paused,
    /// It failed or was too slow.
    Failed(Fault),
}

impl Redis {
    /// A handle, and the task that keeps its connection until `stop`; the caller runs it.
    pub fn new(
        settings: RedisSettings,
        clock: Arc<dyn Clock>,
        metrics: RedisMetrics,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let rules = breaker::Rules { failures_max: settings.breaker_failures, open_for: settings.breaker_open };
        let (sender, connection) = watch::channel(None);
        let handle = Self {
            connection,
            breaker: Arc::new(Breaker::new(rules)),
            clock,
            limit: settings.timeout,
            metrics: metrics.clone(),
        };
        let keeper = async move {
            stop.run_until_cancelled(keep_connected(settings, sender, metrics)).await;
        };
        (handle, keeper)
    }

    /// Sends `command`, waiting at most `redis.timeout`.
    ///
    /// # Errors
    /// [`RedisDown`]; the breaker has heard of it.
    ///
    /// # Cancel safety
    /// Safe: the connection is shared by all callers and goes on.
    pub async fn query<T: FromRedisValue>(&self, command: &redis::Cmd) -> Result<T, RedisDown> {
        if !self.breaker.admits(self.clock.now()) {
            return Err(RedisDown::Paused);
        }
        let Some(mut connection) = self.connection.borrow().clone() else {
            self.report(self.breaker.failed(self.clock.now()));
            return Err(RedisDown::Paused);
        };
        let fault = match timeout(self.limit, command.query_async(&mut connection)).await {
            Ok(Ok(value)) => {
                self.report(self.breaker.succeeded());
                return Ok(value);
            }
            Ok(Err(error)) => Fault::unreachable(Tier::L2, error),
            Err(_) => Fault::Timeout { tier: Tier::L2, limit: self.limit },
        };
        self.report(self.breaker.failed(self.clock.now()));
        Err(RedisDown::Failed(fault))
    }

    fn report(&self, change: breaker::Change) {
        match change {
            breaker::Change::None => {}
            breaker::Change::Opened => tracing::warn!("redis failed repeatedly; the database is asked instead"),
            breaker::Change::Closed => tracing::info!("redis is used again"),
        }
        self.metrics.breaker_closed.set(i64::from(!self.breaker.is_closed()));
    }
}

async fn keep_connected(
    settings: RedisSettings,
    sender: watch::Sender<Option<MultiplexedConnection>>,
    metrics: RedisMetrics,
) {
    let mut wait = RECONNECT_WAIT;
    let mut was_down = false;
    loop {
        match timeout(CONNECT_TIMEOUT, connect(&settings)).await.unwrap_or_else(|_| Err(timed_out())) {
            Ok(connection) => {
                tracing::info!("connected to redis");
                was_down = false;
                wait = RECONNECT_WAIT;
                metrics.up.set(1);
                sender.send_replace(Some(connection.clone()));
                let error = until_broken(connection).await;
                sender.send_replace(None);
                metrics.up.set(0);
                tracing::warn!(%error, "the connection to redis broke");
            }
            Err(error) => {
                if !was_down {
                    tracing::warn!(%error, "cannot connect to redis; trying again in the background");
                }
                was_down = true;
                sleep(wait).await;
                wait = (wait * 2).min(PING_INTERVAL);
            }
        }
    }
}

/// Returns once the connection no longer answers.
async fn until_broken(mut connection: MultiplexedConnection) -> RedisError {
    loop {
        sleep(PING_INTERVAL).await;
        let ping = redis::cmd("PING");
        match timeout(PING_INTERVAL, ping.query_async::<String>(&mut connection)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return error,
            Err(_) => return timed_out(),
        }
    }
}

fn timed_out() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::TimedOut).into()
}

async fn connect(settings: &RedisSettings) -> Result<MultiplexedConnection, RedisError> {
    let config = AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT_TIMEOUT)).set_response_timeout(None);
    client(settings)?.get_multiplexed_async_connection_with_config(&config).await
}

/// A client by what `settings` and the files they name hold now.
///
/// # Errors
/// When a file cannot be read or the URL is not one.
pub fn client(settings: &RedisSettings) -> Result<Client, RedisError> {
    let url = match &settings.url_file {
        Some(file) => Some(Secret::read(file)?),
        None => settings.url.clone(),
    };
    let url = url.ok_or_else(|| invalid("redis.url is not set"))?;
    let mut info: ConnectionInfo =
        url.expose().into_connection_info().map_err(|_| invalid("redis.url is not a Redis URL"))?;
    let password = match &settings.password_file {
        Some(file) => Some(Secret::read(file)?),
        None => settings.password.clone(),
    };
    if let Some(password) = password {
        let redis = info.redis_settings().clone().set_password(password.expose());
        info = info.set_redis_settings(redis);
    }
    let Some(ca_file) = &settings.ca_file else { return Client::open(info) };
    Client::build_with_tls(info, TlsCertificates { client_tls: None, root_cert: Some(fs::read(ca_file)?) })
}

fn invalid(problem: &'static str) -> RedisError {
    std::io::Error::new(std::io::ErrorKind::InvalidInput, problem).into()
}
