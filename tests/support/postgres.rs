//! A private PostgreSQL: its own data directory, its own socket, ended with the test. It can be given a standby, and its
//! data can be copied aside and put back.

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

/// A running server. Its superuser is `admin`, and everybody may log in without a password over the socket; over TCP
/// passwords are asked for.
pub struct Postgres {
    dir: PathBuf,
    port: u16,
    server: Option<Guarded>,
}

impl Postgres {
    /// Makes and starts a server.
    ///
    /// # Panics
    /// If PostgreSQL is not installed, with how to install it.
    pub async fn start() -> Self {
        let dir = Self::place();
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

    /// Makes and starts a standby of this server, and waits until it has everything that was committed so far.
    pub async fn standby(&self) -> Self {
        let dir = Self::place();
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

    /// Waits until this standby has applied everything that `primary` committed so far.
    pub async fn until_caught_up_with(&self, primary: &Self) {
        let written: String = primary.value("postgres", "SELECT pg_current_wal_lsn()::text").await;
        let applied = format!("SELECT coalesce(pg_last_wal_replay_lsn() >= '{written}', false)");
        eventually("the standby has it all", LIMIT, || self.value::<bool>("postgres", &applied)).await;
    }

    /// Lets this standby hear no more of its primary.
    pub async fn cut_replication(&self) {
        self.execute("postgres", "ALTER SYSTEM SET primary_conninfo = ''").await;
        self.execute("postgres", "SELECT pg_reload_conf()").await;
        let heard = "SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver)";
        eventually("the standby hears nothing", LIMIT, || self.value::<bool>("postgres", heard)).await;
    }

    /// Makes this standby a primary.
    pub async fn promote(&self) {
        let data = self.dir.join("data");
        let done = as_owner(&[text(&binary("pg_ctl")), "promote", "--wait", "-D", text(&data)]);
        assert!(done.status.success(), "pg_ctl: {}", String::from_utf8_lossy(&done.stderr));
        let is_primary = "SELECT NOT pg_is_in_recovery()";
        eventually("the standby is a primary", LIMIT, || self.value::<bool>("postgres", is_primary)).await;
    }

    /// Ends the server, copies its data aside for [`Self::put_back`], and starts it again.
    pub async fn copy_aside(&mut self) {
        self.stop();
        self.copy("data", "aside");
        self.resume().await;
    }

    /// Ends the server if it runs, puts the copy of [`Self::copy_aside`] in the place of its data, and starts it again.
    pub async fn put_back(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
        }
        std::fs::remove_dir_all(self.dir.join("data")).expect("it is ours");
        self.copy("aside", "data");
        self.resume().await;
    }

    fn copy(&self, from: &str, to: &str) {
        let (from, to) = (self.dir.join(from), self.dir.join(to));
        let done = Command::new("cp").args(["-a", text(&from), text(&to)]).output().expect("cp is there");
        assert!(done.status.success(), "cp: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// A directory that belongs to whom the server runs as.
    fn place() -> PathBuf {
        let dir = tempfile::Builder::new().prefix("trustgate-pg").tempdir().expect("a directory").keep();
        hand_over(&dir);
        dir
    }

    /// What `pg_dump` with these options says of a database, but for what it makes up anew each time.
    pub fn dump(&self, database: &str, options: &[&str]) -> String {
        let pg_dump = binary("pg_dump");
        let output =
            Command::new(pg_dump).args(self.client(database)).args(options).output().expect("pg_dump is there");
        assert!(output.status.success(), "pg_dump: {}", String::from_utf8_lossy(&output.stderr));
        let dump = String::from_utf8(output.stdout).expect("text");
        let is_made_up = |line: &str| line.starts_with("\\restrict ") || line.starts_with("\\unrestrict ");
        dump.split_inclusive('\n').filter(|line| !is_made_up(line)).collect()
    }

    /// Gives `psql` a script, such as a dump.
    pub fn load(&self, database: &str, script: &str) {
        let file = self.dir.join("script.sql");
        std::fs::write(&file, script).expect("our directory");
        let mut psql = Command::new(binary("psql"));
        let output = psql.args(self.client(database)).args(["-q", "-v", "ON_ERROR_STOP=1", "-f", text(&file)]).output();
        let output = output.expect("psql is there");
        assert!(output.status.success(), "psql: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn client(&self, database: &str) -> Vec<String> {
        let port = self.port.to_string();
        ["-h", text(&self.dir), "-p", &port, "-U", "admin", "-d", database].map(str::to_owned).to_vec()
    }

    /// One server for all tests of the binary that do not harm it; it ends with the process.
    pub async fn shared() -> Arc<Self> {
        static SERVER: OnceCell<Arc<Postgres>> = OnceCell::const_new();
        Arc::clone(SERVER.get_or_init(|| async { Arc::new(Self::start().await) }).await)
    }

    /// Starts the server again after [`Self::stop`], at the same place.
    pub async fn resume(&mut self) {
        // Somebody may take a free port before the server does; it says so by ending.
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
            if self.came_up().await {
                return;
            }
            self.port = 0;
        }
        panic!("PostgreSQL does not start: {}", std::fs::read_to_string(self.dir.join("log")).unwrap_or_default());
    }

    async fn came_up(&self) -> bool {
        let server = self.server.as_ref().expect("started");
        let up = Cell::new(false);
        eventually("PostgreSQL answers or ends", Duration::from_secs(30), || async {
            let Some(pid) = server.pid() else { return false };
            up.set(PgConnection::connect(&self.url("admin", "postgres")).await.is_ok());
            up.get() || has_ended(pid)
        })
        .await;
        up.get()
    }

    /// Ends the server at once, as a crash would; its data stays.
    pub fn stop(&mut self) {
        self.server.take().expect("running").stop();
    }

    /// Stops every process of the server without ending it (SIGSTOP), until the answer is dropped.
    pub fn freeze(&self) -> Frozen {
        let postmaster = self.server.as_ref().and_then(Guarded::pid).expect("running");
        // The postmaster first, so that it starts nobody while the others are counted.
        signal("STOP", &[postmaster]);
        let mut pids = vec![postmaster];
        let children = std::fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children"));
        pids.extend(children.expect("readable").split_whitespace().map(|pid| pid.parse::<u32>().expect("a number")));
        signal("STOP", &pids[1..]);
        Frozen(pids)
    }

    /// Where its socket is, among other things.
    pub fn directory(&self) -> &Path {
        &self.dir
    }

    /// Its port.
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join(format!(".s.PGSQL.{}", self.port))
    }

    /// What it logged since it was made.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// The URL for `user` and `database` over the socket.
    pub fn url(&self, user: &str, database: &str) -> String {
        format!("postgres://{user}@{}:{}/{database}?sslmode=disable", text(&self.dir).replace('/', "%2F"), self.port)
    }

    /// The URL for `user` and `database` over TCP, where a password is asked for.
    pub fn tcp_url(&self, user: &str, database: &str) -> String {
        format!("postgres://{user}@127.0.0.1:{}/{database}?sslmode=disable", self.port)
    }

    /// Lets it speak TLS, with the certificate `server.pem` in `certificates`.
    pub async fn turn_on_tls(&self, certificates: &Path) {
        for name in ["server.pem", "server.key"] {
            let copy = self.dir.join(name);
            std::fs::copy(certificates.join(name), &copy).expect("our directory");
            std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o600)).expect("ours");
            hand_over(&copy);
        }
        for (setting, value) in [("ssl_cert_file", "server.pem"), ("ssl_key_file", "server.key")] {
            let file = self.dir.join(value).display().to_string();
            self.execute("postgres", &format!("ALTER SYSTEM SET {setting} = '{file}'")).await;
        }
        self.execute("postgres", "ALTER SYSTEM SET ssl = on").await;
        self.execute("postgres", "SELECT pg_reload_conf()").await;
        eventually("it speaks TLS", LIMIT, || async {
            self.value::<String>("postgres", "SELECT current_setting('ssl')").await == "on"
        })
        .await;
    }

    /// Makes a database of its own; returns its name.
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
        connection.close().await.expect("closes");
    }

    /// The one value that a query gives, as superuser.
    pub async fn value<T>(&self, database: &str, sql: &str) -> T
    where
        T: for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
    {
        let mut connection = self.admin(database).await;
        let row = sqlx::query(AssertSqlSafe(sql)).fetch_one(&mut connection).await;
        let value = row.and_then(|row| row.try_get(0)).unwrap_or_else(|error| panic!("{sql}: {error}"));
        connection.close().await.expect("closes");
        value
    }

    /// A superuser's connection.
    pub async fn admin(&self, database: &str) -> PgConnection {
        let options: PgConnectOptions = self.url("admin", database).parse().expect("a URL");
        PgConnection::connect_with(&options).await.expect("connects")
    }
}

/// Far beyond any usual time.
const LIMIT: Duration = Duration::from_secs(30);

/// The newest PostgreSQL installed, or what `POSTGRES_BIN` names.
fn binary(name: &str) -> PathBuf {
    let named = std::env::var_os("POSTGRES_BIN").map(PathBuf::from);
    let mut found: Vec<PathBuf> = named.map_or_else(
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

/// PostgreSQL refuses to run as root: then it runs as the user that its package made.
fn unprivileged() -> Option<(u32, u32)> {
    let number = |option: &str, user: &[&str]| -> u32 {
        let output = Command::new("id").arg(option).args(user).output().expect("id is there");
        let shown = String::from_utf8_lossy(&output.stdout);
        shown.trim().parse().unwrap_or_else(|_| panic!("there is no user {user:?}: `apt-get install postgresql`"))
    };
    (number("-u", &[]) == 0).then(|| (number("-u", &["postgres"]), number("-g", &["postgres"])))
}

/// Gives a directory to whom the server runs as.
pub(super) fn hand_over(dir: &Path) {
    if let Some((user, group)) = unprivileged() {
        chown(dir, Some(user), Some(group)).expect("root may");
    }
}

/// What stands before a command that refuses to run as root.
pub(super) fn owner_prefix() -> Vec<String> {
    unprivileged().map_or_else(Vec::new, |(user, group)| {
        vec!["setpriv".into(), format!("--reuid={user}"), format!("--regid={group}"), "--clear-groups".into()]
    })
}

fn as_owner(command: &[&str]) -> Output {
    let mut words = owner_prefix();
    words.extend(command.iter().map(|word| (*word).to_owned()));
    Command::new(&words[0]).args(&words[1..]).current_dir("/").output().expect("can be started")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}
