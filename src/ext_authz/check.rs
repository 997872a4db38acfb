//! A check from message to reply: one orchestration for every transport.
//!
//! Synchronous on an L1 hit; only a miss waits. Never answers with a gRPC error of its own making unless
//! `decision.on_fault = "error"` asks for it.

use std::{sync::Arc, time::Duration};

use arc_swap::Guard;
use tokio::time::timeout;

use super::{
    credential::{
        CredentialSettings, Hasher,
        extract::{CredentialError, Extracted, Key, Removals, extract},
    },
    decision::{Basis, Decision, DenyReason, decide},
    metrics::CheckMetrics,
    request::View,
    response::{OnFault, Replies, Reply},
    route::{Demands, is_preflight},
};
use crate::{
    base::{
        clock::{Clock, Moment},
        fault::{Fault, quoted},
        log_limit::LogLimit,
        metrics::Registry,
    },
    cache::{Cache, Loaded, ReadContext, ReadPolicy, api_key::ApiKey},
    freshness::{Freshness, ReplicaState, deny_list::DenyList, history::Provenance},
    record::{ApiKeyDigest, Digests, Record},
};

crate::settings! {
    /// What is answered.
    pub struct DecisionSettings in "decision" {
        /// What Envoy is told when we cannot decide: `deny` (503, always enforced), `error` (the gRPC error UNAVAILABLE:
        /// Envoy's retry, `failure_mode_allow` and `status_on_error` decide) or `error_response` (503 that counts as an
        /// error; Envoy 1.37 and later).
        on_fault: OnFault = "deny",
        /// What happens to a CORS preflight: `check` it like any request, or let it `pass` as anonymous (for proxies
        /// that ask us before they apply CORS, such as Istio).
        preflight: Preflight = "check",
        /// How long one check may take in all.
        deadline: Duration = "150ms",
        /// Envoy's own timeout for the check, `grpc_service.timeout` of its filter, or less. `deadline` must be below it.
        envoy_timeout: Duration = "200ms",
        /// What `Retry-After` tells clients when we cannot decide; whole seconds.
        retry_after: Duration = "1s",
    }
}

crate::setting_enum! {
    /// What happens to a CORS preflight.
    pub enum Preflight ("\"check\" or \"pass\"") {
        /// Checked like any request.
        Check = "check",
        /// Passes as anonymous.
        Pass = "pass",
    }
}

/// What a checker is made of.
pub struct CheckerParts {
    /// What is answered.
    pub decision: DecisionSettings,
    /// Where credentials stand.
    pub credential: CredentialSettings,
    /// How fresh records must be where a route does not say so.
    pub freshness: Freshness,
    /// Whether the tables name their changes; without that there is no lease.
    pub tracks_changes: bool,
    /// From key to digest.
    pub hasher: Hasher,
    /// Where records are found.
    pub cache: Arc<Cache<ApiKey>>,
    /// What this replica knows of the store's history.
    pub replica_state: Arc<ReplicaState>,
    /// What is denied whatever the store says.
    pub denials: Arc<DenyList>,
    /// The time.
    pub clock: Arc<dyn Clock>,
}

/// Decides checks.
pub struct Checker {
    parts: CheckerParts,
    replies: Replies,
    metrics: CheckMetrics,
    fault_log: LogLimit,
}

/// The result of a check, before it is encoded for Envoy.
type Outcome<'r> = Result<Decision<'r>, Fault>;

impl Checker {
    /// A checker of `parts`.
    ///
    /// # Errors
    /// When a metric of that name exists already.
    pub fn new(parts: CheckerParts, registry: &Registry) -> prometheus::Result<Self> {
        let replies = Replies::new(parts.decision.on_fault, parts.decision.retry_after);
        Ok(Self {
            replies,
            metrics: CheckMetrics::register(registry)?,
            parts,
            fault_log: LogLimit::every(FAULT_LOG_INTERVAL),
        })
    }

    /// Decides the request in `message`, the bytes of a `CheckRequest`.
    ///
    /// # Cancel safety
    /// Safe: a dropped check is counted as cancelled, and a load that it waited for continues for other checks.
    pub async fn check(&self, message: &[u8]) -> Reply {
        match self.try_decide(message) {
            Progress::Done(reply) => reply,
            Progress::Pending(waiting) => self.finish(message, waiting).await,
        }
    }

    /// Decides the request without waiting, if L1 has a usable entry or the decision needs none.
    #[must_use]
    pub fn try_decide(&self, message: &[u8]) -> Progress {
        let began = self.parts.clock.now();
        // Load the view and the state of its lease first: the freshness rule holds for values that are looked up later.
        let view = self.parts.replica_state.load();
        let lease = view.lease_state(began);
        let request = match self.read(message) {
            Ok(request) => request,
            Err(refusal) => return Progress::Done(self.refused(&refusal, began)),
        };
        let Subject::Key(key) = &request.subject else {
            return Progress::Done(self.answer(Ok(Decision::Anonymous), &request, Basis::Confirmed, began));
        };
        let digest = self.parts.hasher.current(key.expose());
        let policy = ReadPolicy::new(self.freshness(&request.demands), lease);
        if let Some(entry) = self.parts.cache.hit(policy, &view, &digest, began) {
            let found = Found { record: entry.value(), digest: &digest, provenance: Provenance::Known };
            let is_its = |stored: &ApiKeyDigest| self.parts.hasher.matches(stored, &digest, key.expose());
            let outcome = self.decide(&found, is_its, &request.demands, began);
            let denies_key = matches!(&outcome, Ok(Decision::Deny(reason)) if reason.is_of_key());
            if policy != ReadPolicy::GrantOnly {
                return Progress::Done(self.answer(outcome, &request, Basis::Confirmed, began));
            }
            if !denies_key {
                return Progress::Done(self.answer(outcome, &request, Basis::Stale, began));
            }
        }
        let digests = self.parts.hasher.digests(digest, key.expose());
        Progress::Pending(Waiting { digests, context: ReadContext { policy, view: Guard::into_inner(view), began } })
    }

    /// Decides a check that [`Self::try_decide`] left pending, for the same `message`.
    ///
    /// # Cancel safety
    /// As [`Self::check`].
    pub async fn finish(&self, message: &[u8], waiting: Waiting) -> Reply {
        let Waiting { digests, context } = waiting;
        let began = context.began;
        let clock = &*self.parts.clock;
        let cancel_guard = CancelGuard { metrics: Some(&self.metrics), clock, began };
        let limit = self.parts.decision.deadline;
        let loaded = self.parts.cache.find(digests.clone(), &context);
        let loaded = timeout(limit, loaded).await.unwrap_or(Err(Fault::Late { limit }));
        if let Ok(loaded) = &loaded {
            self.await_word_on_lost_revocation(loaded, &digests, &context).await;
        }
        cancel_guard.disarm();
        // Read the message again: a pending check keeps nothing of it.
        let request = match self.read(message) {
            Ok(request) => request,
            Err(refusal) => return self.refused(&refusal, began),
        };
        let outcome = match &loaded {
            Ok(loaded) => {
                let provenance = loaded.provenance(&context.view);
                let found = Found { record: loaded.entry.value(), digest: &digests.current, provenance };
                self.decide(&found, |stored| digests.contains(stored), &request.demands, clock.now())
            }
            Err(fault) => Err(fault.clone()),
        };
        self.answer(outcome, &request, Basis::Confirmed, began)
    }

    /// Waits for the next poll if the key was revoked in a database history that was lost. It may have been enabled again
    /// since, which the poll finds out; if none comes in time, [`Self::decide`] denies the key.
    async fn await_word_on_lost_revocation(&self, loaded: &Loaded<ApiKey>, digests: &Digests, context: &ReadContext) {
        let replica_state = &self.parts.replica_state;
        if let Some(version) = loaded.ahead_of(&context.view)
            && digests.all().any(|digest| replica_state.revoked.binds_elsewhere(digest))
        {
            let elapsed = self.parts.clock.now().since(context.began);
            let left = self.parts.decision.deadline.saturating_sub(elapsed);
            let _ = timeout(left, replica_state.reached(&context.view, version)).await;
        }
    }

    /// The reply to a message that was refused unread.
    pub fn refuse(&self, reason: DenyReason) -> Reply {
        self.denied(reason, self.parts.clock.now())
    }

    /// The reply to a message that there is no room for.
    pub fn shed(&self, limit: &'static str) -> Reply {
        self.failed(&Fault::Overloaded { limit }, self.parts.clock.now(), Duration::ZERO)
    }

    /// Counts a message that did not arrive within `limit`. `net::call` answers it with HTTP 408, not with a [`Reply`].
    pub fn late(&self, limit: Duration) {
        self.failed(&Fault::Late { limit }, self.parts.clock.now(), limit);
    }

    /// The reply to a message that is compressed, by the algorithm that the header `grpc-encoding` names.
    pub fn compressed(&self, encoding: &[u8]) -> Reply {
        self.failed(&Fault::Compressed { encoding: quoted(encoding) }, self.parts.clock.now(), Duration::ZERO)
    }

    /// Counts a check whose caller left before its message had arrived.
    pub fn abandoned(&self) {
        self.metrics.observe(&self.metrics.cancelled, Duration::ZERO);
    }

    /// The parts of `message` that a decision needs, borrowed from it.
    fn read<'c, 'm: 'c>(&'c self, message: &'m [u8]) -> Result<Request<'m, 'c>, Refusal> {
        let view = View::parse(message).map_err(|_| Refusal::Denied(DenyReason::Undecodable))?;
        if !view.is_http {
            return Err(Refusal::Denied(DenyReason::Undecodable));
        }
        let Extracted { key, removals } = extract(&self.parts.credential, &view);
        let demands = Demands::of(&view).map_err(Refusal::Fault)?;
        let passes = self.parts.decision.preflight == Preflight::Pass && is_preflight(&view);
        let subject = match key {
            _ if passes => Subject::Anonymous,
            Ok(key) => Subject::Key(key),
            Err(CredentialError::Missing) if demands.admits_anonymous() => Subject::Anonymous,
            Err(error) => return Err(Refusal::Denied(error.into())),
        };
        Ok(Request { subject, demands, removals })
    }

    /// The freshness that the route demands, or else the configured one. Tables that do not track their changes cannot
    /// confirm anything by a lease, so a route that demands a lease there gets `live`, which is stricter.
    fn freshness(&self, demands: &Demands<'_>) -> Freshness {
        match demands.freshness.unwrap_or(self.parts.freshness) {
            Freshness::Lease | Freshness::Strict if !self.parts.tracks_changes => Freshness::Live,
            freshness => freshness,
        }
    }

    /// Decides by `found`. `is_its` compares the stored digest with the presented key, in constant time.
    fn decide<'r>(
        &self,
        found: &Found<'r, '_>,
        is_its: impl FnOnce(&ApiKeyDigest) -> bool,
        demands: &Demands<'_>,
        now: Moment,
    ) -> Outcome<'r> {
        let replica_state = &self.parts.replica_state;
        // The value was read from the database, so the offset of the database's clock is known by now.
        let now = replica_state.database_clock.at(now).ok_or(Fault::Unconfirmed)?;
        // Without the recorded pepper this server cannot find new keys, so it must not deny them as unknown.
        if found.record.is_none() && !replica_state.pepper.identifies_all() {
            return Err(Fault::Pepper);
        }
        let decision = decide(found.record, demands, now);
        let Some(record) = found.record.filter(|_| matches!(decision, Decision::Allow(_))) else { return Ok(decision) };
        // The map lookup is not constant-time, so compare the digest again in constant time.
        if !is_its(&record.digest) {
            return Ok(Decision::Deny(DenyReason::Unknown));
        }
        if self.parts.denials.denies(found.digest, record, now) {
            return Ok(Decision::Deny(DenyReason::DenyListed));
        }
        // A key that was revoked in a lost history stays revoked until the present history changes it.
        let is_unconfirmed = found.provenance != Provenance::Known;
        let is_bound = [found.digest, &record.digest].into_iter().any(|digest| {
            replica_state.revoked.binds(digest) || (is_unconfirmed && replica_state.revoked.binds_elsewhere(digest))
        });
        Ok(if is_bound { Decision::Deny(DenyReason::Revoked) } else { decision })
    }

    /// The reply to a request whose check began at `began`.
    fn answer(&self, outcome: Outcome<'_>, request: &Request<'_, '_>, basis: Basis, began: Moment) -> Reply {
        let took = self.parts.clock.now().since(began);
        let limit = self.parts.decision.deadline;
        match outcome {
            // The lease that the check relied on may have expired since.
            Ok(Decision::Allow(_)) if took > limit => self.failed(&Fault::Late { limit }, began, took),
            Ok(decision) => {
                if basis == Basis::Stale && matches!(decision, Decision::Allow(_)) {
                    self.metrics.stale.inc();
                }
                let counter = match &decision {
                    Decision::Allow(_) => &self.metrics.allowed,
                    Decision::Anonymous => &self.metrics.anonymous,
                    Decision::Deny(reason) => &self.metrics.denied[*reason as usize],
                };
                self.metrics.observe(counter, took);
                self.replies.decision(&decision, &request.removals, basis)
            }
            Err(fault) => self.failed(&fault, began, took),
        }
    }

    fn refused(&self, refusal: &Refusal, began: Moment) -> Reply {
        match refusal {
            Refusal::Denied(reason) => self.denied(*reason, began),
            Refusal::Fault(fault) => self.failed(fault, began, self.parts.clock.now().since(began)),
        }
    }

    fn denied(&self, reason: DenyReason, began: Moment) -> Reply {
        let took = self.parts.clock.now().since(began);
        self.metrics.observe(&self.metrics.denied[reason as usize], took);
        self.replies.denial(reason)
    }

    fn failed(&self, fault: &Fault, began: Moment, took: Duration) -> Reply {
        self.metrics.observe(self.metrics.fault(fault.reason()), took);
        if let Some(suppressed) = self.fault_log.permit(began) {
            tracing::warn!(%fault, suppressed, "a check could not be decided");
        }
        self.replies.fault()
    }
}

/// How far a check got without waiting.
pub enum Progress {
    /// The reply.
    Done(Reply),
    /// Redis or the database must be asked: [`Checker::finish`] does so.
    Pending(Waiting),
}

/// A check that has to wait. Keeps nothing of its message.
pub struct Waiting {
    digests: Digests,
    context: ReadContext,
}

/// The parts of a request that a decision needs. `'m`: the message, `'c`: the checker.
struct Request<'m, 'c> {
    subject: Subject<'m>,
    demands: Demands<'m>,
    removals: Removals<'c>,
}

/// On whose behalf a request is made.
enum Subject<'m> {
    /// The holder of this key.
    Key(Key<'m>),
    /// The request may pass without a key.
    Anonymous,
}

/// Why a check ends before a record is looked up.
enum Refusal {
    Denied(DenyReason),
    Fault(Fault),
}

/// What the cache or the store found for a key. `'r`: the record.
struct Found<'r, 'd> {
    /// `None`: no such key.
    record: Option<&'r Record>,
    /// The digest of the presented key under the current pepper.
    digest: &'d ApiKeyDigest,
    /// How the value relates to the history that this replica knows.
    provenance: Provenance,
}

/// Counts a check that waits as cancelled if it is dropped: Envoy gave up.
struct CancelGuard<'a> {
    /// `None` once the check has its answer.
    metrics: Option<&'a CheckMetrics>,
    clock: &'a dyn Clock,
    began: Moment,
}

impl CancelGuard<'_> {
    fn disarm(mut self) {
        self.metrics = None;
    }
}

impl Drop for CancelGuard<'_> {
    fn drop(&mut self) {
        if let Some(metrics) = self.metrics {
            metrics.observe(&metrics.cancelled, self.clock.now().since(self.began));
        }
    }
}

/// How often faults are logged: an outage must not become a flood of lines.
const FAULT_LOG_INTERVAL: Duration = Duration::from_secs(1);
