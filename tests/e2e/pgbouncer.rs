//! PgBouncer in transaction mode does not support `LISTEN`, and a statement that was prepared on one server connection
//! may be missing on the next connection. Behind PgBouncer, replicas therefore learn of changes only by polling, and a
//! revocation must still take effect in time.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::support::{
    exclusive,
    grpc::CheckClient,
    load::print_quantiles,
    machine::{Sample, keep_undisturbed},
    pgbouncer::PgBouncer,
    postgres::Postgres,
    probe::{Probing, sample_of_grants},
    server::TestConfig,
};

const REVOCATIONS: usize = 20;
/// The default of `freshness.lease`, plus a margin: if the command revokes a key, the test starts to count before the
/// commit.
const LEASE_LIMIT: Duration = Duration::from_millis(1_200);

#[tokio::test(flavor = "multi_thread")]
async fn revoked_keys_are_denied_within_400_ms_through_pgbouncer_in_transaction_mode() {
    let _turn = exclusive().await;
    let postgres = Postgres::start().await;
    let bouncer = PgBouncer::start(&postgres).await;
    let database = postgres.database().await;
    let test_config = TestConfig::new().with("store.url", bouncer.url(&database));
    test_config.migrate().await;
    test_config.trust("acme").await;
    let mut keys = Vec::new();
    for _ in 0..REVOCATIONS {
        keys.push(test_config.issue("acme", &[]).await);
    }
    let (one, other) = (test_config.serve().await, test_config.serve().await);
    let clients = [CheckClient::connect(one.grpc()).await, CheckClient::connect(other.grpc()).await];
    let mut late = Vec::new();
    for (number, key) in keys.iter().enumerate() {
        let mut probing = clients.each_ref().map(|client| Probing::start(client, 250, vec![key.key.clone()], &[]));
        for probing in &mut probing {
            probing.until_granted().await;
        }
        // The command revokes every fifth key, and connects through PgBouncer like the servers. The test cannot see
        // when the command commits, so it starts to count before it runs the command.
        let committed = if number % 5 == 0 {
            let before = Instant::now();
            let answer = test_config.json(&["key", "revoke", &key.id]).await;
            let effect = &answer["effect"];
            assert_eq!((&effect["replicas"], &effect["applied"]), (&2.into(), &2.into()), "{answer}");
            println!("through PgBouncer: effective after {} ms", effect["after_ms"]);
            before
        } else {
            let revocation = format!("UPDATE trustgate.api_key SET revoked_at = now() WHERE id = '{}'", key.id);
            postgres.execute(&database, &revocation).await;
            Instant::now()
        };
        sleep_until(committed + Duration::from_millis(800)).await;
        let (mut sample, mut granted_before) = (Sample::new(committed, committed, Duration::ZERO), 0);
        for probing in probing {
            let probes = probing.stop().await;
            granted_before += usize::from(probes.iter().any(|probe| probe.began < committed && probe.is_grant()));
            let end = probes.iter().max_by_key(|probe| probe.began).unwrap().verdict.as_ref().unwrap();
            assert_eq!((end.status, end.reason.as_deref()), (401, Some("revoked")));
            sample = sample.or_longer(sample_of_grants(committed, &probes));
        }
        assert_eq!(granted_before, clients.len());
        late.push(sample);
    }
    // The lease must hold through a pause of the machine, so the lease limit applies to all samples.
    assert!(late.iter().all(|sample| sample.value <= LEASE_LIMIT), "{late:?}");
    let mut late = keep_undisturbed("revocations", late, |_| true);
    late.sort();
    print_quantiles("last grant after the commit, through PgBouncer", &late);
    assert!(late[late.len() - 1] <= Duration::from_millis(400), "{late:?}");
}
