//! Stale grants are allowed only while the database does not answer at all. A database that refuses a replica may still
//! commit revocations from other clients, so the replica must not rely on its cache for longer than the lease.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::{
    fixture::Fixture,
    support::{
        eventually,
        grpc::{CheckClient, granted},
        postgres::Postgres,
        server::Server,
        shared,
    },
};

const PATIENCE: Duration = Duration::from_secs(30);
/// The maximum time after the commit for which a revoked key may be granted: the lease (1 s) plus the deadline of a
/// check (150 ms). `freshness.stale_if_unconfirmed` must not extend this time.
const BOUND: Duration = Duration::from_millis(1_150);

/// A way in which PostgreSQL refuses a replica, with the SQLSTATE of the error.
#[derive(Clone, Copy, Debug)]
enum Refusal {
    /// 53300: the role has reached its connection limit.
    TooManyClients,
    /// 28000: `pg_hba.conf` rejects the role.
    RejectedLogin,
    /// 28000: the role has lost the right to log in.
    LoginRevoked,
    /// 28P01: the password was changed.
    ChangedPassword,
    /// 55P03: another session has locked one of trustgate's tables.
    LockedTable,
    /// 57014: another session cancels the replica's statements.
    CancelledStatement,
}

/// Keeps a refusal active. If a task has locked the table and cancels statements, dropping this value aborts the task,
/// which releases the lock.
struct RefusalGuard(Option<tokio::task::JoinHandle<()>>);

impl Drop for RefusalGuard {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl Refusal {
    const ALL: [Self; 6] = [
        Self::TooManyClients,
        Self::RejectedLogin,
        Self::LoginRevoked,
        Self::ChangedPassword,
        Self::LockedTable,
        Self::CancelledStatement,
    ];

    async fn begin(self, postgres: &Postgres, database: &str) -> RefusalGuard {
        let disconnect = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'serve'";
        match self {
            Self::TooManyClients => postgres.execute(database, "ALTER ROLE serve CONNECTION LIMIT 0").await,
            Self::LoginRevoked => postgres.execute(database, "ALTER ROLE serve NOLOGIN").await,
            Self::ChangedPassword => postgres.execute(database, "ALTER ROLE serve PASSWORD 'other'").await,
            Self::RejectedLogin => reject(postgres, true).await,
            Self::LockedTable | Self::CancelledStatement => {
                let mut locker = postgres.admin(database).await;
                let lock = "BEGIN; LOCK TABLE trustgate.meta IN ACCESS EXCLUSIVE MODE";
                sqlx::raw_sql(lock).execute(&mut locker).await.unwrap();
                let cancels = matches!(self, Self::CancelledStatement);
                return RefusalGuard(Some(tokio::spawn(async move {
                    let cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE usename = 'serve'";
                    loop {
                        if cancels {
                            sqlx::raw_sql(cancel).execute(&mut locker).await.unwrap();
                        }
                        sleep(Duration::from_millis(5)).await;
                    }
                })));
            }
        }
        postgres.execute(database, disconnect).await;
        RefusalGuard(None)
    }

    async fn end(self, postgres: &Postgres, database: &str, guard: RefusalGuard) {
        drop(guard);
        match self {
            Self::TooManyClients => postgres.execute(database, "ALTER ROLE serve CONNECTION LIMIT -1").await,
            Self::LoginRevoked => postgres.execute(database, "ALTER ROLE serve LOGIN").await,
            Self::ChangedPassword => postgres.execute(database, "ALTER ROLE serve PASSWORD 'secret'").await,
            Self::RejectedLogin => reject(postgres, false).await,
            Self::LockedTable | Self::CancelledStatement => {}
        }
    }
}

/// Adds a rule to `pg_hba.conf` that rejects the role, or removes that rule if `rejects` is false.
async fn reject(postgres: &Postgres, rejects: bool) {
    let file = postgres.directory().join("data/pg_hba.conf");
    let rule = "host all serve 127.0.0.1/32 reject\n";
    let before = std::fs::read_to_string(&file).unwrap().replace(rule, "");
    std::fs::write(&file, if rejects { format!("{rule}{before}") } else { before }).unwrap();
    postgres.execute("postgres", "SELECT pg_reload_conf()").await;
}

async fn is_fresh(server: &Server) -> bool {
    server.readiness().await.body.contains("lease: fresh")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_by_the_database_does_not_open_the_stale_window() {
    let _turn = shared().await;
    let mut fixture = Fixture::with_default_deadlines(&[("freshness.stale_if_unconfirmed", "60s")]).await;
    let roles = ["migrate", "--print-grants", "--serve-role", "serve", "--manage-role", "manage"];
    let grants = fixture.test_config.run(&roles).await.out;
    let create = "CREATE ROLE serve LOGIN PASSWORD 'secret'; CREATE ROLE manage";
    fixture.postgres.execute(&fixture.database, &format!("{create}; {grants}")).await;
    let owner = fixture.postgres.url("admin", &fixture.database);
    let url = fixture.postgres.tcp_url("serve:secret", &fixture.database);
    fixture.test_config.set("store.management_url", owner);
    fixture.test_config.set("store.url", url);
    let good = fixture.test_config.issue("acme", &[]).await;
    let server = fixture.test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    for refusal in Refusal::ALL {
        let key = fixture.test_config.issue("acme", &[]).await;
        eventually("the lease is fresh", PATIENCE, || is_fresh(&server)).await;
        granted(&client, &key).await;
        let guard = refusal.begin(&fixture.postgres, &fixture.database).await;
        let unusable = "trustgate_polls_total{outcome=\"unusable\"}";
        let before = server.metric(unusable).await;
        eventually(&format!("{refusal:?} counts as an answer"), PATIENCE, || async {
            server.metric(unusable).await > before
        })
        .await;
        let revoke = format!("UPDATE trustgate.api_key SET revoked_at = now() WHERE id = '{}'", key.id);
        fixture.postgres.execute(&fixture.database, &revoke).await;
        let revoked = Instant::now();
        sleep(BOUND).await;
        while revoked.elapsed() < BOUND + Duration::from_secs(1) {
            let status = client.check(&key.key).await.status;
            assert_ne!(status, 200, "{refusal:?}: granted {:?} after the revocation", revoked.elapsed());
            sleep(Duration::from_millis(10)).await;
        }
        refusal.end(&fixture.postgres, &fixture.database, guard).await;
        eventually("valid keys are granted again", PATIENCE, || async { client.check(&good.key).await.status == 200 })
            .await;
        eventually("the revoked key is denied", PATIENCE, || async { client.check(&key.key).await.status == 401 })
            .await;
    }
}
