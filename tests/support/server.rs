//! The trustgate program: its commands, and the server as a separate process.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use trustgate::testing::record::ApiKeyDigest;
use uuid::Uuid;

use super::{
    eventually, http,
    process::{End, Frozen, Guarded, directory},
};

/// Timeouts and deadlines that no test reaches. A test that waits for a record in Redis also needs them: the server
/// writes a record to Redis once, best effort, and after a timeout does not retry while the record is in L1.
pub const LONG_DEADLINES: [(&str, &str); 4] = [
    ("store.read_timeout", "60s"),
    ("redis.timeout", "5s"),
    ("decision.deadline", "70s"),
    ("decision.envoy_timeout", "80s"),
];

/// Five times the default deadlines. With them, a busy machine does not turn checks into faults in tests that measure
/// no time. Tests that check documented times use [`TestConfig::with_default_deadlines`].
const RELAXED_DEADLINES: [(&str, &str); 4] = [
    ("store.read_timeout", "500ms"),
    ("redis.timeout", "100ms"),
    ("decision.deadline", "750ms"),
    ("decision.envoy_timeout", "1s"),
];

/// The settings of trustgate, and a directory for the embedded database. The program inherits no environment variables
/// from the test process.
pub struct TestConfig {
    dir: TempDir,
    settings: Vec<(String, String)>,
    /// The path of the trustgate binary.
    program: PathBuf,
}

/// The exit code and the output of a command.
#[derive(Debug)]
pub struct CommandOutput {
    pub code: i32,
    pub out: String,
    pub err: String,
}

#[derive(Clone, Debug)]
pub struct IssuedKey {
    pub id: String,
    pub key: String,
    pub trust_id: String,
}

impl TestConfig {
    /// Creates a configuration with the embedded database and the default settings, but with free ports for the
    /// listeners and with [`RELAXED_DEADLINES`].
    pub fn new() -> Self {
        let program = env!("CARGO_BIN_EXE_trustgate").into();
        let mut test_config = Self { dir: tempfile::tempdir().expect("a directory"), settings: Vec::new(), program };
        for (setting, value) in
            [("grpc.listen", "127.0.0.1:0"), ("admin.listen", "127.0.0.1:0"), ("canary.listen", "127.0.0.1:0")]
                .iter()
                .chain(&RELAXED_DEADLINES)
        {
            test_config.set(setting, *value);
        }
        test_config
    }

    /// Restores the default deadlines, for tests that check documented times.
    pub fn with_default_deadlines(mut self) -> Self {
        self.settings.retain(|(name, _)| RELAXED_DEADLINES.iter().all(|(setting, _)| *name != variable(setting)));
        self
    }

    /// Uses the build of trustgate at `program`.
    pub fn run_by(self, program: &Path) -> Self {
        Self { program: program.to_owned(), ..self }
    }

    /// Sets [`LONG_DEADLINES`].
    pub fn with_long_deadlines(mut self) -> Self {
        for (setting, value) in LONG_DEADLINES {
            self.set(setting, value);
        }
        self
    }

    /// Sets `setting`, such as `store.url`, to `value`.
    pub fn with(mut self, setting: &str, value: impl Into<String>) -> Self {
        self.set(setting, value);
        self
    }

    /// Sets `setting` to `value` for programs that are started from now on.
    pub fn set(&mut self, setting: &str, value: impl Into<String>) {
        let name = variable(setting);
        self.settings.retain(|(set, _)| *set != name);
        self.settings.push((name, value.into()));
    }

    /// Returns the environment variables of the program: the settings, the state directory and a user name.
    pub fn variables(&self) -> Vec<(String, String)> {
        let mut variables = self.settings.clone();
        variables.push(("STATE_DIRECTORY".to_owned(), self.path().display().to_string()));
        variables.push(("USER".to_owned(), "operator".to_owned()));
        variables
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Runs the program with `arguments`, and with `input` on standard input.
    pub async fn feed(&self, arguments: &[&str], input: &str) -> CommandOutput {
        let mut command = Command::new(&self.program);
        command.args(arguments).env_clear().envs(self.variables()).current_dir(self.path());
        let input = input.to_owned();
        let running = tokio::task::spawn_blocking(move || {
            let mut child = command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .expect("a program that starts");
            let mut stdin = child.stdin.take().expect("piped");
            // Ignore a write error: a command that fails early does not read its input.
            let feeder = std::thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
            let output = child.wait_with_output().expect("an exit status");
            feeder.join().expect("no panic");
            output
        });
        let output = running.await.expect("no panic");
        CommandOutput {
            code: output.status.code().expect("no signal"),
            out: String::from_utf8(output.stdout).expect("UTF-8"),
            err: String::from_utf8(output.stderr).expect("UTF-8"),
        }
    }

    /// Runs the program with `arguments` and empty standard input.
    pub async fn run(&self, arguments: &[&str]) -> CommandOutput {
        self.feed(arguments, "").await
    }

    /// Runs the program with `--output json` and returns the parsed output.
    ///
    /// # Panics
    /// If the command fails, or if its output is not JSON.
    pub async fn json(&self, arguments: &[&str]) -> Value {
        let ran = self.run(&[&["--output", "json"], arguments].concat()).await;
        assert_eq!(ran.code, 0, "{arguments:?}: {ran:?}");
        serde_json::from_str(&ran.out).unwrap_or_else(|_| panic!("{arguments:?}: {ran:?}"))
    }

    /// Creates or upgrades the tables.
    pub async fn migrate(&self) {
        self.json(&["migrate"]).await;
    }

    /// Creates a trust; returns its id.
    pub async fn trust(&self, name: &str) -> String {
        text(&self.json(&["trust", "create", name]).await["id"])
    }

    /// Issues a key for `trust`, with further `options` of `key issue`.
    pub async fn issue(&self, trust: &str, options: &[&str]) -> IssuedKey {
        let issued = self.json(&[&["key", "issue", "--trust", trust], options].concat()).await;
        IssuedKey { id: text(&issued["id"]), key: text(&issued["key"]), trust_id: text(&issued["trust_id"]) }
    }

    /// Revokes a key with `key revoke`, which must succeed.
    pub async fn revoke(&self, key: &IssuedKey) {
        self.json(&["key", "revoke", &key.id]).await;
    }

    /// Imports `count` random keys for a trust with one command; returns the keys.
    pub async fn import(&self, trust: &str, count: usize) -> Vec<String> {
        let keys: Vec<_> = (0..count).map(|_| made_up_key()).collect();
        let arguments = ["--output", "json", "key", "import", "--trust", trust, "--plaintext", "-"];
        let ran = self.feed(&arguments, &keys.join("\n")).await;
        assert_eq!(ran.code, 0, "{ran:?}");
        keys
    }

    /// Starts the server and waits until the server listens. The server may not be ready yet.
    ///
    /// # Panics
    /// If the server ends before it listens; the message contains the log.
    pub async fn listening(&self) -> Server {
        let (program, line) = self.start("serve", "listening").await;
        let grpc = first(&line["grpc"]).expect("an address");
        Server { program, grpc, admin: first(&line["admin"]).expect("an address") }
    }

    /// Starts the canary and waits until its metrics can be read. The canary may not have completed a round yet.
    ///
    /// # Panics
    /// If the canary ends before its metrics can be read; the message contains the log.
    pub async fn canary(&self) -> Canary {
        let (program, line) = self.start("canary", "canary started").await;
        Canary { program, metrics: first(&line["metrics"]).expect("an address") }
    }

    /// Starts the program with `command` and waits for its log line `message`; returns the program and the line.
    async fn start(&self, command: &str, message: &str) -> (Guarded, Value) {
        let variables = self.variables().into_iter().map(|(name, value)| format!("{name}={value}").into());
        let mut words = vec![OsString::from("env"), "-i".into()];
        words.extend(variables);
        words.extend([self.program.clone().into(), command.into()]);
        let program = Guarded::start_with_end(End::Kill, &directory(command), &words);
        let logged = program.until(async || {
            let log = program.log();
            let mut lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            lines.find(|line| line["message"] == message)
        });
        let Some(line) = logged.await else { panic!("{command} ended:\n{}", program.log()) };
        (program, line)
    }

    /// Starts the server and waits until the server is ready.
    pub async fn serve(&self) -> Server {
        let server = self.listening().await;
        server.until_ready().await;
        server
    }
}

/// A running server, which is killed when this value is dropped.
pub struct Server {
    program: Guarded,
    grpc: SocketAddr,
    admin: SocketAddr,
}

impl Server {
    /// Returns the address of the gRPC listener.
    pub const fn grpc(&self) -> SocketAddr {
        self.grpc
    }

    /// Returns the address of the admin listener.
    pub const fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Waits until the server is ready.
    pub async fn until_ready(&self) {
        let ready = self.program.until(async || (self.readiness().await.status == 200).then_some(()));
        assert!(ready.await.is_some(), "the server ended:\n{}", self.log());
    }

    /// Returns the response of `/readyz`.
    pub async fn readiness(&self) -> http::Answer {
        http::get(self.admin, "/readyz", &[]).await
    }

    /// Returns the value of one metric; see [`metric`].
    pub async fn metric(&self, name: &str) -> f64 {
        metric(self.admin, name).await
    }

    /// Returns the number of lookups in Redis with the outcome `outcome`.
    pub async fn l2(&self, outcome: &str) -> f64 {
        let labels = format!("kind=\"api_key\",outcome=\"{outcome}\",tier=\"l2\"");
        self.metric(&format!("trustgate_cache_lookups_total{{{labels}}}")).await
    }

    /// Waits until the log contains `text`.
    pub async fn until_logged(&self, text: &str) {
        let what = format!("{text:?} in the log");
        eventually(&what, Duration::from_secs(30), || async { self.log().contains(text) }).await;
    }

    /// Returns the log so far.
    pub fn log(&self) -> String {
        self.program.log()
    }

    /// Returns true if the process has not ended.
    pub fn is_running(&self) -> bool {
        !self.program.has_ended()
    }

    /// Pauses the process (SIGSTOP) until the returned value is dropped.
    pub fn freeze(&self) -> Frozen {
        Frozen::of(self.program.pid().expect("running"))
    }

    /// Returns the current and the peak resident memory of the process.
    ///
    /// # Panics
    /// If the server has ended.
    pub fn memory(&self) -> Memory {
        let status = format!("/proc/{}/status", self.program.pid().expect("started"));
        let status = std::fs::read_to_string(status).expect("a running process");
        let mib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a line");
            line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
        };
        Memory { now: mib("VmRSS:"), peak: mib("VmHWM:") }
    }

    /// Returns how often each worker thread has waited for work, by the name of the thread. The number hardly rises for
    /// a worker that serves no requests.
    ///
    /// # Panics
    /// If the server has ended.
    pub fn worker_waits(&self) -> BTreeMap<String, u64> {
        let waits = self.threads("status").into_iter().filter_map(|(name, status)| {
            let waits = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
            name.starts_with("worker-").then(|| (name, waits.trim().parse().expect("a number")))
        });
        waits.collect()
    }

    /// Returns the name and the nice value of each thread (`proc_pid_stat(5)`).
    ///
    /// # Panics
    /// If the server has ended.
    pub fn niceness(&self) -> Vec<(String, i32)> {
        let nice = |stat: &str| stat.rsplit(')').next()?.split_whitespace().nth(16)?.parse().ok();
        self.threads("stat").into_iter().map(|(name, stat)| (name, nice(&stat).expect("a number"))).collect()
    }

    /// Returns the name of each thread, and the content of `file` in /proc for the thread.
    fn threads(&self, file: &str) -> Vec<(String, String)> {
        let tasks = format!("/proc/{}/task", self.program.pid().expect("started"));
        let threads = std::fs::read_dir(tasks).expect("a running process").filter_map(Result::ok);
        let contents = threads.filter_map(|thread| {
            let name = std::fs::read_to_string(thread.path().join("comm")).ok()?.trim().to_owned();
            Some((name, std::fs::read_to_string(thread.path().join(file)).ok()?))
        });
        contents.collect()
    }

    /// Limits the server to `most` file descriptors from now on.
    ///
    /// # Panics
    /// If the server has ended.
    pub fn limit_descriptors(&self, most: u64) {
        let pid = i32::try_from(self.program.pid().expect("started")).expect("a process id");
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        prlimit(Pid::from_raw(pid), Resource::Nofile, limit).expect("a test process");
    }

    /// Sends the signal `name`, such as `TERM`, to the process.
    pub fn signal(&self, name: &str) {
        self.program.signal(name);
    }

    /// Waits up to `limit` for the process to exit; returns its exit code and its log.
    pub async fn ended(self, limit: Duration) -> (i32, String) {
        self.program.ended(limit).await
    }
}

/// A running canary, which is killed when this value is dropped.
pub struct Canary {
    program: Guarded,
    metrics: SocketAddr,
}

impl Canary {
    /// Returns the number of rounds for `target` with the outcome `outcome`.
    pub async fn rounds(&self, target: &str, outcome: &str) -> f64 {
        let labels = format!("outcome=\"{outcome}\",target=\"{target}\"");
        metric(self.metrics, &format!("trustgate_canary_rounds_total{{{labels}}}")).await
    }

    /// Returns the number of revocations whose time the canary has measured for `target`.
    pub async fn revocations(&self, target: &str) -> f64 {
        metric(self.metrics, &format!("trustgate_canary_revocation_seconds_count{{target=\"{target}\"}}")).await
    }

    /// Returns the metrics page.
    pub async fn metrics(&self) -> String {
        http::get(self.metrics, "/metrics", &[]).await.body
    }

    /// Returns the log so far.
    pub fn log(&self) -> String {
        self.program.log()
    }

    /// Sends SIGTERM and waits up to `limit` for the process to exit; returns its exit code and its log.
    pub async fn stop(self, limit: Duration) -> (i32, String) {
        self.program.signal("TERM");
        self.program.ended(limit).await
    }
}

/// Resident memory in MiB.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    pub now: f64,
    pub peak: f64,
}

/// Returns the value of one metric that the process at `admin` exports. `name` is the metric's name with its labels, as
/// `/metrics` prints it.
///
/// # Panics
/// If `/metrics` has no such metric.
pub async fn metric(admin: SocketAddr, name: &str) -> f64 {
    let metrics = http::get(admin, "/metrics", &[]).await.body;
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value = value.unwrap_or_else(|| panic!("no {name} in\n{metrics}"));
    value.parse().expect("a number")
}

/// Returns the environment variable that sets `setting`.
fn variable(setting: &str) -> String {
    format!("TRUSTGATE__{}", setting.to_uppercase().replace('.', "__"))
}

/// Returns a random key that no command has issued. Tests import it or send it as an unknown key.
pub fn made_up_key() -> String {
    format!("key-{}", Uuid::new_v4().simple())
}

/// Returns the digest that the database stores for a key if there is no pepper: the key's SHA-256 hash in hexadecimal.
pub fn digest(key: &str) -> String {
    ApiKeyDigest::from_bytes(Sha256::digest(key).into()).to_hex()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("not a string: {value}")).to_owned()
}

/// Returns the first address in a list that the server has logged.
fn first(list: &Value) -> Option<SocketAddr> {
    list.as_str()?.trim_matches(['[', ']']).split(", ").next()?.parse().ok()
}
