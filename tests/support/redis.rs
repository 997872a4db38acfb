//! Private redis-servers: in memory alone, ended with the test. A single one, one with a replica and a Sentinel, or a
//! Cluster; each also with TLS and users.

use std::{path::PathBuf, sync::Arc, time::Duration};

use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionInfo, FromRedisValue, IntoConnectionInfo as _, TlsCertificates,
    aio::MultiplexedConnection,
};
use tempfile::TempDir;
use trustgate::{base::settings::Section as _, redis::RedisSettings};

use super::{
    certificates, eventually,
    process::{End, Frozen, Guarded, directory, free_port, program},
};

/// A server that was started.
pub struct Redis {
    dir: PathBuf,
    role: Role,
    tls: Option<Arc<TempDir>>,
    port: u16,
    /// Where nodes of a Cluster talk to each other.
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

/// The user of a server with TLS, and the password. May do what the page of settings says that it must, and no more.
pub const USER: (&str, &str) = ("gate", "letmein-4711");
/// The tests' own user of such a server.
const ADMIN: (&str, &str) = ("admin", "hunter2");
/// What a Sentinel with TLS asks for.
pub const SENTINEL_PASSWORD: &str = "who-goes-there";
/// The name under which the Sentinel knows the master.
pub const MASTER: &str = "main";

/// How long servers may take to find each other; usual: 2 s.
const PATIENCE: Duration = Duration::from_mins(1);

impl Redis {
    /// A server that everybody may use.
    ///
    /// # Panics
    /// If redis-server is not installed, with how to install it.
    pub async fn start() -> Self {
        Self::new(Role::Single, None).await
    }

    /// A server that speaks TLS alone and serves only [`USER`].
    pub async fn start_secured() -> Self {
        Self::new(Role::Single, Some(certificates::certificates())).await
    }

    async fn new(role: Role, tls: Option<Arc<TempDir>>) -> Self {
        // Whoever starts first installs it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut redis = Self { dir: directory("redis"), role, tls, port: 0, bus: 0, server: None };
        redis.resume().await;
        redis
    }

    /// Starts the server again after [`Self::kill`], at the same port. A single server is empty then.
    pub async fn resume(&mut self) {
        let known = self.port != 0;
        for _ in 0..10 {
            if !known {
                (self.port, self.bus) = (free_port(), free_port());
            }
            // Sentinels and nodes write down what they learn.
            if !known || matches!(self.role, Role::Single) {
                std::fs::write(self.dir.join("redis.conf"), self.config()).expect("our directory");
            }
            let mut words =
                vec![program(&["redis-server", "valkey-server"], "redis-server"), self.dir.join("redis.conf")];
            if matches!(self.role, Role::Sentinel { .. }) {
                words.push("--sentinel".into());
            }
            let server = Guarded::start_to(End::Kill, &self.dir, &words);
            // Somebody else may take the port before the server does; it says so by ending.
            if server.until(async || self.try_connection().await).await.is_some() && !server.has_ended() {
                self.server = Some(server);
                return;
            }
            server.stop();
            assert!(!known, "Redis does not start again: {}", self.log());
        }
        panic!("Redis does not start: {}", self.log());
    }

    /// Ends the server at once.
    pub fn kill(&mut self) {
        self.server.take().expect("running").stop();
    }

    /// Stops the server without ending it (SIGSTOP), until the answer is dropped.
    pub fn freeze(&self) -> Frozen {
        Frozen::of(self.server.as_ref().and_then(Guarded::pid).expect("running"))
    }

    /// The URL, with the user where there is one and without the password.
    pub fn url(&self) -> String {
        if self.tls.is_some() {
            format!("rediss://{}@localhost:{}/0", USER.0, self.port)
        } else {
            format!("redis://127.0.0.1:{}/0", self.port)
        }
    }

    /// The certificate authority that signed the server's certificate, as PEM.
    ///
    /// # Panics
    /// If the server has no TLS.
    pub fn ca_file(&self) -> PathBuf {
        self.tls.as_ref().expect("with TLS").path().join("ca.pem")
    }

    /// A connection of the test's own.
    pub async fn connection(&self) -> MultiplexedConnection {
        self.try_connection().await.expect("Redis is up")
    }

    /// What the server answers to `words`.
    ///
    /// # Panics
    /// If it answers with an error.
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
            let root_cert = Some(std::fs::read(tls.path().join("ca.pem")).expect("written"));
            let certificates = TlsCertificates { client_tls: None, root_cert };
            Client::build_with_tls(info.set_redis_settings(redis), certificates).expect("certificates")
        } else {
            let redis = redis::RedisConnectionInfo::default();
            Client::open(info.set_redis_settings(redis)).expect("a URL")
        };
        // Bounds for a server that hangs, not for one on a busy machine.
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

    /// What the page of settings says that the user needs for a server of this role.
    fn permissions(&self) -> String {
        let quoted: Vec<&str> = RedisSettings::DOC.split('`').skip(1).step_by(2).collect();
        let said = |what: &str| {
            let found = quoted.iter().find(|words| words.contains(what));
            found.unwrap_or_else(|| panic!("{what} is not in {:?}", RedisSettings::DOC)).replace('\n', " ")
        };
        let role = match self.role {
            Role::Single => &["+ping"][..],
            Role::Master | Role::Replica { .. } | Role::Sentinel { .. } => &["+ping", "+role"],
            Role::Node => &["+ping", "+cluster|slots", "+asking"],
        };
        [&["~", "&"], role].concat().into_iter().map(said).collect::<Vec<_>>().join(" ")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        drop(self.server.take());
        // Gone already, unless the server was killed before.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A master, its replica, and a Sentinel that watches both and needs 500 ms to see that one is gone.
pub struct Watched {
    pub master: Redis,
    pub replica: Redis,
    pub sentinel: Redis,
}

impl Watched {
    /// All three, once they know of each other.
    pub async fn start(secured: bool) -> Self {
        let tls = secured.then(certificates::certificates);
        let master = Redis::new(Role::Master, tls.clone()).await;
        let replica = Redis::new(Role::Replica { of: master.port }, tls.clone()).await;
        eventually("the replica follows", PATIENCE, || async {
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

    /// Waits until the replica is the master.
    pub async fn failed_over(&self) {
        eventually("the replica became master", PATIENCE, || async {
            // The Sentinel cuts every connection to a server that it gives another role.
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
    /// All nodes, once each knows all slots.
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
        cluster.whole().await;
        cluster
    }

    /// Waits until every node knows who has which slots.
    pub async fn whole(&self) {
        for node in &self.nodes {
            eventually("the Cluster is whole", PATIENCE, || async {
                let info: String = node.ask(&["CLUSTER", "INFO"]).await;
                info.contains("cluster_state:ok") && info.contains("cluster_size:3")
            })
            .await;
        }
    }

    /// The node that `name` is kept at, and the one after it.
    pub async fn home_of(&self, name: &str) -> (&Redis, &Redis) {
        let slot: u16 = self.nodes[0].ask(&["CLUSTER", "KEYSLOT", name]).await;
        let at = usize::from(slot > 5460) + usize::from(slot > 10922);
        (&self.nodes[at], &self.nodes[(at + 1) % 3])
    }
}
