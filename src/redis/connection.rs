//! The way from settings to connections: to a single server, the master that Sentinels name, or a Cluster.
//!
//! Reads the files that hold secrets at every connect, and never shows what they hold.

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, FromRedisValue, IntoConnectionInfo, RedisError,
    TlsCertificates, TlsMode,
    aio::{MultiplexedConnection, PubSub},
    cluster::{ClusterClient, ClusterClientBuilder},
    cluster_async::ClusterConnection,
    sentinel::{SentinelClientBuilder, SentinelServerType},
};

use super::{CONNECT_TIMEOUT, RedisSettings};
use crate::base::secret::Secret;

/// The way to Redis. That of the settings is the real one.
#[async_trait]
pub trait Link: Send + Sync + 'static {
    /// Connects, and has heard a first answer. The caller sets the deadline.
    ///
    /// # Errors
    /// What Redis, or the way to it, says.
    async fn connect(&self) -> Result<Connection, RedisError>;

    /// A connection that can subscribe; the next of several ways at each `turn`.
    ///
    /// # Errors
    /// As [`Self::connect`].
    async fn subscriber(&self, turn: usize) -> Result<PubSub, RedisError>;
}

#[async_trait]
impl<L: Link + ?Sized> Link for Arc<L> {
    async fn connect(&self) -> Result<Connection, RedisError> {
        (**self).connect().await
    }

    async fn subscriber(&self, turn: usize) -> Result<PubSub, RedisError> {
        (**self).subscriber(turn).await
    }
}

/// A connection that many callers share.
#[derive(Clone)]
pub enum Connection {
    /// To one server.
    Server(MultiplexedConnection),
    /// To all nodes of a Cluster; follows `MOVED` and `ASK` and connects again to nodes that went away.
    Cluster(ClusterConnection),
}

impl Connection {
    /// Sends `command`; waits without an end of its own.
    pub(crate) async fn send<T: FromRedisValue>(&mut self, command: &Cmd) -> Result<T, RedisError> {
        match self {
            Self::Server(connection) => command.query_async(connection).await,
            Self::Cluster(connection) => command.query_async(connection).await,
        }
    }

    /// Asks for a sign of life; in a Cluster, of every master.
    pub(crate) async fn ping(&mut self) -> Result<(), RedisError> {
        self.send(&redis::cmd("PING")).await
    }
}

/// How long one node of a Cluster may take to connect and to answer, so that one that hangs leaves time for the others.
const NODE_TIMEOUT: Duration = Duration::from_millis(500);
// A node that hangs is waited for twice: among the first to connect to, and as one that another node named.
const _: () = assert!(NODE_TIMEOUT.as_millis() * 4 <= CONNECT_TIMEOUT.as_millis());
/// How often a command is sent on within a Cluster, after `MOVED`, `ASK` or a broken connection. `redis.timeout` ends
/// it anyway; what it does not end soon would only pile up.
const REDIRECTS_MAX: u32 = 3;

#[async_trait]
impl Link for RedisSettings {
    async fn connect(&self) -> Result<Connection, RedisError> {
        let mut connection = if self.cluster {
            Connection::Cluster(cluster(Files::of(self).await?)?.get_async_connection().await?)
        } else {
            let config =
                AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT_TIMEOUT)).set_response_timeout(None);
            let client = server(self, 0).await?;
            Connection::Server(client.get_multiplexed_async_connection_with_config(&config).await?)
        };
        // A server that wants a password says so only when it is asked something.
        connection.ping().await?;
        Ok(connection)
    }

    /// In a Cluster a message reaches every node, so any will do.
    async fn subscriber(&self, turn: usize) -> Result<PubSub, RedisError> {
        server(self, turn).await?.get_async_pubsub().await
    }
}

/// What the settings and their files say at the moment.
struct Files {
    servers: Vec<ConnectionInfo>,
    certificates: Option<TlsCertificates>,
    sentinel_password: Option<Secret>,
}

impl Files {
    fn read(settings: &RedisSettings) -> Result<Self, RedisError> {
        let sentinel_password =
            secret(settings.sentinel_password.as_ref(), settings.sentinel_password_file.as_deref())?;
        Ok(Self { servers: servers(settings)?, certificates: certificates(settings)?, sentinel_password })
    }

    /// Reads them on another thread: they may be on a network filesystem, and hold up nothing else.
    async fn of(settings: &RedisSettings) -> Result<Self, RedisError> {
        let settings = settings.clone();
        tokio::task::spawn_blocking(move || Self::read(&settings)).await.map_err(io::Error::from)?
    }
}

/// The single server, the master that the Sentinels name now, or the `turn`-th node of a Cluster.
async fn server(settings: &RedisSettings, turn: usize) -> Result<Client, RedisError> {
    let mut files = Files::of(settings).await?;
    if let Some(name) = &settings.sentinel_master {
        return master(name, files).await;
    }
    let chosen = files.servers.swap_remove(turn % files.servers.len());
    match files.certificates {
        Some(certificates) => Client::build_with_tls(chosen, certificates),
        None => Client::open(chosen),
    }
}

async fn master(name: &str, files: Files) -> Result<Client, RedisError> {
    let sentinels = &files.servers;
    let addresses = sentinels.iter().map(|sentinel| sentinel.addr().clone());
    let mut builder = SentinelClientBuilder::new(addresses, name, SentinelServerType::Master)?;
    let first = &sentinels[0]; // `servers` gives at least one
    let redis = first.redis_settings();
    builder = builder.set_client_to_redis_protocol(redis.protocol()).set_client_to_redis_db(redis.db());
    if let Some(user) = redis.username() {
        builder = builder.set_client_to_redis_username(user);
    }
    if let Some(password) = redis.password() {
        builder = builder.set_client_to_redis_password(password);
    }
    if let Some(password) = files.sentinel_password {
        builder = builder.set_client_to_sentinel_password(password.expose());
    }
    if matches!(first.addr(), ConnectionAddr::TcpTls { .. }) {
        builder = builder.set_client_to_redis_tls_mode(TlsMode::Secure);
    }
    if let Some(certificates) = files.certificates {
        builder = builder
            .set_client_to_redis_certificates(certificates.clone())
            .set_client_to_sentinel_certificates(certificates);
    }
    builder.build()?.async_get_client().await
}

fn cluster(files: Files) -> Result<ClusterClient, RedisError> {
    let builder = ClusterClientBuilder::new(files.servers)
        .connection_timeout(NODE_TIMEOUT)
        .response_timeout(NODE_TIMEOUT)
        .retries(REDIRECTS_MAX);
    match files.certificates {
        Some(certificates) => builder.certs(certificates).build(),
        None => builder.build(),
    }
}

/// What `redis.url` and the files say now, with the password; at least one.
pub(crate) fn servers(settings: &RedisSettings) -> Result<Vec<ConnectionInfo>, RedisError> {
    let urls = match &settings.url_file {
        Some(file) => urls_in(&Secret::read_text(file)?),
        None => settings.url.clone(),
    };
    let password = secret(settings.password.as_ref(), settings.password_file.as_deref())?;
    let servers = urls.iter().map(|url| {
        // The parser's own message might quote the URL.
        let info = url.expose().into_connection_info().map_err(|_| invalid("redis.url is not a Redis URL"))?;
        let Some(password) = &password else { return Ok(info) };
        let redis = info.redis_settings().clone().set_password(password.expose());
        Ok(info.set_redis_settings(redis))
    });
    let servers: Vec<_> = servers.collect::<Result<_, RedisError>>()?;
    match servers.len() {
        0 => Err(invalid("redis.url is not set")),
        2.. if !settings.cluster && settings.sentinel_master.is_none() => Err(invalid(SEVERAL)),
        _ => Ok(servers),
    }
}

const SEVERAL: &str = "several URLs need redis.sentinel_master or redis.cluster";

/// The URLs in a file: one a line, or with commas between them, as in a variable.
fn urls_in(text: &Secret) -> Vec<Secret> {
    let urls = text.expose().split(['\n', ',']).map(str::trim).filter(|url| !url.is_empty());
    urls.map(|url| Secret::new(url.to_owned())).collect()
}

fn secret(value: Option<&Secret>, file: Option<&Path>) -> io::Result<Option<Secret>> {
    file.map_or_else(|| Ok(value.cloned()), |file| Secret::read(file).map(Some))
}

fn certificates(settings: &RedisSettings) -> io::Result<Option<TlsCertificates>> {
    let read = settings.ca_file.as_ref().map(fs::read).transpose()?;
    Ok(read.map(|authorities| TlsCertificates { client_tls: None, root_cert: Some(authorities) }))
}

fn invalid(problem: &'static str) -> RedisError {
    io::Error::new(io::ErrorKind::InvalidInput, problem).into()
}
