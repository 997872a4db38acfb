//! The canary on three replicas of one database: its rounds succeed over TCP, TLS and a Unix socket, it detects a
//! revocation that is missing from the change log, and it leaves no trusts or keys behind.

use std::time::Duration;

use crate::{
    fixture::Fixture,
    support::{certificates::certificates, eventually, server::Canary, shared},
};

const PATIENCE: Duration = Duration::from_secs(30);

/// SQL that suppresses the change log for revocations: from now on a key revocation creates a version, but no row
/// in `trustgate.change`. Replicas therefore keep granting the key from their caches.
const SUPPRESS_CHANGES: &str = "
CREATE FUNCTION public.unrecorded() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM trustgate.change WHERE tx = pg_current_xact_id();
    RETURN NULL;
END
$$;
CREATE TRIGGER unrecorded AFTER INSERT ON trustgate.audit
    FOR EACH ROW WHEN (NEW.action = 'key.revoke') EXECUTE FUNCTION public.unrecorded()";
/// SQL that undoes [`SUPPRESS_CHANGES`].
const RECORD_CHANGES: &str = "DROP TRIGGER unrecorded ON trustgate.audit";

const TRUSTS: &str = "SELECT coalesce(string_agg(name, ' ' ORDER BY name), '') FROM trustgate.trust
    WHERE name LIKE 'trustgate-canary-%'";

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_missing_from_the_change_log_is_detected_on_every_replica() {
    let _turn = shared().await;
    let mut fixture = Fixture::new(&[("canary.interval", "1s"), ("limits.drain_delay", "0s")]).await;
    // The first two trusts look like those of other canaries. One of these canaries was killed hours ago, so its trust
    // must be deleted; the other canary is still running. The third trust does not belong to a canary.
    let (left_behind, running) = (canary_trust(), canary_trust());
    let others = "trustgate-canary-in-a-coal-mine";
    for name in [&*left_behind, &*running, others] {
        fixture.test_config.trust(name).await;
        fixture.test_config.issue(name, &[]).await;
    }
    let age = format!(
        "UPDATE trustgate.trust SET created_at = now() - interval '2 h' WHERE name IN ('{left_behind}', '{others}')"
    );
    fixture.postgres.execute(&fixture.database, &age).await;
    let servers =
        [fixture.test_config.serve().await, fixture.test_config.serve().await, fixture.test_config.serve().await];
    let targets = servers.each_ref().map(|server| server.grpc().to_string());
    fixture.test_config.set("canary.targets", targets.join(","));
    let canary = fixture.test_config.canary().await;
    for target in &targets {
        until_rounds(&canary, target, "ok", 3.0).await;
        for outcome in ["late", "denied", "failed"] {
            assert!(canary.rounds(target, outcome).await < 1.0, "{outcome}: {}", canary.log());
        }
        let revocations = canary.revocations(target).await;
        assert!(revocations >= 3.0, "{revocations}");
    }

    fixture.postgres.execute(&fixture.database, SUPPRESS_CHANGES).await;
    for target in &targets {
        until_rounds(&canary, target, "late", 1.0).await;
        let logged = canary.log();
        let is_late = |line: &str| line.contains("granted beyond the revocation bound") && line.contains(target);
        assert!(logged.lines().any(is_late), "{logged}");
    }
    fixture.postgres.execute(&fixture.database, RECORD_CHANGES).await;
    for target in &targets {
        let before = canary.rounds(target, "ok").await;
        until_rounds(&canary, target, "ok", before + 1.0).await;
        assert!(canary.rounds(target, "denied").await < 1.0, "{}", canary.log());
    }

    let (code, log) = canary.stop(PATIENCE).await;
    assert_eq!(code, 0, "{log}");
    let trusts: String = fixture.postgres.value(&fixture.database, TRUSTS).await;
    let mut want = [&*running, others];
    want.sort_unstable();
    assert_eq!(trusts, want.join(" "));
    let keys: i64 = fixture.postgres.value(&fixture.database, "SELECT count(*) FROM trustgate.api_key").await;
    assert_eq!(keys, 2, "only the keys of the other trusts may remain");
    let audited =
        "SELECT string_agg(DISTINCT action, ' ' ORDER BY action) FROM trustgate.audit WHERE actor LIKE 'canary:%'";
    let audited: String = fixture.postgres.value(&fixture.database, audited).await;
    assert_eq!(audited, "key.issue key.revoke trust.create trust.delete");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_canary_probes_replicas_over_mutual_tls_and_unix_sockets_despite_an_unreachable_target() {
    let _turn = shared().await;
    let mut fixture = Fixture::new(&[("canary.interval", "1s")]).await;
    let certificates = certificates();
    let file = |name: &str| certificates.path().join(name).display().to_string();
    let socket = format!("unix://{}", fixture.test_config.path().join("grpc.sock").display());
    fixture.test_config.set("grpc.listen", format!("127.0.0.1:0,{socket}"));
    for (setting, name) in [
        ("grpc.tls_certificate_file", "server.pem"),
        ("grpc.tls_key_file", "server.key"),
        ("grpc.tls_client_ca_file", "ca.pem"),
        ("canary.tls_ca_file", "ca.pem"),
        ("canary.tls_certificate_file", "client.pem"),
        ("canary.tls_key_file", "client.key"),
    ] {
        fixture.test_config.set(setting, file(name));
    }
    let server = fixture.test_config.serve().await;
    let target = server.grpc().to_string();
    // No server listens on port 1, so this target is unreachable.
    fixture.test_config.set("canary.targets", format!("{target},{socket},127.0.0.1:1"));
    let canary = fixture.test_config.canary().await;
    for target in [&target, &socket] {
        until_rounds(&canary, target, "ok", 2.0).await;
        assert!(canary.rounds(target, "failed").await < 1.0, "{}", canary.log());
    }
    assert!(canary.rounds("127.0.0.1:1", "failed").await >= 2.0, "{}", canary.log());
    assert!(canary.rounds("127.0.0.1:1", "ok").await < 1.0, "{}", canary.log());
    let log = canary.log();
    let failed: Vec<_> = log.lines().filter(|line| line.contains("canary round failed")).collect();
    assert!(failed.len() == 1 && failed[0].contains("cannot connect to 127.0.0.1:1: "), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn canary_rounds_fail_while_the_database_refuses_changes_and_then_succeed_again() {
    let _turn = shared().await;
    let mut fixture = Fixture::new(&[("canary.interval", "1s")]).await;
    let server = fixture.test_config.serve().await;
    let target = server.grpc().to_string();
    fixture.test_config.set("canary.targets", &*target);
    let canary = fixture.test_config.canary().await;
    until_rounds(&canary, &target, "ok", 1.0).await;
    let refuse = "CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'no new trusts'; END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON trustgate.trust EXECUTE FUNCTION public.refuse()";
    fixture.postgres.execute(&fixture.database, refuse).await;
    until_rounds(&canary, &target, "failed", 1.0).await;
    let log = canary.log();
    assert!(log.contains("canary round failed") && log.contains("no new trusts"), "{log}");
    fixture.postgres.execute(&fixture.database, "DROP TRIGGER refuse ON trustgate.trust").await;
    let before = canary.rounds(&target, "ok").await;
    until_rounds(&canary, &target, "ok", before + 1.0).await;
    for outcome in ["late", "denied"] {
        assert!(canary.rounds(&target, outcome).await < 1.0, "{outcome}: {}", canary.log());
    }
}

/// Returns a trust name in the form that canaries use.
fn canary_trust() -> String {
    format!("trustgate-canary-{}", uuid::Uuid::new_v4())
}

async fn until_rounds(canary: &Canary, target: &str, outcome: &str, count: f64) {
    let what = format!("{count} rounds of {target} are {outcome}");
    eventually(&what, PATIENCE, || async { canary.rounds(target, outcome).await >= count }).await;
}
