//! The poll task: reads the change log at intervals and applies it to the replica state. It also sends heartbeats,
//! prunes old versions and restores triggers.
//!
//! It does not touch the cache, and it continues when the store fails. It runs on a separate thread, so that other work
//! does not delay it.

use std::{collections::VecDeque, future::pending, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    Applied, ChangeLog, FreshnessSettings, ReplicaState,
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

/// The longest time between two heartbeats, +-10 %. Commands that wait for all replicas read them.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);
/// The wait before a failed heartbeat is sent again while polls are answered.
const REPORT_AGAIN: Duration = Duration::from_secs(1);
/// The maximum time that one write to the store may take: a heartbeat, pruning, restoring triggers.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);
/// The interval at which old versions are deleted. All replicas try; the database lets one at a time delete.
const PRUNE_INTERVAL: Duration = Duration::from_secs(30);
/// The wait before the next attempt if one attempt could not delete all old versions.
const PRUNE_AGAIN: Duration = Duration::from_secs(1);
/// The wait between two attempts to restore the triggers, while they are not intact.
const RESTORE_INTERVAL: Duration = Duration::from_secs(1);
/// The maximum number of requested polls in [`REQUESTED_PERIOD`]. Notifications and waiting checks request polls.
const REQUESTED_MAX: usize = 20;
/// See [`REQUESTED_MAX`].
const REQUESTED_PERIOD: Duration = Duration::from_secs(1);
/// The wait before the poll task listens again after the connection for notifications failed.
const LISTEN_WAIT: Duration = Duration::from_secs(1);
/// The maximum drift between the wall clock and the boot clock from one poll to the next. A larger one means that this
/// machine was paused without its boot clock counting the time, or that the wall clock was set.
const CLOCK_STEP_MAX: Duration = Duration::from_secs(1);
/// An addition to the time that a heartbeat covers, for its way to the database.
const HEARTBEAT_MARGIN: Duration = Duration::from_millis(200);

/// The metrics of the poll and the lease.
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
                "Polls of the database by outcome: ok, unanswered, or unusable (answered, but lease not renewed).",
            ),
            &["outcome"],
        );
        let polls = register(registry, polls)?;
        let latency = HistogramOpts::new(
            "trustgate_revocation_latency_seconds",
            "Time from the commit of a change until this replica applied it, by the database's clock, in seconds.",
        );
        let mut buckets = SHORT_SECONDS.to_vec();
        buckets.extend([0.5, 1.0, 2.5]);
        Ok(Self {
            store_up: gauge("trustgate_store_up", "1 while the database answers polls and can be used, else 0.")?,
            applied_version: gauge(
                "trustgate_applied_version",
                "The newest version of the database that this replica has applied.",
            )?,
            lease_age: seconds(
                "trustgate_lease_age_seconds",
                "Seconds since the lease began, when the last successful poll was sent; +Inf without a lease.",
            )?,
            bound: seconds(
                "trustgate_revocation_bound_seconds",
                "The current revocation bound: the maximum time that a revoked key is still granted, in seconds.",
            )?,
            latency: register(registry, Histogram::with_opts(latency.buckets(buckets)))?,
            lost: register(
                registry,
                IntCounter::new(
                    "trustgate_lost_history_total",
                    "Losses of database history that this replica detected: a restore, or a failover with data loss.",
                ),
            )?,
            confirmed: polls.with_label_values(&["ok"]),
            unanswered: polls.with_label_values(&["unanswered"]),
            unusable: polls.with_label_values(&["unusable"]),
        })
    }

    /// True if the last poll was answered and the database can be used.
    #[must_use]
    pub fn is_store_up(&self) -> bool {
        self.store_up.get() == 1
    }

    /// Sets the gauges that are computed at scrape time. `bound` returns the revocation bound; its argument is true
    /// while polls get no answer.
    pub fn observe(&self, replica_state: &ReplicaState, clock: &dyn Clock, bound: impl FnOnce(bool) -> Duration) {
        let view = replica_state.load();
        let age = view.lease().start().map_or(f64::INFINITY, |start| clock.now().since(start).as_secs_f64());
        self.lease_age.set(age);
        self.bound.set(bound(view.lease().is_unanswered()).as_secs_f64());
    }
}

/// The poll task and its dependencies.
pub struct Poll {
    /// The store.
    pub store: Arc<dyn Lookup>,
    /// The state to which it applies the change log.
    pub replica_state: Arc<ReplicaState>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// The intervals and limits of the poll task.
    pub settings: FreshnessSettings,
    /// True if the tables have a change log.
    pub tracks_changes: bool,
    /// The id of this replica. It stays the same until the process ends.
    pub replica: Uuid,
    /// The name of this replica for operators.
    pub name: String,
    /// The peppers of this server.
    pub peppers: Peppers,
    /// The metrics.
    pub metrics: PollMetrics,
    /// True while the lease is fresh; for health checks.
    pub fresh: watch::Sender<bool>,
    /// Called after new versions were applied, to notify replicas that may not have seen them.
    pub applied: Box<dyn Fn() + Send + Sync>,
}

impl Poll {
    /// Polls until `stop`, then sends a last heartbeat.
    ///
    /// # Cancel safety
    /// `stop` does not interrupt the application of an answer, because [`ReplicaState::apply`] does not wait.
    pub async fn run(self, stop: CancellationToken) {
        let to_report = watch::Sender::new(Version(0));
        let compared = Compared::default();
        let polling = async {
            tokio::join!(
                self.poll(&to_report, &compared),
                self.watch_freshness(),
                self.report(to_report.subscribe()),
                self.prune(),
                self.tend_peppers(),
                self.watch_pepper_files(&compared),
                self.listen()
            );
        };
        stop.run_until_cancelled(polling).await;
        // Commands that wait for all replicas need not wait for this one any longer.
        let farewell = Heartbeat { lasts: Duration::ZERO, ..self.heartbeat(self.replica_state.load().applied()) };
        let _ = timeout(WRITE_TIMEOUT, self.store.report(&farewell)).await;
    }

    async fn poll(&self, to_report: &watch::Sender<Version>, compared: &Compared) {
        let mut state = State {
            up: None,
            registered: false,
            warned: false,
            attempted: None,
            restored: None,
            offset: self.clock.wall_offset(),
        };
        let (mut rate, mut jitter) = (Rate::default(), Jitter::of(self.replica));
        loop {
            let due = Instant::now() + jitter.around(self.settings.poll_interval);
            self.poll_once(to_report, compared, &mut state).await;
            self.publish_freshness();
            tokio::select! {
                biased;
                () = sleep_until(due) => {}
                () = rate.woken(&self.replica_state) => {}
            }
        }
    }

    /// Publishes whether the lease is fresh, for health checks.
    fn publish_freshness(&self) {
        self.fresh.send_if_modified(|fresh| {
            let is_fresh = self.replica_state.load().lease_state(self.clock.now()) == LeaseState::Fresh;
            std::mem::replace(fresh, is_fresh) != is_fresh
        });
    }

    /// Publishes the end of the lease even while a poll waits for its answer. Only a poll can make the lease fresh
    /// again.
    async fn watch_freshness(&self) {
        let mut fresh = self.fresh.subscribe();
        while fresh.wait_for(|is_fresh| *is_fresh).await.is_ok() {
            let view = self.replica_state.load();
            let age = view.lease().start().map_or(Duration::MAX, |start| self.clock.now().since(start));
            let left = self.settings.lease.saturating_sub(age);
            // The lease is still fresh at exactly `lease`, so wait a little longer.
            sleep(left + Duration::from_millis(1)).await;
            self.publish_freshness();
        }
    }

    async fn poll_once(&self, to_report: &watch::Sender<Version>, compared: &Compared, state: &mut State) {
        if !state.registered && state.may_report() {
            state.attempted = Some(Instant::now());
            // Send the heartbeat before a poll can begin a lease. Otherwise a command that waits for all replicas could
            // overlook a replica that is starting or was cut off.
            let heartbeat = self.heartbeat(self.replica_state.load().applied());
            state.registered = self.send(&heartbeat, self.settings.poll_timeout).await;
            if !state.registered && !std::mem::replace(&mut state.warned, true) {
                tracing::warn!(
                    "heartbeat failed: commands that wait for all replicas may overlook this one until a heartbeat \
                     succeeds; retrying"
                );
            }
        }
        self.detect_pause(state);
        let limit = self.settings.poll_timeout;
        let timed_out = Err(PollError::NoAnswer(Fault::Timeout { tier: Tier::Store, limit }));
        let (since, asked) = (self.replica_state.load().since(), self.clock.now());
        let answer = timeout(limit, self.store.poll(since)).await.unwrap_or(timed_out);
        if self.detect_pause(state) {
            return; // the machine was paused, so the answer may be old
        }
        match answer {
            Ok(polled) => {
                // Compare the peppers first: applying the answer can make the server ready.
                self.peppers.compare(polled.peppers, compared, &self.replica_state.pepper);
                self.apply_answer(&polled, to_report, state).await;
            }
            Err(PollError::NoAnswer(fault)) => {
                let given_up = self.clock.now();
                // Ignore a poll whose timeout fired late: this process was paused, which proves nothing about the
                // database.
                if given_up.since(asked) <= limit * 2 {
                    self.replica_state.load().lease().note_unanswered(given_up);
                }
                self.metrics.unanswered.inc();
                state.registered = false;
                if state.up.replace(Up::No) != Some(Up::No) {
                    let interval = self.settings.poll_interval;
                    tracing::warn!(%fault, "poll failed: the database does not answer; retrying every {interval:?}");
                }
                self.metrics.store_up.set(0);
            }
            Err(PollError::Unusable(problem)) => {
                self.replica_state.load().lease().note_unusable();
                self.metrics.unusable.inc();
                state.registered = false;
                if state.up.replace(Up::Unusable) != Some(Up::Unusable) {
                    tracing::error!(%problem, "poll result unusable; lease not renewed: run `trustgate doctor`");
                }
                self.metrics.store_up.set(0);
            }
        }
    }

    async fn apply_answer(&self, polled: &Polled, to_report: &watch::Sender<Version>, state: &mut State) {
        let newest = polled.newest.as_of;
        let change_log = if self.tracks_changes { ChangeLog::Present } else { ChangeLog::Absent };
        let applied = self.replica_state.apply(polled, change_log);
        match applied {
            Applied::Nothing => {}
            Applied::Begun => {
                tracing::info!(version = newest.0, "first poll of this database history succeeded");
            }
            Applied::Changed => self.observe_latency(polled),
            Applied::Everything => {
                self.observe_latency(polled);
                tracing::warn!(
                    version = newest.0,
                    "too many changes for one poll: values cached before are out of date and are loaded again"
                );
            }
            Applied::Lost { lineage, applied } => {
                self.metrics.lost.inc();
                tracing::error!(
                    applied = applied.0,
                    newest = newest.0,
                    "database history lost: the database was restored, or failed over with data loss; values cached \
                     before are not used. Recent revocations may be missing from the database: repeat them"
                );
                if lineage == polled.newest.lineage {
                    let renewed = timeout(WRITE_TIMEOUT, self.store.renew_incarnation(lineage.incarnation)).await;
                    if let Ok(Err(fault)) = renewed {
                        tracing::error!(
                            %fault,
                            "incarnation not renewed: cannot record in the database that history was lost; run \
                             `trustgate migrate --new-incarnation`"
                        );
                    }
                }
                self.replica_state.wake(); // start the new view at once
            }
            Applied::Unwatched => {
                self.metrics.unusable.inc();
                return self.restore_triggers(state).await;
            }
        }
        self.metrics.confirmed.inc();
        self.metrics.applied_version.set(newest.0.cast_signed());
        if applied != Applied::Nothing {
            to_report.send_replace(self.replica_state.load().applied());
        }
        if matches!(applied, Applied::Changed | Applied::Everything) {
            (self.applied)();
        }
        if state.up.replace(Up::Yes) != Some(Up::Yes) {
            tracing::info!("poll succeeded: the database answers");
        }
        self.metrics.store_up.set(1);
    }

    /// Ends the lease if time passed that the boot clock did not count. Returns true in that case.
    fn detect_pause(&self, state: &mut State) -> bool {
        let offset = self.clock.wall_offset();
        let step = Duration::from_micros(offset.abs_diff(state.offset));
        state.offset = offset;
        if step <= CLOCK_STEP_MAX {
            return false;
        }
        tracing::warn!(
            ?step,
            "clock step: the wall clock was set, or this machine was paused; the lease ended until the next poll"
        );
        self.replica_state.load().lease().end();
        self.publish_freshness();
        true
    }

    /// Restores the triggers that record changes, at most once per [`RESTORE_INTERVAL`].
    async fn restore_triggers(&self, state: &mut State) {
        if state.restored.is_some_and(|last| last.elapsed() < RESTORE_INTERVAL) {
            return;
        }
        state.restored = Some(Instant::now());
        if state.up.replace(Up::Unusable) != Some(Up::Unusable) {
            tracing::warn!(
                "triggers not intact: tables or triggers of the database were altered; the lease ended until they are \
                 restored"
            );
        }
        self.metrics.store_up.set(1);
        match timeout(WRITE_TIMEOUT, self.store.restore_watch()).await {
            Ok(Ok(())) => self.replica_state.wake(),
            Ok(Err(fault)) => {
                tracing::error!(
                    %fault,
                    "triggers not restored: changes to trusts and keys may not be recorded; run `trustgate doctor`"
                );
            }
            Err(_) => tracing::warn!("triggers not restored: timeout; retrying"),
        }
    }

    fn observe_latency(&self, polled: &Polled) {
        if let Some(now) = self.replica_state.database_clock.at(self.clock.now()) {
            self.metrics.latency.observe(now.since(polled.stamped_at).as_secs_f64());
        }
    }

    /// Sends a heartbeat after each applied version, and at least every [`REPORT_INTERVAL`].
    async fn report(&self, mut to_report: watch::Receiver<Version>) {
        let mut jitter = Jitter::of(self.replica);
        loop {
            tokio::select! {
                biased;
                changed = to_report.changed() => if changed.is_err() { return },
                () = sleep(jitter.around(REPORT_INTERVAL)) => {}
            }
            let applied = *to_report.borrow_and_update();
            if self.replica_state.is_confirmed() {
                // Best effort: the next heartbeat carries the same information.
                self.send(&self.heartbeat(applied), WRITE_TIMEOUT).await;
            }
        }
    }

    /// Sends one heartbeat. Returns true if the database accepted it.
    async fn send(&self, heartbeat: &Heartbeat, limit: Duration) -> bool {
        match timeout(limit, self.store.report(heartbeat)).await {
            Ok(Ok(())) => true,
            Ok(Err(fault)) => {
                tracing::debug!(%fault, "heartbeat failed");
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
                Ok(Err(fault)) => tracing::debug!(%fault, "change log pruning failed; retrying"),
            }
        }
    }

    /// Records the peppers of keys, as found by checks, and counts the active keys under unknown peppers.
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
            // Reading may take long on a network file system.
            let read = tokio::task::spawn_blocking(move || reread()).await;
            self.peppers.compare_files(read.unwrap_or_else(|panic| Err(panic.into())), compared, &mut last);
        }
    }

    async fn listen(&self) {
        if !self.settings.notifications {
            return pending().await;
        }
        loop {
            let replica_state = &self.replica_state;
            let fault = self.store.listen(&|| replica_state.wake()).await;
            tracing::debug!(%fault, "notifications unavailable: cannot listen to the database; retrying");
            sleep(LISTEN_WAIT).await;
        }
    }

    fn heartbeat(&self, applied: Version) -> Heartbeat {
        let FreshnessSettings { lease, stale_if_unconfirmed, .. } = self.settings;
        // The next heartbeat may follow after a whole interval (+10 %). A poll just before it may begin a lease, which
        // this replica may use to its end and through its stale time.
        let lasts = REPORT_INTERVAL + REPORT_INTERVAL / 10 + lease + stale_if_unconfirmed + HEARTBEAT_MARGIN;
        Heartbeat { replica: self.replica, name: self.name.clone(), applied, lasts }
    }
}

/// The state of the poll task between polls.
struct State {
    /// The result of the last poll. The poll task logs a result only if it differs from this one.
    up: Option<Up>,
    /// True if the database accepted a heartbeat since the last poll that failed.
    registered: bool,
    /// True once a warning about a failed heartbeat was logged.
    warned: bool,
    /// When the poll task last tried to register.
    attempted: Option<Instant>,
    /// When it last tried to restore the triggers.
    restored: Option<Instant>,
    /// How far the wall clock was ahead of the boot clock, in microseconds.
    offset: i64,
}

impl State {
    /// True if the poll task may send a heartbeat now. If polls are answered but heartbeats fail, rights are missing.
    /// Each attempt then costs a new connection, so limit them to one per [`REPORT_AGAIN`].
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

/// Limits requested polls. Contains the times of the recent ones.
#[derive(Default)]
struct Rate(VecDeque<Instant>);

impl Rate {
    /// Waits until a poll is requested and the limit allows it.
    async fn woken(&mut self, replica_state: &ReplicaState) {
        replica_state.woken().await;
        sleep_until(self.earliest(Instant::now())).await;
        self.0.push_back(Instant::now());
    }

    /// The earliest time for the next requested poll.
    fn earliest(&mut self, now: Instant) -> Instant {
        while self.0.front().is_some_and(|oldest| now.duration_since(*oldest) > REQUESTED_PERIOD) {
            self.0.pop_front();
        }
        match self.0.front() {
            Some(oldest) if self.0.len() >= REQUESTED_MAX => *oldest + REQUESTED_PERIOD,
            _ => now,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requested_polls_are_limited_per_second() {
        let (mut rate, start) = (Rate::default(), Instant::now());
        for _ in 0..REQUESTED_MAX {
            assert_eq!(rate.earliest(start), start, "polls within the limit are not delayed");
            rate.0.push_back(start);
        }
        assert_eq!(rate.earliest(start), start + REQUESTED_PERIOD);
        let later = start + REQUESTED_PERIOD * 2;
        assert_eq!(rate.earliest(later), later);
    }

    #[test]
    fn failed_heartbeats_are_retried_at_intervals_while_polls_are_answered() {
        let attempted_after = |up, attempted| {
            State { up, registered: false, warned: true, attempted, restored: None, offset: 0 }.may_report()
        };
        let (now, earlier) = (Some(Instant::now()), Instant::now().checked_sub(REPORT_AGAIN));
        for (up, attempted, want) in [
            (Some(Up::Yes), None, true),
            (Some(Up::Yes), now, false),
            (Some(Up::Yes), earlier, true),
            (Some(Up::No), now, true),
            (None, now, true),
        ] {
            assert_eq!(attempted_after(up, attempted), want);
        }
    }
}
