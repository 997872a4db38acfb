//! PostgreSQL going away beneath the reads of checks, and the connections they hold.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use sqlx::Row;
use tokio::{sync::Semaphore, task::JoinSet};
use trustgate::{
    base::{clock::SystemClock, fault::Fault, secret::Secret},
    record::{ApiKeyDigest, Digests},
    store::{
        self, Heartbeat, Missing, Source, StoreSettings,
        reads::pool::{Connect, Limits, Pool, PoolError},
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

fn nobody() -> Digests {
    Digests { current: ApiKeyDigest::from_bytes([1; 32]), older: Vec::new() }
}

/// Reads so many at once, so that as many connections are in use.
async fn read_at_once(lookup: &Arc<dyn Source>, count: usize) {
    let mut reading = JoinSet::new();
    for _ in 0..count {
        let lookup = Arc::clone(lookup);
        reading.spawn(async move { lookup.find(&nobody()).await.unwrap() });
    }
    reading.join_all().await;
}

/// Connections of `user`, as the server counts them.
async fn connections(server: &Postgres, user: &str) -> i64 {
    let count = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1";
    let row = sqlx::query(count).bind(user).fetch_one(&mut server.admin("postgres").await).await.unwrap();
    row.get(0)
}

/// A server with our tables and the role `reader`, which may do what `serve` may.
async fn migrated(server: &Postgres) -> StoreSettings {
    store::migrate(&settings(server.url("admin", "postgres")), &|_| None).await.unwrap();
    let settings = settings(server.url("reader", "postgres"));
    let roles = "CREATE ROLE reader LOGIN PASSWORD 'first'; CREATE ROLE manager LOGIN PASSWORD 'other';";
    server.execute("postgres", &format!("{roles} {}", store::grants(&settings, "reader", "manager"))).await;
    settings
}

#[tokio::test]
async fn after_a_restart_of_the_server_the_next_read_works() {
    let mut server = Postgres::start().await;
    let lookup = open(&migrated(&server).await);
    lookup.prepare(Missing::Refuse).await.unwrap();
    read_at_once(&lookup, 9).await;
    server.stop();
    let refused = tokio::time::timeout(20 * SECONDS, lookup.find(&nobody())).await;
    let fault = refused.expect("a connect that is refused keeps nobody waiting").unwrap_err();
    assert!(matches!(fault, Fault::Unreachable { .. }), "refused at once: {fault:?}");
    let text = fault.to_string();
    assert!(!text.contains("reader") && !text.contains("postgres://"), "{text}");
    server.resume().await;
    read_at_once(&lookup, 9).await;
    server.stop();
    server.resume().await;
    // This time nobody noticed that it was gone.
    lookup.find(&nobody()).await.unwrap();
    lookup.poll(None).await.unwrap();
    lookup.close().await;
    eventually("the connections are gone", 10 * SECONDS, || async { connections(&server, "reader").await == 0 }).await;
}

#[tokio::test]
async fn started_before_its_server_it_serves_as_soon_as_that_is_there() {
    let mut server = Postgres::start().await;
    let settings = migrated(&server).await;
    server.stop();
    let lookup = open(&settings);
    let problem = lookup.prepare(Missing::Refuse).await.unwrap_err();
    assert!(problem.is_transient(), "{problem}");
    assert!(matches!(lookup.find(&nobody()).await, Err(Fault::Unreachable { .. })));
    server.resume().await;
    lookup.prepare(Missing::Refuse).await.unwrap();
    lookup.find(&nobody()).await.unwrap();
}

#[tokio::test]
async fn reads_given_up_while_the_server_hangs_close_their_connections() {
    let server = Postgres::start().await;
    let lookup = open(&migrated(&server).await);
    read_at_once(&lookup, 9).await;
    lookup.poll(None).await.unwrap();
    assert!(connections(&server, "reader").await <= 4);
    let frozen = server.freeze();
    for _ in 0..10 {
        let hung = tokio::time::timeout(Duration::from_millis(20), lookup.find(&nobody())).await;
        assert!(hung.is_err(), "a server that is stopped does not answer: {hung:?}");
    }
    drop(frozen);
    lookup.find(&nobody()).await.unwrap();
    read_at_once(&lookup, 9).await;
    eventually("no more than 3 for reads and 1 beside", 10 * SECONDS, || async {
        connections(&server, "reader").await <= 4
    })
    .await;
}

#[tokio::test]
async fn a_read_given_up_while_it_waits_for_a_lock_is_ended_by_the_server_too() {
    let server = Postgres::start().await;
    let settings = StoreSettings { read_timeout: Duration::from_millis(100), ..migrated(&server).await };
    let lookup = open(&settings);
    lookup.find(&nobody()).await.unwrap();
    let mut admin = server.admin("postgres").await;
    sqlx::raw_sql("BEGIN; LOCK TABLE trustgate.api_key IN ACCESS EXCLUSIVE MODE").execute(&mut admin).await.unwrap();
    for _ in 0..5 {
        assert!(tokio::time::timeout(settings.read_timeout, lookup.find(&nobody())).await.is_err());
    }
    eventually("nobody waits for the lock", 10 * SECONDS, || async {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND wait_event_type = 'Lock'";
        let row = sqlx::query(waiting).fetch_one(&mut server.admin("postgres").await).await.unwrap();
        row.get::<i64, _>(0) == 0
    })
    .await;
    sqlx::raw_sql("ROLLBACK").execute(&mut admin).await.unwrap();
    lookup.find(&nobody()).await.unwrap();
}

#[tokio::test]
async fn the_printed_grants_are_enough_to_serve_and_to_manage_and_no_more() {
    let server = Postgres::start().await;
    let reader = migrated(&server).await;
    let lookup = open(&reader);
    lookup.prepare(Missing::Refuse).await.unwrap();
    let applied = lookup.poll(None).await.unwrap().newest.as_of;
    let replica = uuid::Uuid::from_u128(1);
    let sign = Heartbeat { replica, name: "one".into(), applied, lasts: SECONDS };
    lookup.report(&sign).await.unwrap();
    assert!(lookup.redis_mac_key().await.unwrap().is_some());
    let actor = store::Actor("test".into());
    let id = trustgate::record::TrustId(uuid::Uuid::from_u128(7));
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
        id: trustgate::record::KeyId(uuid::Uuid::from_u128(8)),
        digest: nobody().current,
        older: Vec::new(),
        made: trustgate::record::Made::Elsewhere,
        hint: "tg_abcde".into(),
        name: None,
        scopes: vec![],
        allowed_cidrs: vec![],
        not_before: None,
        expires_in: None,
    };
    ledger.add_key(&actor, &trust, key).await.unwrap();
    ledger.revoke_key(&actor, trustgate::record::KeyId(uuid::Uuid::from_u128(8))).await.unwrap();
    ledger.clear_caches(&actor).await.unwrap();
    assert_eq!(ledger.replicas().await.unwrap().len(), 1);
    ledger.delete_trust(&actor, &trust, true).await.unwrap();
    let secret = "SET ROLE manager; SELECT value FROM trustgate.setting";
    assert!(sqlx::raw_sql(secret).execute(&mut server.admin("postgres").await).await.is_err());
}

#[tokio::test]
async fn a_password_file_is_read_at_every_connect() {
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
    let refused = lookup.find(&nobody()).await.unwrap_err().to_string();
    assert!(refused.contains("password authentication failed") && !refused.contains("wrong-secret"), "{refused}");
    std::fs::write(&password_file, "first\n").unwrap();
    lookup.find(&nobody()).await.unwrap();
    server.execute("postgres", "ALTER ROLE reader PASSWORD 'second'; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reader'").await;
    std::fs::write(&password_file, "second").unwrap();
    lookup.find(&nobody()).await.unwrap();
    // A password in the URL goes before the file's.
    let own = server.tcp_url("manager", "postgres").replace("manager@", "manager:other@");
    let with_own = StoreSettings { url: Some(Secret::new(own)), url_file: None, ..settings.clone() };
    store::open_ledger(&with_own, &|_| None).await.unwrap();
    std::fs::remove_file(&url_file).unwrap();
    server.execute("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reader'").await;
    let gone = lookup.find(&nobody()).await.unwrap_err().to_string();
    assert!(gone.contains("store.url_file"), "{gone}");
}

/// A database that connects and answers when the test says so.
#[derive(Default)]
struct Staged {
    connects: AtomicUsize,
    open: Arc<AtomicUsize>,
    most: AtomicUsize,
    may_connect: Semaphores,
    may_answer: Semaphores,
}

struct Semaphores(Semaphore);

impl Default for Semaphores {
    fn default() -> Self {
        Self(Semaphore::new(0))
    }
}

impl Semaphores {
    async fn pass(&self) {
        self.0.acquire().await.expect("never closed").forget();
    }
}

struct Held(Arc<AtomicUsize>, usize);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Connect for Staged {
    type Connection = Held;
    type Query = ();
    type Row = usize;
    async fn connect(&self) -> Result<Held, sqlx::Error> {
        let number = self.connects.fetch_add(1, Ordering::SeqCst);
        self.may_connect.pass().await;
        self.most.fetch_max(self.open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        Ok(Held(Arc::clone(&self.open), number))
    }
    async fn run(&self, held: &mut Held, (): &()) -> Result<Vec<usize>, sqlx::Error> {
        self.may_answer.pass().await;
        Ok(vec![held.1])
    }
    async fn close(_: Held) {}
    fn lost(_: &sqlx::Error) -> bool {
        false
    }
}

fn staged(connections_max: usize, waiting_max: usize, connect_timeout: Duration) -> (Arc<Staged>, Arc<Pool<Staged>>) {
    let staged = Arc::new(Staged::default());
    let pool = Pool::new("test", Arc::clone(&staged), Limits { connections_max, waiting_max, connect_timeout });
    (staged, Arc::new(pool))
}

#[test]
fn a_read_on_a_runtime_that_has_ended_fails_and_does_not_hang() {
    let (done, is_done) = std::sync::mpsc::channel();
    // On a thread of its own: a deadlock would hang it for ever.
    std::thread::spawn(move || {
        let ended = tokio::runtime::Runtime::new().unwrap();
        let home = ended.handle().clone();
        ended.shutdown_background();
        let (_staged, pool) = staged(4, 4, 60 * SECONDS);
        pool.run_on(home);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let outcome = runtime.block_on(pool.read(&()));
        done.send(outcome.is_err()).unwrap();
    });
    assert_eq!(is_done.recv_timeout(30 * SECONDS), Ok(true));
}

#[tokio::test]
async fn a_connect_slower_than_the_read_ends_well_and_the_next_read_finds_it() {
    let (staged, pool) = staged(4, 4, 60 * SECONDS);
    for _ in 0..3 {
        assert!(tokio::time::timeout(Duration::from_millis(5), pool.read(&())).await.is_err());
    }
    assert_eq!(staged.connects.load(Ordering::SeqCst), 1, "reads that gave up have no connects left over");
    staged.may_connect.0.add_permits(1);
    staged.may_answer.0.add_permits(1);
    assert_eq!(pool.read(&()).await.unwrap(), [0]);
    pool.close().await;
    assert_eq!(staged.open.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_connect_that_never_ends_fails_whoever_waits_when_its_time_is_up() {
    let (_staged, pool) = staged(1, 4, Duration::from_millis(20));
    let waiting = (pool.read(&()), pool.read(&()));
    let (one, other) = tokio::join!(waiting.0, waiting.1);
    assert!(matches!((one, other), (Err(PoolError::Connect(_)), Err(PoolError::Connect(_)))));
    assert_eq!(pool.connections(), 0);
}

#[tokio::test]
async fn reads_beyond_the_limit_are_turned_away_and_connections_never_exceed_theirs() {
    let (staged, pool) = staged(2, 5, 60 * SECONDS);
    staged.may_connect.0.add_permits(1_000);
    let mut reading = JoinSet::new();
    for _ in 0..20 {
        let pool = Arc::clone(&pool);
        reading.spawn(async move { pool.read(&()).await });
    }
    eventually("two run", 10 * SECONDS, || async { staged.open.load(Ordering::SeqCst) == 2 }).await;
    staged.may_answer.0.add_permits(1_000);
    let outcomes = reading.join_all().await;
    let full = outcomes.iter().filter(|outcome| matches!(outcome, Err(PoolError::Full))).count();
    let read = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert_eq!((full + read, full > 0, read > 0), (20, true, true), "{full} {read}");
    assert_eq!(staged.most.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_dropped_read_closes_its_connection_and_hands_its_place_on() {
    let (staged, pool) = staged(1, 5, 60 * SECONDS);
    staged.may_connect.0.add_permits(1_000);
    // The first connection is in the middle of an answer when its read is dropped.
    assert!(tokio::time::timeout(Duration::from_millis(20), pool.read(&())).await.is_err());
    assert_eq!(staged.open.load(Ordering::SeqCst), 0, "closed");
    staged.may_answer.0.add_permits(2);
    assert_eq!(pool.read(&()).await.unwrap(), [1], "a new one");
    assert_eq!(pool.read(&()).await.unwrap(), [1], "which is used again");
    assert_eq!(pool.connections(), 1);
}

#[tokio::test]
async fn a_closed_pool_leaves_nothing_behind_and_nobody_waiting() {
    let (staged, pool) = staged(2, 5, 60 * SECONDS);
    let reading = tokio::spawn({
        let pool = Arc::clone(&pool);
        async move { pool.read(&()).await }
    });
    eventually("it connects", 10 * SECONDS, || async { staged.connects.load(Ordering::SeqCst) == 1 }).await;
    let closed = tokio::time::timeout(20 * SECONDS, pool.close()).await;
    assert!(closed.is_ok(), "it does not wait for the connect");
    assert!(matches!(reading.await.unwrap(), Err(PoolError::Closed)));
    assert!(matches!(pool.read(&()).await, Err(PoolError::Closed)));
    assert_eq!((pool.connections(), staged.open.load(Ordering::SeqCst)), (0, 0));
}
