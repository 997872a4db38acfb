//! The modes `lease`, `strict`, `live` and `ttl` on each kind of table (trustgate's own, an attached table, an existing
//! table that is not attached, a preset), on PostgreSQL and SQLite. In each mode the server caches keys only if the
//! mode allows it, logs no warning, loses no history, denies a revoked key within the bound of the mode, and behaves in
//! an outage as `docs/revocation.md` says.

use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, sqlite::SqliteConnectOptions};
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use crate::support::{
    eventually,
    grpc::CheckClient,
    postgres::Postgres,
    process::Frozen,
    server::{Server, TestConfig, digest, made_up_key},
    shared,
};

const PATIENCE: Duration = Duration::from_secs(30);
const LEASE: Duration = Duration::from_secs(1);
const TTL: Duration = Duration::from_secs(2);
/// The default of `decision.deadline`, which is part of the bound of each mode that caches keys.
const DEADLINE: Duration = Duration::from_millis(150);
const CHECKS: u32 = 20;

/// The kind of table that contains the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tables {
    Own,
    Attached,
    Unattached,
    Preset,
}

impl Tables {
    const fn track_changes(self) -> bool {
        matches!(self, Self::Own | Self::Attached)
    }

    /// Returns the mode that takes effect on a route that demands `mode`. If changes are not tracked, no lease can
    /// confirm cached data, so `lease` and `strict` become `live`.
    const fn effective(self, mode: Mode) -> Mode {
        match mode {
            Mode::Lease | Mode::Strict if !self.track_changes() => Mode::Live,
            mode => mode,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Lease,
    Strict,
    Live,
    Ttl,
}

impl Mode {
    const ALL: [Self; 4] = [Self::Lease, Self::Strict, Self::Live, Self::Ttl];

    const fn word(self) -> &'static str {
        match self {
            Self::Lease => "lease",
            Self::Strict => "strict",
            Self::Live => "live",
            Self::Ttl => "ttl",
        }
    }

    /// Returns the maximum time for which a revoked key may still be granted while the database can be reached.
    fn bound(self) -> Duration {
        match self {
            Self::Lease | Self::Strict => LEASE + DEADLINE,
            Self::Live => Duration::ZERO,
            Self::Ttl => TTL + DEADLINE,
        }
    }
}

enum Database {
    Postgres(Postgres, String),
    Sqlite,
}

struct Fixture {
    tables: Tables,
    database: Database,
    test_config: TestConfig,
}

const APPLICATION_TABLE: &str = "CREATE TABLE trust (id {uuid} PRIMARY KEY, api_key_hash char(64) NULL UNIQUE)";

impl Fixture {
    async fn new(tables: Tables, database: Database) -> Self {
        let mut test_config = TestConfig::new()
            .with_default_deadlines()
            .with("freshness.ttl", "2s")
            .with("freshness.stale_if_unconfirmed", "60s")
            .with("store.read_timeout", "100ms");
        if let Database::Postgres(postgres, name) = &database {
            test_config.set("store.url", postgres.url("admin", name));
        } else if tables != Tables::Own {
            test_config.set("store.url", format!("sqlite://{}", test_config.path().join("theirs.db").display()));
        }
        let fixture = Self { tables, database, test_config };
        if tables != Tables::Own {
            let kind = if matches!(fixture.database, Database::Sqlite) { "text" } else { "uuid" };
            fixture.execute(&APPLICATION_TABLE.replace("{uuid}", kind)).await;
            if matches!(fixture.database, Database::Sqlite) {
                let file = fixture.test_config.path().join("theirs.db");
                fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
            }
        }
        fixture.configured().await
    }

    /// Applies the settings for the kind of table, and creates trustgate's own tables if they are needed.
    async fn configured(mut self) -> Self {
        match self.tables {
            Tables::Own => {
                self.test_config.migrate().await;
                self.test_config.trust("acme").await;
            }
            Tables::Attached => {
                self.test_config.set("store.table", "public.trust");
                self.test_config.set("store.attached", "true");
                self.test_config.migrate().await;
                self.test_config.json(&["attach"]).await;
            }
            Tables::Unattached => self.test_config.set("store.table", "public.trust"),
            Tables::Preset => self.test_config.set("store.preset", "trust-table"),
        }
        self
    }

    async fn execute(&self, sql: &str) {
        match &self.database {
            Database::Postgres(postgres, name) => postgres.execute(name, sql).await,
            Database::Sqlite => {
                let file = if self.tables == Tables::Own { "trustgate.db" } else { "theirs.db" };
                let options =
                    SqliteConnectOptions::new().filename(self.test_config.path().join(file)).create_if_missing(true);
                let mut connection = options.connect().await.unwrap();
                sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
                connection.close().await.unwrap();
            }
        }
    }

    /// Adds a valid key; returns the key and the SQL statement that revokes it.
    async fn key(&self) -> (String, String) {
        if self.tables == Tables::Own {
            let issued = self.test_config.issue("acme", &[]).await;
            let (table, now) = match self.database {
                Database::Postgres(..) => ("trustgate.api_key", "now()"),
                Database::Sqlite => ("api_key", "1"),
            };
            return (issued.key, format!("UPDATE {table} SET revoked_at = {now} WHERE id = '{}'", issued.id));
        }
        let (id, key) = (Uuid::new_v4(), made_up_key());
        self.execute(&format!("INSERT INTO trust VALUES ('{id}', '{}')", digest(&key))).await;
        (key, format!("DELETE FROM trust WHERE id = '{id}'"))
    }

    /// Makes the database unreachable until the returned value is dropped.
    fn outage(&self) -> Outage<'_> {
        match &self.database {
            Database::Postgres(postgres, _) => Outage::Frozen(postgres.freeze()),
            Database::Sqlite => {
                let away = self.test_config.path().join("away");
                fs::create_dir(&away).unwrap();
                for entry in fs::read_dir(self.test_config.path()).unwrap() {
                    let entry = entry.unwrap();
                    if entry.file_name().to_string_lossy().contains(".db") {
                        fs::rename(entry.path(), away.join(entry.file_name())).unwrap();
                    }
                }
                Outage::Moved(&self.test_config)
            }
        }
    }
}

/// A database outage, which ends when this value is dropped.
enum Outage<'s> {
    Frozen(#[expect(dead_code, reason = "its drop resumes the process")] Frozen),
    Moved(&'s TestConfig),
}

impl Drop for Outage<'_> {
    fn drop(&mut self) {
        let Self::Moved(test_config) = self else { return };
        for entry in fs::read_dir(test_config.path().join("away")).unwrap() {
            let entry = entry.unwrap();
            fs::rename(entry.path(), test_config.path().join(entry.file_name())).unwrap();
        }
    }
}

async fn status(client: &CheckClient, key: &str, mode: Mode) -> u16 {
    client.check_with(key, &[("trustgate.freshness", mode.word())]).await.unwrap().status
}

async fn reads(server: &Server) -> f64 {
    server.metric("trustgate_store_reads_total{outcome=\"ok\"}").await
}

async fn hits(server: &Server) -> f64 {
    let labels = "kind=\"api_key\",outcome=\"hit\",tier=\"l1\"";
    server.metric(&format!("trustgate_cache_lookups_total{{{labels}}}")).await
}

/// Asserts that the server caches the key, or reads the key for each check, as the mode requires.
async fn is_cached_as_the_mode_says(server: &Server, client: &CheckClient, key: &str, (tables, mode): (Tables, Mode)) {
    let name = format!("{tables:?}, {mode:?}");
    eventually(&format!("{name}: the key is granted, from the cache if the mode allows it"), PATIENCE, || async {
        let before = reads(server).await;
        status(client, key, mode).await == 200
            && (tables.effective(mode) == Mode::Live || reads(server).await <= before)
    })
    .await;
    let (read_before, hits_before) = (reads(server).await, hits(server).await);
    for _ in 0..CHECKS {
        assert_eq!(status(client, key, mode).await, 200, "{name}");
    }
    let (read, hit) = (reads(server).await - read_before, hits(server).await - hits_before);
    let checks = f64::from(CHECKS);
    let is_as_documented = if tables.effective(mode) == Mode::Live {
        read >= checks && hit < 0.5
    } else {
        // In mode `ttl`, the entry may expire during these checks; the server then reads the key once more.
        let again = if mode == Mode::Ttl { 1.5 } else { 0.5 };
        read < again && hit > checks - again
    };
    assert!(is_as_documented, "{name}: {read} reads and {hit} hits in {CHECKS} checks");
}

async fn behaves_as_documented(tables: Tables, database: Database) {
    let fixture = Fixture::new(tables, database).await;
    let server = fixture.test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    let mut keys = Vec::new();
    for mode in Mode::ALL {
        let (key, revoke) = fixture.key().await;
        is_cached_as_the_mode_says(&server, &client, &key, (tables, mode)).await;
        keys.push((mode, key, revoke));
    }

    // The server must log no warning and must not detect lost history.
    let log = server.log();
    let loud: Vec<_> = log.lines().filter(|line| line.contains("\"WARN\"") || line.contains("\"ERROR\"")).collect();
    assert!(loud.is_empty(), "{tables:?}: {loud:#?}");
    assert!(server.metric("trustgate_lost_history_total").await < 0.5);
    assert!(server.metric("trustgate_polls_total{outcome=\"unusable\"}").await < 0.5);

    // Each mode denies the revoked key within its bound.
    for (_, _, revoke) in &keys {
        fixture.execute(revoke).await;
    }
    let revoked = Instant::now();
    keys.sort_by_key(|(mode, ..)| tables.effective(*mode).bound());
    for (mode, key, _) in &keys {
        sleep_until(revoked + tables.effective(*mode).bound()).await;
        let status = status(&client, key, *mode).await;
        assert_ne!(status, 200, "{tables:?}, {mode:?}: granted {:?} after the revocation", revoked.elapsed());
    }

    // In an outage, mode `lease` grants cached keys. All other checks are faults.
    let mut keys = Vec::new();
    for mode in Mode::ALL {
        let (key, _) = fixture.key().await;
        is_cached_as_the_mode_says(&server, &client, &key, (tables, mode)).await;
        keys.push((mode, key));
    }
    let (cold, _) = fixture.key().await;
    let outage = fixture.outage();
    let lost = Instant::now();
    sleep_until(lost + TTL.max(LEASE) + 2 * DEADLINE).await;
    for (mode, key) in &keys {
        let want = if tables.effective(*mode) == Mode::Lease { 200 } else { 503 };
        assert_eq!(status(&client, key, *mode).await, want, "{tables:?}, {mode:?} in an outage");
        assert_eq!(status(&client, &cold, *mode).await, 503, "{tables:?}, {mode:?}: a key that is not cached");
    }
    drop(outage);
    for (mode, key) in &keys {
        let again = || async { status(&client, key, *mode).await == 200 };
        eventually(&format!("{tables:?}, {mode:?}: granted again after the outage"), PATIENCE, again).await;
    }
    assert!(server.metric("trustgate_lost_history_total").await < 0.5);
}

async fn postgres() -> Database {
    let postgres = Postgres::start().await;
    let name = postgres.database().await;
    Database::Postgres(postgres, name)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_mode_works_as_documented_on_trustgate_tables_in_postgresql() {
    let _turn = shared().await;
    behaves_as_documented(Tables::Own, postgres().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_mode_works_as_documented_on_an_attached_table_in_postgresql() {
    let _turn = shared().await;
    behaves_as_documented(Tables::Attached, postgres().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_mode_works_as_documented_on_an_unattached_table_in_postgresql() {
    let _turn = shared().await;
    behaves_as_documented(Tables::Unattached, postgres().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_mode_works_as_documented_with_a_preset_on_postgresql() {
    let _turn = shared().await;
    behaves_as_documented(Tables::Preset, postgres().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_mode_works_as_documented_on_trustgate_tables_in_sqlite() {
    let _turn = shared().await;
    behaves_as_documented(Tables::Own, Database::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_mode_works_as_documented_with_a_preset_on_sqlite() {
    let _turn = shared().await;
    behaves_as_documented(Tables::Preset, Database::Sqlite).await;
}
