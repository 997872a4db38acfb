//! Runs one check, from the bytes of the message to the reply. This module does not depend on the transport.
//!
//! A check that hits in L1 returns without waiting; a miss waits for Redis or the database. A fault becomes a gRPC
//! error only with `decision.on_fault = "error"`.

use std::{sync::Arc, time::Duration};

use arc_swap::Guard;
use tokio::time::timeout;

use super::{
    credential::{
        CredentialSettings, Hasher,
        extract::{CredentialError, Extracted, PresentedKey, Removals, extract},
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
    /// How trustgate answers checks, and how long a check may take.
    pub struct DecisionSettings in "decision" {
        /// The answer to Envoy when trustgate cannot decide. `deny`: a denial with 503, which Envoy enforces regardless
        /// of its `failure_mode_allow`. `error`: the gRPC error UNAVAILABLE, so that Envoy's retry policy,
        /// `failure_mode_allow` and `status_on_error` apply. `error_response`: a 503 that Envoy counts as an error, so
        /// that `failure_mode_allow` applies (Envoy 1.37 and later; an older Envoy denies with 403).
        on_fault: OnFault = "deny",
        /// How to treat a CORS preflight request. `check`: like any other request. `pass`: let the preflight pass as
        /// anonymous. Set `pass` for proxies that call trustgate before they apply CORS, such as Istio.
        preflight: Preflight = "check",
        /// The maximum duration of a check. If a check takes longer, trustgate answers as `on_fault` says. The sum of
        /// `store.read_timeout` and `redis.timeout` must not exceed the deadline.
        deadline: Duration = "150ms",
        /// Envoy's timeout for a check (`grpc_service.timeout` of the `ext_authz` filter), or a shorter time.
        /// `deadline` must be shorter than `envoy_timeout`.
        envoy_timeout: Duration = "200ms",
        /// The value of the `Retry-After` header that clients receive when trustgate cannot decide. Rounded down to
        /// whole seconds; at least one second.
        retry_after: Duration = "1s",
    }
}

crate::setting_enum! {
    /// How to treat a CORS preflight.
    pub enum Preflight ("\"check\" or \"pass\"") {
        /// Check the preflight like any other request.
        Check = "check",
        /// Let the preflight pass as anonymous.
        Pass = "pass",
    }
}

/// The dependencies of a [`Checker`].
pub struct CheckerParts {
    /// The section `[decision]`.
    pub decision: DecisionSettings,
    /// The section `[credential]`.
    pub credential: CredentialSettings,
    /// The freshness for routes that do not set `trustgate.freshness`.
    pub freshness: Freshness,
    /// True if the tables have a change log. Without a change log, there is no lease.
    pub tracks_changes: bool,
    /// Computes the digests of keys.
    pub hasher: Hasher,
    /// Finds records in L1, Redis and the database.
    pub cache: Arc<Cache<ApiKey>>,
    /// The changes that this replica has applied, and its lease.
    pub replica_state: Arc<ReplicaState>,
    /// The deny list, which applies even to keys that are valid in the store.
    pub denials: Arc<DenyList>,
    /// The clock for deadlines, the lease and metrics.
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
type DecisionResult<'r> = Result<Decision<'r>, Fault>;

impl Checker {
    /// Creates a checker from `parts` and registers its metrics.
    ///
    /// # Errors
    /// If `registry` already has one of the metrics.
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
        // Read the lease before looking up the entry. In the other order, a poll in between could invalidate the entry
        // and renew the lease, and this check would use the outdated entry under the renewed lease.
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
            let found = FoundRecord { record: entry.value(), digest: &digest, provenance: Provenance::Known };
            let matches_key = |stored: &ApiKeyDigest| self.parts.hasher.matches(stored, &digest, key.expose());
            let outcome = self.decide(&found, matches_key, &request.demands, began);
            let basis = if policy == ReadPolicy::GrantOnly { Basis::Stale } else { Basis::Confirmed };
            let denies_key = matches!(&outcome, Ok(Decision::Deny(reason)) if reason.is_of_key());
            // While the lease is stale, an unknown key gets a fault. Do not serve a cached denial of a key either: the
            // different answer would reveal that the key exists.
            if basis == Basis::Confirmed || !denies_key {
                return Progress::Done(self.answer(outcome, &request, basis, began));
            }
        }
        let digests = self.parts.hasher.digests(digest, key.expose());
        Progress::Pending(Waiting { digests, context: ReadContext { policy, view: Guard::into_inner(view), began } })
    }

    /// Decides a check that [`Self::try_decide`] left pending, for the same `message`.
    ///
    /// # Cancel safety
    /// Same as [`Self::check`].
    pub async fn finish(&self, message: &[u8], waiting: Waiting) -> Reply {
        let Waiting { digests, context } = waiting;
        let began = context.began;
        let clock = &*self.parts.clock;
        let cancel_guard = CancelGuard { metrics: Some(&self.metrics), clock, began };
        let limit = self.parts.decision.deadline;
        let loaded = self.parts.cache.find(digests.clone(), &context);
        let loaded = timeout(limit, loaded).await.unwrap_or(Err(Fault::Late { limit }));
        if let Ok(loaded) = &loaded {
            self.await_poll_after_lost_revocation(loaded, &digests, &context).await;
        }
        cancel_guard.disarm();
        // Parse the message again, because a pending check does not borrow from the message.
        let request = match self.read(message) {
            Ok(request) => request,
            Err(refusal) => return self.refused(&refusal, began),
        };
        let outcome = match &loaded {
            Ok(loaded) => {
                let provenance = loaded.provenance(&context.view);
                let found = FoundRecord { record: loaded.entry.value(), digest: &digests.current, provenance };
                self.decide(&found, |stored| digests.contains(stored), &request.demands, clock.now())
            }
            Err(fault) => Err(fault.clone()),
        };
        self.answer(outcome, &request, Basis::Confirmed, began)
    }

    /// If the record is newer than the last poll and this replica has seen the key revoked before, waits for a poll:
    /// the database may have been restored to a state in which the key is still valid. If no poll finishes before the
    /// deadline, [`Self::decide`] denies the key.
    async fn await_poll_after_lost_revocation(
        &self,
        loaded: &Loaded<ApiKey>,
        digests: &Digests,
        context: &ReadContext,
    ) {
        let replica_state = &self.parts.replica_state;
        if let Some(version) = loaded.ahead_of(&context.view)
            && digests.all().any(|digest| replica_state.revoked.binds_elsewhere(digest))
        {
            let elapsed = self.parts.clock.now().since(context.began);
            let left = self.parts.decision.deadline.saturating_sub(elapsed);
            let _ = timeout(left, replica_state.reached(&context.view, version)).await;
        }
    }

    /// Returns the reply to a message that the transport refuses because of its size or framing, and counts the denial.
    pub fn refuse(&self, reason: DenyReason) -> Reply {
        self.denied(reason, self.parts.clock.now())
    }

    /// Returns the reply to a message that would exceed `limit`, a limit of this server, and counts the fault.
    pub fn shed(&self, limit: &'static str) -> Reply {
        self.failed(&Fault::Overloaded { limit }, self.parts.clock.now(), Duration::ZERO)
    }

    /// Counts a fault for a message that did not arrive within `limit`. `grpc::call` answers such a message with HTTP
    /// 408, not with a [`Reply`].
    pub fn late(&self, limit: Duration) {
        self.failed(&Fault::Late { limit }, self.parts.clock.now(), limit);
    }

    /// Returns the reply to a compressed message, and counts the fault. `encoding` is the value of the header
    /// `grpc-encoding`.
    pub fn compressed(&self, encoding: &[u8]) -> Reply {
        self.failed(&Fault::Compressed { encoding: quoted(encoding) }, self.parts.clock.now(), Duration::ZERO)
    }

    /// Counts a check as cancelled because its caller ended the stream before the message was complete.
    pub fn abandoned(&self) {
        self.metrics.observe(&self.metrics.cancelled, Duration::ZERO);
    }

    /// Parses `message` into the parts that a decision needs. The parts borrow from `message`.
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

    /// Returns the freshness that the route demands, or else the configured freshness. Without a change log there is no
    /// lease: `live`, which is stricter, then replaces `lease` and `strict`.
    fn freshness(&self, demands: &Demands<'_>) -> Freshness {
        match demands.freshness.unwrap_or(self.parts.freshness) {
            Freshness::Lease | Freshness::Strict if !self.parts.tracks_changes => Freshness::Live,
            freshness => freshness,
        }
    }

    /// Decides based on `found`. `matches_key` compares the stored digest with the presented key, in constant time.
    fn decide<'r>(
        &self,
        found: &FoundRecord<'r, '_>,
        matches_key: impl FnOnce(&ApiKeyDigest) -> bool,
        demands: &Demands<'_>,
        now: Moment,
    ) -> DecisionResult<'r> {
        let replica_state = &self.parts.replica_state;
        // Polls and database reads set `database_clock`. Before the database first answers, expiry cannot be
        // decided.
        let now = replica_state.database_clock.at(now).ok_or(Fault::ClockUnknown)?;
        // Without the pepper that the database records, this server cannot find keys that were issued with that pepper,
        // so it must not deny a key as unknown.
        if found.record.is_none() && !replica_state.pepper.identifies_all() {
            return Err(Fault::Pepper);
        }
        let decision = decide(found.record, demands, now);
        let Some(record) = found.record.filter(|_| matches!(decision, Decision::Allow(_))) else { return Ok(decision) };
        // The map lookup is not constant-time, so compare the digest again in constant time.
        if !matches_key(&record.digest) {
            return Ok(Decision::Deny(DenyReason::Unknown));
        }
        if self.parts.denials.denies(found.digest, record, now) {
            return Ok(Decision::Deny(DenyReason::DenyListed));
        }
        // A key that was revoked in a lost database history stays denied until the current history changes the key.
        let is_unconfirmed = found.provenance != Provenance::Known;
        let is_bound = [found.digest, &record.digest].into_iter().any(|digest| {
            replica_state.revoked.binds(digest) || (is_unconfirmed && replica_state.revoked.binds_elsewhere(digest))
        });
        Ok(if is_bound { Decision::Deny(DenyReason::Revoked) } else { decision })
    }

    /// Counts the outcome of a check that began at `began`, and returns the reply.
    fn answer(&self, outcome: DecisionResult<'_>, request: &Request<'_, '_>, basis: Basis, began: Moment) -> Reply {
        let took = self.parts.clock.now().since(began);
        let limit = self.parts.decision.deadline;
        match outcome {
            // Do not grant after the deadline: the lease that was read at `began` may have expired.
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
            tracing::warn!(%fault, suppressed, "check could not be decided");
        }
        self.replies.fault()
    }
}

/// The state of a check after [`Checker::try_decide`].
pub enum Progress {
    /// The check is decided; this is its reply.
    Done(Reply),
    /// The check needs Redis or the database: [`Checker::finish`] waits for them.
    Pending(Waiting),
}

/// A pending check. It does not borrow from the message.
pub struct Waiting {
    digests: Digests,
    context: ReadContext,
}

/// The parts of a request that a decision needs. `'m` is the lifetime of the message, `'c` the lifetime of the checker.
struct Request<'m, 'c> {
    subject: Subject<'m>,
    demands: Demands<'m>,
    removals: Removals<'c>,
}

/// The caller of a request.
enum Subject<'m> {
    /// A caller with this key.
    Key(PresentedKey<'m>),
    /// A caller without an identity, whose request may pass without a key.
    Anonymous,
}

/// Why a check ends before a record is looked up.
enum Refusal {
    Denied(DenyReason),
    Fault(Fault),
}

/// The result of a lookup in the cache or the store. `'r` is the lifetime of the record.
struct FoundRecord<'r, 'd> {
    /// `None`: the store has no such key.
    record: Option<&'r Record>,
    /// The digest of the presented key with the current pepper.
    digest: &'d ApiKeyDigest,
    /// The relation between the record and the database history that this replica has applied.
    provenance: Provenance,
}

/// Counts a pending check as cancelled if it is dropped before it is decided, which happens when Envoy gives up.
struct CancelGuard<'a> {
    /// `None` once the guard is disarmed.
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

/// Minimum interval between two log lines about faults, so that an outage does not flood the log.
const FAULT_LOG_INTERVAL: Duration = Duration::from_secs(1);
