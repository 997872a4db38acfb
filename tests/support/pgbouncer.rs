//! A private PgBouncer in transaction mode, in which a client has a server connection only during a transaction.

use tokio::net::TcpStream;

use super::{
    postgres::{Postgres, hand_over, owner_prefix},
    process::{End, Guarded, directory, free_port, program},
};

pub struct PgBouncer {
    _server: Guarded,
    port: u16,
}

impl PgBouncer {
    /// Starts PgBouncer in front of `postgres`. PgBouncer connects to PostgreSQL as the superuser for each client.
    ///
    /// # Panics
    /// If PgBouncer is not installed; the message says how to install it.
    pub async fn start(postgres: &Postgres) -> Self {
        for _ in 0..10 {
            let (dir, port) = (directory("pgbouncer"), free_port());
            let config = dir.join("pgbouncer.ini");
            let text = format!(
                "[databases]\n* = host={} port={} user=admin\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
                 listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\n\
                 ignore_startup_parameters = extra_float_digits\nlog_connections = 0\nlog_disconnections = 0\n",
                postgres.directory().display(),
                postgres.port(),
            );
            std::fs::write(&config, text).expect("a writable directory");
            // Like PostgreSQL, PgBouncer refuses to run as root.
            hand_over(&dir);
            let mut words = owner_prefix();
            words.push(program(&["pgbouncer"], "pgbouncer").display().to_string());
            words.push(config.display().to_string());
            let server = Guarded::start_with_end(End::Kill, &dir, &words);
            let up = server.until(async || TcpStream::connect(("127.0.0.1", port)).await.ok()).await.is_some();
            if up && !server.has_ended() {
                return Self { _server: server, port };
            }
            // Another process took the port, so try another port.
            assert!(server.log().contains("Address already in use"), "{}", server.log());
        }
        panic!("PgBouncer does not start");
    }

    /// Returns the URL for `database` through PgBouncer.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://admin@127.0.0.1:{}/{database}?sslmode=disable", self.port)
    }
}
