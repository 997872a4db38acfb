//! Heartbeats: rows in the database that record which replicas are alive and which version each replica has applied.
//! Commands read these rows to wait until all replicas have applied a change.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use uuid::Uuid;

use super::replica_state::ReplicaState;
use crate::{
    base::jitter::Jitter,
    record::Version,
    store::{Heartbeat, Lookup},
};

/// The maximum time between two heartbeats, varied by up to 10 % in either direction.
const INTERVAL: Duration = Duration::from_secs(5);
/// The minimum time between two attempts to send a heartbeat before a poll, while the database answers polls.
const RETRY_WAIT: Duration = Duration::from_secs(1);
/// Timeout of a heartbeat that is sent independently of polls.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Extra time in [`Heartbeat::lasts`], because a heartbeat takes some time to reach the database.
const MARGIN: Duration = Duration::from_millis(200);

/// Sends the heartbeats of one replica.
pub(super) struct Heartbeats {
    pub(super) store: Arc<dyn Lookup>,
    pub(super) replica_state: Arc<ReplicaState>,
    pub(super) replica: Uuid,
    /// The name of the replica, shown to operators.
    pub(super) name: String,
    /// The maximum time for which this replica may use one lease, including the stale time.
    pub(super) lease_time: Duration,
}

/// The state of the heartbeats that [`Heartbeats::register`] sends before polls.
#[derive(Default)]
pub(super) struct Registration {
    /// True if the database has accepted a heartbeat since the last failed poll.
    is_valid: bool,
    /// True once a failed heartbeat has been logged as a warning.
    has_warned: bool,
    /// When [`Heartbeats::register`] last sent a heartbeat.
    attempted: Option<Instant>,
}

impl Registration {
    /// Requires another heartbeat before the next poll. The poll task calls this after a failed poll.
    pub(super) const fn lapse(&mut self) {
        self.is_valid = false;
    }

    /// Returns true if a heartbeat is due before the next poll. If the database answers polls but refuses heartbeats, a
    /// database privilege is probably missing. Each attempt then costs a new connection, so attempts are limited to one
    /// per [`RETRY_WAIT`].
    fn is_due(&self, polls_are_answered: bool) -> bool {
        let may_retry = !polls_are_answered || self.attempted.is_none_or(|last| last.elapsed() >= RETRY_WAIT);
        !self.is_valid && may_retry
    }
}

impl Heartbeats {
    /// Sends a heartbeat if one is due. The poll task calls this before each poll, because a poll can begin a lease:
    /// without a heartbeat, a command that waits for all replicas could overlook a replica that is starting or was cut
    /// off.
    pub(super) async fn register(&self, registration: &mut Registration, polls_are_answered: bool, limit: Duration) {
        if !registration.is_due(polls_are_answered) {
            return;
        }
        registration.attempted = Some(Instant::now());
        registration.is_valid = self.send(&self.heartbeat(self.replica_state.load().applied()), limit).await;
        if !registration.is_valid && !std::mem::replace(&mut registration.has_warned, true) {
            tracing::warn!(
                "heartbeat failed: commands that wait for all replicas may overlook this replica until a heartbeat \
                 succeeds; retrying"
            );
        }
    }

    /// Sends a heartbeat after each newly applied version, and at least every [`INTERVAL`].
    pub(super) async fn repeat(&self, mut applied: watch::Receiver<Version>) {
        let mut jitter = Jitter::of(self.replica);
        loop {
            tokio::select! {
                biased;
                changed = applied.changed() => if changed.is_err() { return },
                () = sleep(jitter.around(INTERVAL)) => {}
            }
            let version = *applied.borrow_and_update();
            if self.replica_state.is_confirmed() {
                // Best effort: the next heartbeat carries the same information.
                self.send(&self.heartbeat(version), TIMEOUT).await;
            }
        }
    }

    /// Sends the last heartbeat, so that commands that wait for all replicas no longer wait for this replica.
    pub(super) async fn end(&self) {
        let last = Heartbeat { lasts: Duration::ZERO, ..self.heartbeat(self.replica_state.load().applied()) };
        let _ = timeout(TIMEOUT, self.store.report(&last)).await;
    }

    /// Sends one heartbeat and returns true if the database accepted it.
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

    fn heartbeat(&self, applied: Version) -> Heartbeat {
        // The next heartbeat may be sent up to 110 % of the interval later. A poll just before that heartbeat may begin
        // a lease, and this replica may then grant until the stale time of that lease has passed.
        let lasts = INTERVAL + INTERVAL / 10 + self.lease_time + MARGIN;
        Heartbeat { replica: self.replica, name: self.name.clone(), applied, lasts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_heartbeats_are_retried_at_intervals_while_polls_are_answered() {
        let (now, earlier) = (Some(Instant::now()), Instant::now().checked_sub(RETRY_WAIT));
        for (polls_are_answered, attempted, want) in
            [(true, None, true), (true, now, false), (true, earlier, true), (false, now, true)]
        {
            let registration = Registration { attempted, has_warned: true, ..Registration::default() };
            assert_eq!(registration.is_due(polls_are_answered), want);
        }
        let valid = Registration { is_valid: true, ..Registration::default() };
        assert!(!valid.is_due(true) && !valid.is_due(false));
    }
}
