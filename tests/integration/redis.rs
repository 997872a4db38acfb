//! Tests L2 and notifications with real Redis servers: which values Redis keeps, which values a reader deletes, and
//! single servers, Sentinels, a Cluster and TLS.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use redis::{AsyncCommands as _, aio::MultiplexedConnection};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use trustgate::testing::{
    base::{
        clock::{Clock as _, DatabaseTime, SystemClock},
        metrics::{IntGauge, Registry},
        secret::Secret,
    },
    cache::{
        api_key::ApiKey,
        l2::{L2, L2Lookup, MacKey},
    },
    record::{ApiKeyDigest, KeyId, Lineage, Nonce, Record, TrustId, Version, Versioned},
    redis::{Redis as Handle, RedisMetrics, RedisSettings, listen},
};
use uuid::Uuid;

use crate::support::{
    eventually,
    redis::{Cluster, MASTER, Redis, SENTINEL_PASSWORD, SentinelSetup, USER},
};

/// The maximum time that a test waits for a condition.
const TIMEOUT: Duration = Duration::from_mins(1);

/// The part of a replica that uses Redis.
struct Replica {
    l2: L2<ApiKey>,
    handle: Handle,
    notifications: Arc<AtomicUsize>,
    breaker_open: IntGauge,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Replica {
    /// Starts a replica and waits until it is connected to Redis.
    async fn start(settings: RedisSettings) -> Self {
        let breaker_open = IntGauge::new("breaker_open", "1 while the circuit breaker is open.").unwrap();
        let metrics = RedisMetrics::register(&Registry::new(), breaker_open.clone()).unwrap();
        let (stop, notifications, mut tasks) =
            (CancellationToken::new(), Arc::new(AtomicUsize::new(0)), JoinSet::new());
        let (handle, keeper) = Handle::new(&settings, settings.clone(), Arc::new(SystemClock), metrics, stop.clone());
        tasks.spawn(keeper);
        let counter = Arc::clone(&notifications);
        let on_notification = move || {
            counter.fetch_add(1, Ordering::SeqCst);
        };
        tasks.spawn(listen(settings, on_notification, stop.clone()));
        let l2 = L2::new(handle.clone(), MacKey::new(OnceLock::from([7; 32])), None);
        let replica = Self { l2, handle, notifications, breaker_open, stop, tasks };
        replica.connected().await;
        eventually("the listener is connected", TIMEOUT, || async { replica.received() > 0 }).await;
        replica
    }

    /// Waits until L2 answers.
    async fn connected(&self) {
        eventually("Redis is connected", TIMEOUT, || async { self.get(key(0xffff)).await != "down" }).await;
    }

    async fn put(&self, found: Versioned<Record>) {
        self.l2.put(&found.value.digest, &found.as_ref(), Duration::from_mins(5)).await;
    }

    async fn get(&self, key: ApiKeyDigest) -> String {
        match self.l2.get(&key, SystemClock.now()).await {
            L2Lookup::Found(found) => format!("{:x} of {}", found.as_of.0, found.lineage.timeline),
            L2Lookup::Absent => "absent".to_owned(),
            L2Lookup::Refused => "refused".to_owned(),
            L2Lookup::Down => "down".to_owned(),
        }
    }

    /// Returns the number of notifications so far. Each new listener connection also counts as a notification.
    fn received(&self) -> usize {
        self.notifications.load(Ordering::SeqCst)
    }

    /// Stops the replica and waits until its tasks have ended.
    async fn stop(mut self) {
        self.stop.cancel();
        let ended = async { while self.tasks.join_next().await.transpose().unwrap().is_some() {} };
        tokio::time::timeout(TIMEOUT, ended).await.expect("the tasks end after the stop signal");
    }
}

fn settings(url: impl Into<String>) -> RedisSettings {
    let url = vec![Secret::new(url.into())];
    // Set a long timeout, so that a busy machine does not cause timeouts that open the circuit breaker. No test in this
    // file measures the timeout.
    RedisSettings { url, timeout: Duration::from_secs(5), ..RedisSettings::default() }
}

/// Returns settings with the password of [`USER`] and TLS.
fn secured(redis: &Redis) -> RedisSettings {
    let password = Some(Secret::new(USER.1.to_owned()));
    RedisSettings { password, ca_file: Some(redis.ca_file()), ..settings(redis.url()) }
}

fn key(number: u16) -> ApiKeyDigest {
    let mut bytes = [0; 32];
    bytes[..2].copy_from_slice(&number.to_be_bytes());
    ApiKeyDigest::from_bytes(bytes)
}

/// Returns the name under which Redis stores the value of `key`.
fn name(key: ApiKeyDigest) -> String {
    format!("trustgate:api_key:{}", key.to_hex())
}

/// Returns a record of `key` that was read at version `as_of`, in a lineage with this timeline.
fn found(key: ApiKeyDigest, as_of: u64, timeline: u32) -> Versioned<Record> {
    let record = Record {
        key_id: KeyId(Uuid::from_u128(1)),
        trust_id: TrustId(Uuid::from_u128(2)),
        trust_enabled: true,
        digest: key,
        scopes: ["read".into()].into(),
        allowed_cidrs: [].into(),
        not_before: None,
        expires_at: None,
        revoked_at: None,
    };
    Versioned {
        value: record,
        as_of: Version(as_of),
        nonce: Nonce([9; 16]),
        lineage: Lineage { incarnation: Uuid::from_u128(3), system: 4, timeline },
        read_at: DatabaseTime::from_micros(11),
        sent_at: SystemClock.now(),
    }
}

async fn raw(connection: &mut MultiplexedConnection, key: ApiKeyDigest) -> Option<Vec<u8>> {
    connection.get(name(key)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_newer_version_or_a_different_lineage_replaces_a_value_in_redis() {
    let server = Redis::start().await;
    for (number, protocol) in ["", "?protocol=resp2", "?protocol=resp3"].into_iter().enumerate() {
        let (replica, key) =
            (Replica::start(settings(server.url() + protocol)).await, key(u16::try_from(number).unwrap()));
        let mut connection = server.connection().await;
        assert_eq!(replica.get(key).await, "absent");
        for (as_of, timeline, want) in [
            (9, 1, "9 of 1"),
            (8, 1, "9 of 1"), // older
            (0xa, 1, "a of 1"),
            (0x10, 1, "10 of 1"), // one digit more
            (0xf, 1, "10 of 1"),
            (1 << 53, 1, "20000000000000 of 1"),
            ((1 << 53) + 1, 1, "20000000000001 of 1"), // a Lua number cannot represent the difference
            (1 << 53, 1, "20000000000001 of 1"),
            (1, 2, "1 of 2"), // a different lineage
            (u64::MAX, 2, "ffffffffffffffff of 2"),
            (3, 1, "3 of 1"),
        ] {
            replica.put(found(key, as_of, timeline)).await;
            assert_eq!(replica.get(key).await, want, "after {as_of:x} of {timeline} by {protocol:?}");
        }
        // A value with the same version replaces neither the stored bytes nor their time to live.
        let before = raw(&mut connection, key).await.unwrap();
        assert_eq!((before[0], &before[61..77]), (2, &b"0000000000000003"[..]));
        let ttl: u64 = connection.pttl::<_, i64>(name(key)).await.unwrap().try_into().unwrap();
        assert!((1..=300_000).contains(&ttl), "{ttl} ms");
        connection.pexpire::<_, ()>(name(key), 200_000).await.unwrap();
        replica.put(found(key, 3, 1)).await;
        assert_eq!(raw(&mut connection, key).await.unwrap(), before);
        assert!(connection.pttl::<_, i64>(name(key)).await.unwrap() <= 200_000);
        // A write replaces a value that has a different layout, and bytes that are not a valid value, regardless of the
        // version in them.
        for other in [[&[1], &before[1..]].concat(), [&[3], &before[1..]].concat(), before[..60].to_vec(), vec![]] {
            connection.set::<_, _, ()>(name(key), other).await.unwrap();
            replica.put(found(key, 2, 1)).await;
            assert_eq!(replica.get(key).await, "2 of 1");
        }
        connection.del::<_, ()>(name(key)).await.unwrap();
        connection.lpush::<_, _, ()>(name(key), "x").await.unwrap();
        replica.put(found(key, 1, 1)).await;
        assert_eq!(replica.get(key).await, "1 of 1");
        // After the server has lost the script, the replica sends the script again.
        server.ask::<()>(&["SCRIPT", "FLUSH"]).await;
        replica.put(found(key, 2, 1)).await;
        assert_eq!(replica.get(key).await, "2 of 1");
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_values_are_deleted_and_values_of_other_releases_are_kept() {
    let server = Redis::start().await;
    let replica = Replica::start(settings(server.url())).await;
    let (key, mut connection) = (key(1), server.connection().await);
    replica.put(found(key, 7, 1)).await;
    let genuine = raw(&mut connection, key).await.unwrap();

    let newest = [&genuine[..61], b"ffffffffffffffff", &genuine[77..]].concat();
    let mut huge = genuine.clone();
    huge.resize(1 << 20, 0);
    for (what, value) in [
        ("a changed bit", genuine.iter().enumerate().map(|(at, byte)| byte ^ u8::from(at == 100)).collect()),
        ("a version that the MAC does not cover", newest),
        ("half of the value", genuine[..genuine.len() / 2].to_vec()),
        ("only the layout", vec![2]),
        ("a megabyte", huge),
    ] {
        connection.set::<_, _, ()>(name(key), value).await.unwrap();
        assert_eq!(replica.get(key).await, "refused", "{what}");
        assert_eq!(raw(&mut connection, key).await, None, "{what} was not deleted");
    }
    // A value with a different Redis type, such as a list, is invalid, but does not count as a Redis failure.
    for _ in 0..RedisSettings::default().breaker_failures * 2 {
        connection.lpush::<_, _, ()>(name(key), &genuine).await.unwrap();
        assert_eq!(replica.get(key).await, "refused");
        assert!(!connection.exists::<_, bool>(name(key)).await.unwrap(), "the list was not deleted");
    }
    assert_eq!(replica.breaker_open.get(), 0);
    // Values with a different layout are kept, because another release may be able to read them.
    for layout in [1, 3, b'{'] {
        let other = [&[layout], &genuine[1..]].concat();
        connection.set::<_, _, ()>(name(key), &other).await.unwrap();
        assert_eq!(replica.get(key).await, "absent");
        assert_eq!(raw(&mut connection, key).await, Some(other));
    }
    connection.set::<_, _, ()>(name(key), &genuine).await.unwrap();
    assert_eq!(replica.get(key).await, "7 of 1");
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valid_value_that_replaced_an_invalid_value_is_not_deleted() {
    let server = Redis::start().await;
    let mut connection = server.connection().await;
    // A reader runs this script after it has read the invalid value `bad`.
    let discard = redis::Script::new(include_str!("../../src/cache/l2/discard.lua"));
    let mut left_after = async |stored: &[u8], bad: &[u8], bytes_read: usize| -> Option<Vec<u8>> {
        connection.set::<_, _, ()>("name", stored).await.unwrap();
        let mut call = discard.key("name");
        call.arg(bad).arg(bytes_read).invoke_async::<()>(&mut connection).await.unwrap();
        connection.get("name").await.unwrap()
    };
    assert_eq!(left_after(b"bad", b"bad", 10).await, None);
    assert_eq!(left_after(b"good", b"bad", 10).await, Some(b"good".to_vec()));
    assert_eq!(left_after(b"long and bad", b"long", 4).await, None, "only the bytes that were read are compared");
    assert_eq!(left_after(b"in place of a list", b"", 10).await, Some(b"in place of a list".to_vec()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_redis_permissions_are_sufficient() {
    let server = Redis::start_secured().await;
    for protocol in ["", "?protocol=resp3"] {
        let mut settings = secured(&server);
        settings.url = vec![Secret::new(server.url() + protocol)];
        let (one, other) = (Replica::start(settings.clone()).await, Replica::start(settings).await);
        everything_works(&one, &other, 1).await;
        server.ask::<()>(&["SET", &name(key(1)), "\u{2}bad"]).await;
        assert_eq!(one.get(key(1)).await, "refused");
        assert_eq!(one.get(key(1)).await, "absent");
        one.stop().await;
        other.stop().await;
    }
}

/// Asserts that `other` reads the values that `one` writes, and that a notification from either replica reaches both.
async fn everything_works(one: &Replica, other: &Replica, keys: u16) {
    for number in 1..=keys {
        let key = key(number);
        // Retry, because a Cluster that has just recovered sometimes still reports that it is down.
        eventually("the value is shared", TIMEOUT, || async {
            one.put(found(key, 7, 1)).await;
            one.put(found(key, 6, 1)).await;
            other.get(key).await == "7 of 1"
        })
        .await;
    }
    for from in [one, other] {
        let before = [one.received(), other.received()];
        from.handle.publish();
        eventually("both receive the notification", TIMEOUT, || async {
            one.received() > before[0] && other.received() > before[1]
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_notification_arrives_once_and_the_listener_reconnects() {
    let mut server = Redis::start().await;
    for protocol in ["", "?protocol=resp3"] {
        let replica = Replica::start(settings(server.url() + protocol)).await;
        assert_eq!(replica.received(), 1, "one for the connection");
        let mut connection = server.connection().await;
        for (number, content) in ["", "12", "{}", "\0"].into_iter().enumerate() {
            connection.publish::<_, _, ()>("trustgate:hints", content).await.unwrap();
            connection.publish::<_, _, ()>("trustgate:other", content).await.unwrap();
            eventually("the notification arrives", TIMEOUT, || async { replica.received() >= number + 2 }).await;
        }
        assert_eq!(replica.received(), 5);
        server.kill();
        replica.handle.publish(); // this notification is lost, but the call does not block
        server.resume().await;
        eventually("the listener is back", TIMEOUT, || async { replica.received() == 6 }).await;
        replica.connected().await;
        replica.handle.publish();
        eventually("the notification arrives", TIMEOUT, || async { replica.received() == 7 }).await;
        // The server hangs but keeps its connections open. The listener detects this within 2 s, because it sends a
        // PING every second and waits up to 1 s for the reply.
        let frozen = server.freeze();
        eventually("Redis counts as down", TIMEOUT, || async { replica.get(key(1)).await == "down" }).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        drop(frozen);
        eventually("the listener is back", TIMEOUT, || async { replica.received() == 8 }).await;
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_find_the_new_master_after_a_sentinel_failover() {
    for with_tls in [false, true] {
        let mut setup = SentinelSetup::start(with_tls).await;
        let sentinel = &setup.sentinel;
        let base = if with_tls { secured(sentinel) } else { settings(sentinel.url()) };
        let password = with_tls.then(|| Secret::new(SENTINEL_PASSWORD.to_owned()));
        let dead = if with_tls { "rediss://gate@127.0.0.1:1" } else { "redis://127.0.0.1:1" };
        let settings = RedisSettings {
            // Nothing listens at the first URL.
            url: [dead.to_owned(), sentinel.url()].map(Secret::new).to_vec(),
            sentinel_master: Some(MASTER.to_owned()),
            sentinel_password: password,
            ..base
        };
        let (one, other) = (Replica::start(settings.clone()).await, Replica::start(settings).await);
        everything_works(&one, &other, 3).await;
        let before = [one.received(), other.received()];
        setup.master.kill();
        setup.failed_over().await;
        for (replica, before) in [&one, &other].into_iter().zip(before) {
            replica.connected().await;
            eventually("the listener is back", TIMEOUT, || async { replica.received() > before }).await;
        }
        everything_works(&one, &other, 3).await;
        let mut connection = setup.replica.connection().await;
        assert!(connection.exists::<_, bool>(name(key(3))).await.unwrap());
        one.stop().await;
        other.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_use_every_node_of_a_cluster_and_follow_moved_slots() {
    for with_tls in [false, true] {
        let mut cluster = Cluster::start(with_tls).await;
        let first = &cluster.nodes[0];
        let base = if with_tls { secured(first) } else { settings(first.url()) };
        let urls = cluster.nodes.iter().map(|node| Secret::new(node.url())).collect();
        // `one` has the URLs of all nodes, and `other` finds the nodes through the first node.
        let one = RedisSettings { url: urls, cluster: true, ..base.clone() };
        let other = RedisSettings { cluster: true, ..base };
        let (one, other) = (Replica::start(one).await, Replica::start(other).await);
        everything_works(&one, &other, 20).await;
        let mut used = BTreeSet::new();
        for number in 1..=20 {
            used.insert(cluster.node_of(&name(key(number))).await.0.url());
        }
        assert_eq!(used.len(), 3, "too few keys");

        move_slot_of(&cluster, key(1), (&one, &other)).await;
        everything_works(&one, &other, 20).await;

        // A node stops and restarts without its data. The Cluster is down until the node has restarted.
        cluster.nodes[2].kill();
        eventually("the Cluster counts as down", TIMEOUT, || async { one.get(key(2)).await == "down" }).await;
        cluster.nodes[2].resume().await;
        cluster.until_ready().await;
        one.connected().await;
        other.connected().await;
        everything_works(&one, &other, 20).await;

        // A node hangs, and the listener reconnects through another node.
        let before = one.received();
        let frozen = cluster.nodes[0].freeze();
        eventually("the listener is back", TIMEOUT, || async { one.received() > before }).await;
        eventually("the Cluster counts as down", TIMEOUT, || async { one.get(key(2)).await == "down" }).await;
        drop(frozen);
        cluster.until_ready().await;
        one.connected().await;
        other.connected().await;
        everything_works(&one, &other, 20).await;
        one.stop().await;
        other.stop().await;
    }
}

/// Moves the slot of `key` to another node step by step: the old node first answers `ASK` and then `MOVED`.
async fn move_slot_of(cluster: &Cluster, key: ApiKeyDigest, (one, other): (&Replica, &Replica)) {
    let name = name(key);
    let (from, to) = cluster.node_of(&name).await;
    let slot: u16 = from.ask(&["CLUSTER", "KEYSLOT", &name]).await;
    let slot = slot.to_string();
    let (from_id, to_id): (String, String) = (from.ask(&["CLUSTER", "MYID"]).await, to.ask(&["CLUSTER", "MYID"]).await);
    to.ask::<()>(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &from_id]).await;
    from.ask::<()>(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &to_id]).await;
    from.ask::<()>(&["DEL", &name]).await;
    one.put(found(key, 8, 1)).await; // the client follows ASK
    assert_eq!(other.get(key).await, "8 of 1");
    let at_home = redis::cmd("GET").arg(&name).query_async::<()>(&mut from.connection().await).await;
    assert_eq!(at_home.unwrap_err().code(), Some("ASK"));
    for node in [to, from] {
        node.ask::<()>(&["CLUSTER", "SETSLOT", &slot, "NODE", &to_id]).await;
    }
    assert_eq!(one.get(key).await, "8 of 1"); // the client follows MOVED
    one.put(found(key, 9, 1)).await;
    assert_eq!(other.get(key).await, "9 of 1");
    // Delete the value, because the rest of the test writes older versions.
    to.ask::<()>(&["DEL", &name]).await;
}
