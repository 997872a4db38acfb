//! A private redis-server: in memory alone, ended with the test.

use std::{path::PathBuf, time::Duration};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use redis::{Client, ConnectionInfo, IntoConnectionInfo as _, TlsCertificates, aio::MultiplexedConnection};

use super::process::{End, Frozen, Guarded, directory, free_port, program};

/// A server that was started.
pub struct Redis {
    dir: PathBuf,
    port: u16,
    secured: bool,
    server: Option<Guarded>,
}

/// The user of a server with TLS, and the password.
pub const USER: (&str, &str) = ("gate", "letmein-4711");

impl Redis {
    /// A server that everybody may use.
    ///
    /// # Panics
    /// If redis-server is not installed, with how to install it.
    pub async fn start() -> Self {
        Self::new(false).await
    }

    /// A server that speaks TLS alone and serves only [`USER`].
    pub async fn start_secured() -> Self {
        Self::new(true).await
    }

    async fn new(secured: bool) -> Self {
        // Whoever starts first installs it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut redis = Self { dir: directory("redis"), port: 0, secured, server: None };
        if secured {
            redis.write_certificates();
        }
        redis.resume().await;
        redis
    }

    /// Starts the server again after [`Self::kill`], empty, at the same port.
    pub async fn resume(&mut self) {
        for _ in 0..10 {
            let port = if self.port == 0 { free_port() } else { self.port };
            std::fs::write(self.file("redis.conf"), self.config(port)).expect("our directory");
            let words = [program(&["redis-server", "valkey-server"], "redis-server"), self.file("redis.conf")];
            let server = Guarded::start_to(End::Kill, &self.dir, &words);
            let before = std::mem::replace(&mut self.port, port);
            let up = server.until(async || self.try_connection().await).await.is_some();
            self.server = Some(server);
            if up {
                return;
            }
            assert_eq!(before, 0, "Redis does not start again: {}", self.log());
            self.port = 0; // somebody else took the port
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
        if self.secured {
            format!("rediss://{}@localhost:{}/0", USER.0, self.port)
        } else {
            format!("redis://127.0.0.1:{}/0", self.port)
        }
    }

    /// The certificate authority that signed the server's certificate, as PEM.
    pub fn ca_file(&self) -> PathBuf {
        self.file("ca.pem")
    }

    /// A connection of the test's own.
    pub async fn connection(&self) -> MultiplexedConnection {
        self.try_connection().await.expect("Redis is up")
    }

    async fn try_connection(&self) -> Option<MultiplexedConnection> {
        let info: ConnectionInfo = self.url().into_connection_info().expect("a URL");
        let client = if self.secured {
            let settings = info.redis_settings().clone().set_password(USER.1);
            let root_cert = Some(std::fs::read(self.ca_file()).expect("written"));
            let certificates = TlsCertificates { client_tls: None, root_cert };
            Client::build_with_tls(info.set_redis_settings(settings), certificates).expect("certificates")
        } else {
            Client::open(info).expect("a URL")
        };
        let connecting = tokio::time::timeout(Duration::from_secs(1), client.get_multiplexed_async_connection());
        let mut connection = connecting.await.ok()?.ok()?;
        redis::cmd("PING").query_async::<String>(&mut connection).await.ok()?;
        Some(connection)
    }

    fn config(&self, port: u16) -> String {
        let common = "bind 127.0.0.1\nsave \"\"\nappendonly no\n";
        if !self.secured {
            return format!("{common}port {port}\n");
        }
        let file = |name| self.file(name).display().to_string();
        let (certificate, key, ca) = (file("server.pem"), file("server.key"), file("ca.pem"));
        format!(
            "{common}port 0\ntls-port {port}\ntls-auth-clients no\ntls-cert-file {certificate}\ntls-key-file {key}\n\
             tls-ca-cert-file {ca}\nuser default off\nuser {} on >{} ~* &* +@all\n",
            USER.0, USER.1
        )
    }

    fn write_certificates(&self) {
        let ca_key = KeyPair::generate().expect("a key");
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_certificate = ca.self_signed(&ca_key).expect("a certificate");
        let issuer = Issuer::new(ca, ca_key);
        let key = KeyPair::generate().expect("a key");
        let server = CertificateParams::new(["localhost".to_owned()]).expect("a name");
        let certificate = server.signed_by(&key, &issuer).expect("a certificate");
        for (name, text) in
            [("ca.pem", ca_certificate.pem()), ("server.pem", certificate.pem()), ("server.key", key.serialize_pem())]
        {
            std::fs::write(self.file(name), text).expect("our directory");
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.file("log")).unwrap_or_default()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        drop(self.server.take());
        // Gone already, unless the server was killed before.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
