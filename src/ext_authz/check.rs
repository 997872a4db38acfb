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
    decision::{Decision, DenyReason, decide},
    request::View,
    response::{OnFault, Replies, Reply},
    route::{Demands, is_preflight},
};
use crate::{
    base::{
        clock::{Clock, Moment},
        fault::{Fault, quoted},
        log_limit::LogLimit,
        metrics::{ThreadCounter, ThreadCounters, ThreadHistogram, HistogramOpts, Opts, Registry, SHORT_SECONDS, register},
    },
    cache::{Cache, ReadPolicy, api_key::ApiKey},
    freshness::{Freshness, ReplicaView, ReplicaState, deny_list::DenyList, history::Provenance, lease::LeaseState},
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
pub struct Parts {
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
    parts: Parts,
    replies: Replies,
    metrics: CheckMetrics,
    fault_log: LogLimit,
}

/// What a check came to, before it is put into words for Envoy.
type Outcome<'r> = Result<Decision<'r>, Fault>;

impl Checker {
    /// A checker of `parts`.
    ///
    /// # Errors
    /// When a metric of that name exists already.
    pub fn new(parts: Parts, registry: &Registry) -> prometheus::Result<Self> {
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
    /// Safe: a dropped check is counted as cancelled, and what it waited for goes on for others.
    pub async fn check(&self, message: &[u8]) -> Reply {
        match self.try_decide(message) {
            Progress::Done(reply) => reply,
            Progress::Pending(waiting) => self.finish(message, waiting).await,
        }
    }

    /// The same as far as it goes without waiting: what L1 holds, and what needs no record at all.
    #[must_use]
    pub fn try_decide(&self, message: &[u8]) -> Progress {
        let now = self.parts.clock.now();
        // Before anything else: what is found later is judged by this view and its lease.
        let history = self.parts.replica_state.load();
        let lease_state = history.lease_state(now);
        let request = match self.read(message) {
            Ok(request) => request,
            Err(reason) => return Progress::Done(self.denied(reason, now)),
        };
        let key = match &request.subject {
            Ok(Subject::Key(key)) => key.expose(),
            Ok(Subject::Anonymous) => return Progress::Done(self.answer(Ok(Decision::Anonymous), &request, now, false)),
            Err(Refusal::Denied(reason)) => return Progress::Done(self.denied(*reason, now)),
            Err(Refusal::Fault(fault)) => {
                return Progress::Done(self.answer(Err(fault.clone()), &request, now, false));
            }
        };
        let digest = self.parts.hasher.current(key);
        let freshness = self.freshness(&request.demands);
        let lease_state = match (freshness, lease_state) {
            (Freshness::Lease, lease_state) => lease_state,
            (Freshness::Strict, LeaseState::Fresh) => LeaseState::Fresh,
            (Freshness::Strict | Freshness::Live | Freshness::Ttl, _) => LeaseState::Expired,
        };
        if lease_state != LeaseState::Expired || freshness == Freshness::Ttl {
            let entry = self.parts.cache.hit(&history, &digest, now, freshness == Freshness::Ttl);
            // An absence that cannot be confirmed is not one.
            if let Some(entry) = entry.filter(|entry| lease_state != LeaseState::Stale || entry.value().is_some()) {
                let is_its = |stored: &ApiKeyDigest| self.parts.hasher.matches(stored, &digest, key);
                let outcome = self.decide(&digest, entry.value(), is_its, false, &request.demands, now);
                // In the stale window an unknown key gets a fault, so a revoked one must get the same answer.
                let is_stale = lease_state == LeaseState::Stale;
                if !(is_stale && matches!(&outcome, Ok(Decision::Deny(reason)) if reason.is_of_key())) {
                    return Progress::Done(self.answer(outcome, &request, now, is_stale));
                }
            }
        }
        let digests = self.parts.hasher.digests(digest, key);
        let history = Guard::into_inner(history);
        let policy = match (freshness, lease_state) {
            (Freshness::Ttl, _) => ReadPolicy::Age,
            (_, LeaseState::Fresh) => ReadPolicy::Lease(Arc::clone(&history), now),
            (_, LeaseState::Stale | LeaseState::Expired) => ReadPolicy::Store(Arc::clone(&history), now),
        };
        Progress::Pending(Waiting { began: now, history, digests, policy })
    }

    /// Decides what [`Self::try_decide`] could not decide at once, for the same `message`.
    ///
    /// # Cancel safety
    /// As [`Self::check`].
    pub async fn finish(&self, message: &[u8], waiting: Waiting) -> Reply {
        let Waiting { began, history, digests, policy } = waiting;
        let clock = &*self.parts.clock;
        let cancel_guard = CancelGuard { metrics: Some(&self.metrics), clock, began };
        let limit = self.parts.decision.deadline;
        let found = self.parts.cache.find(digests.clone(), &policy);
        let found = timeout(limit, found).await.unwrap_or(Err(Fault::Late { limit }));
        if let Ok(loaded) = &found
            && let Some(version) = loaded.ahead_of(&history)
            && digests.all().any(|digest| self.parts.replica_state.revoked.binds_elsewhere(digest))
        {
            // Made good again, or good in a history that lost its revocation? The next poll tells; without one it binds.
            let left = limit.saturating_sub(clock.now().since(began));
            let _ = timeout(left, self.parts.replica_state.reached(&history, version)).await;
        }
        cancel_guard.disarm();
        // Read once more: nothing of the request was kept while it waited.
        let request = match self.read(message) {
            Ok(request) => request,
            Err(reason) => return self.denied(reason, began),
        };
        let outcome = match &found {
            Ok(loaded) => {
                let elsewhere = loaded.provenance(&history) != Provenance::Known;
                let is_its = |stored: &ApiKeyDigest| digests.contains(stored);
                let value = loaded.entry.value();
                self.decide(&digests.current, value, is_its, elsewhere, &request.demands, clock.now())
            }
            Err(fault) => Err(fault.clone()),
        };
        self.answer(outcome, &request, began, false)
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

    /// What a decision needs of `message`, where it lies.
    fn read<'c, 'm: 'c>(&'c self, message: &'m [u8]) -> Result<Request<'m, 'c>, DenyReason> {
        let view = View::parse(message).map_err(|_| DenyReason::Undecodable)?;
        if !view.is_http {
            return Err(DenyReason::Undecodable);
        }
        let Extracted { key, removals } = extract(&self.parts.credential, &view);
        let demands = match Demands::of(&view) {
            Ok(demands) => demands,
            Err(fault) => {
                return Ok(Request { subject: Err(Refusal::Fault(fault)), demands: Demands::default(), removals });
            }
        };
        let passes = self.parts.decision.preflight == Preflight::Pass && is_preflight(&view);
        let subject = match key {
            _ if passes => Ok(Subject::Anonymous),
            Ok(key) => Ok(Subject::Key(key)),
            Err(CredentialError::Missing) if demands.admits_anonymous() => Ok(Subject::Anonymous),
            Err(error) => Err(Refusal::Denied(error.into())),
        };
        Ok(Request { subject, demands, removals })
    }

    /// What the route demands, or the configuration says. Tables that do not name their changes cannot confirm anything
    /// by a lease: there, a route that demands one gets what is fresher.
    fn freshness(&self, demands: &Demands<'_>) -> Freshness {
        match demands.freshness.unwrap_or(self.parts.freshness) {
            Freshness::Lease | Freshness::Strict if !self.parts.tracks_changes => Freshness::Live,
            freshness => freshness,
        }
    }

    /// What `record`, found by `digest`, comes to. `elsewhere`: it is of a history that no poll of this check's view has
    /// confirmed.
    fn decide<'r>(
        &self,
        digest: &ApiKeyDigest,
        record: Option<&'r Record>,
        is_its: impl FnOnce(&ApiKeyDigest) -> bool,
        elsewhere: bool,
        demands: &Demands<'_>,
        now: Moment,
    ) -> Outcome<'r> {
        let replica_state = &self.parts.replica_state;
        // A value was read from the database, so its clock is known by now.
        let now = replica_state.database_clock.at(now).ok_or(Fault::Unconfirmed)?;
        // Without the recorded pepper this server cannot find new keys, so it must not deny them as unknown.
        if record.is_none() && !replica_state.pepper.identifies_all() {
            return Err(Fault::Pepper);
        }
        let decision = decide(record, demands, now);
        let Some(record) = record.filter(|_| matches!(decision, Decision::Allow(_))) else { return Ok(decision) };
        // A map found it; what was hashed from this request says once more that it is the one, in constant time.
        if !is_its(&record.digest) {
            return Ok(Decision::Deny(DenyReason::Unknown));
        }
        if self.parts.denials.denies(digest, record, now) {
            return Ok(Decision::Deny(DenyReason::DenyListed));
        }
        // What was revoked in a history that was lost stays so, until the present one speaks of it.
        let is_bound = [digest, &record.digest]
            .into_iter()
            .any(|digest| replica_state.revoked.binds(digest) || (elsewhere && replica_state.revoked.binds_elsewhere(digest)));
        Ok(if is_bound { Decision::Deny(DenyReason::Revoked) } else { decision })
    }

    /// The reply to a request that began at `began`. `is_stale`: whether it rests on what the lease no longer covers.
    fn answer(&self, outcome: Outcome<'_>, request: &Request<'_, '_>, began: Moment, is_stale: bool) -> Reply {
        let took = self.parts.clock.now().since(began);
        let limit = self.parts.decision.deadline;
        match outcome {
            // What was relied on when the check began may have ended since.
            Ok(Decision::Allow(_)) if took > limit => self.failed(&Fault::Late { limit }, began, took),
            Ok(decision) => {
                if is_stale && matches!(decision, Decision::Allow(_)) {
                    self.metrics.stale.inc();
                }
                let counter = match &decision {
                    Decision::Allow(_) => &self.metrics.allowed,
                    Decision::Anonymous => &self.metrics.anonymous,
                    Decision::Deny(reason) => &self.metrics.denied[*reason as usize],
                };
                self.metrics.observe(counter, took);
                self.replies.decision(&decision, &request.removals, is_stale)
            }
            Err(fault) => self.failed(&fault, began, took),
        }
    }

    fn denied(&self, reason: DenyReason, began: Moment) -> Reply {
        let took = self.parts.clock.now().since(began);
        self.metrics.observe(&self.metrics.denied[reason as usize], took);
        self.replies.denial(reason)
    }

    fn failed(&self, fault: &Fault, began: Moment, took: Duration) -> Reply {
        self.metrics.observe(&self.metrics.fault, took);
        if let Some(suppressed) = self.fault_log.permit(began) {
            tracing::warn!(%fault, suppressed, "a check could not be decided");
        }
        self.replies.fault()
    }
}

/// What a check came to without waiting.
pub enum Progress {
    /// A reply.
    Done(Reply),
    /// Redis or the database has to be asked: [`Checker::finish`] does.
    Pending(Waiting),
}

/// A check that has to wait. Holds nothing of its message.
pub struct Waiting {
    began: Moment,
    history: Arc<ReplicaView>,
    digests: Digests,
    policy: ReadPolicy,
}

/// What a decision needs of a request. `'m`: the message, `'c`: the checker.
struct Request<'m, 'c> {
    subject: Result<Subject<'m>, Refusal>,
    demands: Demands<'m>,
    removals: Removals<'c>,
}

/// Who is asked about.
enum Subject<'m> {
    /// Whoever holds this key.
    Key(Key<'m>),
    /// Nobody: the request may pass without a key.
    Anonymous,
}

/// Why a request ends before a record is looked for.
enum Refusal {
    Denied(DenyReason),
    Fault(Fault),
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

/// Checks answered. Children are resolved here, since looking them up hashes and locks.
struct CheckMetrics {
    allowed: ThreadCounter,
    anonymous: ThreadCounter,
    denied: [ThreadCounter; DenyReason::ALL.len()],
    fault: ThreadCounter,
    cancelled: ThreadCounter,
    stale: ThreadCounter,
    seconds: ThreadHistogram,
}

impl CheckMetrics {
    fn register(registry: &Registry) -> prometheus::Result<Self> {
        let checks = ThreadCounters::new(
            Opts::new(
                "trustgate_checks_total",
                "Checks by decision (allow, deny, fault, cancelled) and the reason for it.",
            ),
            &["decision", "reason"],
        );
        let checks = register(registry, checks)?;
        let seconds = HistogramOpts::new(
            "trustgate_check_duration_seconds",
            "How long checks took from the whole message to the reply, in seconds.",
        );
        let stale = Opts::new(
            "trustgate_stale_grants_total",
            "Grants on what the database has not confirmed within freshness.lease, while it did not answer.",
        );
        let count = |decision, reason| checks.with(&[decision, reason]);
        Ok(Self {
            allowed: count("allow", "key"),
            anonymous: count("allow", "anonymous"),
            denied: DenyReason::ALL.map(|reason| count("deny", reason.as_str())),
            fault: count("fault", "fault"),
            cancelled: count("cancelled", "cancelled"),
            stale: register(registry, ThreadCounters::new(stale, &[]))?.with(&[]),
            seconds: register(registry, ThreadHistogram::new(seconds.buckets(SHORT_SECONDS.to_vec())))?,
        })
    }

    fn observe(&self, counter: &ThreadCounter, took: Duration) {
        counter.inc();
        self.seconds.observe(took);
    }
}
