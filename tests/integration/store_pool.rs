//! Tests the connection pool for reads from PostgreSQL: server restarts and hangs, timeouts, limits, grants and
//! password files.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use sqlx::Row;
use tokio::{sync::Semaphore, task::JoinSet};
use trustgate::testing::{
    base::{clock::SystemClock, fault::Fault, secret::Secret},
    record::{ApiKeyDigest, Digests},
    store::{
        self, Heartbeat, Missing, Source, StoreSettings,
        reads::pool::{Connect, Pool, PoolError, PoolLimits},
    },
};

use crate::support::{eventually, postgres::Postgres};

const SECONDS: Duration = Duration::from_secs(1);

fn settings(url: String) -> StoreSettings {
    StoreSettings {
        url: Some(Secret::new(url)),
        connections_max: 3,
        read_timeout: 30 * SECONDS,
        connect_timeout: 30 * SECONDS,
        ..StoreSettings::default()
    }
}

fn open(settings: &StoreSettings) -> Arc<dyn Source> {
    store::open_lookup(settings, &|_| None, Arc::new(SystemClock)).unwrap()
}

fn unknown_key() -> Digests {
    Digests { current: ApiKeyDigest::from_bytes([1; 32]), older: Vec::new() }
}

/// Starts `count` reads at once, so that the pool uses several connections.
async fn read_at_once(lookup: &Arc<dyn Source>, count: usize) {
    let mut reading = JoinSet::new();
    for _ in 0..count {
        let lookup = Arc::clone(lookup);
        reading.spawn(async move { lookup.find(&unknown_key()).await.unwrap() });
    }
    reading.join_all().await;
}

/// Returns the number of connections of `user`, as PostgreSQL counts them.
async fn connections(server: &Postgres, user: &str) -> i64 {
    let count = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1";
    let row = sqlx::query(count).bind(user).fetch_one(&mut server.admin("postgres").await).await.unwrap();
    row.get(0)
}

/// Creates trustgate's tables, and the roles `reader` and `manager` with the printed grants. Returns the settings of
/// `reader`.
async fn migrated(server: &Postgres) -> StoreSettings {
    store::migrate(&settings(server.url("admin", "postgres")), &|_| None).await.unwrap();
    let settings = settings(server.url("reader", "postgres"));
    let roles = "CREATE ROLE reader LOGIN PASSWORD 'first'; CREATE ROLE manager LOGIN PASSWORD 'other';";
    server.execute("postgres", &format!("{roles} {}", store::grants(&settings, "reader", "manager"))).await;
    settings
}

#[tokio::test]
async fn the_next_read_after_a_restart_of_postgresql_works() {
    let mut server = Postgres::start().await;
    let lookup = open(&migrated(&server).await);
    lookup.prepare(Missing::Refuse).await.unwrap();
    read_at_once(&lookup, 9).await;
    server.stop();
    let refused = tokio::time::timeout(20 * SECONDS, lookup.find(&unknown_key())).await;
    let fault = refused.expect("a read fails at once if the server refuses the connect").unwrap_err();
    assert!(matches!(fault, Fault::Unreachable { .. }), "the read fails at once: {fault:?}");
    let text = fault.to_string();
    assert!(!text.contains("reader") && !text.contains("postgres://"), "{text}");
    server.resume().await;
    read_at_once(&lookup, 9).await;
    server.stop();
    server.resume().await;
    // No read ran while the server was down, so the pool has not detected that its connections are closed.
    lookup.find(&unknown_key()).await.unwrap();
    lookup.poll(None).await.unwrap();
    lookup.close().await;
    eventually("the connections are closed", 10 * SECONDS, || async { connections(&server, "reader").await == 0 })
        .await;
}

#[tokio::test]
async fn a_lookup_that_is_opened_while_postgresql_is_down_works_after_postgresql_starts() {
    let mut server = Postgres::start().await;
    let settings = migrated(&server).await;
    server.stop();
    let lookup = open(&settings);
    let problem = lookup.prepare(Missing::Refuse).await.unwrap_err();
    assert!(problem.is_transient(), "{problem}");
    assert!(matches!(lookup.find(&unknown_key()).await, Err(Fault::Unreachable { .. })));
    server.resume().await;
    lookup.prepare(Missing::Refuse).await.unwrap();
    lookup.find(&unknown_key()).await.unwrap();
}

#[tokio::test]
async fn cancelled_reads_close_their_connections_while_postgresql_hangs() {
    let server = Postgres::start().await;
    let lookup = open(&migrated(&server).await);
    read_at_once(&lookup, 9).await;
    lookup.poll(None).await.unwrap();
    assert!(connections(&server, "reader").await <= 4);
    let frozen = server.freeze();
    for _ in 0..10 {
        let hung = tokio::time::timeout(Duration::from_millis(20), lookup.find(&unknown_key())).await;
        assert!(hung.is_err(), "a frozen server does not answer: {hung:?}");
    }
    drop(frozen);
    lookup.find(&unknown_key()).await.unwrap();
    read_at_once(&lookup, 9).await;
    eventually("at most 3 connections for reads and 1 for polls", 10 * SECONDS, || async {
        connections(&server, "reader").await <= 4
    })
    .await;
}

#[tokio::test]
async fn postgresql_ends_a_cancelled_read_that_waits_for_a_lock() {
    let server = Postgres::start().await;
    let settings = StoreSettings { read_timeout: Duration::from_millis(100), ..migrated(&server).await };
    let lookup = open(&settings);
    lookup.find(&unknown_key()).await.unwrap();
    let mut admin = server.admin("postgres").await;
    sqlx::raw_sql("BEGIN; LOCK TABLE trustgate.api_key IN ACCESS EXCLUSIVE MODE").execute(&mut admin).await.unwrap();
    for _ in 0..5 {
        assert!(tokio::time::timeout(settings.read_timeout, lookup.find(&unknown_key())).await.is_err());
    }
    eventually("no session waits for the lock", 10 * SECONDS, || async {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND wait_event_type = 'Lock'";
        let row = sqlx::query(waiting).fetch_one(&mut server.admin("postgres").await).await.unwrap();
        row.get::<i64, _>(0) == 0
    })
    .await;
    sqlx::raw_sql("ROLLBACK").execute(&mut admin).await.unwrap();
    lookup.find(&unknown_key()).await.unwrap();
}

#[tokio::test]
async fn the_printed_grants_suffice_to_serve_and_manage_and_grant_no_more() {
    let server = Postgres::start().await;
    let reader = migrated(&server).await;
    let lookup = open(&reader);
    lookup.prepare(Missing::Refuse).await.unwrap();
    let applied = lookup.poll(None).await.unwrap().newest.as_of;
    let replica = uuid::Uuid::from_u128(1);
    let heartbeat = Heartbeat { replica, name: "one".into(), applied, lasts: SECONDS };
    lookup.report(&heartbeat).await.unwrap();
    assert!(lookup.redis_mac_key().await.unwrap().is_some());
    let actor = store::Actor("test".into());
    let id = trustgate::testing::record::TrustId(uuid::Uuid::from_u128(7));
    let mut as_reader = store::open_ledger(&reader, &|_| None).await.unwrap();
    let refused = as_reader.create_trust(&actor, id, "acme").await.unwrap_err().to_string();
    assert!(refused.contains("permission denied"), "{refused}");
    assert!(as_reader.clear_caches(&actor).await.is_err());

    let manager = StoreSettings { management_url: Some(Secret::new(server.url("manager", "postgres"))), ..reader };
    let mut ledger = store::open_ledger(&manager, &|_| None).await.unwrap();
    ledger.create_trust(&actor, id, "acme").await.unwrap();
    let trust = store::ledger::TrustRef::Id(id);
    ledger.enable_trust(&actor, &trust, false).await.unwrap();
    let key = store::ledger::NewKey {
        id: trustgate::testing::record::KeyId(uuid::Uuid::from_u128(8)),
        digest: unknown_key().current,
        older: Vec::new(),
        made: trustgate::testing::record::Made::Elsewhere,
        hint: "tg_abcde".into(),
        name: None,
        scopes: vec![],
        allowed_cidrs: vec![],
        not_before: None,
        expires_in: None,
    };
    ledger.add_key(&actor, &trust, key).await.unwrap();
    ledger.revoke_key(&actor, trustgate::testing::record::KeyId(uuid::Uuid::from_u128(8))).await.unwrap();
    ledger.clear_caches(&actor).await.unwrap();
    assert_eq!(ledger.replicas().await.unwrap().len(), 1);
    ledger.delete_trust(&actor, &trust, true).await.unwrap();
    let secret = "SET ROLE manager; SELECT value FROM trustgate.setting";
    assert!(sqlx::raw_sql(secret).execute(&mut server.admin("postgres").await).await.is_err());
}

#[tokio::test]
async fn the_password_file_is_read_for_each_new_connection() {
    let server = Postgres::start().await;
    let dir = tempfile::tempdir().unwrap();
    let (url_file, password_file) = (dir.path().join("url"), dir.path().join("password"));
    migrated(&server).await;
    std::fs::write(&url_file, server.tcp_url("reader", "postgres")).unwrap();
    std::fs::write(&password_file, "wrong-secret\n").unwrap();
    let settings = StoreSettings {
        url: None,
        url_file: Some(url_file.clone()),
        password_file: Some(password_file.clone()),
        ..settings(String::new())
    };
    let lookup = open(&settings);
    let refused = lookup.find(&unknown_key()).await.unwrap_err().to_string();
    assert!(refused.contains("password authentication failed") && !refused.contains("wrong-secret"), "{refused}");
    std::fs::write(&password_file, "first\n").unwrap();
    lookup.find(&unknown_key()).await.unwrap();
    server.execute("postgres", "ALTER ROLE reader PASSWORD 'second'; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reader'").await;
    std::fs::write(&password_file, "second").unwrap();
    lookup.find(&unknown_key()).await.unwrap();
    // A password in the URL takes precedence over the password file.
    let own = server.tcp_url("manager", "postgres").replace("manager@", "manager:other@");
    let with_own = StoreSettings { url: Some(Secret::new(own)), url_file: None, ..settings.clone() };
    store::open_ledger(&with_own, &|_| None).await.unwrap();
    std::fs::remove_file(&url_file).unwrap();
    server.execute("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reader'").await;
    let gone = lookup.find(&unknown_key()).await.unwrap_err().to_string();
    assert!(gone.contains("store.url_file"), "{gone}");
}

/// A fake database: each connect and each answer waits for a permit from the test.
#[derive(Default)]
struct FakeDatabase {
    /// The number of connects that have started.
    connects: AtomicUsize,
    /// The number of connections that are open now.
    open: Arc<AtomicUsize>,
    /// The largest number of connections that were open at once.
    open_max: AtomicUsize,
    may_connect: Permits,
    may_answer: Permits,
    /// For each connect, the name of the thread that ran it.
    threads: Mutex<Vec<Option<String>>>,
}

struct Permits(Semaphore);

impl Default for Permits {
    fn default() -> Self {
        Self(Semaphore::new(0))
    }
}

impl Permits {
    async fn pass(&self) {
        self.0.acquire().await.expect("the semaphore is open").forget();
    }
}

/// A connection to the fake database, with its number.
struct FakeConnection(Arc<AtomicUsize>, usize);

impl Drop for FakeConnection {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Connect for FakeDatabase {
    type Connection = FakeConnection;
    type Query = ();
    type Row = usize;
    async fn connect(&self) -> Result<FakeConnection, sqlx::Error> {
        let number = self.connects.fetch_add(1, Ordering::SeqCst);
        self.threads.lock().unwrap().push(std::thread::current().name().map(str::to_owned));
        self.may_connect.pass().await;
        self.open_max.fetch_max(self.open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        Ok(FakeConnection(Arc::clone(&self.open), number))
    }
    async fn run(&self, connection: &mut FakeConnection, (): &()) -> Result<Vec<usize>, sqlx::Error> {
        self.may_answer.pass().await;
        Ok(vec![connection.1])
    }
    async fn close(_: FakeConnection) {}
    fn lost(_: &sqlx::Error) -> bool {
        false
    }
}

fn fake_pool(
    connections_max: usize,
    waiting_max: usize,
    connect_timeout: Duration,
) -> (Arc<FakeDatabase>, Arc<Pool<FakeDatabase>>) {
    let database = Arc::new(FakeDatabase::default());
    let pool = Pool::new("test", Arc::clone(&database), PoolLimits { connections_max, waiting_max, connect_timeout });
    (database, Arc::new(pool))
}

#[test]
fn a_read_on_a_runtime_that_was_shut_down_fails_and_does_not_hang() {
    let (done, is_done) = std::sync::mpsc::channel();
    // Run the test on another thread, because a deadlock would block the thread forever.
    std::thread::spawn(move || {
        let ended = tokio::runtime::Runtime::new().unwrap();
        let home = ended.handle().clone();
        ended.shutdown_background();
        let (_database, pool) = fake_pool(4, 4, 60 * SECONDS);
        pool.run_on(home);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let outcome = runtime.block_on(pool.read(&()));
        done.send(outcome.is_err()).unwrap();
    });
    assert_eq!(is_done.recv_timeout(30 * SECONDS), Ok(true));
}

#[tokio::test]
async fn connects_run_on_the_pool_runtime_and_not_on_the_caller_runtime() {
    let io =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).thread_name("io").enable_time().build().unwrap();
    let (database, pool) = fake_pool(1, 4, 60 * SECONDS);
    pool.run_on(io.handle().clone());
    database.may_connect.0.add_permits(1);
    database.may_answer.0.add_permits(1);
    assert_eq!(pool.read(&()).await.unwrap(), [0]);
    assert_eq!(*database.threads.lock().unwrap(), [Some("io".to_owned())]);
    io.shutdown_background();
}

#[tokio::test]
async fn a_connect_that_outlasts_its_read_serves_the_next_read() {
    let (database, pool) = fake_pool(4, 4, 60 * SECONDS);
    for _ in 0..3 {
        assert!(tokio::time::timeout(Duration::from_millis(5), pool.read(&())).await.is_err());
    }
    assert_eq!(database.connects.load(Ordering::SeqCst), 1, "the cancelled reads share one connect");
    database.may_connect.0.add_permits(1);
    database.may_answer.0.add_permits(1);
    assert_eq!(pool.read(&()).await.unwrap(), [0]);
    pool.close().await;
    assert_eq!(database.open.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_connect_that_hangs_fails_the_waiting_reads_after_the_connect_timeout() {
    let (database, pool) = fake_pool(1, 4, Duration::from_millis(20));
    let waiting = (pool.read(&()), pool.read(&()));
    let (one, other) = tokio::join!(waiting.0, waiting.1);
    assert!(matches!((one, other), (Err(PoolError::Connect(_)), Err(PoolError::Connect(_)))));
    database.may_connect.0.add_permits(1);
    database.may_answer.0.add_permits(1);
    assert!(pool.read(&()).await.is_ok(), "the failed connect no longer counts towards the limit");
}

#[tokio::test]
async fn reads_beyond_the_limit_fail_and_connections_stay_within_their_limit() {
    let (database, pool) = fake_pool(2, 5, 60 * SECONDS);
    database.may_connect.0.add_permits(1_000);
    let mut reading = JoinSet::new();
    for _ in 0..20 {
        let pool = Arc::clone(&pool);
        reading.spawn(async move { pool.read(&()).await });
    }
    eventually("two connections are open", 10 * SECONDS, || async { database.open.load(Ordering::SeqCst) == 2 }).await;
    database.may_answer.0.add_permits(1_000);
    let outcomes = reading.join_all().await;
    let full = outcomes.iter().filter(|outcome| matches!(outcome, Err(PoolError::Full))).count();
    let read = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert_eq!((full + read, full > 0, read > 0), (20, true, true), "{full} {read}");
    assert_eq!(database.open_max.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_dropped_read_closes_its_connection_and_frees_its_slot() {
    let (database, pool) = fake_pool(1, 5, 60 * SECONDS);
    database.may_connect.0.add_permits(1_000);
    // The first connection is in the middle of an answer when its read is dropped.
    assert!(tokio::time::timeout(Duration::from_millis(20), pool.read(&())).await.is_err());
    assert_eq!(database.open.load(Ordering::SeqCst), 0, "the connection is closed");
    database.may_answer.0.add_permits(2);
    assert_eq!(pool.read(&()).await.unwrap(), [1], "the read opens a new connection");
    assert_eq!(pool.read(&()).await.unwrap(), [1], "the next read reuses it");
    assert_eq!(database.open.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn closing_the_pool_fails_waiting_reads_and_leaves_no_connection() {
    let (database, pool) = fake_pool(2, 5, 60 * SECONDS);
    let reading = tokio::spawn({
        let pool = Arc::clone(&pool);
        async move { pool.read(&()).await }
    });
    eventually("the read has started a connect", 10 * SECONDS, || async {
        database.connects.load(Ordering::SeqCst) == 1
    })
    .await;
    let closed = tokio::time::timeout(20 * SECONDS, pool.close()).await;
    assert!(closed.is_ok(), "close does not wait for the connect");
    assert!(matches!(reading.await.unwrap(), Err(PoolError::Closed)));
    assert!(matches!(pool.read(&()).await, Err(PoolError::Closed)));
    assert_eq!(database.open.load(Ordering::SeqCst), 0);
}
