//! A real Envoy with the configuration that the project ships, on ports of its own.

use std::{net::SocketAddr, path::PathBuf};

use serde_json::Value;

use super::{
    http,
    process::{End, Guarded, directory},
};

/// The configuration.
const CONFIG: &str = include_str!("../../envoy/envoy.yaml");

/// A running Envoy, healthy or not.
pub struct Envoy {
    program: Guarded,
    address: SocketAddr,
    admin: SocketAddr,
}

/// What Envoy is given.
pub struct Plan {
    config: String,
    workers: usize,
}

impl Plan {
    /// The shipped configuration, with requests going to `application` and checks to `gates`. Beside it, the access log
    /// gets a field `check_us`: how long the check took in Envoy's eyes.
    pub fn new(application: SocketAddr, gates: &[SocketAddr]) -> Self {
        Self::of(CONFIG, application, gates)
    }

    /// The same for a configuration that was shipped before.
    pub fn of(config: &str, application: SocketAddr, gates: &[SocketAddr]) -> Self {
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
            .replace(&shipped(50051), &all(gates))
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

    /// The same with `from`, which stands in it once, replaced by `to`.
    ///
    /// # Panics
    /// If it does not stand there exactly once.
    pub fn replace(self, from: &str, to: &str) -> Self {
        assert_eq!(self.config.matches(from).count(), 1, "envoy/envoy.yaml has changed: {from:?}");
        Self { config: self.config.replace(from, to), ..self }
    }

    /// The same with everything from `from` up to `until`, which stays, replaced by `to`.
    ///
    /// # Panics
    /// If either of them is missing.
    pub fn replace_block(self, from: &str, until: &str, to: &str) -> Self {
        let start = self.config.find(from).unwrap_or_else(|| panic!("envoy/envoy.yaml has changed: {from:?}"));
        let length =
            self.config[start..].find(until).unwrap_or_else(|| panic!("envoy/envoy.yaml has changed: {until:?}"));
        let config = [&self.config[..start], to, &self.config[start + length..]].concat();
        Self { config, ..self }
    }

    /// The same with this many workers, each of which has a connection of its own to each gate.
    pub fn workers(self, workers: usize) -> Self {
        Self { workers, ..self }
    }

    /// Starts Envoy and waits until it listens. Whether it finds a gate healthy is another matter.
    ///
    /// # Panics
    /// If there is no Envoy, with how to get it; if it does not start, with what it said.
    pub async fn start(self) -> Envoy {
        let dir = directory("envoy");
        let (config, admin_file) = (dir.join("envoy.yaml"), dir.join("admin"));
        std::fs::write(&config, &self.config).expect("our directory");
        let mut words = vec![binary().into_os_string(), "-c".into(), config.into(), "--admin-address-path".into()];
        words.push(admin_file.clone().into());
        let options = "--disable-hot-restart --log-level warning --file-flush-interval-msec 50 --concurrency";
        words.extend(options.split(' ').map(Into::into));
        words.push(self.workers.to_string().into());
        let program = Guarded::start_to(End::Kill, &dir, &words);
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
    /// Starts Envoy as [`Plan::new`] says and waits until it finds every gate healthy.
    pub async fn start(application: SocketAddr, gates: &[SocketAddr]) -> Self {
        let envoy = Plan::new(application, gates).start().await;
        for gate in gates {
            envoy.until_healthy(*gate).await;
        }
        envoy
    }

    /// Where requests go.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Envoy's own statistics and configuration.
    pub const fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Waits until Envoy finds `gate` healthy.
    pub async fn until_healthy(&self, gate: SocketAddr) {
        let healthy = format!("trustgate::{gate}::health_flags::healthy");
        let found = self.program.until(async || {
            let clusters = http::get(self.admin, "/clusters", &[]).await.body;
            clusters.contains(&healthy).then_some(())
        });
        assert!(found.await.is_some(), "Envoy ended:\n{}", self.program.log());
    }

    /// Asks for `path` through Envoy.
    pub async fn get(&self, path: &str, headers: &[(&str, &str)]) -> http::Answer {
        http::get(self.address, path, headers).await
    }

    /// The access log, once it has `lines` lines: Envoy writes a moment after it answers.
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

/// What `TRUSTGATE_TEST_ENVOY` names, else what `make setup` fetched.
fn binary() -> PathBuf {
    let named = std::env::var_os("TRUSTGATE_TEST_ENVOY").map(PathBuf::from);
    let path = named.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools/bin/envoy").into());
    assert!(path.is_file(), "this test needs Envoy, and {} is not there: run `make setup`", path.display());
    path
}
