//! The poll task: reads the change log at intervals and applies the changes to the replica state. It also sends
//! heartbeats, prunes old versions, restores triggers and compares peppers.
//!
//! The poll task does not access the cache, and it continues when the store fails. It runs on a separate thread, so
//! that other work does not delay polls.

use std::{collections::VecDeque, future::pending, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub(crate) use super::metrics::PollMetrics;
use super::{
    FreshnessSettings,
    heartbeat::{Heartbeats, Registration},
    lease::LeaseState,
    pepper::{Compared, FileState, Peppers},
    replica_state::{Applied, ChangeLog, ReplicaState},
};
use crate::{
    base::{
        clock::Clock,
        fault::{Fault, Tier},
        jitter::Jitter,
    },
    record::Version,
    store::{Lookup, PollError, Polled, Tended},
};

/// The interval at which the peppers of keys are recorded and the pepper files are read again, varied by up to 10 % in
/// either direction.
const PEPPER_INTERVAL: Duration = Duration::from_secs(5);
/// Timeout of one write to the store: pruning, restoring triggers, recording peppers or renewing the incarnation.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);
/// The interval at which old versions are deleted. All replicas try to delete them, but the database lets only one
/// replica delete at a time.
const PRUNE_INTERVAL: Duration = Duration::from_secs(30);
/// The wait before the next deletion if the previous deletion left old versions in the database.
const PRUNE_AGAIN: Duration = Duration::from_secs(1);
/// The minimum time between two attempts to restore the triggers.
const RESTORE_INTERVAL: Duration = Duration::from_secs(1);
/// The maximum number of requested polls per [`REQUESTED_PERIOD`]. Notifications and waiting checks request polls.
const REQUESTED_MAX: usize = 20;
/// See [`REQUESTED_MAX`].
const REQUESTED_PERIOD: Duration = Duration::from_secs(1);
/// The wait before the poll task listens for notifications again after the connection failed.
const LISTEN_WAIT: Duration = Duration::from_secs(1);
/// The maximum drift between the wall clock and the boot clock from one poll to the next. A larger drift means that the
/// wall clock was set, or that this machine was paused and its boot clock stopped.
const CLOCK_STEP_MAX: Duration = Duration::from_secs(1);

/// The poll task and its dependencies.
pub(crate) struct Poll {
    pub store: Arc<dyn Lookup>,
    pub replica_state: Arc<ReplicaState>,
    pub clock: Arc<dyn Clock>,
    pub settings: FreshnessSettings,
    /// True if the tables have a change log.
    pub tracks_changes: bool,
    /// The id of this replica, which is new each time the process starts.
    pub replica: Uuid,
    /// The name of this replica, shown to operators.
    pub name: String,
    pub peppers: Peppers,
    pub metrics: PollMetrics,
    /// Contains true while the lease is fresh. Health checks subscribe to changes.
    pub fresh: watch::Sender<bool>,
    /// Called after new versions were applied, to notify replicas that may not have applied them yet.
    pub applied: Box<dyn Fn() + Send + Sync>,
}

impl Poll {
    /// Polls until `stop` is cancelled, then sends a last heartbeat.
    ///
    /// # Cancel safety
    /// Cancelling `stop` cannot interrupt [`ReplicaState::apply`], because that function does not await anything.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let heartbeats = self.heartbeats();
        let applied = watch::Sender::new(Version(0));
        let compared = Compared::default();
        let polling = async {
            tokio::join!(
                self.poll(&heartbeats, &applied, &compared),
                self.watch_freshness(),
                heartbeats.repeat(applied.subscribe()),
                self.prune(),
                self.tend_peppers(),
                self.watch_pepper_files(&compared),
                self.listen()
            );
        };
        stop.run_until_cancelled(polling).await;
        heartbeats.end().await;
    }

    fn heartbeats(&self) -> Heartbeats {
        let FreshnessSettings { lease, stale_if_unconfirmed, .. } = self.settings;
        Heartbeats {
            store: Arc::clone(&self.store),
            replica_state: Arc::clone(&self.replica_state),
            replica: self.replica,
            name: self.name.clone(),
            lease_time: lease + stale_if_unconfirmed,
        }
    }

    async fn poll(&self, heartbeats: &Heartbeats, applied: &watch::Sender<Version>, compared: &Compared) {
        let mut state = PollState {
            up: None,
            registration: Registration::default(),
            restored: None,
            offset: self.clock.wall_offset(),
        };
        let (mut rate, mut jitter) = (Rate::default(), Jitter::of(self.replica));
        loop {
            let due = Instant::now() + jitter.around(self.settings.poll_interval);
            heartbeats.register(&mut state.registration, state.up == Some(Up::Yes), self.settings.poll_timeout).await;
            self.poll_once(applied, compared, &mut state).await;
            self.publish_freshness();
            tokio::select! {
                biased;
                () = sleep_until(due) => {}
                () = rate.woken(&self.replica_state) => {}
            }
        }
    }

    /// Updates `fresh`, so that health checks see whether the lease is fresh.
    fn publish_freshness(&self) {
        self.fresh.send_if_modified(|fresh| {
            let is_fresh = self.replica_state.load().lease_state(self.clock.now()) == LeaseState::Fresh;
            std::mem::replace(fresh, is_fresh) != is_fresh
        });
    }

    /// Publishes that the lease is no longer fresh, even while a poll is still waiting for its answer. The start of a
    /// lease needs no such timer, because only a poll can make the lease fresh again.
    async fn watch_freshness(&self) {
        let mut fresh = self.fresh.subscribe();
        while fresh.wait_for(|is_fresh| *is_fresh).await.is_ok() {
            let view = self.replica_state.load();
            let age = view.lease().start().map_or(Duration::MAX, |start| self.clock.now().since(start));
            let left = self.settings.lease.saturating_sub(age);
            // The lease is still fresh when its age is exactly `lease`, so wait slightly longer.
            sleep(left + Duration::from_millis(1)).await;
            self.publish_freshness();
        }
    }

    async fn poll_once(&self, newest_applied: &watch::Sender<Version>, compared: &Compared, state: &mut PollState) {
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
                self.apply_answer(&polled, newest_applied, state).await;
            }
            Err(PollError::NoAnswer(fault)) => {
                let given_up = self.clock.now();
                // Ignore a poll whose timeout fired late: this process was paused, which proves nothing about the
                // database.
                if given_up.since(asked) <= limit * 2 {
                    self.replica_state.load().lease().note_unanswered(given_up);
                }
                self.metrics.unanswered.inc();
                state.registration.lapse();
                if state.up.replace(Up::No) != Some(Up::No) {
                    let interval = self.settings.poll_interval;
                    tracing::warn!(%fault, "poll failed: the database does not answer; retrying every {interval:?}");
                }
                self.metrics.store_up.set(0);
            }
            Err(PollError::Unusable(problem)) => {
                self.replica_state.load().lease().note_unusable();
                self.metrics.unusable.inc();
                state.registration.lapse();
                if state.up.replace(Up::Unusable) != Some(Up::Unusable) {
                    tracing::error!(%problem, "poll result unusable: lease not renewed; run `trustgate doctor`");
                }
                self.metrics.store_up.set(0);
            }
        }
    }

    async fn apply_answer(&self, polled: &Polled, newest_applied: &watch::Sender<Version>, state: &mut PollState) {
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
                    "changes missed: there were more changes than one poll can read, or some were pruned before this \
                     replica read them; all cached values are out of date and will be loaded again"
                );
            }
            Applied::Lost { lineage, applied } => {
                self.metrics.lost.inc();
                tracing::error!(
                    applied = applied.0,
                    newest = newest.0,
                    "database history lost: the database was restored or replaced, or failed over with data loss; \
                     previously cached values are no longer used. Recent revocations may be missing from the database: \
                     repeat them"
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
                self.replica_state.wake(); // poll again now, to begin the new view
            }
            Applied::Unwatched => {
                self.metrics.unusable.inc();
                return self.restore_triggers(state).await;
            }
        }
        self.metrics.confirmed.inc();
        self.metrics.applied_version.set(newest.0.cast_signed());
        if applied != Applied::Nothing {
            newest_applied.send_replace(self.replica_state.load().applied());
        }
        if matches!(applied, Applied::Changed | Applied::Everything) {
            (self.applied)();
        }
        if state.up.replace(Up::Yes) != Some(Up::Yes) {
            tracing::info!("poll succeeded: the database answers");
        }
        self.metrics.store_up.set(1);
    }

    /// Ends the lease and returns true if the wall clock and the boot clock have drifted apart since the last call,
    /// because this machine may have been paused.
    fn detect_pause(&self, state: &mut PollState) -> bool {
        let offset = self.clock.wall_offset();
        let step = Duration::from_micros(offset.abs_diff(state.offset));
        state.offset = offset;
        if step <= CLOCK_STEP_MAX {
            return false;
        }
        tracing::warn!(
            ?step,
            "clock step: the wall clock was set, or this machine was paused; lease ended, waiting for a successful poll"
        );
        self.replica_state.load().lease().end();
        self.publish_freshness();
        true
    }

    /// Tries to restore the triggers that record changes, at most once per [`RESTORE_INTERVAL`].
    async fn restore_triggers(&self, state: &mut PollState) {
        if state.restored.is_some_and(|last| last.elapsed() < RESTORE_INTERVAL) {
            return;
        }
        state.restored = Some(Instant::now());
        if state.up.replace(Up::Unusable) != Some(Up::Unusable) {
            tracing::warn!(
                "triggers not intact: tables or triggers in the database were altered; lease ended, restoring the \
                 triggers"
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

    /// Records the pepper of each key that checks have looked up successfully, and counts the active keys hashed with
    /// peppers that this server does not have.
    async fn tend_peppers(&self) {
        let mut jitter = Jitter::of(self.replica);
        let mut failed = false;
        loop {
            sleep(jitter.around(PEPPER_INTERVAL)).await;
            if !self.replica_state.is_confirmed() {
                continue;
            }
            match timeout(WRITE_TIMEOUT, self.store.tend_peppers(&self.peppers.known)).await {
                Ok(Ok(Tended { others, unrecorded })) => {
                    self.peppers.count_others(others);
                    let had_failed = std::mem::replace(&mut failed, unrecorded.is_some());
                    if let Some(fault) = unrecorded.filter(|_| !had_failed) {
                        tracing::warn!(%fault, "pepper check failed: cannot record the keys' peppers; retrying");
                    }
                }
                Ok(Err(fault)) if !std::mem::replace(&mut failed, true) => {
                    tracing::warn!(%fault, "pepper check failed: cannot count keys with unknown peppers; retrying");
                }
                Ok(Err(_)) | Err(_) => {}
            }
        }
    }

    async fn watch_pepper_files(&self, compared: &Compared) {
        let Some(reread) = &self.peppers.reread else { return pending().await };
        let (mut jitter, mut last) = (Jitter::of(self.replica), FileState::Same);
        loop {
            sleep(jitter.around(PEPPER_INTERVAL)).await;
            let reread = Arc::clone(reread);
            // A read can block for a long time on a network file system.
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
}

/// The state that the poll task keeps between polls.
struct PollState {
    /// The result of the last poll. The poll task logs the next result only if it differs.
    up: Option<Up>,
    registration: Registration,
    /// When the poll task last tried to restore the triggers.
    restored: Option<Instant>,
    /// The time by which the wall clock was ahead of the boot clock at the last check, in microseconds. Negative if it
    /// was behind.
    offset: i64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Up {
    Yes,
    No,
    Unusable,
}

/// Limits the rate of requested polls. Contains the times of the most recent requested polls.
#[derive(Default)]
struct Rate(VecDeque<Instant>);

impl Rate {
    /// Waits until a poll is requested and the rate limit allows it.
    async fn woken(&mut self, replica_state: &ReplicaState) {
        replica_state.woken().await;
        sleep_until(self.earliest(Instant::now())).await;
        self.0.push_back(Instant::now());
    }

    /// Returns the earliest time at which the next requested poll may run.
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
    fn requested_polls_are_limited_to_twenty_per_second() {
        let (mut rate, start) = (Rate::default(), Instant::now());
        for _ in 0..REQUESTED_MAX {
            assert_eq!(rate.earliest(start), start, "polls within the limit are not delayed");
            rate.0.push_back(start);
        }
        assert_eq!(rate.earliest(start), start + REQUESTED_PERIOD);
        let later = start + REQUESTED_PERIOD * 2;
        assert_eq!(rate.earliest(later), later);
    }
}
