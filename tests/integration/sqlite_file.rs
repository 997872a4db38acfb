//! Tests the SQLite database file: its default path and mode, which commands create it, and what happens when it is
//! replaced or removed.

use std::{os::unix::fs::PermissionsExt, path::Path, sync::Arc, time::Duration};

use trustgate::testing::{
    base::{clock::SystemClock, fault::Fault},
    record::{ApiKeyDigest, Digests, Version},
    store::{self, Heartbeat, Missing, StoreError, StoreSettings},
};

fn unknown_key() -> Digests {
    Digests { current: ApiKeyDigest::from_bytes([0; 32]), older: Vec::new() }
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn only_serve_and_migrate_create_the_file_and_only_its_owner_can_read_it() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join(".local/state/trustgate/trustgate.db");
    let vars = home.path().to_str().unwrap().to_owned();
    let env = move |name: &str| (name == "HOME").then(|| vars.clone());
    let settings = StoreSettings::default();
    assert_eq!(store::describe(&settings, &env), format!("the SQLite database at {}", path.display()));
    let lookup = store::open_lookup(&settings, &env, Arc::new(SystemClock)).unwrap();

    // The other commands create no file.
    for outcome in [lookup.prepare(Missing::Refuse).await, store::open_ledger(&settings, &env).await.map(drop)] {
        let problem = outcome.unwrap_err();
        assert!(matches!(&problem, StoreError::NoDatabase { path: missing } if *missing == path));
        let text = problem.to_string();
        assert!(text.contains(path.to_str().unwrap()) && text.contains("trustgate serve"), "{text}");
        assert!(!problem.is_transient());
    }
    assert!(!path.exists() && std::fs::read_dir(home.path()).unwrap().next().is_none(), "no file was created");

    // `serve` creates the file.
    lookup.prepare(Missing::Create).await.unwrap();
    let heartbeat =
        Heartbeat { replica: uuid::Uuid::nil(), name: "here".into(), applied: Version(1), lasts: Duration::ZERO };
    lookup.report(&heartbeat).await.unwrap();
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().unwrap()), 0o700);
    for beside in ["trustgate.db-wal", "trustgate.db-shm"] {
        assert_eq!(mode(&path.with_file_name(beside)), 0o600, "{beside}");
    }
    store::open_ledger(&settings, &env).await.unwrap();
    lookup.close().await;

    // trustgate accepts a file that other users can read, and does not change its mode.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    store::migrate(&settings, &env).await.unwrap();
    assert_eq!(mode(&path), 0o644);
}

#[tokio::test]
async fn a_file_that_is_not_a_database_is_reported_and_not_changed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trustgate.db");
    std::fs::write(&path, "notes that are longer than the header of a database file".repeat(50)).unwrap();
    let before = std::fs::read(&path).unwrap();
    let state = dir.path().to_str().unwrap().to_owned();
    let env = move |name: &str| (name == "STATE_DIRECTORY").then(|| state.clone());
    let settings = StoreSettings::default();
    let lookup = store::open_lookup(&settings, &env, Arc::new(SystemClock)).unwrap();
    let problem = lookup.prepare(Missing::Create).await.unwrap_err().to_string();
    assert!(problem.contains("not a database"), "{problem}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[tokio::test]
async fn a_replaced_or_removed_database_file_is_no_longer_read() {
    let dir = tempfile::tempdir().unwrap();
    let settings = |name: &str| StoreSettings {
        url: Some(trustgate::testing::base::secret::Secret::new(format!(
            "sqlite://{}/{name}.db",
            dir.path().display()
        ))),
        ..StoreSettings::default()
    };
    let lookup = store::open_lookup(&settings("used"), &|_| None, Arc::new(SystemClock)).unwrap();
    lookup.prepare(Missing::Create).await.unwrap();
    store::migrate(&settings("other"), &|_| None).await.unwrap();
    let first = lookup.find(&unknown_key()).await.unwrap();
    for beside in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(dir.path().join(format!("used.db{beside}")));
    }
    std::fs::rename(dir.path().join("other.db"), dir.path().join("used.db")).unwrap();
    let second = lookup.find(&unknown_key()).await.unwrap();
    assert_ne!(first.lineage, second.lineage, "the lookup reads the new file");
    std::fs::remove_file(dir.path().join("used.db")).unwrap();
    assert!(
        matches!(lookup.find(&unknown_key()).await, Err(Fault::Unreachable { .. })),
        "a missing file is a fault, not an unknown key"
    );
}

#[tokio::test]
async fn a_preset_does_not_create_a_missing_database() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("theirs.db");
    let url = Some(trustgate::testing::base::secret::Secret::new(format!("sqlite://{}", path.display())));
    let settings = StoreSettings { url, preset: Some(store::Preset::TrustTable), ..StoreSettings::default() };
    let lookup = store::open_lookup(&settings, &|_| None, Arc::new(SystemClock)).unwrap();
    assert!(matches!(lookup.prepare(Missing::Create).await, Err(StoreError::NoDatabase { .. })));
    assert!(!path.exists());
    let nowhere = StoreSettings { url: None, ..settings };
    assert!(
        store::open_lookup(&nowhere, &|_| None, Arc::new(SystemClock)).is_err(),
        "a preset requires a database URL"
    );
}

#[tokio::test]
async fn a_table_is_readable_after_its_application_was_killed_during_a_commit() {
    use sqlx::{ConnectOptions as _, sqlite::SqliteConnectOptions};
    let dir = tempfile::tempdir().unwrap();
    let (theirs, copy) = (dir.path().join("theirs.db"), dir.path().join("copy.db"));
    let mut application =
        SqliteConnectOptions::new().filename(&theirs).create_if_missing(true).connect().await.unwrap();
    let start = "PRAGMA journal_mode = DELETE; PRAGMA cache_size = 1;
        CREATE TABLE trust (id text PRIMARY KEY, api_key_hash text UNIQUE);
        INSERT INTO trust WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 5000)
            SELECT printf('00000000-0000-0000-0000-%012d', n), printf('%064d', n) FROM n;
        BEGIN IMMEDIATE; UPDATE trust SET api_key_hash = api_key_hash || 'x'";
    sqlx::raw_sql(start).execute(&mut application).await.unwrap();
    // These copies are the files that a killed application leaves behind: a database with a partial change, and the
    // journal that undoes the partial change.
    std::fs::copy(&theirs, &copy).unwrap();
    std::fs::copy(dir.path().join("theirs.db-journal"), dir.path().join("copy.db-journal")).unwrap();
    let settings = StoreSettings {
        url: Some(trustgate::testing::base::secret::Secret::new(format!("sqlite://{}", copy.display()))),
        preset: Some(store::Preset::TrustTable),
        ..StoreSettings::default()
    };
    let lookup = store::open_lookup(&settings, &|_| None, Arc::new(SystemClock)).unwrap();
    lookup.prepare(Missing::Refuse).await.unwrap();
    let digest = ApiKeyDigest::from_hex(&format!("{:064}", 4_999)).unwrap();
    let found = lookup.find(&Digests { current: digest, older: Vec::new() }).await.unwrap();
    assert!(found.value.is_some(), "SQLite undid the unfinished change");
    lookup.close().await;
}
