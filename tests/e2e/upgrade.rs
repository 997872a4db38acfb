//! Upgrades the tables of an earlier build under load. Servers from the earlier build keep running on the upgraded
//! tables, also alongside servers from this build. Then the test returns to the earlier build. `make upgrade OLD=...`
//! compiles the earlier build and runs this test.

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

/// A load generator that sends checks to one server, one at a time.
struct Load {
    stop: Arc<AtomicBool>,
    checks: Arc<AtomicU64>,
    /// The task that sends the checks. It returns the wrong answers.
    task: JoinHandle<Vec<String>>,
}

impl Load {
    /// Starts checking `good` keys, which must be granted, and `revoked` and unknown keys, which must be denied.
    async fn on(name: &'static str, server: &Server, good: Vec<IssuedKey>, revoked: Vec<IssuedKey>) -> Self {
        let client = CheckClient::connect(server.grpc()).await;
        let (stop, checks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&checks));
        let task = tokio::spawn(async move {
            let mut wrong = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                for key in &good {
                    let verdict = client.check(&key.key).await;
                    if (verdict.status, verdict.trust_id.as_ref()) != (200, Some(&key.trust_id)) {
                        wrong.push(format!("{name}: a valid key: {verdict:?}"));
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
        Self { stop, checks, task }
    }

    /// Waits until `more` further checks have been answered.
    async fn wait_for(&self, more: u64) {
        let target = self.checks.load(Ordering::Relaxed) + more;
        while self.checks.load(Ordering::Relaxed) < target {
            tokio::task::yield_now().await;
        }
    }

    /// Ends the load and returns the number of checks. Panics if an answer was wrong.
    async fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let wrong = self.task.await.unwrap();
        assert!(wrong.is_empty(), "{} wrong answers, the first: {}", wrong.len(), wrong[0]);
        self.checks.load(Ordering::Relaxed)
    }
}

/// Issues keys for the trust "acme"; returns the valid keys and the revoked keys.
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

/// The minimum number of checks for which each step waits.
const CHECKS: u64 = 3_000;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an earlier build: make upgrade OLD=..."]
async fn an_upgrade_under_load_and_a_downgrade_cause_no_wrong_answer() {
    let _turn = shared().await;
    let old_program: PathBuf = std::env::var_os("TRUSTGATE_OLD").expect("run `make upgrade OLD=...`").into();
    let postgres = Postgres::start().await;
    let database = postgres.database().await;
    postgres.execute(&database, "CREATE ROLE trustgate_serve LOGIN; CREATE ROLE trustgate_manage LOGIN").await;
    let test_config = |user: &str| {
        TestConfig::new()
            .with_long_deadlines()
            .with("store.url", postgres.url(user, &database))
            .with("credential.pepper", "a pepper of more than 16 bytes")
    };
    let old = |user: &str| test_config(user).run_by(&old_program);
    // Grant the roles the privileges that the earlier build prints. The upgrade must need no other privileges.
    old("admin").migrate().await;
    let grants = old("admin").run(&["migrate", "--print-grants"]).await.out;
    postgres.execute(&database, &grants).await;
    let (manage_old, manage_new) = (old("trustgate_manage"), test_config("trustgate_manage"));
    manage_old.trust("acme").await;
    let (mut good, mut revoked) = keys(&manage_old).await;
    let mut checks = 0;

    // Servers from the earlier build run first on the tables of that build, and then on the upgraded tables.
    let (first, second) = (old("trustgate_serve").serve().await, old("trustgate_serve").serve().await);
    let loads = [
        Load::on("old", &first, good.clone(), revoked.clone()).await,
        Load::on("old", &second, good.clone(), revoked.clone()).await,
    ];
    loads[0].wait_for(CHECKS).await;
    test_config("admin").migrate().await;
    loads[0].wait_for(CHECKS).await;
    let [load, other] = loads;
    checks += load.end().await + other.end().await;

    // The commands of both builds change keys, and a server from this build runs alongside one from the earlier build.
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
    loads[1].wait_for(2 * CHECKS).await;
    let [load, other] = loads;
    checks += load.end().await + other.end().await;

    // Return to the earlier build, and run its `migrate`.
    drop((first, new));
    old("admin").migrate().await;
    revoked.push(good.remove(0));
    manage_old.revoke(revoked.last().unwrap()).await;
    good.push(manage_old.issue("acme", &[]).await);
    let back = old("trustgate_serve").serve().await;
    let load = Load::on("old again", &back, good.clone(), revoked.clone()).await;
    load.wait_for(CHECKS).await;
    checks += load.end().await;

    // Upgrade to this build once more.
    drop(back);
    test_config("admin").migrate().await;
    let new = test_config("trustgate_serve").serve().await;
    let load = Load::on("new again", &new, good.clone(), revoked.clone()).await;
    load.wait_for(CHECKS).await;
    checks += load.end().await;
    let pepper_of_all = async || {
        let keys = manage_new.json(&["key", "list", "--pepper", "current"]).await;
        keys.as_array().unwrap().iter().filter(|key| key["state"] == "active").count() == good.len()
    };
    eventually("the pepper of each active key is recorded", Duration::from_secs(30), pepper_of_all).await;
    println!("{checks} checks, 0 wrong answers, 0 faults");
}
