//! The same for somebody else's table: attached while its application goes on writing a million rows, and read by three
//! replicas that look for what was revoked.

use std::{
    sync::Arc,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use sqlx::{AssertSqlSafe, Connection, PgConnection, postgres::PgConnectOptions};
use tokio::{
    sync::Mutex,
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    DOOMED_PER_SECOND, GOOD_PER_SECOND, REPLICAS, ask_for, execute, revocations, right,
    support::{
        exclusive,
        grpc::CheckClient,
        load::{KeyCase, quantiles},
        postgres::Postgres,
        probe::{Probe, granted_after},
        server::TestConfig,
    },
};

const ROWS: u32 = 1_000_000;
/// What the application writes, each second.
const WRITES_PER_SECOND: u32 = 300;
/// Of its writes one in this many is of a key, the others are heartbeats.
const KEY_WRITE_EVERY: u32 = 150;
/// Rounds of writing to the table without our triggers and with them, in turn.
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(3);
const SPACING: Duration = Duration::from_millis(700);
const WATCHED: Duration = Duration::from_millis(1_250);

/// Rows from here on are the application's to write; those before hold the keys that are asked for.
const FIRST_WRITTEN: u32 = 10_000;

fn row_id(number: u32) -> String {
    format!("lpad(to_hex({number}), 32, '0')::uuid")
}

fn key(number: u32) -> String {
    format!("a-key-of-somebody-else-{number}")
}

fn case(number: u32) -> KeyCase {
    KeyCase { key: key(number), owner: Some(uuid::Uuid::from_u128(number.into()).to_string()) }
}

/// The table, its roles, and a million rows in it.
async fn table(postgres: &Postgres, database: &str) {
    postgres
        .execute(
            database,
            &format!(
                "CREATE ROLE hospital LOGIN; CREATE ROLE app LOGIN; CREATE ROLE gate LOGIN; CREATE ROLE serve LOGIN;
                 GRANT CREATE ON DATABASE {database} TO hospital, gate;
                 SET ROLE hospital;
                 CREATE SCHEMA hospital;
                 CREATE TABLE hospital.trust (
                     id uuid PRIMARY KEY, api_key_hash char(64) UNIQUE, seen_at timestamptz, name text
                 ) WITH (fillfactor = 80);
                 INSERT INTO hospital.trust
                     SELECT {id}, encode(sha256(convert_to('a-key-of-somebody-else-' || number, 'UTF8')), 'hex'), now(),
                         'trust ' || number
                     FROM generate_series(1, {ROWS}) AS number;
                 GRANT USAGE ON SCHEMA hospital TO app;
                 GRANT SELECT, INSERT, UPDATE, DELETE ON hospital.trust TO app;
                 RESET ROLE;
                 ANALYZE hospital.trust",
                id = "lpad(to_hex(number), 32, '0')::uuid",
            ),
        )
        .await;
}

async fn as_role(postgres: &Postgres, database: &str, role: &str) -> PgConnection {
    let options: PgConnectOptions = postgres.url(role, database).parse().unwrap();
    PgConnection::connect_with(&options).await.unwrap()
}

/// An application that knows nothing of us.
struct Application {
    enough: CancellationToken,
    writing: JoinHandle<Vec<Write>>,
}

/// One of its writes.
struct Write {
    due: Instant,
    /// From when it was due until it was committed.
    took: Duration,
    is_of_key: bool,
}

impl Application {
    /// Writes when it is time to, over a few connections.
    async fn start(postgres: &Postgres, database: &str) -> Self {
        let mut idle = Vec::new();
        for _ in 0..4 {
            idle.push(as_role(postgres, database, "app").await);
        }
        let enough = CancellationToken::new();
        let writing = tokio::spawn(write(Arc::new(Mutex::new(idle)), enough.clone()));
        Self { enough, writing }
    }

    /// What it has written.
    async fn stop(self) -> Vec<Write> {
        self.enough.cancel();
        self.writing.await.expect("no panic")
    }
}

async fn write(idle: Arc<Mutex<Vec<PgConnection>>>, enough: CancellationToken) -> Vec<Write> {
    static WRITES: AtomicU32 = AtomicU32::new(0);
    let (mut due, mut writes, mut took) = (Instant::now(), JoinSet::new(), Vec::new());
    while enough.run_until_cancelled(sleep_until(due)).await.is_some() {
        let number = WRITES.fetch_add(1, Ordering::Relaxed);
        let row = fastrand::u32(FIRST_WRITTEN..ROWS);
        let is_of_key = number % KEY_WRITE_EVERY == 0;
        let sql = if is_of_key {
            format!(
                "UPDATE hospital.trust SET api_key_hash = lpad(to_hex({number}), 64, '0') WHERE id = {}",
                row_id(row)
            )
        } else {
            format!("UPDATE hospital.trust SET seen_at = clock_timestamp() WHERE id = {}", row_id(row))
        };
        let idle = Arc::clone(&idle);
        writes.spawn(async move {
            let mut connection = loop {
                // One of the connections gets free, or somebody waits for it as a pool would.
                if let Some(connection) = idle.lock().await.pop() {
                    break connection;
                }
                sleep(Duration::from_millis(1)).await;
            };
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.expect("the application is unharmed");
            idle.lock().await.push(connection);
            Write { due, took: due.elapsed(), is_of_key }
        });
        due += Duration::from_secs(1) / WRITES_PER_SECOND;
        while let Some(write) = writes.try_join_next() {
            took.push(write.expect("no panic"));
        }
    }
    took.extend(writes.join_all().await);
    took
}

/// Within what time 99 % of the writes of these spans were committed.
fn nearly_all<'w>(writes: impl IntoIterator<Item = &'w Write>, spans: &[(Instant, Instant)]) -> Duration {
    let within = |write: &&Write| spans.iter().any(|(from, until)| (*from..*until).contains(&write.due));
    let mut took: Vec<_> = writes.into_iter().filter(within).map(|write| write.took).collect();
    took.sort();
    took[took.len() * 99 / 100]
}

#[tokio::test(flavor = "multi_thread")]
async fn of_an_attached_table_with_a_million_rows_half_within_15_ms_and_all_within_1200_ms() {
    let _turn = exclusive().await;
    let postgres = Postgres::start().await;
    let database = postgres.database().await;
    table(&postgres, &database).await;
    let test_config = TestConfig::new()
        .with_default_deadlines()
        .with("store.url", postgres.url("serve", &database))
        .with("store.table", "hospital.trust")
        .with("store.attached", "true")
        .with("store.management_url", postgres.url("gate", &database));
    test_config.migrate().await;
    let grants =
        test_config.run(&["migrate", "--print-grants", "--serve-role", "serve", "--manage-role", "gate"]).await.out;
    postgres.execute(&database, &grants).await;
    // By one who may do both parts at once.
    let admin =
        TestConfig::new().with_default_deadlines().with("store.table", "hospital.trust").with("store.attached", "true");
    let admin = admin.with("store.url", postgres.url("admin", &database));

    // === the application without our triggers and with them ===
    let application = Application::start(&postgres, &database).await;
    let (mut without, mut with, mut altering) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        for (word, spans) in [("detach", &mut without), ("attach", &mut with)] {
            let began = Instant::now();
            admin.json(&[word]).await;
            altering.push((began, Instant::now()));
            let from = Instant::now();
            sleep(ROUND).await;
            spans.push((from, Instant::now()));
        }
    }
    let writes = application.stop().await;
    let rounds = |spans: &[(Instant, Instant)]| {
        let mut each: Vec<_> = spans.iter().map(|span| nearly_all(&writes, &[*span])).collect();
        each.sort();
        println!("99 % of the application's writes, in each round: {each:?}");
        each[each.len() / 2]
    };
    let (before, after) = (rounds(&without), rounds(&with));
    println!("detached {before:?}, attached {after:?}: {:.2}", after.as_secs_f64() / before.as_secs_f64());
    let of_keys = |spans| nearly_all(writes.iter().filter(|write| write.is_of_key), spans);
    println!("99 % of those of keys alone: detached {:?}, attached {:?}", of_keys(&without), of_keys(&with));
    let longest =
        writes.iter().filter(|write| altering.iter().any(|(from, until)| (*from..*until).contains(&write.due)));
    let longest = longest.map(|write| write.took).max().unwrap();
    println!("its longest write while it was attached and detached {} times: {longest:?}", altering.len());

    // === the bound ===
    let (mut servers, mut askers) = (Vec::new(), Vec::new());
    for _ in 0..REPLICAS {
        let server = test_config.serve().await;
        askers.push(CheckClient::connect(server.grpc()).await);
        servers.push(server);
    }
    let count = revocations(40);
    let good: Vec<_> = (5_000..5_300).map(case).collect();
    let application = Application::start(&postgres, &database).await;
    let mut loads: Vec<_> = askers.iter().map(|client| ask_for(client, GOOD_PER_SECOND, &good)).collect();
    for load in &mut loads {
        load.until_granted().await;
    }
    let (start, askers) = (Instant::now(), Arc::new(askers));
    let sql = Arc::new(Mutex::new(as_role(&postgres, &database, "app").await));
    let mut watching = JoinSet::new();
    for number in 0..u32::try_from(count).unwrap() {
        sleep_until(start + SPACING * number).await;
        watching.spawn(watch(Arc::clone(&askers), Arc::clone(&sql), number + 1));
    }
    let mut late = watching.join_all().await;
    let took = start.elapsed();
    for load in loads {
        right(&load.stop().await, &good, start, took);
    }
    let writes = application.stop().await;
    println!("99 % of the application's writes meanwhile: {:?}", nearly_all(&writes, &[(start, start + took)]));
    late.sort();
    quantiles("last grant after the commit, attached table", &late);
    let at = |share: usize| late[(late.len() * share).div_ceil(100) - 1];
    assert!(at(50) <= Duration::from_millis(15), "{:?}", at(50));
    assert!(at(99) <= Duration::from_millis(100), "{:?}", at(99));
    assert!(at(100) <= Duration::from_millis(1_200), "{:?}", at(100));
    for server in &servers {
        let bound = server.metric("trustgate_revocation_bound_seconds").await;
        println!("a replica says: bound {bound} s");
        assert!(bound > 0.0);
    }
}

/// Revokes one key as the application would, and looks how long it is granted.
async fn watch(askers: Arc<Vec<CheckClient>>, sql: Arc<Mutex<PgConnection>>, number: u32) -> Duration {
    let cases = [case(number)];
    let mut probing: Vec<_> = askers.iter().map(|client| ask_for(client, DOOMED_PER_SECOND, &cases)).collect();
    for probing in &mut probing {
        probing.until_granted().await;
    }
    let revocation = if number % 2 == 0 {
        format!("UPDATE hospital.trust SET api_key_hash = NULL WHERE id = {}", row_id(number))
    } else {
        format!("DELETE FROM hospital.trust WHERE id = {}", row_id(number))
    };
    let committed = execute(&mut *sql.lock().await, &revocation).await;
    sleep_until(committed + WATCHED).await;
    let mut late = Duration::ZERO;
    for probing in probing {
        let probes = probing.stop().await;
        let held = |probe: &Probe| probe.began < committed && probe.is_grant();
        assert!(probes.iter().any(held), "a replica did not hold the key");
        let last = probes.iter().max_by_key(|probe| probe.began).unwrap().verdict.as_ref().unwrap();
        assert_eq!((last.status, last.reason.as_deref()), (401, Some("unknown")));
        late = late.max(granted_after(committed, &probes));
    }
    late
}
