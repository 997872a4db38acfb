//! Measures, for an attached table, how long three replicas still grant a revoked key while the application that owns
//! the table writes to the table's million rows. Also measures how much the triggers slow the application down.

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
    GOOD_PER_SECOND, REPLICAS, REVOKED_PER_SECOND, assert_good_keys, assert_with_notifications, execute,
    keep_undisturbed_revocations, revocations, send_checks,
    support::{
        exclusive,
        grpc::CheckClient,
        load::{KeyCase, print_quantiles},
        machine::Sample,
        postgres::Postgres,
        probe::{Probe, sample_of_grants},
        server::TestConfig,
    },
};

const ROWS: u32 = 1_000_000;
/// The number of writes per second by the application.
const WRITES_PER_SECOND: u32 = 300;
/// One in this many writes changes a key; the other writes change a column that trustgate does not use.
const KEY_WRITE_EVERY: u32 = 150;
/// The number of rounds. In each round, the application writes without the triggers first, and then with them.
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(3);
const SPACING: Duration = Duration::from_millis(700);
const WATCH_FOR: Duration = Duration::from_millis(1_250);

/// The number of the first row that the application writes to. The checks use the keys of earlier rows.
const FIRST_WRITTEN: u32 = 10_000;

fn row_id(number: u32) -> String {
    format!("lpad(to_hex({number}), 32, '0')::uuid")
}

fn key(number: u32) -> String {
    format!("application-key-number-{number}")
}

fn case(number: u32) -> KeyCase {
    KeyCase { key: key(number), trust_id: Some(uuid::Uuid::from_u128(number.into()).to_string()) }
}

/// Creates the table, its roles and a million rows.
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
                     SELECT {id}, encode(sha256(convert_to('application-key-number-' || number, 'UTF8')), 'hex'), now(),
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

/// An application that writes to its table and does not depend on trustgate.
struct Application {
    stop: CancellationToken,
    writing: JoinHandle<Vec<Write>>,
}

/// One write by the application.
struct Write {
    due: Instant,
    /// The time from `due` to the commit.
    took: Duration,
    is_of_key: bool,
}

impl Application {
    /// Starts the application, which writes over four connections at a fixed rate.
    async fn start(postgres: &Postgres, database: &str) -> Self {
        let mut idle = Vec::new();
        for _ in 0..4 {
            idle.push(as_role(postgres, database, "app").await);
        }
        let stop = CancellationToken::new();
        let writing = tokio::spawn(write(Arc::new(Mutex::new(idle)), stop.clone()));
        Self { stop, writing }
    }

    /// Stops the application and returns its writes.
    async fn stop(self) -> Vec<Write> {
        self.stop.cancel();
        self.writing.await.expect("no panic")
    }
}

async fn write(idle: Arc<Mutex<Vec<PgConnection>>>, stop: CancellationToken) -> Vec<Write> {
    static WRITES: AtomicU32 = AtomicU32::new(0);
    let (mut due, mut writes, mut took) = (Instant::now(), JoinSet::new(), Vec::new());
    while stop.run_until_cancelled(sleep_until(due)).await.is_some() {
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
                // Wait for an idle connection, as with a pool.
                if let Some(connection) = idle.lock().await.pop() {
                    break connection;
                }
                sleep(Duration::from_millis(1)).await;
            };
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.expect("a write without an error");
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

/// Returns the 99th percentile of the durations of the writes that were due in `spans`.
fn percentile_99<'w>(writes: impl IntoIterator<Item = &'w Write>, spans: &[(Instant, Instant)]) -> Duration {
    let within = |write: &&Write| spans.iter().any(|(from, until)| (*from..*until).contains(&write.due));
    let mut took: Vec<_> = writes.into_iter().filter(within).map(|write| write.took).collect();
    took.sort();
    took[took.len() * 99 / 100]
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_keys_of_a_million_row_attached_table_are_denied_within_15_ms_median_1200_ms_max() {
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
    let print_grants = ["migrate", "--print-grants", "--serve-role", "serve", "--manage-role", "gate"];
    let grants = test_config.run(&print_grants).await.out;
    postgres.execute(&database, &grants).await;
    // The two parts of `attach` and `detach` need different privileges. The superuser has the privileges for both.
    let admin =
        TestConfig::new().with_default_deadlines().with("store.table", "hospital.trust").with("store.attached", "true");
    let admin = admin.with("store.url", postgres.url("admin", &database));

    // === the application without the triggers and with them ===
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
        let mut each: Vec<_> = spans.iter().map(|span| percentile_99(&writes, &[*span])).collect();
        each.sort();
        println!("99th percentile of the application's writes in each round: {each:?}");
        each[each.len() / 2]
    };
    let (before, after) = (rounds(&without), rounds(&with));
    println!("detached {before:?}, attached {after:?}: {:.2}", after.as_secs_f64() / before.as_secs_f64());
    let of_keys = |spans| percentile_99(writes.iter().filter(|write| write.is_of_key), spans);
    println!("99th percentile of writes to keys: detached {:?}, attached {:?}", of_keys(&without), of_keys(&with));
    let longest =
        writes.iter().filter(|write| altering.iter().any(|(from, until)| (*from..*until).contains(&write.due)));
    let longest = longest.map(|write| write.took).max().unwrap();
    println!("longest write during {} commands that attach or detach: {longest:?}", altering.len());

    // === the bound ===
    let (mut servers, mut clients) = (Vec::new(), Vec::new());
    for _ in 0..REPLICAS {
        let server = test_config.serve().await;
        clients.push(CheckClient::connect(server.grpc()).await);
        servers.push(server);
    }
    let count = revocations(40);
    let good: Vec<_> = (5_000..5_300).map(case).collect();
    let application = Application::start(&postgres, &database).await;
    let mut loads: Vec<_> = clients.iter().map(|client| send_checks(client, GOOD_PER_SECOND, &good)).collect();
    for load in &mut loads {
        load.until_granted().await;
    }
    let (start, clients) = (Instant::now(), Arc::new(clients));
    let sql = Arc::new(Mutex::new(as_role(&postgres, &database, "app").await));
    let mut watching = JoinSet::new();
    for number in 0..u32::try_from(count).unwrap() {
        sleep_until(start + SPACING * number).await;
        watching.spawn(watch(Arc::clone(&clients), Arc::clone(&sql), number + 1));
    }
    let late = watching.join_all().await;
    let took = start.elapsed();
    for load in loads {
        assert_good_keys(&load.stop().await, &good, start, took);
    }
    let writes = application.stop().await;
    let during_checks = percentile_99(&writes, &[(start, start + took)]);
    println!("99th percentile of the application's writes during the checks: {during_checks:?}");
    let mut late = keep_undisturbed_revocations(late, |late| *late);
    late.sort();
    print_quantiles("last grant after the commit, attached table", &late);
    assert_with_notifications(&late);
    for server in &servers {
        let bound = server.metric("trustgate_revocation_bound_seconds").await;
        println!("a replica: bound {bound} s");
        assert!(bound > 0.0);
    }
}

/// Revokes one key as the application would. Returns how long after the commit the last granted check began.
async fn watch(clients: Arc<Vec<CheckClient>>, sql: Arc<Mutex<PgConnection>>, number: u32) -> Sample<Duration> {
    let cases = [case(number)];
    let mut probing: Vec<_> = clients.iter().map(|client| send_checks(client, REVOKED_PER_SECOND, &cases)).collect();
    for probing in &mut probing {
        probing.until_granted().await;
    }
    let revocation = if number % 2 == 0 {
        format!("UPDATE hospital.trust SET api_key_hash = NULL WHERE id = {}", row_id(number))
    } else {
        format!("DELETE FROM hospital.trust WHERE id = {}", row_id(number))
    };
    let committed = execute(&mut *sql.lock().await, &revocation).await;
    sleep_until(committed + WATCH_FOR).await;
    let mut late = Sample::new(committed, committed, Duration::ZERO);
    for probing in probing {
        let probes = probing.stop().await;
        let granted_before = |probe: &Probe| probe.began < committed && probe.is_grant();
        assert!(probes.iter().any(granted_before), "a replica did not grant the key before");
        let last = probes.iter().max_by_key(|probe| probe.began).unwrap().verdict.as_ref().unwrap();
        assert_eq!((last.status, last.reason.as_deref()), (401, Some("unknown")));
        late = late.or_longer(sample_of_grants(committed, &probes));
    }
    late
}
