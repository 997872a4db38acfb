//! The load that the freshness protocol causes in the database: an import makes no replica read unchanged keys again,
//! and without changes a replica sends few statements.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::time::{Instant, sleep};
use trustgate::testing::record::ApiKeyDigest;

use crate::{
    fixture::Fixture,
    support::{
        exclusive,
        grpc::CheckClient,
        load::KeyCase,
        machine::keep_undisturbed,
        probe::{Probe, Probing},
        server::{Server, TestConfig, made_up_key},
        shared,
    },
};

const CACHED: usize = 1_000;
const IMPORTED: usize = 100_000;

/// A lease that does not expire when the import and other programs delay the polls. Without a lease, each check would
/// read the database, so the number of reads would not show whether the keys stayed in the cache.
const LONG_LEASE: (&str, &str) = ("freshness.lease", "1m");

#[tokio::test(flavor = "multi_thread")]
async fn an_import_of_100_000_keys_leaves_cached_keys_cached_on_postgresql() {
    let _turn = exclusive().await;
    let fixture = Fixture::new(&[LONG_LEASE]).await;
    let cached = fixture.keys(CACHED).await;
    import_beside_traffic(&fixture.test_config, cached).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_of_100_000_keys_leaves_cached_keys_cached_on_sqlite() {
    let _turn = exclusive().await;
    let test_config = TestConfig::new().with(LONG_LEASE.0, LONG_LEASE.1);
    test_config.migrate().await;
    let owner = Some(test_config.trust("acme").await);
    let keys = test_config.import("acme", CACHED).await.into_iter();
    import_beside_traffic(&test_config, keys.map(|key| KeyCase { key, trust_id: owner.clone() }).collect()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn worker_and_poll_threads_have_a_higher_priority_than_io_threads() {
    let _turn = shared().await;
    let test_config = TestConfig::new();
    test_config.migrate().await;
    test_config.trust("acme").await;
    let key = test_config.issue("acme", &[]).await;
    let server = test_config.serve().await;
    CheckClient::connect(server.grpc()).await.check(&key.key).await;
    let niceness = |prefix| {
        let nice = server.niceness().into_iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, nice)| nice);
        nice.collect::<BTreeSet<_>>()
    };
    let (normal, low) = (0, 3);
    for (threads, nice) in [("worker-", normal), ("trustgate-poll", normal), ("trustgate-io", low)] {
        assert_eq!(niceness(threads), [nice].into(), "{threads}");
    }
}

async fn import_beside_traffic(test_config: &TestConfig, cached: Vec<KeyCase>) {
    let server = test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    let imported = made_up_key();
    client.fill_cache(&cached).await;
    let file = test_config.path().join("keys");
    let digests = (1..IMPORTED).map(|_| {
        let mut digest = [0; 32];
        getrandom::fill(&mut digest).unwrap();
        ApiKeyDigest::from_bytes(digest).to_hex()
    });
    let digests: Vec<_> = digests.chain([crate::support::server::digest(&imported)]).collect();
    std::fs::write(&file, digests.join("\n")).unwrap();

    let before = reads(&server).await;
    let probing = Probing::start(&client, 500, cached.iter().map(|case| case.key.clone()).collect(), &[]);
    let start = Instant::now();
    let path = file.display().to_string();
    let answer = test_config.json(&["key", "import", "--trust", "acme", &path]).await;
    let took = start.elapsed();
    assert_eq!(answer["imported"], IMPORTED, "{answer}");
    // At 500 checks per second, this time is long enough to check each cached key once more after the import was
    // applied.
    sleep(Duration::from_secs(3)).await;
    let probes = probing.stop().await;
    let read = reads(&server).await - before;
    println!("{IMPORTED} keys imported in {took:?}, with {} checks of cached keys and {read} reads", probes.len());
    let kept = keep_undisturbed("checks of cached keys", probes.iter().map(Probe::sample), |probe| probe.is_fault());
    let wrong: Vec<_> = kept.into_iter().filter(|probe| !probe.is_grant()).collect();
    assert!(wrong.is_empty(), "{} of {}: {:?}", wrong.len(), probes.len(), wrong[0]);
    assert!(probes.len() >= CACHED);
    let limit = f64::from(u32::try_from(CACHED / 100).unwrap());
    assert!(read <= limit, "{read} database reads, at most {limit} are allowed");
    // The replica has applied the import, because it grants an imported key.
    assert_eq!(client.check(&imported).await.status, 200);
}

/// Returns the number of database reads for checks, successful or not.
async fn reads(server: &Server) -> f64 {
    server.metric("trustgate_store_reads_total{outcome=\"ok\"}").await
        + server.metric("trustgate_store_reads_total{outcome=\"error\"}").await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_changes_a_replica_sends_at_most_eleven_polls_and_one_write_per_second() {
    const LENGTH: Duration = Duration::from_secs(10);
    let _turn = exclusive().await;
    let mut fixture = Fixture::with_default_deadlines(&[]).await;
    let cached = fixture.keys(100).await;
    let names = ["replica-one", "replica-two", "replica-three"];
    let url = fixture.postgres.url("admin", &fixture.database);
    let mut probing = Vec::new();
    let mut servers = Vec::new();
    for name in names {
        fixture.test_config.set("store.url", format!("{url}&application_name={name}"));
        let server = fixture.test_config.serve().await;
        let client = CheckClient::connect(server.grpc()).await;
        client.fill_cache(&cached).await;
        probing.push(Probing::start(&client, 100, cached.iter().map(|case| case.key.clone()).collect(), &[]));
        servers.push(server);
    }
    // At startup, a replica sends statements that do not recur. Wait until these statements have been sent before
    // counting.
    sleep(Duration::from_secs(2)).await;
    for sql in [
        "ALTER SYSTEM SET log_line_prefix = 'said by %a, '",
        "ALTER SYSTEM SET log_statement = 'all'",
        "SELECT pg_reload_conf()",
    ] {
        fixture.postgres.execute("postgres", sql).await;
    }
    sleep(Duration::from_secs(1)).await;
    let before = fixture.postgres.log().len();
    let start = Instant::now();
    sleep(LENGTH).await;
    let (log, took) = (fixture.postgres.log(), start.elapsed());
    for probing in probing {
        assert!(probing.stop().await.iter().all(Probe::is_grant));
    }

    let statements = statements(&log[before..]);
    for name in names {
        let mut counts = BTreeMap::new();
        for statement in statements.get(name).unwrap_or_else(|| panic!("{name} sent no statement")) {
            *counts.entry(kind(statement)).or_insert(0) += 1;
        }
        println!("{name} in {took:?}: {counts:?}");
        let at_most = |kind, per_second: u64| {
            // The period may begin and end with a statement, so allow one statement more than the rate gives.
            let limit = u128::from(per_second) * took.as_millis() / 1_000 + 1;
            let count: u128 = counts.get(&kind).copied().unwrap_or(0);
            assert!(count <= limit, "{count} of {kind:?}, at most {limit} are allowed");
        };
        assert!(counts[&Kind::Poll] >= 50, "too few polls: does `kind` recognise them? {counts:?}");
        at_most(Kind::Poll, 11);
        at_most(Kind::Write, 1);
        at_most(Kind::Setting, 12);
        // Every 10 s a replica checks that its notification connection still listens.
        at_most(Kind::Listening, 1);
        let others: Vec<_> = statements[name].iter().filter(|statement| kind(statement) == Kind::Other).collect();
        assert!(others.is_empty(), "{others:?}");
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Poll,
    Write,
    /// A `SET LOCAL` statement, which the server sends in one message with a poll or a write.
    Setting,
    /// The check that the notification connection still listens.
    Listening,
    Other,
}

fn kind(statement: &str) -> Kind {
    let statement = statement.to_lowercase();
    if ["insert", "update ", "delete", "prune"].iter().any(|word| statement.contains(word)) {
        Kind::Write
    } else if statement.contains(".poll(") {
        Kind::Poll
    } else if statement.contains("pg_listening_channels") {
        Kind::Listening
    } else if statement.starts_with("set local") {
        Kind::Setting
    } else {
        Kind::Other
    }
}

/// Returns the statements in a PostgreSQL log, grouped by the name of the application that sent them.
fn statements(log: &str) -> BTreeMap<&str, Vec<String>> {
    let mut statements = BTreeMap::<_, Vec<String>>::new();
    let mut sender = None;
    for line in log.lines() {
        let entry = line.strip_prefix("said by ").and_then(|line| line.split_once(", LOG:  "));
        if let Some((name, message)) = entry {
            let statement = message.strip_prefix("statement: ").or_else(|| {
                message.starts_with("execute ").then(|| message.split_once(": ")).flatten().map(|(_, it)| it)
            });
            sender = statement.map(|_| name);
            if let Some(statement) = statement {
                statements.entry(name).or_default().push(statement.to_owned());
            }
        } else if let (Some(name), Some(more)) = (sender, line.strip_prefix('\t')) {
            // PostgreSQL begins each continuation line of a statement with a tab.
            let statement = statements.get_mut(name).and_then(|sent| sent.last_mut()).unwrap();
            statement.push('\n');
            statement.push_str(more);
        } else {
            sender = None;
        }
    }
    statements
}
