//! Connections to PostgreSQL have `TCP_NODELAY` set, so that a small message does not wait for the acknowledgement of
//! the previous one. A connect with TLS therefore takes only slightly longer than a connect without TLS.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use rustix::{
    net::{getpeername, sockopt::tcp_nodelay},
    process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open},
};
use tokio::time::Instant;
use trustgate::testing::{
    base::{clock::SystemClock, secret::Secret},
    store::{self, Source, StoreSettings},
};

use crate::support::{certificates::certificates, exclusive, postgres::Postgres};

/// The number of connects with TLS, and also the number of connects without TLS.
const ROUNDS: usize = 20;
/// The maximum additional time of a connect with TLS: enough for a handshake, but less than a delayed acknowledgement
/// (40 ms).
const TLS_MAX: Duration = Duration::from_millis(20);

fn open(url: &str) -> Arc<dyn Source> {
    let settings = StoreSettings { url: Some(Secret::new(url.to_owned())), ..StoreSettings::default() };
    store::open_lookup(&settings, &|_| None, Arc::new(SystemClock)).unwrap()
}

/// Returns how long a poll takes, including the connect before it.
async fn connect(url: &str) -> Duration {
    let source = open(url);
    let began = Instant::now();
    source.poll(None).await.unwrap();
    let took = began.elapsed();
    source.close().await;
    took
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Returns, for each TCP connection of this process to `port`, whether `TCP_NODELAY` is set.
fn nodelay(port: u16) -> Vec<bool> {
    let process = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    let numbers = std::fs::read_dir("/proc/self/fd").unwrap();
    let numbers = numbers.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    // `pidfd_getfd` duplicates a descriptor. It fails if the descriptor was closed in the meantime, so skip such
    // descriptors.
    let sockets = numbers.filter_map(|number| pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).ok());
    let connected = sockets.filter(|socket| {
        let peer = getpeername(socket).ok().flatten().and_then(|peer| SocketAddr::try_from(peer).ok());
        peer.is_some_and(|peer| peer.port() == port)
    });
    connected.map(|socket| tcp_nodelay(socket).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_connects_take_at_most_20_ms_longer_than_plain_connects() {
    let _turn = exclusive().await;
    let postgres = Postgres::start().await;
    let certificates = certificates();
    postgres.turn_on_tls(certificates.path()).await;
    let database = postgres.database().await;
    postgres.execute(&database, "CREATE ROLE serve LOGIN SUPERUSER PASSWORD 'secret'").await;
    let plain = postgres.tcp_url("serve", &database).replace("serve@", "serve:secret@");
    let ca = certificates.path().join("ca.pem").display().to_string();
    let tls = plain.replace("sslmode=disable", &format!("sslmode=verify-full&sslrootcert={ca}"));
    let settings = StoreSettings { url: Some(Secret::new(plain.clone())), ..StoreSettings::default() };
    store::migrate(&settings, &|_| None).await.unwrap();

    for url in [&plain, &tls] {
        let source = open(url);
        source.poll(None).await.unwrap();
        assert_eq!(nodelay(postgres.port()), [true], "{}", if url == &tls { "TLS" } else { "plain" });
        source.close().await;
    }
    let encrypted: bool = {
        use sqlx::Connection as _;
        let mut connection = sqlx::PgConnection::connect(&tls).await.unwrap();
        let sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
        sqlx::query_scalar(sql).fetch_one(&mut connection).await.unwrap()
    };
    assert!(encrypted, "the TLS URL connects without TLS");

    let (mut plain_times, mut tls_times) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        plain_times.push(connect(&plain).await);
        tls_times.push(connect(&tls).await);
    }
    let (plain, tls) = (median(plain_times), median(tls_times));
    println!("median of {ROUNDS} connects with a poll: plain {plain:?}, TLS {tls:?}");
    assert!(tls <= plain + TLS_MAX, "plain {plain:?}, TLS {tls:?}");
}
