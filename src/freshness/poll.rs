//! The poll: asks the store what was committed, again and again, tells the views, and keeps the store's side in order.
//!
//! Never touches a cache, and never ends because the store failed. Runs on a thread of its own, so that nothing else can
//! hold it up.

use std::{collections::VecDeque, future::pending, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    Applied, FreshnessSettings, ReplicaState,
    lease::LeaseState,
    pepper::{Compared, FileState, Peppers},
};
use crate::{
    base::{
        clock::Clock,
        fault::{Fault, Tier},
        jitter::Jitter,
        metrics::{
            Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, SHORT_SECONDS,
            register,
        },
    },
    record::Version,
    store::{Heartbeat, Lookup, PollError, Polled, Tended},
};

/// A sign of life for whoever waits for replicas, at least this often.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);
/// How soon a report that failed is tried again while polls are answered.
const REPORT_AGAIN: Duration = Duration::from_secs(1);
/// How long a sign of life, or mending the store's side, may take.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);
/// How often versions that nobody needs are deleted. Every replica does it; one at a time has any effect.
const PRUNE_INTERVAL: Duration = Duration::from_secs(30);
/// And how soon again while there is more to delete than one attempt may.
const PRUNE_AGAIN: Duration = Duration::from_secs(1);
/// How often the store's side is mended at most, while it does not name all changes.
const RESTORE_INTERVAL: Duration = Duration::from_secs(1);
/// Polls that hints may cause, at most, in [`HINTED_PERIOD`].
const HINTED_MAX: usize = 20;
/// See [`HINTED_MAX`].
const HINTED_PERIOD: Duration = Duration::from_secs(1);
/// Wait before listening again after the connection for hints broke.
const LISTEN_WAIT: Duration = Duration::from_secs(1);
/// By how much the wall clock and the boot clock may drift apart between two polls: more is a pause that the boot clock
/// slept through.
const CLOCK_STEP_MAX: Duration = Duration::from_secs(1);
/// What is added to the time that a sign of life covers: for the way of the sign itself.
const SIGN_MARGIN: Duration = Duration::from_millis(200);

/// What the poll and the lease look like from outside.
#[derive(Clone)]
pub struct PollMetrics {
    store_up: IntGauge,
    applied_version: IntGauge,
    lease_age: Gauge,
    bound: Gauge,
    latency: Histogram,
    lost: IntCounter,
    confirmed: IntCounter,
    unanswered: IntCounter,
    unusable: IntCounter,
}

impl PollMetrics {
    /// Declares the metrics.
    ///
    /// # Errors
    /// As [`register`].
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let gauge = |name, help| register(registry, IntGauge::with_opts(Opts::new(name, help)));
        let seconds = |name, help| register(registry, Gauge::with_opts(Opts::new(name, help)));
        let polls = IntCounterVec::new(
            Opts::new(
                "trustgate_polls_total",
                "Polls of the database by outcome: ok, unanswered, or unusable (an answer that confirms nothing).",
            ),
            &["outcome"],
        );
        let polls = register(registry, polls)?;
        let latency = HistogramOpts::new(
            "trustgate_revocation_latency_seconds",
            "From the commit of a change until it was applied here, by the database's clock, in seconds.",
        );
        let mut buckets = SHORT_SECONDS.to_vec();
        buckets.extend([0.5, 1.0, 2.5]);
        Ok(Self {
            store_up: gauge("trustgate_store_up", "1 while the database answers the poll and can be used, else 0.")?,
            applied_version: gauge(
                "trustgate_applied_version",
                "The newest version of the store that is applied here.",
            )?,
            lease_age: seconds(
                "trustgate_lease_age_seconds",
                "How long ago the lease began: when the last poll that was confirmed was sent; +Inf without one.",
            )?,
            bound: seconds(
                "trustgate_revocation_bound_seconds",
                "How long after its commit a revocation may still go unnoticed here, at the most, as things are.",
            )?,
            latency: register(registry, Histogram::with_opts(latency.buckets(buckets)))?,
            lost: register(
                registry,
                IntCounter::new(
                    "trustgate_lost_history_total",
                    "How often the database was found to have lost history: restored, or failed over with a loss.",
                ),
            )?,
            confirmed: polls.with_label_values(&["ok"]),
            unanswered: polls.with_label_values(&["unanswered"]),
            unusable: polls.with_label_values(&["unusable"]),
        })
    }

    /// Whether the last poll was answered.
    #[must_use]
    pub fn is_store_up(&self) -> bool {
        self.store_up.get() == 1
    }

    /// Sets the gauges that are read at scrape time. `bound`: how long a revocation may go unnoticed, where polls get no
    /// answer (`true`) and else.
    pub fn observe(&self, replica_state: &ReplicaState, clock: &dyn Clock, bound: impl FnOnce(bool) -> Duration) {
        let view = replica_state.load();
        let age = view.lease().start().map_or(f64::INFINITY, |start| clock.now().since(start).as_secs_f64());
        self.lease_age.set(age);
        self.bound.set(bound(view.lease().is_unanswered()).as_secs_f64());
    }
}

/// What the poll works with.
pub struct Poll {
    /// The store.
    pub store: Arc<dyn Lookup>,
    /// What it tells.
    pub replica_state: Arc<ReplicaState>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Its intervals and limits.
    pub settings: FreshnessSettings,
    /// Whether the tables name their changes.
    pub tracks_changes: bool,
    /// This replica, from the start of the process to its end.
    pub replica: Uuid,
    /// What people know it by.
    pub name: String,
    /// The peppers of this server.
    pub peppers: Peppers,
    /// What it looks like from outside.
    pub metrics: PollMetrics,
    /// Whether the lease is fresh, for health checks.
    pub fresh: watch::Sender<bool>,
    /// Called when new versions were applied that other replicas may not have seen: to tell them.
    pub applied: Box<dyn Fn() + Send + Sync>,
}

impl Poll {
    /// Polls until `stop`.
    ///
    /// # Cancel safety
    /// Applying an answer is never interrupted: it does not wait.
    pub async fn run(self, stop: CancellationToken) {
        let signs = watch::Sender::new(Version(0));
        let compared = Compared::default();
        let polling = async {
            tokio::join!(
                self.poll(&signs, &compared),
                self.watch_freshness(),
                self.report(signs.subscribe()),
                self.prune(),
                self.tend_peppers(),
                self.watch_pepper_files(&compared),
                self.listen()
            );
        };
        stop.run_until_cancelled(polling).await;
        // Whoever waits for replicas need not wait for this one any more.
        let farewell = Heartbeat { lasts: Duration::ZERO, ..self.sign(self.replica_state.load().applied()) };
        let _ = timeout(WRITE_TIMEOUT, self.store.report(&farewell)).await;
    }

    async fn poll(&self, signs: &watch::Sender<Version>, compared: &Compared) {
        let mut state = State {
            up: None,
            known: false,
            untold: false,
            attempted: None,
            restored: None,
            offset: self.clock.wall_offset(),
        };
        let (mut rate, mut jitter) = (Rate::default(), Jitter::of(self.replica));
        loop {
            let due = Instant::now() + jitter.around(self.settings.poll_interval);
            self.once(signs, compared, &mut state).await;
            self.tell_freshness();
            tokio::select! {
                biased;
                () = sleep_until(due) => {}
                () = rate.woken(&self.replica_state) => {}
            }
        }
    }

    /// Tells health checks whether the lease is fresh.
    fn tell_freshness(&self) {
        self.fresh.send_if_modified(|fresh| {
            let is_fresh = self.replica_state.load().lease_state(self.clock.now()) == LeaseState::Fresh;
            std::mem::replace(fresh, is_fresh) != is_fresh
        });
    }

    /// Tells them as well when it has run out, whatever a poll waits for meanwhile. Nothing but a poll makes it fresh.
    async fn watch_freshness(&self) {
        let mut fresh = self.fresh.subscribe();
        while fresh.wait_for(|is_fresh| *is_fresh).await.is_ok() {
            let view = self.replica_state.load();
            let age = view.lease().start().map_or(Duration::MAX, |start| self.clock.now().since(start));
            let left = self.settings.lease.saturating_sub(age);
            // A moment beyond its last, when it still is.
            sleep(left + Duration::from_millis(1)).await;
            self.tell_freshness();
        }
    }

    async fn once(&self, signs: &watch::Sender<Version>, compared: &Compared, state: &mut State) {
        if !state.known && state.may_report() {
            state.attempted = Some(Instant::now());
            // Before it relies on what it reads: whoever changes something must not overlook a replica that is starting
            // or was cut off.
            let sign = self.sign(self.replica_state.load().applied());
            state.known = self.tell(&sign, self.settings.poll_timeout).await;
            if !state.known && !std::mem::replace(&mut state.untold, true) {
                tracing::warn!(
                    "this replica could not say that it is there: commands that count replicas may overlook it"
                );
            }
        }
        self.notice_pause(state);
        let limit = self.settings.poll_timeout;
        let late = Err(PollError::NoAnswer(Fault::Timeout { tier: Tier::Store, limit }));
        let (since, asked) = (self.replica_state.load().since(), self.clock.now());
        let answer = timeout(limit, self.store.poll(since)).await.unwrap_or(late);
        if self.notice_pause(state) {
            return; // the answer may be older than it seems
        }
        match answer {
            Ok(polled) => {
                // Before anything is confirmed, which makes the server ready.
                self.peppers.compare(polled.peppers, compared, &self.replica_state.pepper);
                self.take_in(&polled, signs, state).await;
            }
            Err(PollError::NoAnswer(fault)) => {
                let given_up = self.clock.now();
                // Long after its time, it was this process that stood still: that says nothing of the database.
                if given_up.since(asked) <= limit * 2 {
                    self.replica_state.load().lease().note_unanswered(given_up);
                }
                self.metrics.unanswered.inc();
                state.known = false;
                if state.up.replace(Up::No) != Some(Up::No) {
                    let interval = self.settings.poll_interval;
                    tracing::warn!(%fault, "the database does not answer; trying again every {interval:?}");
                }
                self.metrics.store_up.set(0);
            }
            Err(PollError::Unusable(problem)) => {
                self.replica_state.load().lease().note_unusable();
                self.metrics.unusable.inc();
                state.known = false;
                if state.up.replace(Up::Unusable) != Some(Up::Unusable) {
                    tracing::error!(%problem, "the database answers, but confirms nothing");
                }
                self.metrics.store_up.set(0);
            }
        }
    }

    async fn take_in(&self, polled: &Polled, signs: &watch::Sender<Version>, state: &mut State) {
        let newest = polled.newest.as_of;
        let applied = self.replica_state.apply(polled, self.tracks_changes);
        match applied {
            Applied::Nothing => {}
            Applied::Begun => {
                tracing::info!(version = newest.0, "the database has confirmed its history");
            }
            Applied::Changed => self.observe_latency(polled),
            Applied::Everything => {
                self.observe_latency(polled);
                tracing::warn!(version = newest.0, "too much changed at once: everything cached before is read again");
            }
            Applied::Lost { lineage, applied } => {
                self.metrics.lost.inc();
                tracing::error!(
                    applied = applied.0,
                    newest = newest.0,
                    "the database has lost history (restored, or failed over with a loss?): what was revoked in between \
                     may be good again there; nothing cached before is used"
                );
                if lineage == polled.newest.lineage {
                    let renewed = timeout(WRITE_TIMEOUT, self.store.renew_incarnation(lineage.incarnation)).await;
                    if let Ok(Err(fault)) = renewed {
                        tracing::error!(%fault, "the lost history could not be closed in the database");
                    }
                }
                self.replica_state.wake(); // begin anew at once
            }
            Applied::Unwatched => {
                self.metrics.unusable.inc();
                return self.restore(state).await;
            }
        }
        self.metrics.confirmed.inc();
        self.metrics.applied_version.set(newest.0.cast_signed());
        if applied != Applied::Nothing {
            signs.send_replace(self.replica_state.load().applied());
        }
        if matches!(applied, Applied::Changed | Applied::Everything) {
            (self.applied)();
        }
        if state.up.replace(Up::Yes) != Some(Up::Yes) {
            tracing::info!("the database answers");
        }
        self.metrics.store_up.set(1);
    }

    /// Ends the lease when time passed that the boot clock did not count. Says whether it did.
    fn notice_pause(&self, state: &mut State) -> bool {
        let offset = self.clock.wall_offset();
        let step = Duration::from_micros(offset.abs_diff(state.offset));
        state.offset = offset;
        if step <= CLOCK_STEP_MAX {
            return false;
        }
        tracing::warn!(
            ?step,
            "the wall clock stepped, or this machine was paused: nothing is relied on until the next poll"
        );
        self.replica_state.load().lease().end();
        self.tell_freshness();
        true
    }

    async fn restore(&self, state: &mut State) {
        if state.restored.is_some_and(|last| last.elapsed() < RESTORE_INTERVAL) {
            return;
        }
        state.restored = Some(Instant::now());
        if state.up.replace(Up::Unusable) != Some(Up::Unusable) {
            tracing::warn!(
                "tables or triggers of the database were altered: nothing is relied on until they are checked"
            );
        }
        self.metrics.store_up.set(1);
        match timeout(WRITE_TIMEOUT, self.store.restore_watch()).await {
            Ok(Ok(())) => self.replica_state.wake(),
            Ok(Err(fault)) => {
                tracing::error!(%fault, "changes of trusts and keys may go unnoticed; `trustgate doctor` says what to do");
            }
            Err(_) => tracing::warn!("checking the triggers took too long; trying again"),
        }
    }

    fn observe_latency(&self, polled: &Polled) {
        if let Some(now) = self.replica_state.database_clock.at(self.clock.now()) {
            self.metrics.latency.observe(now.since(polled.stamped_at).as_secs_f64());
        }
    }

    /// Says what was applied as soon as it was, and that this replica is alive.
    async fn report(&self, mut signs: watch::Receiver<Version>) {
        let mut jitter = Jitter::of(self.replica);
        loop {
            tokio::select! {
                biased;
                changed = signs.changed() => if changed.is_err() { return },
                () = sleep(jitter.around(REPORT_INTERVAL)) => {}
            }
            let applied = *signs.borrow_and_update();
            if self.replica_state.is_confirmed() {
                // What it does not hear now it hears next time.
                self.tell(&self.sign(applied), WRITE_TIMEOUT).await;
            }
        }
    }

    /// Says that this replica is alive, and whether that was taken.
    async fn tell(&self, sign: &Heartbeat, limit: Duration) -> bool {
        match timeout(limit, self.store.report(sign)).await {
            Ok(Ok(())) => true,
            Ok(Err(fault)) => {
                tracing::debug!(%fault, "the sign of life was not taken");
                false
            }
            Err(_) => false,
        }
    }

    async fn prune(&self) {
        let (mut jitter, mut wait) = (Jitter::of(self.replica), PRUNE_INTERVAL);
        loop {
            sleep(jitter.around(wait)).await;
            wait = PRUNE_INTERVAL;
            if !self.replica_state.is_confirmed() {
                continue;
            }
            match timeout(WRITE_TIMEOUT, self.store.prune()).await {
                Ok(Ok(true)) => wait = PRUNE_AGAIN,
                Ok(Ok(false)) | Err(_) => {}
                Ok(Err(fault)) => tracing::debug!(%fault, "old versions could not be deleted"),
            }
        }
    }

    /// Records the peppers of keys that checks have proven, and counts the keys that are made under others.
    async fn tend_peppers(&self) {
        let mut jitter = Jitter::of(self.replica);
        let mut failed = false;
        loop {
            sleep(jitter.around(REPORT_INTERVAL)).await;
            if !self.replica_state.is_confirmed() {
                continue;
            }
            match timeout(WRITE_TIMEOUT, self.store.tend_peppers(&self.peppers.known)).await {
                Ok(Ok(Tended { others, unrecorded })) => {
                    self.peppers.count_others(others);
                    let had_failed = std::mem::replace(&mut failed, unrecorded.is_some());
                    if let Some(fault) = unrecorded.filter(|_| !had_failed) {
                        tracing::warn!(%fault, "pepper check failed: cannot record the peppers of keys; retrying");
                    }
                }
                Ok(Err(fault)) if !std::mem::replace(&mut failed, true) => {
                    tracing::warn!(%fault, "pepper check failed: cannot count keys under unknown peppers; retrying");
                }
                Ok(Err(_)) | Err(_) => {}
            }
        }
    }

    async fn watch_pepper_files(&self, compared: &Compared) {
        let Some(reread) = &self.peppers.reread else { return pending().await };
        let (mut jitter, mut last) = (Jitter::of(self.replica), FileState::Same);
        loop {
            sleep(jitter.around(REPORT_INTERVAL)).await;
            let reread = Arc::clone(reread);
            // Reading may take long on a network filesystem.
            let read = tokio::task::spawn_blocking(move || reread()).await;
            self.peppers.compare_files(read.unwrap_or_else(|panic| Err(panic.into())), compared, &mut last);
        }
    }

    async fn listen(&self) {
        if !self.settings.hints {
            return pending().await;
        }
        loop {
            let replica_state = &self.replica_state;
            let fault = self.store.listen(&|| replica_state.wake()).await;
            tracing::debug!(%fault, "no hints from the database at the moment; the poll goes on");
            sleep(LISTEN_WAIT).await;
        }
    }

    fn sign(&self, applied: Version) -> Heartbeat {
        let FreshnessSettings { lease, stale_if_unconfirmed, .. } = self.settings;
        // The next sign may be a whole interval away, and a lease is as old as the last poll before it.
        let lasts = REPORT_INTERVAL + REPORT_INTERVAL / 10 + lease + stale_if_unconfirmed + SIGN_MARGIN;
        Heartbeat { replica: self.replica, name: self.name.clone(), applied, lasts }
    }
}

struct State {
    up: Option<Up>,
    /// Whether a sign of life was taken since the database last answered anew.
    known: bool,
    /// Whether it was told that none was.
    untold: bool,
    /// When the last attempt to report was made.
    attempted: Option<Instant>,
    restored: Option<Instant>,
    offset: i64,
}

impl State {
    /// Whether to try a report. Where polls are answered and reports fail, rights are missing: each attempt would cost a new connection,
    /// ten times a second.
    fn may_report(&self) -> bool {
        self.up != Some(Up::Yes) || self.attempted.is_none_or(|last| last.elapsed() >= REPORT_AGAIN)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Up {
    Yes,
    No,
    Unusable,
}

/// The hinted polls of late.
#[derive(Default)]
struct Rate(VecDeque<Instant>);

impl Rate {
    /// Returns when a poll was asked for and may go.
    async fn woken(&mut self, replica_state: &ReplicaState) {
        replica_state.woken().await;
        sleep_until(self.earliest(Instant::now())).await;
        self.0.push_back(Instant::now());
    }

    /// When the next hinted poll may go.
    fn earliest(&mut self, now: Instant) -> Instant {
        while self.0.front().is_some_and(|oldest| now.duration_since(*oldest) > HINTED_PERIOD) {
            self.0.pop_front();
        }
        match self.0.front() {
            Some(oldest) if self.0.len() >= HINTED_MAX => *oldest + HINTED_PERIOD,
            _ => now,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_cause_a_bounded_number_of_polls_a_second() {
        let (mut rate, start) = (Rate::default(), Instant::now());
        for _ in 0..HINTED_MAX {
            assert_eq!(rate.earliest(start), start, "a few at once are no problem");
            rate.0.push_back(start);
        }
        assert_eq!(rate.earliest(start), start + HINTED_PERIOD);
        let later = start + HINTED_PERIOD * 2;
        assert_eq!(rate.earliest(later), later);
    }
}
