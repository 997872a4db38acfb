//! Connects to Redis according to the settings: to a single server, to the master that Sentinels name, or to a Cluster.
//!
//! The files with secrets are read again for each new connection. Error messages do not contain the content of these
//! files.

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

use super::{reconnect::CONNECT_TIMEOUT, settings::RedisSettings};
use crate::base::secret::Secret;

/// Opens connections to Redis. The server uses the implementation for [`RedisSettings`].
#[async_trait]
pub trait Link: Send + Sync + 'static {
    /// Connects and waits for a first reply. The caller sets the timeout.
    ///
    /// # Errors
    /// Returns the Redis or network error.
    async fn connect(&self) -> Result<RedisConnection, RedisError>;

    /// Opens a connection for a subscription. If there are several addresses, `turn` selects one of them, so that
    /// successive turns use successive addresses.
    ///
    /// # Errors
    /// Returns the same errors as [`Self::connect`].
    async fn subscriber(&self, turn: usize) -> Result<PubSub, RedisError>;
}

#[async_trait]
impl<L: Link + ?Sized> Link for Arc<L> {
    async fn connect(&self) -> Result<RedisConnection, RedisError> {
        (**self).connect().await
    }

    async fn subscriber(&self, turn: usize) -> Result<PubSub, RedisError> {
        (**self).subscriber(turn).await
    }
}

/// A connection that many callers share.
#[derive(Clone)]
pub enum RedisConnection {
    /// A connection to one server.
    Server(MultiplexedConnection),
    /// Connections to all nodes of a Cluster. The client follows `MOVED` and `ASK`, and reconnects to lost nodes.
    Cluster(ClusterConnection),
}

impl RedisConnection {
    /// Sends `command` and waits for the reply. The caller sets the timeout.
    pub(crate) async fn send<T: FromRedisValue>(&mut self, command: &Cmd) -> Result<T, RedisError> {
        match self {
            Self::Server(connection) => command.query_async(connection).await,
            Self::Cluster(connection) => command.query_async(connection).await,
        }
    }

    /// Sends a PING to the server, or to every master of a Cluster.
    pub(crate) async fn ping(&mut self) -> Result<(), RedisError> {
        self.send(&redis::cmd("PING")).await
    }
}

/// Timeout for connecting to a node of a Cluster, and for each reply of a node. It is short, so that a node that hangs
/// leaves enough time to connect to the other nodes.
const NODE_TIMEOUT: Duration = Duration::from_millis(500);
// The client waits twice for a node that hangs: first because the settings list the node, then because a different node
// lists it.
const _: () = assert!(NODE_TIMEOUT.as_millis() * 4 <= CONNECT_TIMEOUT.as_millis());
/// The maximum number of times that the client repeats a command within a Cluster, after `MOVED`, `ASK` or a broken
/// connection. `redis.timeout` limits how long the caller waits, but the client continues to repeat the command. With a
/// higher limit, commands could pile up.
const REDIRECTS_MAX: u32 = 3;

#[async_trait]
impl Link for RedisSettings {
    async fn connect(&self) -> Result<RedisConnection, RedisError> {
        let mut connection = if self.cluster {
            RedisConnection::Cluster(cluster(SecretFiles::of(self).await?)?.get_async_connection().await?)
        } else {
            let config =
                AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT_TIMEOUT)).set_response_timeout(None);
            let client = server(self, 0).await?;
            RedisConnection::Server(client.get_multiplexed_async_connection_with_config(&config).await?)
        };
        // A server that requires a password reports a missing or wrong password only in reply to a command.
        connection.ping().await?;
        Ok(connection)
    }

    /// A message that is published in a Cluster reaches all nodes, so any node can serve the subscription.
    async fn subscriber(&self, turn: usize) -> Result<PubSub, RedisError> {
        server(self, turn).await?.get_async_pubsub().await
    }
}

/// The current values of the settings, including the values read from files.
struct SecretFiles {
    servers: Vec<ConnectionInfo>,
    certificates: Option<TlsCertificates>,
    sentinel_password: Option<Secret>,
}

impl SecretFiles {
    fn read(settings: &RedisSettings) -> Result<Self, RedisError> {
        let sentinel_password =
            secret(settings.sentinel_password.as_ref(), settings.sentinel_password_file.as_deref())?;
        Ok(Self { servers: servers(settings)?, certificates: certificates(settings)?, sentinel_password })
    }

    /// Reads the files on another thread, because a read can block for a long time on a network file system.
    async fn of(settings: &RedisSettings) -> Result<Self, RedisError> {
        let settings = settings.clone();
        tokio::task::spawn_blocking(move || Self::read(&settings)).await.map_err(io::Error::from)?
    }
}

/// Creates a client for the single server, for the master that the Sentinels name now, or for the `turn`-th node of a
/// Cluster.
async fn server(settings: &RedisSettings, turn: usize) -> Result<Client, RedisError> {
    let mut files = SecretFiles::of(settings).await?;
    if let Some(name) = &settings.sentinel_master {
        return master(name, files).await;
    }
    let chosen = files.servers.swap_remove(turn % files.servers.len());
    match files.certificates {
        Some(certificates) => Client::build_with_tls(chosen, certificates),
        None => Client::open(chosen),
    }
}

async fn master(name: &str, files: SecretFiles) -> Result<Client, RedisError> {
    let sentinels = &files.servers;
    let addresses = sentinels.iter().map(|sentinel| sentinel.addr().clone());
    let mut builder = SentinelClientBuilder::new(addresses, name, SentinelServerType::Master)?;
    let first = &sentinels[0]; // `servers` returns at least one server
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

fn cluster(files: SecretFiles) -> Result<ClusterClient, RedisError> {
    let builder = ClusterClientBuilder::new(files.servers)
        .connection_timeout(NODE_TIMEOUT)
        .response_timeout(NODE_TIMEOUT)
        .retries(REDIRECTS_MAX);
    match files.certificates {
        Some(certificates) => builder.certs(certificates).build(),
        None => builder.build(),
    }
}

/// Returns the servers (at least one) that `redis.url` or its file lists now, with the password.
pub(crate) fn servers(settings: &RedisSettings) -> Result<Vec<ConnectionInfo>, RedisError> {
    let urls = match &settings.url_file {
        Some(file) => urls_in(&Secret::read_text(file)?),
        None => settings.url.clone(),
    };
    let password = secret(settings.password.as_ref(), settings.password_file.as_deref())?;
    let servers = urls.iter().map(|url| {
        // Do not use the parser's message: it can quote the URL, which may contain a password.
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

const SEVERAL: &str = "redis.url contains several URLs: set redis.sentinel_master or redis.cluster";

/// Returns the URLs in `text`, the content of a file: one URL per line, or separated by commas, as in an environment
/// variable.
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
