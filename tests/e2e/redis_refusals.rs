//! A Redis that answers but refuses commands, because it became a replica or has no memory left.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

use crate::support::{
    eventually,
    grpc::{CheckClient, granted},
    redis::Redis,
    server::{Server, TestConfig},
    shared,
};

const PATIENCE: Duration = Duration::from_secs(30);

/// Starts a forwarder that forwards new connections to the Redis at `target`. After a failover, the test sends the new
/// target's address to the channel. Open connections keep their target.
async fn forwarder(target: SocketAddr) -> (SocketAddr, watch::Sender<SocketAddr>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (target_sender, target) = watch::channel(target);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let target = *target.borrow();
            tokio::spawn(async move {
                if let Ok(mut redis) = TcpStream::connect(target).await {
                    let _ = copy_bidirectional(&mut stream, &mut redis).await;
                }
            });
        }
    });
    (address, target_sender)
}

fn address(redis: &Redis) -> SocketAddr {
    let url = redis.url();
    url.trim_start_matches("redis://").split('/').next().unwrap().parse().unwrap()
}

async fn refused(server: &Server, reason: &str) -> f64 {
    server.metric(&format!("trustgate_redis_refused_total{{reason=\"{reason}\"}}")).await
}

fn lines(server: &Server, text: &str) -> usize {
    server.log().lines().filter(|line| line.contains(text)).count()
}

async fn size(redis: &Redis) -> u64 {
    redis.ask::<u64>(&["DBSIZE"]).await
}

async fn served(url: String) -> (TestConfig, Server, CheckClient) {
    let test_config = TestConfig::new().with_long_deadlines().with("redis.url", url);
    test_config.migrate().await;
    test_config.trust("acme").await;
    let server = test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    (test_config, server, client)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_to_a_redis_that_became_a_replica_is_replaced() {
    let _turn = shared().await;
    let (old, new) = (Redis::start().await, Redis::start().await);
    let (front, target_sender) = forwarder(address(&old)).await;
    let (test_config, server, client) = served(format!("redis://{front}")).await;
    granted(&client, &test_config.issue("acme", &[]).await).await;
    eventually("the record is in Redis", PATIENCE, || async { size(&old).await == 1 }).await;

    let master = address(&new);
    old.ask::<()>(&["REPLICAOF", &master.ip().to_string(), &master.port().to_string()]).await;
    target_sender.send(master).unwrap();
    eventually("records reach the new master", PATIENCE, || async {
        granted(&client, &test_config.issue("acme", &[]).await).await;
        size(&new).await > 0
    })
    .await;
    assert!(refused(&server, "readonly").await > 0.5);
    assert_eq!(lines(&server, "redis refuses commands"), 1, "{}", server.log());
    eventually("the log reports that Redis accepts writes again", PATIENCE, || async {
        granted(&client, &test_config.issue("acme", &[]).await).await;
        lines(&server, "redis accepts writes again") == 1
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_writes_refused_for_lack_of_memory_are_counted_and_logged_once() {
    let _turn = shared().await;
    let redis = Redis::start().await;
    let (test_config, server, client) = served(redis.url()).await;
    redis.ask::<()>(&["CONFIG", "SET", "maxmemory", "1"]).await;
    for count in 1..=5 {
        granted(&client, &test_config.issue("acme", &[]).await).await;
        eventually("the refusal is counted", PATIENCE, || async { refused(&server, "oom").await >= f64::from(count) })
            .await;
    }
    assert_eq!(lines(&server, "redis refuses commands"), 1, "{}", server.log());
    // The server keeps its connection, because Redis would refuse the commands on a new connection for the same reason.
    assert_eq!(lines(&server, "redis connection established\""), 1, "{}", server.log());
    redis.ask::<()>(&["CONFIG", "SET", "maxmemory", "0"]).await;
    eventually("the log reports that Redis accepts writes again", PATIENCE, || async {
        granted(&client, &test_config.issue("acme", &[]).await).await;
        lines(&server, "redis accepts writes again") == 1
    })
    .await;
    assert!(size(&redis).await >= 1);
}
