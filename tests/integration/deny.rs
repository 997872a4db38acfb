//! Tests the deny list with a real Redis server. Entries take effect within a second. A program that can write to Redis
//! but does not have the MAC key can neither add nor remove an entry.

use std::{
    ffi::OsString,
    fs,
    sync::{Arc, OnceLock},
    time::Duration,
};

use redis::AsyncCommands as _;
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use trustgate::testing::{
    base::{
        clock::{DatabaseTime, SystemClock},
        metrics::{self, IntGauge, Registry},
    },
    config::{self, Purpose},
    freshness::deny_list::{
        DenyList, DenyMetrics,
        entries::Denied,
        redis::{ENTRIES_MAX, SharedList},
    },
    record::{ApiKeyDigest, KeyId, Record, TrustId},
    redis::{Redis as Link, RedisMetrics},
};
use uuid::Uuid;

use crate::{
    program::Place,
    support::{
        exclusive, grpc::CheckClient, machine::PAUSE_MARGIN, postgres::Postgres, redis::Redis, server::TestConfig,
    },
};

const MAC_KEY: [u8; 32] = [7; 32];
const HASH: &str = "trustgate:deny";
const NOW: DatabaseTime = DatabaseTime::from_micros(1_000_000);
/// The maximum time until an entry takes effect: the documented second, plus a margin, because the replica reads the
/// list late if the machine pauses.
const EFFECTIVE_WITHIN: Duration = Duration::from_secs(1).saturating_add(PAUSE_MARGIN);

/// The part of a replica that reads the deny list.
struct Replica {
    list: Arc<DenyList>,
    registry: Registry,
    stop: CancellationToken,
}

impl Replica {
    fn start(redis: &Redis) -> Self {
        let variables = [("TRUSTGATE__REDIS__URL", redis.url()), ("TRUSTGATE__REDIS__TIMEOUT", "50ms".to_owned())];
        let variables = variables.map(|(name, value)| (OsString::from(name), OsString::from(value)));
        let config = config::load(None, variables, Purpose::Deny).unwrap();
        let (registry, stop) = (Registry::new(), CancellationToken::new());
        let link_metrics = RedisMetrics::register(&registry, IntGauge::new("breaker", "breaker").unwrap()).unwrap();
        let (link, keeper) =
            Link::new(&config.redis, config.redis.clone(), Arc::new(SystemClock), link_metrics, stop.clone());
        let list = Arc::new(DenyList::open(None, DenyMetrics::register(&registry).unwrap()).unwrap());
        let shared = SharedList::new(link, Arc::new(OnceLock::from(MAC_KEY)));
        tokio::spawn(keeper);
        let (running, stopping) = (Arc::clone(&list), stop.clone());
        tokio::spawn(async move { running.run(Some(shared), || Some(NOW), stopping).await });
        Self { list, registry, stop }
    }

    fn denies(&self, record: &Record) -> bool {
        self.list.denies(&record.digest, record, NOW)
    }

    /// Waits until [`Self::denies`] returns `denies`, and returns the time that this took.
    async fn until_it_denies(&self, record: &Record, denies: bool) -> Duration {
        self.until(|| self.denies(record) == denies).await
    }

    async fn until(&self, condition: impl Fn() -> bool) -> Duration {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < Duration::from_secs(30), "the condition was not met within 30 s");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        start.elapsed()
    }

    fn shows(&self, line: &str) -> bool {
        metrics::text(&self.registry).lines().any(|shown| shown == line)
    }

    /// Waits long enough for the replica to read the list again: more than twice the interval between two reads.
    async fn after_another_read(&self) {
        tokio::time::sleep(Duration::from_millis(1_100)).await;
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn record(number: u128) -> Record {
    Record {
        key_id: KeyId(Uuid::from_u128(number)),
        trust_id: TrustId(Uuid::from_u128(1 << 64 | number)),
        trust_enabled: true,
        digest: ApiKeyDigest::from_bytes([u8::try_from(number).unwrap(); 32]),
        scopes: [].into(),
        allowed_cidrs: [].into(),
        not_before: None,
        expires_at: None,
        revoked_at: None,
    }
}

/// Returns the command line of an operator who has the MAC key but cannot reach the database.
fn operator(redis: &Redis) -> Place {
    let place = Place::new()
        .with("TRUSTGATE__REDIS__URL", &redis.url())
        .with("TRUSTGATE__REDIS__MAC_KEY_FILE", "mac-key")
        .with("TRUSTGATE__STORE__URL", "postgres://operator@127.0.0.1:1/none")
        .with("TRUSTGATE__STORE__PASSWORD_FILE", "nowhere")
        .with("TRUSTGATE__FRESHNESS__DENY_FILE", "nowhere");
    fs::write(place.path().join("mac-key"), MAC_KEY).unwrap();
    place
}

/// Runs a command of the program on a thread for blocking calls, and returns the parsed output.
async fn json(place: &Arc<Place>, arguments: &[&str]) -> serde_json::Value {
    let (place, arguments) = (Arc::clone(place), arguments.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
    let run = move || place.json(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    tokio::task::spawn_blocking(run).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn deny_add_and_remove_take_effect_within_a_second_without_a_database() {
    let _turn = exclusive().await;
    let redis = Redis::start().await;
    let (replica, place) = (Replica::start(&redis), Arc::new(operator(&redis)));
    let (by_key, by_trust, by_digest) = (record(1), record(2), record(3));
    let (key, trust, digest) = (by_key.key_id.to_string(), by_trust.trust_id.to_string(), by_digest.digest.to_hex());
    for (record, which) in
        [(&by_key, ["--key", &key]), (&by_trust, ["--trust", &trust]), (&by_digest, ["--digest", &digest])]
    {
        assert!(!replica.denies(record));
        let added = json(&place, &["deny", "add", which[0], which[1], "--for", "1h"]).await;
        assert_eq!((&added[0]["kind"], &added[0]["id"]), (&json!(which[0].trim_start_matches('-')), &json!(which[1])));
        let took = replica.until_it_denies(record, true).await;
        assert!(took < EFFECTIVE_WITHIN, "{took:?}");
    }
    let listed = json(&place, &["deny", "list"]).await;
    assert_eq!(listed.as_array().unwrap().len(), 3, "{listed}");
    replica.until(|| replica.shows("trustgate_deny_entries{source=\"redis\"} 3")).await;

    json(&place, &["deny", "remove", "--key", &key]).await;
    let took = replica.until_it_denies(&by_key, false).await;
    assert!(took < EFFECTIVE_WITHIN, "{took:?}");
    assert!(replica.denies(&by_trust) && replica.denies(&by_digest));
    assert_eq!(json(&place, &["deny", "list"]).await.as_array().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_to_redis_without_the_mac_key_neither_add_nor_remove_an_entry() {
    let redis = Redis::start().await;
    let (replica, place) = (Replica::start(&redis), Arc::new(operator(&redis)));
    let (denied, good) = (record(1), record(2));
    let (field, key) = (Denied::Key(denied.key_id).line(), denied.key_id.to_string());
    json(&place, &["deny", "add", "--key", &key, "--for", "1h"]).await;
    replica.until_it_denies(&denied, true).await;
    let mut connection = redis.connection().await;
    let genuine: Vec<u8> = connection.hget(HASH, &field).await.unwrap();

    // Write a genuine value to the field of a different key, and a value without a valid MAC.
    for (field, value) in [(Denied::Key(good.key_id).line(), &genuine[..]), (Denied::Trust(good.trust_id).line(), b"x")]
    {
        let _: () = connection.hset(HASH, field, value).await.unwrap();
    }
    replica.until(|| replica.shows("trustgate_deny_stale{source=\"redis\"} 1")).await;
    assert!(!replica.denies(&good) && replica.denies(&denied));

    // The key stays denied after the hash is deleted, replaced with a string, or filled with too many fields.
    let _: () = connection.del(HASH).await.unwrap();
    replica.until(|| replica.shows("trustgate_deny_stale{source=\"redis\"} 0")).await;
    assert!(replica.denies(&denied));
    let _: () = connection.set(HASH, "no hash").await.unwrap();
    replica.until(|| replica.shows("trustgate_deny_stale{source=\"redis\"} 1")).await;
    assert!(replica.denies(&denied));
    let _: () = connection.del(HASH).await.unwrap();
    let many: Vec<(String, &[u8])> = (0..=ENTRIES_MAX).map(|number| (number.to_string(), &b"x"[..])).collect();
    let _: () = connection.hset_multiple(HASH, &many).await.unwrap();
    replica.after_another_read().await;
    assert!(replica.denies(&denied) && replica.shows("trustgate_deny_stale{source=\"redis\"} 1"));
    let _: () = connection.del(HASH).await.unwrap();

    // The operator can remove the entry even though the hash is missing. Writing the old value back to Redis does not
    // deny the key again.
    json(&place, &["deny", "remove", "--key", &key]).await;
    replica.until_it_denies(&denied, false).await;
    let _: () = connection.hset(HASH, &field, &genuine[..]).await.unwrap();
    replica.after_another_read().await;
    assert!(!replica.denies(&denied));
}

#[tokio::test(flavor = "multi_thread")]
async fn oversized_and_unknown_fields_are_not_read_and_do_not_block_new_entries() {
    let redis = Redis::start().await;
    let (replica, place) = (Replica::start(&redis), Arc::new(operator(&redis)));
    let denied = record(1);
    let mut connection = redis.connection().await;
    let large = vec![b'x'; 64 << 20];
    let field = Denied::Key(record(2).key_id).line();
    let _: () = connection.hset(HASH, field, large).await.unwrap();
    let junk: Vec<(String, &[u8])> = (0..2 * ENTRIES_MAX).map(|number| (number.to_string(), &b"x"[..])).collect();
    let _: () = connection.hset_multiple(HASH, &junk).await.unwrap();
    replica.until(|| replica.shows("trustgate_deny_stale{source=\"redis\"} 1")).await;
    let sent = async || {
        let info: String = redis::cmd("INFO").arg("stats").query_async(&mut redis.connection().await).await.unwrap();
        let sent =
            info.lines().find_map(|line| line.strip_prefix("total_net_output_bytes:")).unwrap().trim().to_owned();
        sent.parse::<u64>().unwrap()
    };
    let before = sent().await;
    replica.after_another_read().await;
    let after = sent().await;
    assert!(after - before < 1 << 20, "Redis sent {} bytes", after - before);

    // `deny add` deletes the oversized and unknown fields, and the replica applies the new entry.
    json(&place, &["deny", "add", "--key", &denied.key_id.to_string(), "--for", "1h"]).await;
    replica.until_it_denies(&denied, true).await;
    let left: usize = connection.hlen(HASH).await.unwrap();
    assert_eq!(left, 1);
    replica.until(|| replica.shows("trustgate_deny_stale{source=\"redis\"} 0")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deny_entries_stay_in_force_while_redis_is_down() {
    let mut redis = Redis::start().await;
    let (replica, place) = (Replica::start(&redis), Arc::new(operator(&redis)));
    let (denied, other) = (record(1), record(2));
    json(&place, &["deny", "add", "--key", &denied.key_id.to_string(), "--for", "1h"]).await;
    replica.until_it_denies(&denied, true).await;
    redis.kill();
    replica.until(|| replica.shows("trustgate_deny_stale{source=\"redis\"} 1")).await;
    assert!(replica.denies(&denied));
    let failed = Arc::clone(&place);
    let add = move || failed.run(&["deny", "add", "--key", &Uuid::from_u128(2).to_string(), "--for", "1h"]);
    let failed = tokio::task::spawn_blocking(add).await.unwrap();
    failed
        .failed(1, &["no connection to Redis", "redis.url is set in TRUSTGATE__REDIS__URL", "redis connection failed"]);

    redis.resume().await; // Redis restarts without its data
    replica.until(|| replica.shows("trustgate_deny_stale{source=\"redis\"} 0")).await;
    assert!(replica.denies(&denied) && !replica.denies(&other));
    json(&place, &["deny", "add", "--key", &other.key_id.to_string(), "--for", "1h"]).await;
    replica.until_it_denies(&other, true).await;
    assert!(replica.denies(&denied));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_possible_digest_of_a_key_on_standard_input_is_denied() {
    const KEY: &str = "a-foreign-key-of-some-length";
    let redis = Redis::start().await;
    let place = operator(&redis).with("TRUSTGATE__CREDENTIAL__PEPPER", "pepper-hunter2-hunter2");
    let added = tokio::task::spawn_blocking(move || {
        let command = ["--output", "json", "deny", "add", "--stdin", "--for", "1h"];
        let mistyped = place.feed(&command, "short\n").failed(2, &["standard input is not a key"]);
        mistyped.hides("short\n");
        let added = place.feed(&command, &format!("{KEY}\n")).done();
        added.hides(KEY);
        added.hides("hunter2");
        place.feed(&["deny", "remove", "--stdin"], KEY).done();
        assert_eq!(place.json(&["deny", "list"]), json!([]));
        added.parsed()
    });
    let added = added.await.unwrap();
    let ids: Vec<_> = added.as_array().unwrap().iter().map(|entry| entry["id"].as_str().unwrap().to_owned()).collect();
    // The key has one digest without a pepper and one digest with the pepper.
    assert_eq!(ids.len(), 2, "{ids:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mac_key_comes_from_the_database_if_no_file_is_set() {
    let redis = Redis::start().await;
    let url = redis.url();
    tokio::task::spawn_blocking(move || {
        let place = Place::migrated().with("TRUSTGATE__REDIS__URL", &url);
        let id = Uuid::from_u128(7).to_string();
        let added = place.run(&["deny", "add", "--key", &id, "--for", "1h"]).done();
        assert!(added.out.contains("Every replica that can reach Redis applies the change within 1 s"), "{added:?}");
        assert_eq!(place.json(&["deny", "list"])[0]["id"], json!(id));

        let other = Place::migrated().with("TRUSTGATE__REDIS__URL", &url);
        let listed = other.run(&["deny", "list"]).done();
        assert!(
            listed.out.contains("Entries that replicas ignore (wrong MAC, or written by another release): 1"),
            "the other database has a different MAC key: {listed:?}"
        );
        assert_eq!(other.json(&["deny", "list"]), json!([]));

        let nowhere = Place::new().with("TRUSTGATE__REDIS__URL", &url);
        nowhere.run(&["deny", "list"]).failed(1, &["from the database: no database at", "redis.mac_key_file"]);
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deny_entry_stops_a_key_within_a_second_while_the_database_is_down() {
    let _turn = exclusive().await;
    let (postgres, redis) = (Postgres::start().await, Redis::start().await);
    let database = postgres.database().await;
    let mut test_config =
        TestConfig::new().with("store.url", postgres.url("admin", &database)).with("redis.url", redis.url());
    let (file, mac_key) = (test_config.path().join("deny"), test_config.path().join("mac-key"));
    fs::write(&file, "# no entries yet\n").unwrap();
    fs::write(&mac_key, MAC_KEY).unwrap();
    test_config.set("freshness.deny_file", file.display().to_string());
    test_config.set("redis.mac_key_file", mac_key.display().to_string());
    test_config.migrate().await;
    test_config.trust("acme").await;
    test_config.trust("globex").await;
    let (by_file, by_digest) = (test_config.issue("acme", &[]).await, test_config.issue("acme", &[]).await);
    let (by_trust, good) = (test_config.issue("globex", &[]).await, test_config.issue("acme", &[]).await);
    let server = test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    for key in [&by_file, &by_digest, &by_trust, &good] {
        assert_eq!(client.check(&key.key).await.status, 200);
    }
    let frozen = postgres.freeze();

    let until_denied = async |key: &str| {
        let start = Instant::now();
        let denied = loop {
            let verdict = client.check(key).await;
            if verdict.status != 200 {
                break verdict;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let took = start.elapsed();
        assert_eq!((denied.status, denied.reason.as_deref()), (401, Some("deny_listed")));
        assert!(took < EFFECTIVE_WITHIN, "{took:?}");
    };
    fs::write(&file, format!("key {}\n", by_file.id)).unwrap();
    until_denied(&by_file.key).await;
    let added = test_config.feed(&["deny", "add", "--stdin", "--for", "1h"], &by_digest.key).await;
    assert_eq!(added.code, 0, "{added:?}");
    until_denied(&by_digest.key).await;
    test_config.json(&["deny", "add", "--trust", &by_trust.trust_id, "--for", "1h"]).await;
    until_denied(&by_trust.key).await;
    assert_eq!(client.check(&good.key).await.status, 200, "a key that is not on the deny list still passes");

    // The entries are still in force after the database is reachable again.
    drop(frozen);
    assert_eq!(client.check(&by_file.key).await.reason.as_deref(), Some("deny_listed"));
    assert!(server.metric("trustgate_deny_entries{source=\"file\"}").await > 0.0);
}

#[test]
fn deny_add_without_redis_suggests_the_deny_file() {
    let place = Place::new();
    let id = Uuid::from_u128(7).to_string();
    let line = format!("\n  key {id}\n");
    let add = ["deny", "add", "--key", &id, "--for", "1h"];
    place.run(&add).failed(1, &["redis.url is not set", "freshness.deny_file", &line]);
    place.run(&["deny", "list"]).failed(1, &["redis.url is not set"]);
    for (arguments, text) in [
        (&["deny", "add", "--key", &id][..], "--for"),
        (&["deny", "add", "--for", "1h"], "--stdin"),
        (&["deny", "add", "--key", &id, "--trust", &id, "--for", "1h"], "cannot be used with"),
        (&["deny", "add", "--trust", "acme", "--for", "1h"], "expected the UUID of a trust"),
        (&["deny", "add", "--digest", "hunter2", "--for", "1h"], "64 hexadecimal digits"),
        (&["deny", "remove"], "--stdin"),
    ] {
        place.run(arguments).failed(2, &[text]);
    }
}

#[test]
fn serve_and_config_check_report_a_deny_file_that_is_missing_or_invalid() {
    let place = Place::new().with("TRUSTGATE__FRESHNESS__DENY_FILE", "deny");
    let setting = "freshness.deny_file: cannot read deny: ";
    place.run(&["serve"]).failed(1, &[&format!("{setting}No such file")]);
    place.write("deny", "# nothing yet\nkey acme\n");
    let checked = place.run(&["config", "check"]);
    assert!(checked.code == 1 && checked.out.contains(&format!("{setting}line 2: expected")), "{checked:?}");
    place.write("deny", &format!("key {}\n", Uuid::from_u128(7)));
    place.run(&["config", "check"]).done();
}
