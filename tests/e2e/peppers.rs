//! A server with another pepper than the one that keys are made under rejects no valid key: it is not ready, and says why.

use std::{path::Path, time::Duration};

use serde_json::Value;

use crate::support::{
    eventually,
    grpc::CheckClient,
    http,
    postgres::Postgres,
    server::{IssuedKey, Server, TestConfig, made_up_key},
    shared,
};

const PATIENCE: Duration = Duration::from_secs(30);

/// A database, and files with peppers.
struct Peppers {
    postgres: Option<Postgres>,
    database: String,
    files: tempfile::TempDir,
}

impl Peppers {
    async fn on_postgres() -> Self {
        let postgres = Postgres::start().await;
        let database = postgres.database().await;
        Self { database, postgres: Some(postgres), files: tempfile::tempdir().unwrap() }
    }

    fn on_sqlite() -> Self {
        Self { database: String::new(), postgres: None, files: tempfile::tempdir().unwrap() }
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.files.path().join(name)
    }

    fn write(&self, name: &str, pepper: &str) {
        std::fs::write(self.file(name), pepper.repeat(8)).unwrap();
    }

    /// Settings with the pepper `current`, and the others before it; `None`: without a pepper.
    fn test_config(&self, current: Option<&str>, previous: &[&str]) -> TestConfig {
        let url = match &self.postgres {
            Some(postgres) => postgres.url("admin", &self.database),
            None => format!("sqlite://{}", self.file("trustgate.db").display()),
        };
        let mut test_config = TestConfig::new().unhurried().with("store.url", url);
        for name in previous.iter().chain(&current) {
            self.write(name, name);
        }
        if let Some(current) = current {
            test_config.set("credential.pepper_file", self.file(current).display().to_string());
        }
        if !previous.is_empty() {
            let previous: Vec<_> = previous.iter().map(|name| self.file(name).display().to_string()).collect();
            test_config.set("credential.previous_pepper_files", previous.join(","));
        }
        test_config
    }

    /// Does to the keys what an upgrade finds: no pepper is recorded.
    async fn forget(&self) {
        let forget = |schema: &str| {
            format!(
                "UPDATE {schema}api_key SET pepper_fingerprint = NULL;
                 UPDATE {schema}meta SET pepper_fingerprint = NULL, previous_pepper_fingerprint = NULL"
            )
        };
        match &self.postgres {
            Some(postgres) => postgres.execute(&self.database, &forget("trustgate.")).await,
            None => sqlite(&self.file("trustgate.db"), &forget("")).await,
        }
    }
}

async fn sqlite(path: &Path, sql: &str) {
    use sqlx::Connection as _;
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
    let mut connection = sqlx::SqliteConnection::connect_with(&options).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned())).execute(&mut connection).await.unwrap();
}

/// The fingerprint that is recorded with a key.
async fn pepper(test_config: &TestConfig, key: &IssuedKey) -> Option<String> {
    let shown: Value = test_config.json(&["key", "show", &key.id]).await;
    shown["pepper"].as_str().map(str::to_owned)
}

async fn is_granted(server: &Server, key: &IssuedKey) -> bool {
    let verdict = CheckClient::connect(server.grpc()).await.check(&key.key).await;
    assert!(verdict.status != 200 || verdict.trust_id.as_ref() == Some(&key.trust_id), "{verdict:?}");
    verdict.status == 200
}

async fn status(server: &Server, key: &str) -> u16 {
    CheckClient::connect(server.grpc()).await.check(key).await.status
}

#[tokio::test(flavor = "multi_thread")]
async fn with_another_pepper_a_server_is_not_ready_and_rejects_nobody() {
    let _turn = shared().await;
    for peppers in [Peppers::on_postgres().await, Peppers::on_sqlite()] {
        let old = peppers.test_config(Some("old-pepper"), &[]);
        old.migrate().await;
        old.trust("acme").await;
        let first = old.issue("acme", &[]).await;
        let recorded = pepper(&old, &first).await.expect("recorded");
        let server = old.serve().await;
        assert!(is_granted(&server, &first).await);
        assert_eq!(status(&server, &made_up_key()).await, 401);

        // Another pepper, and none.
        for current in [Some("new-pepper"), None] {
            let wrong = peppers.test_config(current, &[]);
            let other = wrong.listening().await;
            other.until_logged("does not have the pepper recorded in the database").await;
            let log = other.log();
            assert!(log.contains(&format!("\"recorded\":\"{recorded}\"")), "{log}");
            assert!(!log.contains("pepper-pepper") && !log.contains("old-pepperold"), "a pepper is in the log");
            let readiness = other.readiness().await;
            assert_eq!(readiness.status, 503, "{}", readiness.body);
            assert!(readiness.body.contains("pepper: mismatch with the database"), "{}", readiness.body);
            assert_eq!(status(&other, &first.key).await, 503);
            assert_eq!(status(&other, &made_up_key()).await, 503);
            assert!(other.metric("trustgate_pepper_fits").await < 0.5);
            let refused = wrong.run(&["key", "issue", "--trust", "acme"]).await;
            assert_eq!(refused.code, 1, "{refused:?}");
            assert!(refused.err.contains(&recorded) && refused.err.contains("trustgate pepper use"), "{refused:?}");
            let doctor = wrong.run(&["--output", "json", "doctor"]).await;
            assert_eq!(doctor.code, 1);
            assert!(doctor.out.contains("the database records the pepper"), "{doctor:?}");
        }

        // The change that the README describes.
        let new = peppers.test_config(Some("new-pepper"), &["old-pepper"]);
        let changed = new.serve().await;
        assert!(is_granted(&changed, &first).await);
        assert!(new.run(&["key", "issue", "--trust", "acme"]).await.err.contains("pepper use"));
        let waiting = peppers.test_config(Some("new-pepper"), &[]).listening().await;
        waiting.until_logged("pepper mismatch").await;
        let used = new.json(&["pepper", "use"]).await;
        assert_eq!(used["before"].as_str(), Some(&*recorded));
        let second = new.issue("acme", &[]).await;
        assert_eq!(pepper(&new, &second).await.as_deref(), used["pepper"].as_str());
        assert!(is_granted(&changed, &first).await && is_granted(&changed, &second).await);
        // Found at a poll: neither needs a restart.
        waiting.until_ready().await;
        assert!(is_granted(&waiting, &second).await);
        waiting.until_logged("this server does not have, so it cannot grant them").await;
        assert!((waiting.metric("trustgate_other_pepper_keys").await - 1.0).abs() < 0.5);
        assert_eq!(server.readiness().await.status, 200, "it has the pepper before");
        server.until_logged("this server does not have, so it cannot grant them").await;
        // A key that it does not find may be a new one.
        assert_eq!(status(&server, &second.key).await, 503);
        assert!(is_granted(&server, &first).await);
        assert!(old.run(&["key", "issue", "--trust", "acme"]).await.err.contains("pepper use"));
        for (test_config, filter, expected) in [
            (&new, "current", vec![&second]),
            (&new, "previous", vec![&first]),
            (&new, &*recorded, vec![&first]),
            (&old, "unknown", vec![&second]),
            (&new, "unknown", vec![]),
            (&new, "unrecorded", vec![]),
        ] {
            let listed = test_config.json(&["key", "list", "--pepper", filter]).await;
            let listed: Vec<_> = listed.as_array().unwrap().iter().map(|key| key["id"].as_str().unwrap()).collect();
            assert_eq!(listed, expected.iter().map(|key| &*key.id).collect::<Vec<_>>(), "{filter}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_records_the_pepper_of_keys_from_before_an_upgrade() {
    let _turn = shared().await;
    for peppers in [Peppers::on_postgres().await, Peppers::on_sqlite()] {
        let test_config = peppers.test_config(Some("a-pepper"), &[]);
        test_config.migrate().await;
        test_config.trust("acme").await;
        let (used, unused) = (test_config.issue("acme", &[]).await, test_config.issue("acme", &[]).await);
        let recorded = pepper(&test_config, &used).await;
        peppers.forget().await;
        let server = test_config.serve().await;
        assert!(is_granted(&server, &used).await);
        let version = server.metric("trustgate_applied_version").await;
        eventually("the pepper of the key", PATIENCE, || async { pepper(&test_config, &used).await == recorded }).await;
        assert_eq!(pepper(&test_config, &unused).await, None, "no check has proven it");
        // The server recorded its pepper for the database as well, so a command with another one cannot.
        let wrong = peppers.test_config(Some("another-pepper"), &[]);
        assert!(wrong.run(&["key", "issue", "--trust", "acme"]).await.err.contains("pepper use"));
        test_config.issue("acme", &[]).await;
        assert!(server.metric("trustgate_applied_version").await <= version + 1.0, "recording changes no version");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pepper_file_that_changes_is_compared_and_not_used() {
    let _turn = shared().await;
    let peppers = Peppers::on_sqlite();
    let test_config = peppers.test_config(Some("a-pepper"), &[]);
    test_config.migrate().await;
    test_config.trust("acme").await;
    let key = test_config.issue("acme", &[]).await;
    let server = test_config.serve().await;
    peppers.write("a-pepper", "another-one");
    server.until_logged("would not be ready after a restart").await;
    assert_eq!(server.readiness().await.status, 200);
    assert!(is_granted(&server, &key).await);
    peppers.write("a-pepper", "a-pepper");
    server.until_logged("pepper files restored").await;
    std::fs::remove_file(peppers.file("a-pepper")).unwrap();
    server.until_logged("pepper files unreadable").await;
    assert_eq!(http::get(server.admin(), "/readyz", &[]).await.status, 200);
}
