//! The files of the embedded database are removed, moved, restored, or opened through a hard link or a mount, while a
//! server uses them. If a command reports a revocation as done, the server must apply the revocation, and a restart
//! must not lose it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use sqlx::{ConnectOptions as _, Connection as _, sqlite::SqliteConnectOptions};
use tokio::time::{Instant, sleep, sleep_until};

use crate::support::{
    eventually,
    grpc::{CheckClient, granted},
    server::{IssuedKey, Server, TestConfig},
    shared,
};

/// The maximum time after the commit for which a revoked key may be granted: the lease (1 s) plus the deadline of a
/// check (150 ms).
const BOUND: Duration = Duration::from_millis(1_150);
const PATIENCE: Duration = Duration::from_secs(30);

struct Fixture {
    test_config: TestConfig,
    server: Server,
    client: CheckClient,
    key: IssuedKey,
    other: IssuedKey,
}

impl Fixture {
    /// Starts a server and fills its cache with two keys.
    async fn new() -> Self {
        let test_config = TestConfig::new().with_default_deadlines();
        test_config.migrate().await;
        test_config.trust("acme").await;
        let (key, other) = (test_config.issue("acme", &[]).await, test_config.issue("acme", &[]).await);
        let server = test_config.serve().await;
        let client = CheckClient::connect(server.grpc()).await;
        granted(&client, &key).await;
        granted(&client, &other).await;
        Self { test_config, server, client, key, other }
    }

    fn file(&self, suffix: &str) -> PathBuf {
        file(&self.test_config, suffix)
    }

    /// Copies the write-ahead log (WAL) into the database file and empties the WAL.
    async fn checkpoint(&self) {
        let options = SqliteConnectOptions::new().filename(self.file(""));
        let mut connection = options.connect().await.unwrap();
        sqlx::raw_sql("PRAGMA wal_checkpoint(TRUNCATE)").execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    }

    async fn status(&self, key: &IssuedKey, freshness: &str) -> u16 {
        self.client.check_with(&key.key, &[("trustgate.freshness", freshness)]).await.unwrap().status
    }

    /// Revokes the key with `key revoke`, which must succeed. Asserts that no check grants the key after [`BOUND`], not
    /// even after a restart, and that the server logs that its files were replaced.
    async fn assert_revocation_holds(self) {
        self.test_config.revoke(&self.key).await;
        let revoked = Instant::now();
        sleep_until(revoked + BOUND).await;
        while revoked.elapsed() < BOUND + Duration::from_secs(2) {
            for freshness in ["lease", "strict", "live"] {
                let status = self.status(&self.key, freshness).await;
                assert_ne!(status, 200, "granted {:?} after the revocation ({freshness})", revoked.elapsed());
            }
            sleep(Duration::from_millis(20)).await;
        }
        self.server.until_logged("was replaced, removed or moved").await;
        assert!(self.server.metric("trustgate_polls_total{outcome=\"unusable\"}").await > 0.5);
        eventually("valid keys are granted again", PATIENCE, || async {
            self.status(&self.other, "live").await == 200 && self.server.readiness().await.body.contains("lease: fresh")
        })
        .await;
        self.server.signal("INT");
        assert_eq!(self.server.ended(PATIENCE).await.0, 0);
        let next = self.test_config.serve().await;
        let client = CheckClient::connect(next.grpc()).await;
        assert_eq!(client.check(&self.key.key).await.status, 401, "the revocation is lost");
        granted(&client, &self.other).await;
    }
}

fn file(test_config: &TestConfig, suffix: &str) -> PathBuf {
    test_config.path().join(format!("trustgate.db{suffix}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_holds_after_the_index_of_the_wal_is_removed() {
    let _turn = shared().await;
    let fixture = Fixture::new().await;
    fs::remove_file(fixture.file("-shm")).unwrap();
    fixture.assert_revocation_holds().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_holds_after_the_wal_and_its_index_are_removed() {
    let _turn = shared().await;
    let fixture = Fixture::new().await;
    fixture.checkpoint().await;
    fs::remove_file(fixture.file("-wal")).unwrap();
    fs::remove_file(fixture.file("-shm")).unwrap();
    fixture.assert_revocation_holds().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_holds_after_a_backup_is_copied_over_the_database() {
    let _turn = shared().await;
    let fixture = Fixture::new().await;
    fixture.checkpoint().await;
    let backup = fixture.file(".backup");
    fs::copy(fixture.file(""), &backup).unwrap();
    fs::remove_file(fixture.file("-wal")).unwrap();
    fs::remove_file(fixture.file("-shm")).unwrap();
    // Write into the existing file, which keeps its inode, as `cp` does.
    fs::write(fixture.file(""), fs::read(&backup).unwrap()).unwrap();
    fixture.assert_revocation_holds().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_holds_after_the_wal_and_its_index_are_moved_away() {
    let _turn = shared().await;
    let fixture = Fixture::new().await;
    fixture.checkpoint().await;
    for suffix in ["-wal", "-shm"] {
        fs::rename(fixture.file(suffix), fixture.file(&format!("{suffix}.moved"))).unwrap();
    }
    fixture.assert_revocation_holds().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_holds_after_a_wal_with_changes_is_removed() {
    let _turn = shared().await;
    let fixture = Fixture::new().await;
    fixture.checkpoint().await;
    // The checkpoint has emptied the WAL. The key issued below is therefore stored only in the WAL.
    let applied = fixture.server.metric("trustgate_applied_version").await;
    let late = fixture.test_config.issue("acme", &[]).await;
    granted(&fixture.client, &late).await;
    eventually("a poll has read the new key", PATIENCE, || async {
        fixture.server.metric("trustgate_applied_version").await > applied
    })
    .await;
    fs::remove_file(fixture.file("-wal")).unwrap();
    fixture.server.until_logged("was replaced, removed or moved").await;
    eventually("commands work again", PATIENCE, || async {
        fixture.test_config.run(&["key", "list", "--trust", "acme"]).await.code == 0
    })
    .await;
    // The changes in the removed WAL are lost, and the server must detect the loss.
    fixture.server.until_logged("database history lost").await;
    fixture.assert_revocation_holds().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hard_link_is_logged_by_a_running_server_and_refused_by_commands_and_serve() {
    let _turn = shared().await;
    let fixture = Fixture::new().await;
    let link = fixture.test_config.path().join("link.db");
    fs::hard_link(fixture.file(""), &link).unwrap();
    fixture.server.until_logged("several names (hard links)").await;
    granted(&fixture.client, &fixture.key).await;
    // `key revoke` refuses the file under either name, because the server might not see a change that is made under the
    // other name.
    let url = format!("sqlite://{}", link.display());
    let mut by_link = TestConfig::new().with_default_deadlines().with("store.url", url);
    by_link.set("grpc.listen", "127.0.0.1:0");
    for (test_config, command) in [
        (&by_link, &["key", "revoke", &fixture.key.id][..]),
        (&fixture.test_config, &["key", "revoke", &fixture.key.id]),
        (&by_link, &["serve"]),
    ] {
        let ran = test_config.run(command).await;
        assert!(ran.code != 0 && ran.err.contains("2 names (hard links)"), "{command:?}: {ran:?}");
    }
    let ran = by_link.run(&["doctor"]).await;
    assert!(ran.code != 0 && ran.out.contains("hard links"), "{ran:?}");
    fs::remove_file(link).unwrap();
    fixture.test_config.revoke(&fixture.key).await;
    assert_eq!(fixture.status(&fixture.key, "live").await, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_and_serve_refuse_a_bind_mounted_database_file() {
    let _turn = shared().await;
    let fixture = Fixture::new().await;
    let elsewhere = fixture.test_config.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let mounted = elsewhere.join("trustgate.db");
    fs::write(&mounted, "").unwrap();
    for command in ["key revoke", "serve", "doctor"] {
        let arguments =
            if command == "key revoke" { format!("{command} {}", fixture.key.id) } else { command.to_owned() };
        let (code, output) = run_on_bind_mount(&fixture.file(""), &mounted, &arguments);
        assert!(code != 0 && output.contains("mounted without its directory"), "{command}: {code}: {output}");
    }
    granted(&fixture.client, &fixture.key).await;
}

/// Runs a trustgate command with `store.url` set to `to`, while `from` is mounted at `to`. Returns the exit code and
/// the output.
///
/// As root, mounts in the test's mount namespace, because `unshare` cannot create a mount namespace in a chroot. Other
/// users need a separate namespace, in which they are allowed to mount.
fn run_on_bind_mount(from: &Path, to: &Path, arguments: &str) -> (i32, String) {
    let script = "mount --bind \"$1\" \"$2\" || exit; trap 'umount \"$2\"' EXIT; \"$3\" $4";
    let is_root = rustix::process::getuid().is_root();
    let shell = if is_root { &["sh"][..] } else { &["unshare", "--user", "--map-root-user", "--mount", "sh"] };
    let output = Command::new(shell[0])
        .args(&shell[1..])
        .args(["-c", script, "sh"])
        .args([from, to, Path::new(env!("CARGO_BIN_EXE_trustgate"))])
        .arg(arguments)
        .env("TRUSTGATE__STORE__URL", format!("sqlite://{}", to.display()))
        .env("TRUSTGATE__GRPC__LISTEN", "127.0.0.1:0")
        .env("TRUSTGATE__ADMIN__LISTEN", "127.0.0.1:0")
        .output()
        .expect("this test needs mount and unshare: install util-linux and mount");
    let output_bytes = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output_bytes).into_owned())
}

/// Runs the commands of docs/backups.md: a backup while the server runs, and the restore while the server is stopped.
#[tokio::test(flavor = "multi_thread")]
async fn the_documented_backup_and_restore_work() {
    let _turn = shared().await;
    let fixture = Fixture::new().await;
    let page = include_str!("../../docs/backups.md");
    let commands = |heading: &str| {
        let section = page.split("\n## ").find(|section| section.starts_with(heading)).expect("the section");
        let block = section.split("```sh\n").nth(1).expect("a block").split("```").next().expect("its end");
        block.to_owned()
    };
    let (directory, variables) = (fixture.test_config.path().to_owned(), fixture.test_config.variables());
    let run = |script: String| {
        let program = Path::new(env!("CARGO_BIN_EXE_trustgate")).parent().unwrap().display().to_string();
        let path = format!("{program}:{}", std::env::var("PATH").unwrap());
        let output = Command::new("sh")
            .args(["-euc", &script])
            .current_dir(&directory)
            .env("PATH", path)
            .envs(variables.clone())
            .output()
            .unwrap();
        assert!(output.status.success(), "{script}\n{output:?}");
    };
    run(commands("Back up SQLite"));
    // Revoke the key after the backup, so that the key is still valid in the backup.
    fixture.test_config.revoke(&fixture.key).await;
    let Fixture { test_config, server, key, other, .. } = fixture;
    server.signal("INT");
    assert_eq!(server.ended(PATIENCE).await.0, 0);
    run(commands("Restore SQLite"));
    let server = test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    granted(&client, &other).await;
    granted(&client, &key).await;
    test_config.revoke(&key).await;
    assert_eq!(client.check_with(&key.key, &[("trustgate.freshness", "live")]).await.unwrap().status, 401);
}
