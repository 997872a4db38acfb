//! A real Envoy with the configuration that the project ships, on free ports.

use std::{net::SocketAddr, path::PathBuf};

use serde_json::Value;

use super::{
    http,
    process::{End, Guarded, directory},
};

/// The Envoy configuration that the project ships.
const CONFIG: &str = include_str!("../../envoy/envoy.yaml");

/// A running Envoy process.
pub struct Envoy {
    program: Guarded,
    address: SocketAddr,
    admin: SocketAddr,
}

/// The configuration with which Envoy starts.
pub struct Plan {
    config: String,
    workers: usize,
}

impl Plan {
    /// Creates a plan with the shipped configuration. Envoy sends requests to `application` and checks to `servers`.
    /// The access log has an additional field `check_us`: the duration of the check as measured by Envoy, in
    /// microseconds.
    pub fn new(application: SocketAddr, servers: &[SocketAddr]) -> Self {
        Self::of(CONFIG, application, servers)
    }

    /// Like [`Self::new`], but with `config`, the configuration that an earlier release shipped.
    pub fn of(config: &str, application: SocketAddr, servers: &[SocketAddr]) -> Self {
        let endpoint = |address: &SocketAddr| {
            let (ip, port) = (address.ip(), address.port());
            format!("{{endpoint: {{address: {{socket_address: {{address: {ip}, port_value: {port}}}}}}}}}")
        };
        let all = |addresses: &[SocketAddr]| addresses.iter().map(endpoint).collect::<Vec<_>>().join(", ");
        let shipped = |port: u16| endpoint(&SocketAddr::from(([127, 0, 0, 1], port)));
        Self { config: config.to_owned(), workers: 2 }
            .replace("port_value: 9901", "port_value: 0")
            .replace("port_value: 10000", "port_value: 0")
            .replace(&shipped(8080), &all(&[application]))
            .replace(&shipped(50051), &all(servers))
            .replace(
                "              failure_mode_allow: ",
                "              emit_filter_state_stats: true\n              failure_mode_allow: ",
            )
            .replace(
                "                  code: \"%RESPONSE_CODE%\"\n",
                "                  code: \"%RESPONSE_CODE%\"\n                  \
                 check_us: \"%FILTER_STATE(envoy.filters.http.ext_authz:FIELD:latency_us)%\"\n",
            )
    }

    /// Replaces `from` in the configuration with `to`.
    ///
    /// # Panics
    /// If the configuration does not contain `from` exactly once.
    pub fn replace(self, from: &str, to: &str) -> Self {
        assert_eq!(self.config.matches(from).count(), 1, "envoy/envoy.yaml has changed: {from:?}");
        Self { config: self.config.replace(from, to), ..self }
    }

    /// Replaces the part of the configuration that begins with `from` and ends before `until` with `to`.
    ///
    /// # Panics
    /// If `from` or `until` is missing.
    pub fn replace_block(self, from: &str, until: &str, to: &str) -> Self {
        let start = self.config.find(from).unwrap_or_else(|| panic!("envoy/envoy.yaml has changed: {from:?}"));
        let length =
            self.config[start..].find(until).unwrap_or_else(|| panic!("envoy/envoy.yaml has changed: {until:?}"));
        let config = [&self.config[..start], to, &self.config[start + length..]].concat();
        Self { config, ..self }
    }

    /// Sets the number of Envoy's worker threads. Each worker opens a separate connection to each server.
    pub fn workers(self, workers: usize) -> Self {
        Self { workers, ..self }
    }

    /// Starts Envoy and waits until Envoy listens. Envoy may not have found a healthy server yet.
    ///
    /// # Panics
    /// If Envoy is not installed; the message says how to install Envoy. Also if Envoy does not start; the message
    /// contains the log.
    pub async fn start(self) -> Envoy {
        let dir = directory("envoy");
        let (config, admin_file) = (dir.join("envoy.yaml"), dir.join("admin"));
        std::fs::write(&config, &self.config).expect("a writable directory");
        let mut words = vec![binary().into_os_string(), "-c".into(), config.into(), "--admin-address-path".into()];
        words.push(admin_file.clone().into());
        let options = "--disable-hot-restart --log-level warning --file-flush-interval-msec 50 --concurrency";
        words.extend(options.split(' ').map(Into::into));
        words.push(self.workers.to_string().into());
        let program = Guarded::start_with_end(End::Kill, &dir, &words);
        let ready = program.until(async || {
            let admin: SocketAddr = std::fs::read_to_string(&admin_file).ok()?.trim().parse().ok()?;
            let ready = http::try_get(admin, "/ready").await?;
            (ready.status == 200).then_some(admin)
        });
        let Some(admin) = ready.await else { panic!("Envoy does not start:\n{}", program.log()) };
        let listeners = http::get(admin, "/listeners?format=json", &[]).await.body;
        let listeners: Value = serde_json::from_str(&listeners).expect("JSON");
        let port = &listeners["listener_statuses"][0]["local_address"]["socket_address"]["port_value"];
        let port = port.as_u64().and_then(|port| u16::try_from(port).ok()).expect("a port");
        Envoy { program, address: SocketAddr::from(([127, 0, 0, 1], port)), admin }
    }
}

impl Envoy {
    /// Starts Envoy with [`Plan::new`] and waits until Envoy considers each server healthy.
    pub async fn start(application: SocketAddr, servers: &[SocketAddr]) -> Self {
        let envoy = Plan::new(application, servers).start().await;
        for server in servers {
            envoy.until_healthy(*server).await;
        }
        envoy
    }

    /// Returns the address of Envoy's listener for requests.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the address of Envoy's admin interface, which serves statistics and the configuration.
    pub const fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Waits until Envoy considers `server` healthy.
    pub async fn until_healthy(&self, server: SocketAddr) {
        let healthy = format!("trustgate::{server}::health_flags::healthy");
        let found = self.program.until(async || {
            let clusters = http::get(self.admin, "/clusters", &[]).await.body;
            clusters.contains(&healthy).then_some(())
        });
        assert!(found.await.is_some(), "Envoy ended:\n{}", self.program.log());
    }

    /// Sends a GET request for `path` through Envoy.
    pub async fn get(&self, path: &str, headers: &[(&str, &str)]) -> http::Answer {
        http::get(self.address, path, headers).await
    }

    /// Waits until the access log has `lines` lines, and returns them. Envoy writes a line shortly after it answers.
    pub async fn access_log(&self, lines: usize) -> Vec<Value> {
        let found = self.program.until(async || {
            let log = self.program.log();
            let (whole, _) = log.rsplit_once('\n').unwrap_or_default();
            let found: Vec<_> = whole.lines().filter(|line| line.starts_with('{')).map(str::to_owned).collect();
            (found.len() >= lines).then_some(found)
        });
        let Some(found) = found.await else { panic!("Envoy ended:\n{}", self.program.log()) };
        found.iter().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }
}

/// Returns the path in `TRUSTGATE_TEST_ENVOY` if that variable is set, otherwise the path of the Envoy binary that
/// `make setup` downloads.
fn binary() -> PathBuf {
    let configured = std::env::var_os("TRUSTGATE_TEST_ENVOY").map(PathBuf::from);
    let path = configured.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools/bin/envoy").into());
    assert!(path.is_file(), "Envoy not found: this test needs {}: run `make setup`", path.display());
    path
}
