//! Heartbeats: rows of the database that say which replicas are alive, and which version each has applied. Commands that
//! wait for all replicas read them.

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

/// The longest time between two heartbeats, +-10 %.
const INTERVAL: Duration = Duration::from_secs(5);
/// The wait before a failed heartbeat is sent again while polls are answered.
const RETRY_WAIT: Duration = Duration::from_secs(1);
/// The maximum time that one heartbeat may take.
const TIMEOUT: Duration = Duration::from_secs(2);
/// An addition to the time that a heartbeat covers, for its way to the database.
const MARGIN: Duration = Duration::from_millis(200);

/// The heartbeats of one replica.
pub(super) struct Heartbeats {
    pub(super) store: Arc<dyn Lookup>,
    pub(super) replica_state: Arc<ReplicaState>,
    pub(super) replica: Uuid,
    /// The name of the replica for operators.
    pub(super) name: String,
    /// The longest time that this replica may use one lease, its stale time included.
    pub(super) lease_time: Duration,
}

/// The state of heartbeats before polls.
#[derive(Default)]
pub(super) struct Registration {
    /// True if the database accepted a heartbeat since the last poll that failed.
    is_valid: bool,
    /// True once a warning about a failed heartbeat was logged.
    has_warned: bool,
    /// When the last heartbeat before a poll was sent.
    attempted: Option<Instant>,
}

impl Registration {
    /// Requires another heartbeat before the next poll, because a poll failed.
    pub(super) const fn lapse(&mut self) {
        self.is_valid = false;
    }

    /// True if a heartbeat is due now. If polls are answered but heartbeats fail, rights are missing. Each attempt then
    /// costs a new connection, so limit them to one per [`RETRY_WAIT`].
    fn is_due(&self, polls_are_answered: bool) -> bool {
        let may_retry = !polls_are_answered || self.attempted.is_none_or(|last| last.elapsed() >= RETRY_WAIT);
        !self.is_valid && may_retry
    }
}

impl Heartbeats {
    /// Sends a heartbeat, if one is due, before a poll can begin a lease. Otherwise a command that waits for all
    /// replicas could overlook a replica that is starting or was cut off.
    pub(super) async fn register(&self, registration: &mut Registration, polls_are_answered: bool, limit: Duration) {
        if !registration.is_due(polls_are_answered) {
            return;
        }
        registration.attempted = Some(Instant::now());
        registration.is_valid = self.send(&self.heartbeat(self.replica_state.load().applied()), limit).await;
        if !registration.is_valid && !std::mem::replace(&mut registration.has_warned, true) {
            tracing::warn!(
                "heartbeat failed: commands that wait for all replicas may overlook this one until a heartbeat \
                 succeeds; retrying"
            );
        }
    }

    /// Sends a heartbeat after each version that is applied, and at least every [`INTERVAL`].
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

    /// Sends the last heartbeat: commands that wait for all replicas need not wait for this one any longer.
    pub(super) async fn end(&self) {
        let last = Heartbeat { lasts: Duration::ZERO, ..self.heartbeat(self.replica_state.load().applied()) };
        let _ = timeout(TIMEOUT, self.store.report(&last)).await;
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

    fn heartbeat(&self, applied: Version) -> Heartbeat {
        // The next heartbeat may follow after a whole interval (+10 %). A poll just before it may begin a lease, which
        // this replica may use to its end and through its stale time.
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
