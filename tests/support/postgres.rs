//! A private PostgreSQL server with a separate data directory and socket, which stops with the test. A test can also
//! start standbys for the server, and back up and restore its data.

use std::{
    cell::Cell,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use sqlx::{AssertSqlSafe, Connection, PgConnection, Row, postgres::PgConnectOptions};
use tokio::sync::OnceCell;

use super::{
    eventually,
    process::{Frozen, Guarded, free_port, has_ended, signal},
};

/// A PostgreSQL server. Its superuser is `admin`. Over the socket, all users log in without a password; over TCP, the
/// server asks for passwords.
pub struct Postgres {
    dir: PathBuf,
    port: u16,
    server: Option<Guarded>,
}

impl Postgres {
    /// Creates and starts a server.
    ///
    /// # Panics
    /// If PostgreSQL is not installed; the message says how to install it.
    pub async fn start() -> Self {
        let dir = Self::create_directory();
        let data = dir.join("data");
        let made = as_owner(&[
            text(&binary("initdb")),
            "--no-sync",
            "--username=admin",
            "--auth-local=trust",
            "--auth-host=scram-sha-256",
            "--encoding=UTF8",
            "--no-locale",
            "-D",
            text(&data),
        ]);
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let mut postgres = Self { dir, port: 0, server: None };
        postgres.resume().await;
        postgres
    }

    /// Creates and starts a standby of this server, and waits until the standby has applied everything that this server
    /// has committed so far.
    pub async fn standby(&self) -> Self {
        let dir = Self::create_directory();
        let data = dir.join("data");
        let port = self.port.to_string();
        let made = as_owner(&[
            text(&binary("pg_basebackup")),
            "--no-sync",
            "--write-recovery-conf",
            "--checkpoint=fast",
            "--host",
            text(&self.dir),
            "--port",
            &port,
            "--username=admin",
            "--pgdata",
            text(&data),
        ]);
        assert!(made.status.success(), "pg_basebackup: {}", String::from_utf8_lossy(&made.stderr));
        let mut standby = Self { dir, port: 0, server: None };
        standby.resume().await;
        standby.until_caught_up_with(self).await;
        standby
    }

    /// Waits until this standby has applied everything that `primary` has committed so far.
    pub async fn until_caught_up_with(&self, primary: &Self) {
        let written: String = primary.value("postgres", "SELECT pg_current_wal_lsn()::text").await;
        let applied = format!("SELECT coalesce(pg_last_wal_replay_lsn() >= '{written}', false)");
        eventually("the standby has caught up", LIMIT, || self.value::<bool>("postgres", &applied)).await;
    }

    /// Disconnects this standby from its primary permanently.
    pub async fn cut_replication(&self) {
        self.execute("postgres", "ALTER SYSTEM SET primary_conninfo = ''").await;
        self.execute("postgres", "SELECT pg_reload_conf()").await;
        let is_cut = "SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver)";
        eventually("the standby is disconnected", LIMIT, || self.value::<bool>("postgres", is_cut)).await;
    }

    /// Promotes this standby to a primary.
    pub async fn promote(&self) {
        let data = self.dir.join("data");
        let done = as_owner(&[text(&binary("pg_ctl")), "promote", "--wait", "-D", text(&data)]);
        assert!(done.status.success(), "pg_ctl: {}", String::from_utf8_lossy(&done.stderr));
        let is_primary = "SELECT NOT pg_is_in_recovery()";
        eventually("the standby is a primary", LIMIT, || self.value::<bool>("postgres", is_primary)).await;
    }

    /// Stops the server, copies its data for [`Self::restore`], and restarts the server.
    pub async fn back_up(&mut self) {
        self.stop();
        self.copy("data", "backup");
        self.resume().await;
    }

    /// Stops the server if it is running, replaces its data with the copy from [`Self::back_up`], and restarts the
    /// server.
    pub async fn restore(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
        }
        std::fs::remove_dir_all(self.dir.join("data")).expect("a test directory");
        self.copy("backup", "data");
        self.resume().await;
    }

    fn copy(&self, from: &str, to: &str) {
        let (from, to) = (self.dir.join(from), self.dir.join(to));
        let done = Command::new("cp").args(["-a", text(&from), text(&to)]).output().expect("cp is installed");
        assert!(done.status.success(), "cp: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// Creates a directory that belongs to the user who runs the server.
    fn create_directory() -> PathBuf {
        let dir = tempfile::Builder::new().prefix("trustgate-pg").tempdir().expect("a directory").keep();
        hand_over(&dir);
        dir
    }

    /// Returns the output of `pg_dump` with `options` for a database, without the lines that contain a new random value
    /// in each run.
    pub fn dump(&self, database: &str, options: &[&str]) -> String {
        let pg_dump = binary("pg_dump");
        let output =
            Command::new(pg_dump).args(self.client(database)).args(options).output().expect("pg_dump is installed");
        assert!(output.status.success(), "pg_dump: {}", String::from_utf8_lossy(&output.stderr));
        let dump = String::from_utf8(output.stdout).expect("text");
        let is_random = |line: &str| line.starts_with("\\restrict ") || line.starts_with("\\unrestrict ");
        dump.split_inclusive('\n').filter(|line| !is_random(line)).collect()
    }

    /// Runs a script, for example a dump, with `psql`.
    pub fn load(&self, database: &str, script: &str) {
        let file = self.dir.join("script.sql");
        std::fs::write(&file, script).expect("a writable directory");
        let mut psql = Command::new(binary("psql"));
        let output = psql.args(self.client(database)).args(["-q", "-v", "ON_ERROR_STOP=1", "-f", text(&file)]).output();
        let output = output.expect("psql is installed");
        assert!(output.status.success(), "psql: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn client(&self, database: &str) -> Vec<String> {
        let port = self.port.to_string();
        ["-h", text(&self.dir), "-p", &port, "-U", "admin", "-d", database].map(str::to_owned).to_vec()
    }

    /// Returns the server that all tests in a binary share. Tests must not stop or damage this server. It stops with
    /// the test process.
    pub async fn shared() -> Arc<Self> {
        static SERVER: OnceCell<Arc<Postgres>> = OnceCell::const_new();
        Arc::clone(SERVER.get_or_init(|| async { Arc::new(Self::start().await) }).await)
    }

    /// Starts the server, or starts it again with the same data after [`Self::stop`].
    pub async fn resume(&mut self) {
        // If another process takes the port first, the server exits. In that case, try another port.
        for _ in 0..10 {
            if self.port == 0 {
                self.port = free_port();
            }
            let data = self.dir.join("data");
            let (port, sockets) = (self.port.to_string(), format!("unix_socket_directories={}", text(&self.dir)));
            let mut command = owner_prefix();
            let postgres = binary("postgres");
            command.extend(
                [
                    text(&postgres),
                    "-D",
                    text(&data),
                    "-p",
                    &port,
                    "-c",
                    &sockets,
                    "-c",
                    "listen_addresses=127.0.0.1,::1",
                    "-c",
                    "fsync=off",
                    "-c",
                    "max_connections=50",
                    "-c",
                    "shared_buffers=16MB",
                ]
                .map(str::to_owned),
            );
            let server = Guarded::start(&self.dir, &command.iter().map(String::as_str).collect::<Vec<_>>());
            self.server = Some(server);
            if self.has_started().await {
                return;
            }
            self.port = 0;
        }
        panic!("PostgreSQL does not start: {}", std::fs::read_to_string(self.dir.join("log")).unwrap_or_default());
    }

    /// Waits until the server answers or exits; returns true if it answers.
    async fn has_started(&self) -> bool {
        let server = self.server.as_ref().expect("started");
        let up = Cell::new(false);
        eventually("PostgreSQL answers or exits", Duration::from_secs(30), || async {
            let Some(pid) = server.pid() else { return false };
            up.set(PgConnection::connect(&self.url("admin", "postgres")).await.is_ok());
            up.get() || has_ended(pid)
        })
        .await;
        up.get()
    }

    /// Stops the server immediately, as in a crash, and keeps its data.
    pub fn stop(&mut self) {
        self.server.take().expect("running").stop();
    }

    /// Pauses all server processes (SIGSTOP) until the returned value is dropped.
    pub fn freeze(&self) -> Frozen {
        let postmaster = self.server.as_ref().and_then(Guarded::pid).expect("running");
        // Pause the postmaster first, so that it starts no process while the test lists its children.
        signal("STOP", &[postmaster]);
        let mut pids = vec![postmaster];
        let children = std::fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children"));
        pids.extend(children.expect("readable").split_whitespace().map(|pid| pid.parse::<u32>().expect("a number")));
        signal("STOP", &pids[1..]);
        Frozen(pids)
    }

    /// Returns the server's directory, which contains its socket.
    pub fn directory(&self) -> &Path {
        &self.dir
    }

    /// Returns the server's port.
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Returns the path of the server's Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join(format!(".s.PGSQL.{}", self.port))
    }

    /// Returns the log since the server was created.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Returns the URL for `user` and `database` over the socket.
    pub fn url(&self, user: &str, database: &str) -> String {
        format!("postgres://{user}@{}:{}/{database}?sslmode=disable", text(&self.dir).replace('/', "%2F"), self.port)
    }

    /// Returns the URL for `user` and `database` over TCP, where the server asks for a password.
    pub fn tcp_url(&self, user: &str, database: &str) -> String {
        format!("postgres://{user}@127.0.0.1:{}/{database}?sslmode=disable", self.port)
    }

    /// Turns on TLS with the certificate `server.pem` in `certificates`.
    pub async fn turn_on_tls(&self, certificates: &Path) {
        for name in ["server.pem", "server.key"] {
            let copy = self.dir.join(name);
            std::fs::copy(certificates.join(name), &copy).expect("a writable directory");
            std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o600)).expect("a test file");
            hand_over(&copy);
        }
        for (setting, value) in [("ssl_cert_file", "server.pem"), ("ssl_key_file", "server.key")] {
            let file = self.dir.join(value).display().to_string();
            self.execute("postgres", &format!("ALTER SYSTEM SET {setting} = '{file}'")).await;
        }
        self.execute("postgres", "ALTER SYSTEM SET ssl = on").await;
        self.execute("postgres", "SELECT pg_reload_conf()").await;
        eventually("TLS is on", LIMIT, || async {
            self.value::<String>("postgres", "SELECT current_setting('ssl')").await == "on"
        })
        .await;
    }

    /// Creates a database; returns its name.
    pub async fn database(&self) -> String {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("db{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        self.execute("postgres", &format!("CREATE DATABASE {name}")).await;
        name
    }

    /// Runs statements as superuser.
    pub async fn execute(&self, database: &str, sql: &str) {
        let mut connection = self.admin(database).await;
        sqlx::raw_sql(AssertSqlSafe(sql))
            .execute(&mut connection)
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error}"));
        connection.close().await.expect("an orderly close");
    }

    /// Runs a query as superuser and returns its single value.
    pub async fn value<T>(&self, database: &str, sql: &str) -> T
    where
        T: for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
    {
        let mut connection = self.admin(database).await;
        let row = sqlx::query(AssertSqlSafe(sql)).fetch_one(&mut connection).await;
        let value = row.and_then(|row| row.try_get(0)).unwrap_or_else(|error| panic!("{sql}: {error}"));
        connection.close().await.expect("an orderly close");
        value
    }

    /// Opens a connection as superuser.
    pub async fn admin(&self, database: &str) -> PgConnection {
        let options: PgConnectOptions = self.url("admin", database).parse().expect("a URL");
        PgConnection::connect_with(&options).await.expect("a connection")
    }
}

/// The maximum time that the tests wait for a change in the server's state, far longer than such a change usually
/// takes.
const LIMIT: Duration = Duration::from_secs(30);

/// Returns the path of PostgreSQL's program `name`, in the directory `POSTGRES_BIN` if that variable is set, otherwise
/// in the newest installed version.
fn binary(name: &str) -> PathBuf {
    let configured = std::env::var_os("POSTGRES_BIN").map(PathBuf::from);
    let mut found: Vec<PathBuf> = configured.map_or_else(
        || {
            let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
            versions.map(|version| version.path().join("bin")).collect()
        },
        |dir| vec![dir],
    );
    found.retain(|dir| dir.join(name).exists());
    found.sort_by_key(|dir| {
        dir.parent().and_then(Path::file_name).and_then(|name| name.to_str()).and_then(|name| name.parse::<u32>().ok())
    });
    let dir = found.pop().unwrap_or_else(|| {
        panic!(
            "this test needs PostgreSQL's {name}: `apt-get install postgresql`, or set POSTGRES_BIN to its directory"
        )
    });
    dir.join(name)
}

/// Returns the ids of the user and the group that the PostgreSQL package creates; `None` if this process does not run
/// as root. PostgreSQL refuses to run as root, so a test that runs as root starts it as this user.
fn unprivileged() -> Option<(u32, u32)> {
    let number = |option: &str, user: &[&str]| -> u32 {
        let output = Command::new("id").arg(option).args(user).output().expect("id is installed");
        let shown = String::from_utf8_lossy(&output.stdout);
        shown.trim().parse().unwrap_or_else(|_| panic!("there is no user {user:?}: `apt-get install postgresql`"))
    };
    (number("-u", &[]) == 0).then(|| (number("-u", &["postgres"]), number("-g", &["postgres"])))
}

/// Changes the owner of a file or directory to the user who runs the server.
pub(super) fn hand_over(dir: &Path) {
    if let Some((user, group)) = unprivileged() {
        chown(dir, Some(user), Some(group)).expect("root can change owners");
    }
}

/// Returns a command prefix for a program that refuses to run as root. The prefix runs the program as the user of the
/// PostgreSQL package; it is empty if this process does not run as root.
pub(super) fn owner_prefix() -> Vec<String> {
    unprivileged().map_or_else(Vec::new, |(user, group)| {
        vec!["setpriv".into(), format!("--reuid={user}"), format!("--regid={group}"), "--clear-groups".into()]
    })
}

fn as_owner(command: &[&str]) -> Output {
    let mut words = owner_prefix();
    words.extend(command.iter().map(|word| (*word).to_owned()));
    Command::new(&words[0]).args(&words[1..]).current_dir("/").output().expect("a command that starts")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}
