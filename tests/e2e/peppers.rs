//! A server that does not have the pepper recorded in the database denies no valid key. The server reports that it is
//! not ready, logs the reason, and answers checks with 503.

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

/// A database and a directory with pepper files.
struct Peppers {
    /// The PostgreSQL server; `None` if the database is SQLite.
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

    /// Writes pepper files. Returns settings with `current` as the pepper, or without a pepper if `current` is `None`,
    /// and with `previous` as the previous peppers.
    fn test_config(&self, current: Option<&str>, previous: &[&str]) -> TestConfig {
        let url = match &self.postgres {
            Some(postgres) => postgres.url("admin", &self.database),
            None => format!("sqlite://{}", self.file("trustgate.db").display()),
        };
        let mut test_config = TestConfig::new().with_long_deadlines().with("store.url", url);
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

    /// Deletes the recorded pepper fingerprints, so that the tables look as they do after an upgrade from a release
    /// that recorded no fingerprints.
    async fn clear_recorded(&self) {
        let clear = |schema: &str| {
            format!(
                "UPDATE {schema}api_key SET pepper_fingerprint = NULL;
                 UPDATE {schema}meta SET pepper_fingerprint = NULL, previous_pepper_fingerprint = NULL"
            )
        };
        match &self.postgres {
            Some(postgres) => postgres.execute(&self.database, &clear("trustgate.")).await,
            None => sqlite(&self.file("trustgate.db"), &clear("")).await,
        }
    }
}

async fn sqlite(path: &Path, sql: &str) {
    use sqlx::Connection as _;
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
    let mut connection = sqlx::SqliteConnection::connect_with(&options).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned())).execute(&mut connection).await.unwrap();
}

/// Returns the fingerprint of the pepper that the database records for a key.
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
async fn a_server_without_the_recorded_pepper_is_not_ready_and_answers_503() {
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

        // Test a server with the wrong pepper, and a server without a pepper.
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

        // Change the pepper as the documentation describes.
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
        // The servers read the recorded pepper at each poll, so neither server needs a restart.
        waiting.until_ready().await;
        assert!(is_granted(&waiting, &second).await);
        waiting.until_logged("this server does not have, so it cannot grant them").await;
        assert!((waiting.metric("trustgate_other_pepper_keys").await - 1.0).abs() < 0.5);
        assert_eq!(server.readiness().await.status, 200, "a server with the previous pepper must stay ready");
        server.until_logged("this server does not have, so it cannot grant them").await;
        // This server cannot distinguish an unknown key from a key that was issued under the new pepper.
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
async fn a_check_records_the_pepper_of_a_key_issued_before_an_upgrade() {
    let _turn = shared().await;
    for peppers in [Peppers::on_postgres().await, Peppers::on_sqlite()] {
        let test_config = peppers.test_config(Some("a-pepper"), &[]);
        test_config.migrate().await;
        test_config.trust("acme").await;
        let (used, unused) = (test_config.issue("acme", &[]).await, test_config.issue("acme", &[]).await);
        let recorded = pepper(&test_config, &used).await;
        peppers.clear_recorded().await;
        let server = test_config.serve().await;
        assert!(is_granted(&server, &used).await);
        let version = server.metric("trustgate_applied_version").await;
        eventually("the key's pepper is recorded", PATIENCE, || async {
            pepper(&test_config, &used).await == recorded
        })
        .await;
        assert_eq!(pepper(&test_config, &unused).await, None, "a pepper is recorded for a key that no check used");
        // The server has also recorded its pepper for the whole database, so a command with another pepper cannot issue
        // keys.
        let wrong = peppers.test_config(Some("another-pepper"), &[]);
        assert!(wrong.run(&["key", "issue", "--trust", "acme"]).await.err.contains("pepper use"));
        test_config.issue("acme", &[]).await;
        assert!(server.metric("trustgate_applied_version").await <= version + 1.0, "recording created a version");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pepper_file_changed_at_runtime_is_logged_and_not_used() {
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
