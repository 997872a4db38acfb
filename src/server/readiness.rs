//! The server's readiness, which `/readyz` reports.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::future::join_all;
use tokio::{runtime::Handle, time::timeout};

use super::{
    admin::Readiness,
    lifecycle::{Life, Phase},
};
use crate::{
    base::clock::Clock,
    freshness::{ReplicaState, lease::LeaseState, poll::PollMetrics},
};

/// Timeout within which all workers must answer a readiness probe.
const PROBE_TIMEOUT: Duration = Duration::from_millis(250);

/// The state that decides whether the server is ready.
pub(crate) struct ServerReadiness {
    /// The server's current phase.
    pub(crate) life: Life,
    pub(crate) replica_state: Arc<ReplicaState>,
    pub(crate) clock: Arc<dyn Clock>,
    /// The poll's metrics, which show whether the database answers.
    pub(crate) poll: PollMetrics,
    /// The runtimes of the workers.
    pub(crate) workers: Vec<Handle>,
}

#[async_trait]
impl Readiness for ServerReadiness {
    /// The server is ready from the first confirmed poll until the drain, if the workers respond and this server has
    /// the recorded pepper. It stays ready while the database or Redis is down: otherwise Envoy would lose all replicas
    /// at once. The returned details show which part is unavailable.
    async fn examine(&self) -> (bool, String) {
        let phase = self.life.phase();
        let probes = self.workers.iter().map(|worker| worker.spawn(async {}));
        let answers = timeout(PROBE_TIMEOUT, join_all(probes)).await.is_ok();
        let store = match (self.replica_state.is_confirmed(), self.poll.is_store_up()) {
            (_, true) => "ok",
            (false, false) => "cannot be used yet; see the log for the reason",
            (true, false) => "lost",
        };
        let lease = match self.replica_state.load().lease_state(self.clock.now()) {
            LeaseState::Fresh => "fresh",
            LeaseState::Stale => "stale; keys that were valid are still granted for freshness.stale_if_unconfirmed",
            LeaseState::Expired => "none; checks that need a lease read the database instead",
        };
        let fits = self.replica_state.pepper.fits();
        let serving = if answers { "ok" } else { "does not answer" };
        // The first poll compares the peppers, so there is no result before that poll.
        let pepper = match (fits, self.replica_state.is_confirmed()) {
            (true, _) => "ok",
            (false, true) => "mismatch with the database; both fingerprints are in the log",
            (false, false) => "not compared yet",
        };
        let details = format!(
            "{}\nserving: {serving}\ndatabase: {store}\nlease: {lease}\npepper: {pepper}\n",
            if fits || phase != Phase::Serve { phase.as_str() } else { "not ready" }
        );
        (phase == Phase::Serve && answers && fits, details)
    }
}
