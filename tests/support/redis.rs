//! Private Redis servers that keep their data in memory only and stop with the test: a single server, a master with a
//! replica and a Sentinel, or a Cluster. Each can use TLS and users.

use std::{path::PathBuf, sync::Arc, time::Duration};

use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionInfo, FromRedisValue, IntoConnectionInfo as _, TlsCertificates,
    aio::MultiplexedConnection,
};
use tempfile::TempDir;
use trustgate::testing::{base::settings::Section as _, redis::RedisSettings};

use super::{
    certificates, eventually,
    process::{End, Frozen, Guarded, directory, free_port, program},
};

/// A Redis server, a Sentinel or a node of a Cluster.
pub struct Redis {
    dir: PathBuf,
    role: Role,
    tls: Option<Arc<TempDir>>,
    port: u16,
    /// The port on which this node communicates with the other nodes of its Cluster.
    bus: u16,
    server: Option<Guarded>,
}

enum Role {
    Single,
    Master,
    Replica { of: u16 },
    Sentinel { of: u16 },
    Node,
}

/// The user and the password with which trustgate connects to a server with TLS. The user has exactly the permissions
/// that the documentation of the Redis settings requires.
pub const USER: (&str, &str) = ("gate", "letmein-4711");
/// The user and the password with which the tests connect to a server with TLS.
const ADMIN: (&str, &str) = ("admin", "hunter2");
/// The password of a Sentinel with TLS.
pub const SENTINEL_PASSWORD: &str = "who-goes-there";
/// The name of the master in the Sentinel's configuration.
pub const MASTER: &str = "main";

/// The maximum time that servers may take to discover each other. They usually take 2 s.
const PATIENCE: Duration = Duration::from_mins(1);

impl Redis {
    /// Starts a single server without TLS and without a password.
    ///
    /// # Panics
    /// If redis-server is not installed; the message says how to install it.
    pub async fn start() -> Self {
        Self::new(Role::Single, None).await
    }

    /// Starts a single server that requires TLS and a login as [`USER`] or as the user of the tests.
    pub async fn start_secured() -> Self {
        Self::new(Role::Single, Some(certificates::certificates())).await
    }

    async fn new(role: Role, tls: Option<Arc<TempDir>>) -> Self {
        // Ignore the error: another test of this binary may have installed the provider already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut redis = Self { dir: directory("redis"), role, tls, port: 0, bus: 0, server: None };
        redis.resume().await;
        redis
    }

    /// Starts the server, or starts it again on the same port after [`Self::kill`]. A single server has no data after a
    /// restart.
    pub async fn resume(&mut self) {
        let is_restart = self.port != 0;
        for _ in 0..10 {
            if !is_restart {
                (self.port, self.bus) = (free_port(), free_port());
            }
            // On a restart, write the configuration file of a single server only. Sentinels write current roles and
            // addresses into the configuration files of their servers, and a restart must keep these.
            if !is_restart || matches!(self.role, Role::Single) {
                std::fs::write(self.dir.join("redis.conf"), self.config()).expect("a writable directory");
            }
            let mut words =
                vec![program(&["redis-server", "valkey-server"], "redis-server"), self.dir.join("redis.conf")];
            if matches!(self.role, Role::Sentinel { .. }) {
                words.push("--sentinel".into());
            }
            let server = Guarded::start_with_end(End::Kill, &self.dir, &words);
            // Another process may take the port first. The server then ends, so try another port.
            if server.until(async || self.try_connection().await).await.is_some() && !server.has_ended() {
                self.server = Some(server);
                return;
            }
            server.stop();
            assert!(!is_restart, "Redis does not start again: {}", self.log());
        }
        panic!("Redis does not start: {}", self.log());
    }

    /// Kills the server.
    pub fn kill(&mut self) {
        self.server.take().expect("running").stop();
    }

    /// Pauses the server (SIGSTOP) until the returned value is dropped.
    pub fn freeze(&self) -> Frozen {
        Frozen::of(self.server.as_ref().and_then(Guarded::pid).expect("running"))
    }

    /// Returns the URL, with the user if the server has users, and without the password.
    pub fn url(&self) -> String {
        if self.tls.is_some() {
            format!("rediss://{}@localhost:{}/0", USER.0, self.port)
        } else {
            format!("redis://127.0.0.1:{}/0", self.port)
        }
    }

    /// Returns the path of the certificate of the CA that signed the server's certificate.
    ///
    /// # Panics
    /// If the server does not use TLS.
    pub fn ca_file(&self) -> PathBuf {
        self.tls.as_ref().expect("with TLS").path().join("ca.pem")
    }

    /// Opens a connection for the test.
    pub async fn connection(&self) -> MultiplexedConnection {
        self.try_connection().await.expect("a connection")
    }

    /// Runs the command `words` and returns the reply.
    ///
    /// # Panics
    /// If the reply is an error.
    pub async fn ask<T: FromRedisValue>(&self, words: &[&str]) -> T {
        let mut command = Cmd::new();
        command.arg(words);
        command.query_async(&mut self.connection().await).await.unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    async fn try_connection(&self) -> Option<MultiplexedConnection> {
        let info: ConnectionInfo = self.url().into_connection_info().expect("a URL");
        let client = if let Some(tls) = &self.tls {
            let redis = redis::RedisConnectionInfo::default();
            let redis = match self.role {
                Role::Sentinel { .. } => redis.set_password(SENTINEL_PASSWORD),
                _ => redis.set_username(ADMIN.0).set_password(ADMIN.1),
            };
            let root_cert = Some(std::fs::read(tls.path().join("ca.pem")).expect("a certificate file"));
            let certificates = TlsCertificates { client_tls: None, root_cert };
            Client::build_with_tls(info.set_redis_settings(redis), certificates).expect("certificates")
        } else {
            let redis = redis::RedisConnectionInfo::default();
            Client::open(info.set_redis_settings(redis)).expect("a URL")
        };
        // Set timeouts, so that a server that hangs does not block the test. 10 s is long enough for a busy machine.
        let limit = Some(Duration::from_secs(10));
        let config = AsyncConnectionConfig::new().set_connection_timeout(limit).set_response_timeout(limit);
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await.ok()?;
        redis::cmd("PING").query_async::<String>(&mut connection).await.ok()?;
        Some(connection)
    }

    fn config(&self) -> String {
        let mut lines = vec!["bind 127.0.0.1".to_owned(), format!("dir {}", self.dir.display())];
        match &self.tls {
            None => lines.push(format!("port {}", self.port)),
            Some(tls) => {
                lines.extend(["port 0".to_owned(), format!("tls-port {}", self.port)]);
                lines.extend(["tls-auth-clients no", "tls-replication yes", "tls-cluster yes"].map(str::to_owned));
                for (word, name) in [("cert", "server.pem"), ("key", "server.key"), ("ca-cert", "ca.pem")] {
                    lines.push(format!("tls-{word}-file {}", tls.path().join(name).display()));
                }
            }
        }
        let sentinel = matches!(self.role, Role::Sentinel { .. });
        if !sentinel {
            lines.extend(["save \"\"", "appendonly no", "repl-diskless-sync-delay 0"].map(str::to_owned));
        }
        if self.tls.is_some() && !sentinel {
            lines.push("user default off".to_owned());
            lines.push(format!("user {} on >{} ~* &* +@all", ADMIN.0, ADMIN.1));
            lines.push(format!("user {} on >{} -@all {}", USER.0, USER.1, self.permissions()));
            lines.extend([format!("masteruser {}", ADMIN.0), format!("masterauth {}", ADMIN.1)]);
        }
        match self.role {
            Role::Single | Role::Master => {}
            Role::Replica { of } => lines.push(format!("replicaof 127.0.0.1 {of}")),
            Role::Sentinel { of } => {
                lines.push(format!("sentinel monitor {MASTER} 127.0.0.1 {of} 1"));
                lines.push(format!("sentinel down-after-milliseconds {MASTER} 500"));
                lines.push(format!("sentinel failover-timeout {MASTER} 3000"));
                if self.tls.is_some() {
                    lines.push(format!("sentinel auth-user {MASTER} {}", ADMIN.0));
                    lines.push(format!("sentinel auth-pass {MASTER} {}", ADMIN.1));
                    lines.push(format!("requirepass {SENTINEL_PASSWORD}"));
                }
            }
            Role::Node => {
                lines.extend(["cluster-enabled yes".to_owned(), format!("cluster-port {}", self.bus)]);
                lines.push("cluster-node-timeout 2000".to_owned());
            }
        }
        lines.join("\n") + "\n"
    }

    /// Returns the permissions that the documentation of the Redis settings requires for the user of a server with this
    /// role.
    fn permissions(&self) -> String {
        let quoted: Vec<&str> = RedisSettings::DOC.split('`').skip(1).step_by(2).collect();
        let documented = |part: &str| {
            let found = quoted.iter().find(|words| words.contains(part));
            found.unwrap_or_else(|| panic!("{part} is not in {:?}", RedisSettings::DOC)).replace('\n', " ")
        };
        let role = match self.role {
            Role::Single => &["+ping"][..],
            Role::Master | Role::Replica { .. } | Role::Sentinel { .. } => &["+ping", "+role"],
            Role::Node => &["+ping", "+cluster|slots", "+asking"],
        };
        [&["~", "&"], role].concat().into_iter().map(documented).collect::<Vec<_>>().join(" ")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        drop(self.server.take());
        // Dropping `server` has removed the directory, unless the test had killed the server before.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A master, its replica, and a Sentinel that monitors both. The Sentinel considers a server down if the server has
/// not answered for 500 ms.
pub struct SentinelSetup {
    pub master: Redis,
    pub replica: Redis,
    pub sentinel: Redis,
}

impl SentinelSetup {
    /// Starts the three servers and waits until the replica is connected and the Sentinel knows both servers.
    pub async fn start(secured: bool) -> Self {
        let tls = secured.then(certificates::certificates);
        let master = Redis::new(Role::Master, tls.clone()).await;
        let replica = Redis::new(Role::Replica { of: master.port }, tls.clone()).await;
        eventually("the replica is connected", PATIENCE, || async {
            replica.ask::<String>(&["INFO", "replication"]).await.contains("master_link_status:up")
        })
        .await;
        let sentinel = Redis::new(Role::Sentinel { of: master.port }, tls).await;
        eventually("the Sentinel knows the replica", PATIENCE, || async {
            sentinel.ask::<String>(&["INFO", "sentinel"]).await.contains("slaves=1")
        })
        .await;
        Self { master, replica, sentinel }
    }

    /// Waits until the replica has become the master.
    pub async fn failed_over(&self) {
        eventually("the replica became master", PATIENCE, || async {
            // Connecting may fail: the Sentinel closes all connections to a server when it changes the role of the
            // server.
            let Some(mut connection) = self.replica.try_connection().await else { return false };
            let info = redis::cmd("INFO").arg("replication").query_async::<String>(&mut connection).await;
            info.is_ok_and(|info| info.contains("role:master"))
        })
        .await;
    }
}

/// Three masters that share the slots, without replicas.
pub struct Cluster {
    pub nodes: Vec<Redis>,
}

impl Cluster {
    /// Starts the nodes and waits until each node knows which node serves which slots.
    pub async fn start(secured: bool) -> Self {
        let tls = secured.then(certificates::certificates);
        let mut nodes = Vec::new();
        for _ in 0..3 {
            nodes.push(Redis::new(Role::Node, tls.clone()).await);
        }
        for (node, (first, last)) in nodes.iter().zip([("0", "5460"), ("5461", "10922"), ("10923", "16383")]) {
            node.ask::<()>(&["CLUSTER", "ADDSLOTSRANGE", first, last]).await;
            let (port, bus) = (nodes[0].port.to_string(), nodes[0].bus.to_string());
            node.ask::<()>(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus]).await;
        }
        let cluster = Self { nodes };
        cluster.until_ready().await;
        cluster
    }

    /// Waits until each node knows which node serves which slots.
    pub async fn until_ready(&self) {
        for node in &self.nodes {
            eventually("the Cluster is ready", PATIENCE, || async {
                let info: String = node.ask(&["CLUSTER", "INFO"]).await;
                info.contains("cluster_state:ok") && info.contains("cluster_size:3")
            })
            .await;
        }
    }

    /// Returns the node that stores the Redis key `name`, and the next node.
    pub async fn node_of(&self, name: &str) -> (&Redis, &Redis) {
        let slot: u16 = self.nodes[0].ask(&["CLUSTER", "KEYSLOT", name]).await;
        let at = usize::from(slot > 5460) + usize::from(slot > 10922);
        (&self.nodes[at], &self.nodes[(at + 1) % 3])
    }
}
