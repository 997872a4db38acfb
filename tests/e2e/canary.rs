//! The canary on three replicas of one database: its rounds succeed, it finds a revocation that is missing from the
//! change log, and it leaves no trusts or keys behind.

use std::time::Duration;

use crate::{
    fixture::Fixture,
    support::{eventually, server::Server, shared},
};

const PATIENCE: Duration = Duration::from_secs(30);

/// Suppresses the change log for revocations: from now on the revocation of a key gets a version, but no row in
/// `trustgate.change`. Replicas then keep the cached grant of the key.
const SUPPRESS_CHANGES: &str = "
CREATE FUNCTION public.unrecorded() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM trustgate.change WHERE tx = pg_current_xact_id();
    RETURN NULL;
END
$$;
CREATE TRIGGER unrecorded AFTER INSERT ON trustgate.audit
    FOR EACH ROW WHEN (NEW.action = 'key.revoke') EXECUTE FUNCTION public.unrecorded()";
/// Undoes [`SUPPRESS_CHANGES`].
const RECORD_CHANGES: &str = "DROP TRIGGER unrecorded ON trustgate.audit";

const TRUSTS: &str = "SELECT coalesce(string_agg(name, ' ' ORDER BY name), '') FROM trustgate.trust
    WHERE name LIKE 'trustgate-canary-%'";

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_missing_from_the_change_log_is_found_on_every_replica() {
    let _turn = shared().await;
    let settings = [("freshness.canary_interval", "1s"), ("limits.drain_delay", "0s")];
    let fixture = Fixture::new(&settings).await;
    // The first trust looks like one that a stopped replica left behind: the canaries must delete it. The second does
    // not belong to a canary: they must keep it.
    let left_behind = format!("trustgate-canary-{}", uuid::Uuid::new_v4());
    for name in [&left_behind, "trustgate-canary-in-a-coal-mine"] {
        fixture.test_config.trust(name).await;
        fixture.test_config.issue(name, &[]).await;
    }
    let servers =
        [fixture.test_config.serve().await, fixture.test_config.serve().await, fixture.test_config.serve().await];
    for server in &servers {
        eventually("three rounds succeed", PATIENCE, || async { rounds(server, "ok").await >= 3.0 }).await;
        for outcome in ["late", "denied"] {
            assert!(rounds(server, outcome).await < 1.0, "{outcome}: {}", server.log());
        }
        let revoked = server.metric("trustgate_canary_revocation_seconds_count").await;
        assert!(revoked >= 3.0, "{revoked}");
    }

    fixture.postgres.execute(&fixture.database, SUPPRESS_CHANGES).await;
    for server in &servers {
        eventually("a late revocation is found", PATIENCE, || async { rounds(server, "late").await >= 1.0 }).await;
        server.until_logged("granted beyond the revocation bound").await;
    }
    fixture.postgres.execute(&fixture.database, RECORD_CHANGES).await;
    for server in &servers {
        let before = rounds(server, "ok").await;
        eventually("a round succeeds again", PATIENCE, || async { rounds(server, "ok").await > before }).await;
        assert!(rounds(server, "denied").await < 1.0, "{}", server.log());
    }

    for server in &servers {
        server.signal("TERM");
    }
    for server in servers {
        let (code, log) = server.ended(PATIENCE).await;
        assert_eq!(code, 0, "{log}");
    }
    let trusts: String = fixture.postgres.value(&fixture.database, TRUSTS).await;
    assert_eq!(trusts, "trustgate-canary-in-a-coal-mine");
    let keys: i64 = fixture.postgres.value(&fixture.database, "SELECT count(*) FROM trustgate.api_key").await;
    assert_eq!(keys, 1, "only the key of the other trust may remain");
    let audited =
        "SELECT string_agg(DISTINCT action, ' ' ORDER BY action) FROM trustgate.audit WHERE actor LIKE 'canary:%'";
    let audited: String = fixture.postgres.value(&fixture.database, audited).await;
    assert_eq!(audited, "key.issue key.revoke trust.create trust.delete");
}

async fn rounds(server: &Server, outcome: &str) -> f64 {
    server.metric(&format!("trustgate_canary_rounds_total{{outcome=\"{outcome}\"}}")).await
}
