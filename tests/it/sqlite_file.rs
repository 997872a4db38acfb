//! The embedded database as a file: who may read it, who makes it, and where it lies by default.

use std::{os::unix::fs::PermissionsExt, path::Path, sync::Arc, time::Duration};

use trustgate::{
    base::{clock::SystemClock, fault::Fault},
    record::{ApiKeyDigest, Digests, Version},
    store::{self, Heartbeat, Missing, StoreError, StoreSettings},
};

fn nobody() -> Digests {
    Digests { current: ApiKeyDigest::from_bytes([0; 32]), older: Vec::new() }
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn only_serve_and_migrate_make_the_file_and_only_its_owner_can_read_it() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join(".local/state/trustgate/trustgate.db");
    let vars = home.path().to_str().unwrap().to_owned();
    let env = move |name: &str| (name == "HOME").then(|| vars.clone());
    let settings = StoreSettings::default();
    assert_eq!(store::describe(&settings, &env), format!("the SQLite database at {}", path.display()));
    let lookup = store::open_lookup(&settings, &env, Arc::new(SystemClock)).unwrap();

    // Every other command.
    for outcome in [lookup.prepare(Missing::Refuse).await, store::open_ledger(&settings, &env).await.map(drop)] {
        let problem = outcome.unwrap_err();
        assert!(matches!(&problem, StoreError::NoDatabase { path: missing } if *missing == path));
        let text = problem.to_string();
        assert!(text.contains(path.to_str().unwrap()) && text.contains("trustgate serve"), "{text}");
        assert!(!problem.is_transient());
    }
    assert!(!path.exists() && std::fs::read_dir(home.path()).unwrap().next().is_none(), "nothing was made");

    // Serve.
    lookup.prepare(Missing::Create).await.unwrap();
    let sign =
        Heartbeat { replica: uuid::Uuid::nil(), name: "here".into(), applied: Version(1), lasts: Duration::ZERO };
    lookup.report(&sign).await.unwrap();
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().unwrap()), 0o700);
    for beside in ["trustgate.db-wal", "trustgate.db-shm"] {
        assert_eq!(mode(&path.with_file_name(beside)), 0o600, "{beside}");
    }
    store::open_ledger(&settings, &env).await.unwrap();
    lookup.close().await;

    // A file that others may read is used all the same; the warning is in the log.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    store::migrate(&settings, &env).await.unwrap();
    assert_eq!(mode(&path), 0o644);
}

#[tokio::test]
async fn a_file_that_is_no_database_is_told_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trustgate.db");
    std::fs::write(&path, "notes of somebody's, longer than any header could be".repeat(50)).unwrap();
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
async fn a_file_that_was_replaced_or_removed_is_not_read_any_longer() {
    let dir = tempfile::tempdir().unwrap();
    let settings = |name: &str| StoreSettings {
        url: Some(trustgate::base::secret::Secret::new(format!("sqlite://{}/{name}.db", dir.path().display()))),
        ..StoreSettings::default()
    };
    let lookup = store::open_lookup(&settings("used"), &|_| None, Arc::new(SystemClock)).unwrap();
    lookup.prepare(Missing::Create).await.unwrap();
    store::migrate(&settings("other"), &|_| None).await.unwrap();
    let first = lookup.find(&nobody()).await.unwrap();
    for beside in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(dir.path().join(format!("used.db{beside}")));
    }
    std::fs::rename(dir.path().join("other.db"), dir.path().join("used.db")).unwrap();
    let second = lookup.find(&nobody()).await.unwrap();
    assert_ne!(first.lineage, second.lineage, "the one that lies there now");
    std::fs::remove_file(dir.path().join("used.db")).unwrap();
    assert!(matches!(lookup.find(&nobody()).await, Err(Fault::Unreachable { .. })), "an error, never an absence");
}

#[tokio::test]
async fn a_preset_never_makes_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("theirs.db");
    let url = Some(trustgate::base::secret::Secret::new(format!("sqlite://{}", path.display())));
    let settings = StoreSettings { url, preset: Some(store::Preset::TrustTable), ..StoreSettings::default() };
    let lookup = store::open_lookup(&settings, &|_| None, Arc::new(SystemClock)).unwrap();
    assert!(matches!(lookup.prepare(Missing::Create).await, Err(StoreError::NoDatabase { .. })));
    assert!(!path.exists());
    let nowhere = StoreSettings { url: None, ..settings };
    assert!(store::open_lookup(&nowhere, &|_| None, Arc::new(SystemClock)).is_err(), "whose table would it be?");
}

#[tokio::test]
async fn a_preset_whose_application_was_killed_in_the_middle_of_a_commit_is_read() {
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
    // What is on the disk now is what a killed application leaves: half of the change, and the journal to undo it.
    std::fs::copy(&theirs, &copy).unwrap();
    std::fs::copy(dir.path().join("theirs.db-journal"), dir.path().join("copy.db-journal")).unwrap();
    let settings = StoreSettings {
        url: Some(trustgate::base::secret::Secret::new(format!("sqlite://{}", copy.display()))),
        preset: Some(store::Preset::TrustTable),
        ..StoreSettings::default()
    };
    let lookup = store::open_lookup(&settings, &|_| None, Arc::new(SystemClock)).unwrap();
    lookup.prepare(Missing::Refuse).await.unwrap();
    let digest = ApiKeyDigest::from_hex(&format!("{:064}", 4_999)).unwrap();
    let found = lookup.find(&Digests { current: digest, older: Vec::new() }).await.unwrap();
    assert!(found.value.is_some(), "the change was undone");
    lookup.close().await;
}
