//! The canary: repeatedly issues a key, waits until each replica grants it, revokes it, and checks it until each
//! replica denies it. The canary shows whether revocations take effect on running replicas within the revocation bound.
//!
//! The canary is a client like any other: it changes keys through management, which writes audit entries, and sends
//! checks over gRPC as Envoy does. Each round deletes its trust and key; about once an hour, a round also deletes the
//! trusts that other canaries left behind.

pub(crate) mod client;
pub(crate) mod metrics;
pub(crate) mod settings;

use std::{io, sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::{
    client::{Connector, Replica, Verdict},
    metrics::CanaryMetrics,
    settings::{CanarySettings, Target},
};
use crate::{
    base::{
        clock::{Clock, Moment},
        jitter::Jitter,
    },
    ext_authz::credential::CredentialSettings,
    freshness::{Freshness, FreshnessSettings},
    manage::{ManageError, Manager, keys::Wanted},
    record::TrustId,
    store::{Actor, Management, StoreError, ledger::TrustRef},
};

/// Prefix of the names of canary trusts. A random id follows.
const PREFIX: &str = "trustgate-canary-";
/// Wait between two checks with the key on one replica.
const PROBE_WAIT: Duration = Duration::from_millis(5);
/// The maximum time that a new key may be denied before the round counts as `denied`. Normally, a new key is granted at
/// once.
const GRANTED_WITHIN: Duration = Duration::from_secs(5);
/// How long the canary continues to check a revoked key after the revocation bound.
const PROBE_MARGIN: Duration = Duration::from_secs(1);
/// Margin between the maximum duration of a round and the lifetime of its key. The lifetime is limited so that the key
/// expires even if this process ends in the middle of a round.
const LIFETIME_MARGIN: Duration = Duration::from_mins(1);
/// Timeout of one management operation.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Minimum time between two searches for trusts that other canaries left behind. Each search lists all trusts.
const CLEAN_INTERVAL: Duration = Duration::from_hours(1);
/// Age from which a canary trust counts as left behind: a round takes minutes at most.
const LEFT_BEHIND_AFTER: Duration = Duration::from_hours(1);

/// The dependencies of a [`Canary`].
pub(crate) struct CanaryDeps {
    /// Issues and revokes the keys.
    pub management: Management,
    pub clock: Arc<dyn Clock>,
    pub settings: CanarySettings,
    /// The configured sources of keys, and the pepper.
    pub credential: CredentialSettings,
    /// The replicas' revocation bound.
    pub freshness: FreshnessSettings,
    /// The replicas' freshness mode.
    pub mode: Freshness,
    /// The name of this machine or pod, for the audit entries.
    pub name: String,
}

/// A canary. [`Canary::run`] runs its rounds.
pub(crate) struct Canary {
    deps: CanaryDeps,
    metrics: CanaryMetrics,
}

impl Canary {
    #[must_use]
    pub(crate) const fn new(deps: CanaryDeps, metrics: CanaryMetrics) -> Self {
        Self { deps, metrics }
    }

    /// Runs one round after another until `stop` is cancelled. A round that `stop` interrupts still deletes its trust.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let targets = &self.deps.settings.targets;
        let (mut jitter, mut cleaned) = (Jitter::of(Uuid::new_v4()), None);
        let mut previous = vec![Outcome::Ok; targets.len()];
        loop {
            let Some(outcomes) = self.round(&mut cleaned, &stop).await else { return };
            for ((target, outcome), previous) in targets.iter().zip(outcomes).zip(&mut previous) {
                self.metrics.count(target, outcome.label());
                if outcome != *previous {
                    log(target, &outcome);
                }
                *previous = outcome;
            }
            if stop.run_until_cancelled(sleep(jitter.around(self.deps.settings.interval))).await.is_none() {
                return;
            }
        }
    }

    /// Runs one round. Returns the outcome for each target, which is the worst outcome of its replicas; `None` if
    /// `stop` interrupted the round.
    async fn round(&self, cleaned: &mut Option<Moment>, stop: &CancellationToken) -> Option<Vec<Outcome>> {
        let (mut outcomes, replicas) = self.connect().await;
        if replicas.is_empty() {
            return (!stop.is_cancelled()).then_some(outcomes);
        }
        match self.try_key(&replicas, cleaned, stop).await {
            Ok(Some(tried)) => {
                for ((index, _), outcome) in replicas.iter().zip(tried) {
                    outcomes[*index].worsen(outcome);
                }
            }
            Ok(None) => return None,
            Err(problem) => {
                for (index, _) in &replicas {
                    outcomes[*index].worsen(Outcome::Failed(problem.to_string()));
                }
            }
        }
        Some(outcomes)
    }

    /// Connects to the replicas of each target. Returns the outcome for each target, `Failed` if a replica of the target
    /// cannot be reached, and each connected replica with the index of its target.
    async fn connect(&self) -> (Vec<Outcome>, Vec<(usize, Replica)>) {
        let targets = &self.deps.settings.targets;
        let connector = match Connector::new(&self.deps.settings).await {
            Ok(connector) => connector,
            Err(error) => return (vec![Outcome::Failed(error.to_string()); targets.len()], Vec::new()),
        };
        let connected = join_all(targets.iter().map(|target| connector.connect(target))).await;
        let (mut outcomes, mut replicas) = (vec![Outcome::Ok; targets.len()], Vec::new());
        for (index, connections) in connected.into_iter().enumerate() {
            for connection in connections {
                match connection {
                    Ok(replica) => replicas.push((index, replica)),
                    Err(error) => outcomes[index].worsen(Outcome::Failed(error.to_string())),
                }
            }
        }
        (outcomes, replicas)
    }

    /// Creates a trust, tests a key of this trust on the replicas, and deletes the trust. Returns the outcome for each
    /// replica; `None` if `stop` interrupted the test.
    async fn try_key(
        &self,
        replicas: &[(usize, Replica)],
        cleaned: &mut Option<Moment>,
        stop: &CancellationToken,
    ) -> Result<Option<Vec<Outcome>>, Problem> {
        let mut manager = self.open().await?;
        let now = self.deps.clock.now();
        if cleaned.is_none_or(|last| now.since(last) >= CLEAN_INTERVAL) {
            clean(&mut manager).await?;
            *cleaned = Some(now);
        }
        let trust = within(manager.create_trust(&format!("{PREFIX}{}", Uuid::new_v4()))).await?.id;
        let tried = stop.run_until_cancelled(self.try_key_of(trust, &mut manager, replicas)).await;
        let deleted = within(manager.delete_trust(&TrustRef::Id(trust), true)).await;
        let mut outcomes = match tried {
            None => return Ok(None),
            Some(tried) => tried?,
        };
        if let Err(problem) = deleted {
            // Keep the outcomes: a late revocation must be reported even if the trust could not be deleted.
            for outcome in &mut outcomes {
                outcome.worsen(Outcome::Failed(problem.to_string()));
            }
        }
        Ok(Some(outcomes))
    }

    async fn open(&self) -> Result<Manager, Problem> {
        let CanaryDeps { management, name, credential, .. } = &self.deps;
        let ledger = within(async { Ok(management.open().await?) }).await?;
        Manager::new(ledger, Actor(format!("canary:{name}")), credential.clone()).map_err(Problem::Pepper)
    }

    /// Issues a key, waits until it is granted, revokes it, and checks it until it is denied, on all replicas at once.
    /// Returns the outcome for each replica.
    async fn try_key_of(
        &self,
        trust: TrustId,
        manager: &mut Manager,
        replicas: &[(usize, Replica)],
    ) -> Result<Vec<Outcome>, Problem> {
        let CanaryDeps { clock, freshness, mode, .. } = &self.deps;
        let issued = within(manager.issue_key(Wanted {
            trust: TrustRef::Id(trust),
            name: Some("canary".to_owned()),
            scopes: Vec::new(),
            allowed_cidrs: Vec::new(),
            expires_in: Some(self.key_lifetime()),
        }))
        .await?;
        let request = client::request(&self.deps.credential, issued.secret.expose());
        let filled = join_all(replicas.iter().map(|(_, replica)| self.fill_cache(replica, &request))).await;

        within(manager.revoke_key(issued.key.id)).await?;
        // The revocation was committed before this moment. A check that starts more than the bound after this moment
        // therefore also starts more than the bound after the commit.
        let revoked = clock.now();
        let bound_of = |is_stale| freshness.bound(*mode, is_stale);
        let probed = replicas.iter().zip(filled).map(async |((index, replica), filled)| match filled {
            Outcome::Ok => {
                let (last, outcome) = self.until_denied(replica, &request, revoked, bound_of).await;
                self.metrics.observe_revocation(&self.deps.settings.targets[*index], last);
                outcome
            }
            failed => failed,
        });
        Ok(join_all(probed).await)
    }

    /// Returns the lifetime of a canary key: the maximum duration of a round, plus a margin.
    fn key_lifetime(&self) -> Duration {
        let CanaryDeps { freshness, mode, .. } = &self.deps;
        let polled = freshness.poll_interval + freshness.poll_timeout;
        let bound = freshness.bound(*mode, false);
        GRANTED_WITHIN + polled + 2 * CHANGE_TIMEOUT + bound + PROBE_MARGIN + LIFETIME_MARGIN
    }

    /// Checks the new key on `replica` until it is granted, and then once more, so that the replica caches the key.
    async fn fill_cache(&self, replica: &Replica, request: &client::Request) -> Outcome {
        let start = self.deps.clock.now();
        loop {
            match replica.check(request).await {
                Verdict::Granted { .. } => break,
                verdict if self.deps.clock.now().since(start) <= GRANTED_WITHIN => {
                    tracing::debug!(%replica, ?verdict, "canary key not granted yet");
                    sleep(PROBE_WAIT).await;
                }
                Verdict::Denied => return Outcome::Denied(replica.to_string()),
                Verdict::Undecided(why) => {
                    return Outcome::Failed(format!("{replica} could not check the valid key: {why}"));
                }
            }
        }
        // A replica caches the key only after a poll has confirmed its version, and only a cached key can be granted
        // for too long. So wait for a poll, then check the key once more.
        sleep(self.deps.freshness.poll_interval + self.deps.freshness.poll_timeout).await;
        replica.check(request).await;
        Outcome::Ok
    }

    /// Checks the revoked key on `replica` until it is denied, for up to the bound plus a margin. Returns the time
    /// from `revoked` to the start of the last granted check, and the outcome.
    async fn until_denied(
        &self,
        replica: &Replica,
        request: &client::Request,
        revoked: Moment,
        bound_of: impl Fn(bool) -> Duration,
    ) -> (Duration, Outcome) {
        let (mut last, mut is_late) = (Duration::ZERO, false);
        let end = loop {
            let began = self.deps.clock.now();
            let verdict = replica.check(request).await;
            if let Verdict::Granted { is_stale } = verdict {
                last = began.since(revoked);
                // A stale grant means that the replica's polls get no answer. In that case, the bound is longer.
                is_late |= last > bound_of(is_stale);
            }
            if matches!(verdict, Verdict::Denied) || began.since(revoked) > bound_of(false) + PROBE_MARGIN {
                break verdict;
            }
            sleep(PROBE_WAIT).await;
        };
        let outcome = match end {
            _ if is_late => Outcome::Late(replica.to_string()),
            Verdict::Denied => Outcome::Ok,
            Verdict::Granted { .. } => Outcome::Failed(format!(
                "{replica} still grants the revoked key: its lease is stale, because its polls get no answer"
            )),
            Verdict::Undecided(why) => Outcome::Failed(format!("{replica} could not check the revoked key: {why}")),
        };
        (last, outcome)
    }
}

/// Deletes trusts that canaries left behind when they were killed.
async fn clean(manager: &mut Manager) -> Result<(), Problem> {
    let (now, trusts) = (within(manager.now()).await?, within(manager.trusts()).await?);
    for trust in trusts {
        let is_canary = trust.name.strip_prefix(PREFIX).is_some_and(|id| Uuid::parse_str(id).is_ok());
        if is_canary && now.since(trust.created_at) > LEFT_BEHIND_AFTER {
            match within(manager.delete_trust(&TrustRef::Id(trust.id), true)).await {
                // `NoTrust`: another canary has already deleted the trust.
                Ok(_) | Err(Problem::Manage(ManageError::Ledger(StoreError::NoTrust(_)))) => {}
                Err(problem) => return Err(problem),
            }
        }
    }
    Ok(())
}

/// Runs a management operation with a timeout.
async fn within<T>(change: impl Future<Output = Result<T, ManageError>>) -> Result<T, Problem> {
    Ok(timeout(CHANGE_TIMEOUT, change).await.map_err(|_| Problem::Timeout)??)
}

/// The outcome of a round for a replica or a target, ordered from best to worst. The string is the name of the
/// replica, or the cause.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// The key was granted and, after its revocation, denied in time.
    Ok,
    /// The round could not be completed for this reason.
    Failed(String),
    /// This replica denied the valid key.
    Denied(String),
    /// This replica granted the revoked key for longer than the revocation bound.
    Late(String),
}

impl Outcome {
    /// Returns the value of the label `outcome`.
    const fn label(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Late(_) => "late",
            Self::Denied(_) => "denied",
            Self::Failed(_) => "failed",
        }
    }

    /// Replaces this outcome with `other` if `other` is worse.
    fn worsen(&mut self, other: Self) {
        let current = std::mem::replace(self, Self::Ok);
        *self = current.max(other);
    }
}

/// Logs an outcome that differs from the previous one.
fn log(target: &Target, outcome: &Outcome) {
    match outcome {
        Outcome::Ok => {
            tracing::info!(%target, "canary ok: the key was granted and, after its revocation, denied in time");
        }
        Outcome::Late(replica) => {
            tracing::error!(%target, replica, "canary late: the revoked key was granted beyond the revocation bound");
        }
        Outcome::Denied(replica) => {
            tracing::error!(%target, replica, "canary denied: the replica did not grant the valid key");
        }
        Outcome::Failed(problem) => tracing::warn!(%target, problem, "canary round failed"),
    }
}

/// Why a round could not be completed.
#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error(transparent)]
    Manage(#[from] ManageError),
    #[error("cannot read the pepper: {0}")]
    Pepper(io::Error),
    #[error("management timeout: an operation took longer than {CHANGE_TIMEOUT:?}")]
    Timeout,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_has_the_worst_outcome_of_its_replicas() {
        let of = |text: &str| text.to_owned();
        let mut outcome = Outcome::Ok;
        for (next, worst) in [
            (Outcome::Failed(of("a")), Outcome::Failed(of("a"))),
            (Outcome::Ok, Outcome::Failed(of("a"))),
            (Outcome::Late(of("b")), Outcome::Late(of("b"))),
            (Outcome::Denied(of("c")), Outcome::Late(of("b"))),
        ] {
            outcome.worsen(next);
            assert_eq!(outcome, worst);
        }
    }
}
