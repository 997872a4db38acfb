//! The canary: a task that repeatedly issues a key, waits until it is granted, revokes it, and checks it until it is
//! denied. It shows on the running server whether revocations take effect within the revocation bound.
//!
//! The canary uses the same code as other callers: management, which writes audit entries, and the checker, which
//! counts the checks. Each round deletes its trust and key; about once an hour, a round also deletes the trusts of
//! replicas that are gone. Off unless `freshness.canary_interval` is set.

pub mod client;

use std::{io, sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::client::Verdict;
use crate::{
    base::{
        clock::{Clock, Moment},
        jitter::Jitter,
        metrics::{Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry, SHORT_SECONDS, register},
    },
    ext_authz::{
        check::Checker,
        credential::{
            CredentialSettings,
            source::{Scheme, Source},
        },
    },
    freshness::{Freshness, FreshnessSettings, ReplicaState},
    manage::{ManageError, Manager, keys::Wanted},
    record::TrustId,
    store::{
        Actor, Management, StoreError,
        ledger::{Trust, TrustRef},
    },
};

/// Prefix of the names of canary trusts. The id of the replica follows.
const PREFIX: &str = "trustgate-canary-";
/// Wait between two checks of the key.
const PROBE_WAIT: Duration = Duration::from_millis(5);
/// The maximum time that a new key may be denied before the round counts as `denied`. It should be granted at once.
const GRANTED_WITHIN: Duration = Duration::from_secs(5);
/// The maximum time that a revoked key is checked beyond the revocation bound.
const PROBE_MARGIN: Duration = Duration::from_secs(1);
/// Added to the longest time of a round to get the lifetime of its key. The key expires soon even if this process ends
/// in the middle of a round.
const LIFETIME_MARGIN: Duration = Duration::from_mins(1);
/// Timeout of one management operation.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Minimum time between two searches for the trusts of replicas that are gone. Each search lists all trusts.
const CLEAN_INTERVAL: Duration = Duration::from_hours(1);
/// The maximum time that the shutdown waits for the end of a round.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// The dependencies of a canary.
pub struct Parts {
    /// Issues and revokes the keys.
    pub management: Management,
    /// Decides the checks.
    pub checker: Arc<Checker>,
    /// The replica state.
    pub replica_state: Arc<ReplicaState>,
    /// The clock.
    pub clock: Arc<dyn Clock>,
    /// The sources of a key in a request, and the pepper.
    pub credential: CredentialSettings,
    /// The revocation bound, and the interval between rounds.
    pub settings: FreshnessSettings,
    /// The freshness mode of routes that do not set their own.
    pub mode: Freshness,
    /// The id of this replica.
    pub replica: Uuid,
    /// The name of this replica, for people.
    pub name: String,
}

/// A canary that is not running yet.
pub struct Canary {
    parts: Parts,
    metrics: CanaryMetrics,
}

impl Canary {
    /// A canary with these dependencies.
    #[must_use]
    pub const fn new(parts: Parts, metrics: CanaryMetrics) -> Self {
        Self { parts, metrics }
    }

    /// Runs one round after another until `stop`. A round that `stop` interrupts deletes its trust, within
    /// `STOP_TIMEOUT`.
    pub async fn run(self, stop: CancellationToken) {
        let timed_out = async {
            stop.cancelled().await;
            sleep(STOP_TIMEOUT).await;
        };
        tokio::select! {
            biased;
            () = self.rounds(&stop) => {}
            () = timed_out => {}
        }
    }

    async fn rounds(&self, stop: &CancellationToken) {
        if stop.run_until_cancelled(self.parts.replica_state.confirmed()).await.is_none() {
            return;
        }
        let (mut jitter, mut cleaned, mut previous) = (Jitter::of(self.parts.replica), None, Outcome::Ok);
        let interval = self.parts.settings.canary_interval;
        while stop.run_until_cancelled(sleep(jitter.around(interval))).await.is_some() {
            let outcome = match self.round(&mut cleaned, stop).await {
                Ok(Some(outcome)) => outcome,
                Ok(None) => return,
                Err(problem) => Outcome::Failed(problem.to_string()),
            };
            self.metrics.of(&outcome).inc();
            if outcome != previous {
                log(&outcome);
            }
            previous = outcome;
        }
    }

    /// Runs one round; `None` if `stop` interrupted it.
    async fn round(&self, cleaned: &mut Option<Moment>, stop: &CancellationToken) -> Result<Option<Outcome>, Problem> {
        let mut manager = self.open().await?;
        let now = self.parts.clock.now();
        if cleaned.is_none_or(|last| now.since(last) >= CLEAN_INTERVAL) {
            self.clean(&mut manager).await?;
            *cleaned = Some(now);
        }
        let trust = self.trust(&mut manager).await?.id;
        let tried = self.try_key(&mut manager, trust, stop).await;
        let deleted = within(manager.delete_trust(&TrustRef::Id(trust), true)).await;
        match tried? {
            // A late revocation is reported even if the trust could not be deleted.
            Some(Outcome::Late) => Ok(Some(Outcome::Late)),
            outcome => deleted.map(|_| outcome),
        }
    }

    async fn open(&self) -> Result<Manager, Problem> {
        let Parts { management, name, credential, .. } = &self.parts;
        let ledger = within(async { Ok(management.open().await?) }).await?;
        Manager::new(ledger, Actor(format!("canary:{name}")), credential.clone()).map_err(Problem::Pepper)
    }

    /// Creates this canary's trust. It exists already if an earlier round could not delete it.
    async fn trust(&self, manager: &mut Manager) -> Result<Trust, Problem> {
        let name = format!("{PREFIX}{}", self.parts.replica);
        match within(manager.create_trust(&name)).await {
            Err(Problem::Manage(ManageError::Ledger(StoreError::NameTaken(_)))) => {
                within(manager.trust(&TrustRef::Name(name))).await
            }
            made => made,
        }
    }

    /// Issues a key, waits until it is granted, revokes it, and checks it until it is denied. `None` if `stop`
    /// interrupted this.
    async fn try_key(
        &self,
        manager: &mut Manager,
        trust: TrustId,
        stop: &CancellationToken,
    ) -> Result<Option<Outcome>, Problem> {
        let Parts { clock, settings, .. } = &self.parts;
        let bound_of = |is_unanswered| settings.bound(self.parts.mode, is_unanswered);
        let bound = bound_of(false);
        let issued = within(manager.issue_probe(Wanted {
            trust: TrustRef::Id(trust),
            name: Some("canary".to_owned()),
            scopes: Vec::new(),
            allowed_cidrs: Vec::new(),
            expires_in: Some(GRANTED_WITHIN + 2 * CHANGE_TIMEOUT + bound + PROBE_MARGIN + LIFETIME_MARGIN),
        }))
        .await?;
        let message = check_message(&self.parts.credential, issued.secret.expose());

        let granted = |verdict| matches!(verdict, Verdict::Granted { .. });
        match self.probe(&message, granted, GRANTED_WITHIN, |_, _| (), stop).await {
            None => return Ok(None),
            Some(Verdict::Granted { .. }) => {}
            Some(Verdict::Denied) => return Ok(Some(Outcome::Denied)),
            Some(Verdict::Undecided) => return Err(Problem::Undecided),
        }
        // L1 caches the key only after a poll has confirmed its version, and only a cached key can be granted for too
        // long. So wait for a poll, then check the key once more.
        let polled = settings.poll_interval + settings.poll_timeout;
        if stop.run_until_cancelled(sleep(polled)).await.is_none() {
            return Ok(None);
        }
        self.ask(&message).await;

        within(manager.revoke_key(issued.key.id)).await?;
        // The revocation was committed before this moment. So a grant that begins more than the bound after this moment
        // also begins more than the bound after the commit.
        let revoked = clock.now();
        let (mut last, mut is_late) = (Duration::ZERO, false);
        let note = |began: Moment, verdict| {
            if let Verdict::Granted { is_stale } = verdict {
                last = began.since(revoked);
                // A stale grant means that polls get no answer, for which the bound is longer.
                is_late |= last > bound_of(is_stale);
            }
        };
        let denied = |verdict| verdict == Verdict::Denied;
        let Some(end) = self.probe(&message, denied, bound + PROBE_MARGIN, note, stop).await else { return Ok(None) };
        if !is_late && !denied(end) {
            return Err(Problem::Unconfirmed);
        }
        self.metrics.revocation.observe(last.as_secs_f64());
        Ok(Some(if is_late { Outcome::Late } else { Outcome::Ok }))
    }

    /// Repeats the check until `is_end` returns true for its verdict, for at most `limit`. Calls `note` with the start
    /// and the verdict of each check. Returns the last verdict; `None` if `stop` interrupted this.
    async fn probe(
        &self,
        message: &[u8],
        is_end: impl Fn(Verdict) -> bool,
        limit: Duration,
        mut note: impl FnMut(Moment, Verdict),
        stop: &CancellationToken,
    ) -> Option<Verdict> {
        let start = self.parts.clock.now();
        loop {
            let began = self.parts.clock.now();
            let verdict = self.ask(message).await;
            note(began, verdict);
            if is_end(verdict) || began.since(start) > limit {
                return Some(verdict);
            }
            stop.run_until_cancelled(sleep(PROBE_WAIT)).await?;
        }
    }

    async fn ask(&self, message: &[u8]) -> Verdict {
        client::verdict(&self.parts.checker.check(message).await)
    }

    /// Deletes the trusts of canaries whose replicas are gone.
    async fn clean(&self, manager: &mut Manager) -> Result<(), Problem> {
        // List the trusts first: a replica that has created its trust by then is either in the later list of replicas,
        // or gone.
        let trusts = within(manager.trusts()).await?;
        let alive = within(manager.replicas()).await?;
        for trust in trusts {
            let replica = trust.name.strip_prefix(PREFIX).and_then(|id| Uuid::parse_str(id).ok());
            if replica.is_some_and(|id| alive.iter().all(|alive| alive.id != id)) {
                match within(manager.delete_trust(&TrustRef::Id(trust.id), true)).await {
                    // `NoTrust`: another canary has deleted it.
                    Ok(_) | Err(Problem::Manage(ManageError::Ledger(StoreError::NoTrust(_)))) => {}
                    Err(problem) => return Err(problem),
                }
            }
        }
        Ok(())
    }
}

/// The `CheckRequest` that presents `key` in the first of the configured sources.
fn check_message(credential: &CredentialSettings, key: &str) -> Vec<u8> {
    let (path, header) = match credential.sources.first() {
        Some(Source::Header(name)) => ("/".to_owned(), Some((name.as_str(), key.to_owned()))),
        Some(Source::Authorization(Scheme::Bearer)) => {
            ("/".to_owned(), Some(("authorization", format!("Bearer {key}"))))
        }
        Some(Source::Authorization(Scheme::ApiKey)) => {
            ("/".to_owned(), Some(("authorization", format!("ApiKey {key}"))))
        }
        Some(Source::Query(name)) => (format!("/?{name}={key}"), None),
        Some(Source::Cookie(name)) => ("/".to_owned(), Some(("cookie", format!("{name}={key}")))),
        None => ("/".to_owned(), None), // a configuration without a source is refused
    };
    let headers: Vec<_> = header.iter().map(|(name, value)| (*name, value.as_str())).collect();
    client::request(&path, &headers)
}

/// Runs a management operation with a timeout.
async fn within<T>(change: impl Future<Output = Result<T, ManageError>>) -> Result<T, Problem> {
    Ok(timeout(CHANGE_TIMEOUT, change).await.map_err(|_| Problem::Late)??)
}

/// The outcome of a round.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    /// The key was granted and, after its revocation, denied in time.
    Ok,
    /// The revoked key was granted for longer than the revocation bound.
    Late,
    /// The valid key was denied.
    Denied,
    /// The round could not be completed, for this reason.
    Failed(String),
}

/// Logs an outcome that differs from the previous one.
fn log(outcome: &Outcome) {
    match outcome {
        Outcome::Ok => tracing::info!("canary ok: the key was granted and, after its revocation, denied in time"),
        Outcome::Late => tracing::error!("canary late: the revoked key was granted beyond the revocation bound"),
        Outcome::Denied => tracing::error!("canary denied: the valid key was not granted"),
        Outcome::Failed(problem) => tracing::warn!(problem, "canary round failed"),
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
    Late,
    #[error("check fault: the server could not decide the valid key")]
    Undecided,
    #[error("revocation not confirmed: no check denied the revoked key")]
    Unconfirmed,
}

/// The metrics of the canary.
#[derive(Clone)]
pub struct CanaryMetrics {
    ok: IntCounter,
    late: IntCounter,
    denied: IntCounter,
    failed: IntCounter,
    revocation: Histogram,
}

impl CanaryMetrics {
    /// Declares the metrics.
    ///
    /// # Errors
    /// As [`register`].
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let rounds = Opts::new(
            "trustgate_canary_rounds_total",
            "Rounds of the canary by outcome: ok, late (granted for longer than the bound allows), denied (a good key \
             was denied) or failed.",
        );
        let rounds = register(registry, IntCounterVec::new(rounds, &["outcome"]))?;
        let revocation = HistogramOpts::new(
            "trustgate_canary_revocation_seconds",
            "Time from the acknowledged revocation of the canary's key to the start of the last granted check, in \
             seconds.",
        );
        let mut buckets = SHORT_SECONDS.to_vec();
        buckets.extend([0.5, 1.0, 2.5]);
        let count = |outcome| rounds.with_label_values(&[outcome]);
        Ok(Self {
            ok: count("ok"),
            late: count("late"),
            denied: count("denied"),
            failed: count("failed"),
            revocation: register(registry, Histogram::with_opts(revocation.buckets(buckets)))?,
        })
    }

    const fn of(&self, outcome: &Outcome) -> &IntCounter {
        match outcome {
            Outcome::Ok => &self.ok,
            Outcome::Late => &self.late,
            Outcome::Denied => &self.denied,
            Outcome::Failed(_) => &self.failed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::settings::{RawValue, Setting as _},
        ext_authz::{credential::extract::extract, request::View},
    };

    #[test]
    fn the_key_is_presented_in_the_first_source() {
        for source in ["header:x-key", "authorization:bearer", "authorization:apikey", "query:key", "cookie:key"] {
            let sources = vec![Source::read(&RawValue::One(source.to_owned())).unwrap()];
            let credential = CredentialSettings { sources, ..CredentialSettings::default() };
            let message = check_message(&credential, "a-key-for-this-test");
            let found = extract(&credential, &View::parse(&message).unwrap()).key;
            assert_eq!(found.unwrap().expose(), b"a-key-for-this-test", "{source}");
        }
    }
}
