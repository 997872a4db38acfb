//! The tables of an earlier build are upgraded under load: its servers go on with the new tables, beside new servers, and are put
//! back. `make upgrade OLD=...` builds the earlier one and runs this.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::task::JoinHandle;

use crate::support::{
    eventually,
    grpc::CheckClient,
    postgres::Postgres,
    server::{IssuedKey, Server, TestConfig, made_up_key},
    shared,
};

/// Checks on one server, one after the other, until it is stopped.
struct Load {
    ends: Arc<AtomicBool>,
    checks: Arc<AtomicU64>,
    task: JoinHandle<Vec<String>>,
}

impl Load {
    /// `good` keys must be granted, `revoked` and unknown ones denied. Keys join the load as they are issued.
    async fn on(name: &'static str, server: &Server, good: Vec<IssuedKey>, revoked: Vec<IssuedKey>) -> Self {
        let client = CheckClient::connect(server.grpc()).await;
        let (ends, checks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stop, count) = (Arc::clone(&ends), Arc::clone(&checks));
        let task = tokio::spawn(async move {
            let mut wrong = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                for key in &good {
                    let verdict = client.check(&key.key).await;
                    if (verdict.status, verdict.trust_id.as_ref()) != (200, Some(&key.trust_id)) {
                        wrong.push(format!("{name}: a good key: {verdict:?}"));
                    }
                }
                for key in &revoked {
                    let verdict = client.check(&key.key).await;
                    if verdict.status != 401 {
                        wrong.push(format!("{name}: a revoked key: {verdict:?}"));
                    }
                }
                let verdict = client.check(&made_up_key()).await;
                if verdict.status != 401 {
                    wrong.push(format!("{name}: an unknown key: {verdict:?}"));
                }
                count.fetch_add(1 + (good.len() + revoked.len()) as u64, Ordering::Relaxed);
            }
            wrong
        });
        Self { ends, checks, task }
    }

    /// Waits for `more` checks from now on.
    async fn run_until(&self, more: u64) {
        let until = self.checks.load(Ordering::Relaxed) + more;
        while self.checks.load(Ordering::Relaxed) < until {
            tokio::task::yield_now().await;
        }
    }

    /// Ends it; returns how many checks there were.
    async fn end(self) -> u64 {
        self.ends.store(true, Ordering::Relaxed);
        let wrong = self.task.await.unwrap();
        assert!(wrong.is_empty(), "{} wrong answers, the first: {}", wrong.len(), wrong[0]);
        self.checks.load(Ordering::Relaxed)
    }
}

/// Keys of acme: good ones and revoked ones.
async fn keys(test_config: &TestConfig) -> (Vec<IssuedKey>, Vec<IssuedKey>) {
    let mut good = Vec::new();
    for _ in 0..20 {
        good.push(test_config.issue("acme", &[]).await);
    }
    let revoked = good.split_off(15);
    for key in &revoked {
        test_config.revoke(key).await;
    }
    (good, revoked)
}

/// How many checks each step sees.
const CHECKS: u64 = 3_000;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an earlier build: make upgrade OLD=..."]
async fn tables_are_upgraded_under_load_and_the_earlier_build_is_put_back() {
    let _turn = shared().await;
    let old_program: PathBuf = std::env::var_os("TRUSTGATE_OLD").expect("make upgrade OLD=...").into();
    let postgres = Postgres::start().await;
    let database = postgres.database().await;
    postgres.execute(&database, "CREATE ROLE trustgate_serve LOGIN; CREATE ROLE trustgate_manage LOGIN").await;
    let test_config = |user: &str| {
        TestConfig::new()
            .unhurried()
            .with("store.url", postgres.url(user, &database))
            .with("credential.pepper", "a pepper of more than 16 bytes")
    };
    let old = |user: &str| test_config(user).run_by(&old_program);
    // The rights are those that the earlier build asks for; none is given later.
    old("admin").migrate().await;
    let grants = old("admin").run(&["migrate", "--print-grants"]).await.out;
    postgres.execute(&database, &grants).await;
    let (manage_old, manage_new) = (old("trustgate_manage"), test_config("trustgate_manage"));
    manage_old.trust("acme").await;
    let (mut good, mut revoked) = keys(&manage_old).await;
    let mut checks = 0;

    // Earlier servers, on earlier tables and on new ones.
    let (first, second) = (old("trustgate_serve").serve().await, old("trustgate_serve").serve().await);
    let loads = [
        Load::on("old", &first, good.clone(), revoked.clone()).await,
        Load::on("old", &second, good.clone(), revoked.clone()).await,
    ];
    loads[0].run_until(CHECKS).await;
    test_config("admin").migrate().await;
    loads[0].run_until(CHECKS).await;
    let [load, other] = loads;
    checks += load.end().await + other.end().await;

    // Both commands change keys, and a new server stands beside an earlier one.
    revoked.push(good.pop().unwrap());
    manage_old.revoke(revoked.last().unwrap()).await;
    revoked.push(good.pop().unwrap());
    manage_new.revoke(revoked.last().unwrap()).await;
    good.push(manage_old.issue("acme", &[]).await);
    good.push(manage_new.issue("acme", &[]).await);
    drop(second);
    let new = test_config("trustgate_serve").serve().await;
    let loads = [
        Load::on("old beside new", &first, good.clone(), revoked.clone()).await,
        Load::on("new beside old", &new, good.clone(), revoked.clone()).await,
    ];
    loads[1].run_until(2 * CHECKS).await;
    let [load, other] = loads;
    checks += load.end().await + other.end().await;

    // The earlier build is put back, `migrate` included.
    drop((first, new));
    old("admin").migrate().await;
    revoked.push(good.remove(0));
    manage_old.revoke(revoked.last().unwrap()).await;
    good.push(manage_old.issue("acme", &[]).await);
    let back = old("trustgate_serve").serve().await;
    let load = Load::on("old again", &back, good.clone(), revoked.clone()).await;
    load.run_until(CHECKS).await;
    checks += load.end().await;

    // And the new one once more.
    drop(back);
    test_config("admin").migrate().await;
    let new = test_config("trustgate_serve").serve().await;
    let load = Load::on("new again", &new, good.clone(), revoked.clone()).await;
    load.run_until(CHECKS).await;
    checks += load.end().await;
    let pepper_of_all = async || {
        let keys = manage_new.json(&["key", "list", "--pepper", "current"]).await;
        keys.as_array().unwrap().iter().filter(|key| key["state"] == "active").count() == good.len()
    };
    eventually("each key has its pepper", Duration::from_secs(30), pepper_of_all).await;
    println!("{checks} checks, 0 wrong answers, 0 faults");
}
