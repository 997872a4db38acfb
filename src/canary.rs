//! The canary: this replica issues a key of its own, sees it granted, revokes it and asks for it until it is refused,
//! again and again. A proof while the server runs that a revocation counts here when it must.
//!
//! Takes the way of everybody: management, with its audit, and the checker, with its counters. Never leaves anything behind
//! but those: each round deletes what it made, and now and then what others left who are gone. Off unless
//! `freshness.canary_interval` is set.

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

/// What the names of canaries' trusts begin with; the id of the replica follows.
const PREFIX: &str = "trustgate-canary-";
/// The wait between two checks of its key.
const PROBE_WAIT: Duration = Duration::from_millis(5);
/// How long a new key may be refused before that is a finding. It should be granted at once.
const GRANTED_WITHIN: Duration = Duration::from_secs(5);
/// How much longer than promised a revoked key is asked for, at most.
const PROBED_BEYOND: Duration = Duration::from_secs(1);
/// How long a key lives beyond everything else: should this process end in the middle, nothing stays good for long.
const LIFE_LEFT: Duration = Duration::from_mins(1);
/// How long one change may take.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often what others left behind is looked for: all trusts are listed for that.
const CLEAN_INTERVAL: Duration = Duration::from_hours(1);
/// How long the end of the server waits for the end of a round.
const FAREWELL: Duration = Duration::from_secs(2);

/// What a canary works with.
pub struct Parts {
    /// Where it makes its keys.
    pub management: Management,
    /// Whom it asks.
    pub checker: Arc<Checker>,
    /// What this replica knows of the store's history.
    pub replica_state: Arc<ReplicaState>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Where a key stands in a request.
    pub credential: CredentialSettings,
    /// What is promised, and how often that is tried.
    pub settings: FreshnessSettings,
    /// How fresh records are where a route does not say so.
    pub mode: Freshness,
    /// This replica.
    pub replica: Uuid,
    /// What people know it by.
    pub name: String,
}

/// A canary that is not running yet.
pub struct Canary {
    parts: Parts,
    metrics: CanaryMetrics,
}

impl Canary {
    /// A canary of `parts`.
    #[must_use]
    pub const fn new(parts: Parts, metrics: CanaryMetrics) -> Self {
        Self { parts, metrics }
    }

    /// Makes round after round until `stop`, then deletes what there is of the last one.
    pub async fn run(self, stop: CancellationToken) {
        let given_up = async {
            stop.cancelled().await;
            sleep(FAREWELL).await;
        };
        tokio::select! {
            biased;
            () = self.rounds(&stop) => {}
            () = given_up => {}
        }
    }

    async fn rounds(&self, stop: &CancellationToken) {
        if stop.run_until_cancelled(self.parts.replica_state.confirmed()).await.is_none() {
            return;
        }
        let (mut jitter, mut cleaned, mut before) = (Jitter::of(self.parts.replica), None, Outcome::Ok);
        let interval = self.parts.settings.canary_interval;
        while stop.run_until_cancelled(sleep(jitter.around(interval))).await.is_some() {
            let outcome = match self.round(&mut cleaned, stop).await {
                Ok(Some(outcome)) => outcome,
                Ok(None) => return,
                Err(problem) => Outcome::Failed(problem.to_string()),
            };
            self.metrics.of(&outcome).inc();
            if outcome != before {
                tell(&outcome);
            }
            before = outcome;
        }
    }

    /// One round; `None` where it was stopped before its end.
    async fn round(&self, cleaned: &mut Option<Moment>, stop: &CancellationToken) -> Result<Option<Outcome>, Problem> {
        let mut manager = self.open().await?;
        let now = self.parts.clock.now();
        if cleaned.is_none_or(|last| now.since(last) >= CLEAN_INTERVAL) {
            self.clean(&mut manager).await?;
            *cleaned = Some(now);
        }
        let trust = self.trust(&mut manager).await?.id;
        let tried = self.try_key(&mut manager, trust, stop).await;
        let left = within(manager.delete_trust(&TrustRef::Id(trust), true)).await;
        match tried? {
            // What was found counts, whatever became of the rest.
            Some(Outcome::Late) => Ok(Some(Outcome::Late)),
            outcome => left.map(|_| outcome),
        }
    }

    async fn open(&self) -> Result<Manager, Problem> {
        let Parts { management, name, credential, .. } = &self.parts;
        let ledger = within(async { Ok(management.open().await?) }).await?;
        Manager::new(ledger, Actor(format!("canary:{name}")), credential.clone()).map_err(Problem::Pepper)
    }

    /// This canary's trust. It is there already if an earlier round could not delete it.
    async fn trust(&self, manager: &mut Manager) -> Result<Trust, Problem> {
        let name = format!("{PREFIX}{}", self.parts.replica);
        match within(manager.create_trust(&name)).await {
            Err(Problem::Manage(ManageError::Ledger(StoreError::NameTaken(_)))) => {
                within(manager.trust(&TrustRef::Name(name))).await
            }
            made => made,
        }
    }

    /// Issues a key, sees it granted, revokes it and asks for it until it is refused.
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
            expires_in: Some(GRANTED_WITHIN + 2 * CHANGE_TIMEOUT + bound + PROBED_BEYOND + LIFE_LEFT),
        }))
        .await?;
        let message = question(&self.parts.credential, issued.secret.expose());

        let granted = |verdict| matches!(verdict, Verdict::Granted { .. });
        match self.probe(&message, granted, GRANTED_WITHIN, |_, _| (), stop).await {
            None => return Ok(None),
            Some(Verdict::Granted { .. }) => {}
            Some(Verdict::Denied) => return Ok(Some(Outcome::Denied)),
            Some(Verdict::Undecided) => return Err(Problem::Undecided),
        }
        // Once a poll has come to its version it is held: only what is held can be granted too long.
        let polled = settings.poll_interval + settings.poll_timeout;
        if stop.run_until_cancelled(sleep(polled)).await.is_none() {
            return Ok(None);
        }
        self.ask(&message).await;

        within(manager.revoke_key(issued.key.id)).await?;
        // Committed before, so whatever begins too long after this began too long after the commit.
        let revoked = clock.now();
        let (mut last, mut is_late) = (Duration::ZERO, false);
        let note = |began: Moment, verdict| {
            if let Verdict::Granted { is_stale } = verdict {
                last = began.since(revoked);
                // One that is stale says that polls get no answer.
                is_late |= last > bound_of(is_stale);
            }
        };
        let denied = |verdict| verdict == Verdict::Denied;
        let Some(end) = self.probe(&message, denied, bound + PROBED_BEYOND, note, stop).await else { return Ok(None) };
        if !is_late && !denied(end) {
            return Err(Problem::Unconfirmed);
        }
        self.metrics.revocation.observe(last.as_secs_f64());
        Ok(Some(if is_late { Outcome::Late } else { Outcome::Ok }))
    }

    /// Asks until an answer `is_end`, for `limit` at most, and tells `note` when each check began. Returns the last answer;
    /// `None` where it was stopped before.
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

    /// Deletes the trusts of canaries whose replicas are gone without having done so.
    async fn clean(&self, manager: &mut Manager) -> Result<(), Problem> {
        // In this order: whoever has a trust by now is alive when replicas are listed, or gone.
        let trusts = within(manager.trusts()).await?;
        let alive = within(manager.replicas()).await?;
        for trust in trusts {
            let replica = trust.name.strip_prefix(PREFIX).and_then(|id| Uuid::parse_str(id).ok());
            if replica.is_some_and(|id| alive.iter().all(|alive| alive.id != id)) {
                match within(manager.delete_trust(&TrustRef::Id(trust.id), true)).await {
                    // Another canary was quicker.
                    Ok(_) | Err(Problem::Manage(ManageError::Ledger(StoreError::NoTrust(_)))) => {}
                    Err(problem) => return Err(problem),
                }
            }
        }
        Ok(())
    }
}

/// The message that asks for `key` where the first of the configured sources has it.
fn question(credential: &CredentialSettings, key: &str) -> Vec<u8> {
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
        None => ("/".to_owned(), None), // refused at start
    };
    let headers: Vec<_> = header.iter().map(|(name, value)| (*name, value.as_str())).collect();
    client::request(&path, &headers)
}

/// What a change came to, if it did in time.
async fn within<T>(change: impl Future<Output = Result<T, ManageError>>) -> Result<T, Problem> {
    Ok(timeout(CHANGE_TIMEOUT, change).await.map_err(|_| Problem::Late)??)
}

/// What a round came to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    /// Granted, revoked, refused in time.
    Ok,
    /// Granted later than is promised.
    Late,
    /// The good key was refused.
    Denied,
    /// The round could not be made, and why.
    Failed(String),
}

/// Says what has changed with this round.
fn tell(outcome: &Outcome) {
    match outcome {
        Outcome::Ok => tracing::info!("the canary's key is granted and, once revoked, refused in time"),
        Outcome::Late => tracing::error!("the canary's revoked key was granted for longer than is promised"),
        Outcome::Denied => tracing::error!("the canary's key is refused although it is good"),
        Outcome::Failed(problem) => tracing::warn!(problem, "the canary could not make its round"),
    }
}

/// Why a round could not be made.
#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error(transparent)]
    Manage(#[from] ManageError),
    #[error("cannot read the pepper: {0}")]
    Pepper(io::Error),
    #[error("management took longer than {CHANGE_TIMEOUT:?}")]
    Late,
    #[error("the good key could not be decided")]
    Undecided,
    #[error("the database did not confirm the revocation")]
    Unconfirmed,
}

/// What canaries look like from outside.
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
            "Rounds of the canary by outcome: ok, late (granted for longer than is promised), denied (a good key was \
             refused) or failed.",
        );
        let rounds = register(registry, IntCounterVec::new(rounds, &["outcome"]))?;
        let revocation = HistogramOpts::new(
            "trustgate_canary_revocation_seconds",
            "From the acknowledged revocation of the canary's key until the last check that was granted began, in seconds.",
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
    fn the_key_stands_where_the_first_source_looks_for_it() {
        for source in ["header:x-key", "authorization:bearer", "authorization:apikey", "query:key", "cookie:key"] {
            let sources = vec![Source::read(&RawValue::One(source.to_owned())).unwrap()];
            let credential = CredentialSettings { sources, ..CredentialSettings::default() };
            let message = question(&credential, "a-key-of-somebody");
            let found = extract(&credential, &View::parse(&message).unwrap()).key;
            assert_eq!(found.unwrap().expose(), b"a-key-of-somebody", "{source}");
        }
    }
}
