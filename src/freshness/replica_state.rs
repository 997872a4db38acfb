//! The replica state: the current view of the change log, and the data that survives when the view is replaced.
//!
//! A view does no I/O and does not modify the cache. `cache::policy` asks the view whether an applied change affects a
//! cached value, and refuses the value in that case.

use std::{
    num::NonZeroU32,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::{Notify, watch};

use super::{
    history::{Continuity, History, Provenance},
    lease::{Lease, LeaseLimits, LeaseState},
    pepper::PepperState,
    revoked::Revoked,
};
use crate::{
    base::clock::{DatabaseClock, Moment},
    record::{Change, Lineage, Version, Versioned},
    store::Polled,
};

/// This replica's view of one database history: the last version applied, the lease, and the versions of the changes
/// that make cached values out of date.
#[derive(Debug)]
pub struct ReplicaView {
    epoch: Epoch,
    limits: LeaseLimits,
    lease: Lease,
    history: Mutex<History>,
    /// The lost history on which the previous view was based. Empty in the first view.
    lost: History,
}

/// The sequence number of a view. Each cache entry contains the epoch of the view in which it was inserted. Every new
/// view takes at least one poll, so at ten polls per second the 32-bit numbers last for more than ten years.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epoch(NonZeroU32);

impl ReplicaView {
    /// Creates a view. `earlier` is the number of previous views, and `lost` is the history of the most recent one.
    fn new(earlier: u32, limits: LeaseLimits, lost: History) -> Self {
        Self {
            epoch: Epoch(NonZeroU32::MIN.saturating_add(earlier)),
            limits,
            lease: Lease::default(),
            history: Mutex::default(),
            lost,
        }
    }

    /// Returns the epoch that identifies this view.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Returns the lease, which also records the changes that were applied in this view.
    #[must_use]
    pub const fn lease(&self) -> &Lease {
        &self.lease
    }

    /// Returns the state of the lease at `now`. A check must call this before it looks up any value, so that it sees
    /// every change that the lease covers.
    #[must_use]
    pub fn lease_state(&self, now: Moment) -> LeaseState {
        self.lease.lease_state(now, self.limits)
    }

    /// Returns how `value` relates to the history of this view.
    #[must_use]
    pub fn provenance<T>(&self, value: &Versioned<T>) -> Provenance {
        self.history().provenance(value)
    }

    /// Returns the last version applied; 0 before the first poll.
    #[must_use]
    pub fn applied(&self) -> Version {
        self.history().applied()
    }

    /// Returns the version from which the next poll reads the change log; `None` before the first poll.
    #[must_use]
    pub fn since(&self) -> Option<Version> {
        let history = self.history();
        history.is_begun().then(|| history.applied())
    }

    fn history(&self) -> MutexGuard<'_, History> {
        // No update can panic halfway, so the history behind a poisoned lock is still consistent.
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The current view, and the data that survives when the view is replaced.
#[derive(Debug)]
pub struct ReplicaState {
    present: ArcSwap<ReplicaView>,
    limits: LeaseLimits,
    epochs: AtomicU32,
    /// The digests of keys whose revocation this replica saw. If the database loses the history that contains a
    /// revocation, checks still deny the digest.
    pub revoked: Revoked,
    /// An estimate of the database's clock.
    pub database_clock: DatabaseClock,
    /// The result of comparing this server's peppers with those recorded in the database.
    pub pepper: PepperState,
    confirmed: watch::Sender<bool>,
    applied: Notify,
    wake: Notify,
}

/// The two kinds of tables that a poll can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeLog {
    /// Tables with a change log.
    Present,
    /// An existing table that is not attached. A poll of such a table does not begin a lease.
    Absent,
}

/// The effect of a poll's answer on the replica state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// There was no new version.
    Nothing,
    /// This was the first poll of the view.
    Begun,
    /// There were new versions. Cached values affected by their changes are now out of date.
    Changed,
    /// There were new versions, but the answer does not contain all of their changes. Every value that was read before
    /// the newest version is now out of date.
    Everything,
    /// The database lost history. Checks no longer use values from the lost history, and the next poll begins a new
    /// view.
    Lost {
        /// The lineage of the lost history.
        lineage: Lineage,
        /// The last version that this replica applied from the lost history.
        applied: Version,
    },
    /// The triggers that record changes are not intact. The lease has ended, and no lease begins until the triggers are
    /// restored.
    Unwatched,
}

impl ReplicaState {
    /// Creates a state without a lease: checks may not use any cache entry before the first poll.
    #[must_use]
    pub fn new(limits: LeaseLimits) -> Self {
        Self {
            present: ArcSwap::from_pointee(ReplicaView::new(0, limits, History::default())),
            limits,
            epochs: AtomicU32::new(0),
            revoked: Revoked::default(),
            database_clock: DatabaseClock::default(),
            pepper: PepperState::default(),
            confirmed: watch::Sender::new(false),
            applied: Notify::new(),
            wake: Notify::new(),
        }
    }

    /// Returns the current view. A check calls this once and uses the same view until it ends.
    #[must_use]
    pub fn load(&self) -> Guard<Arc<ReplicaView>> {
        self.present.load()
    }

    /// Returns the limits of the lease.
    #[must_use]
    pub const fn limits(&self) -> LeaseLimits {
        self.limits
    }

    /// Returns true once the answer to a poll has been applied.
    #[must_use]
    pub fn is_confirmed(&self) -> bool {
        *self.confirmed.borrow()
    }

    /// Waits until the answer to a poll has been applied.
    pub async fn confirmed(&self) {
        // `wait_for` fails only if the channel is closed, and `self` keeps the channel open.
        let _ = self.confirmed.subscribe().wait_for(|confirmed| *confirmed).await;
    }

    /// Asks the poll task to poll now instead of after `poll_interval`.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Waits until [`Self::wake`] requests a poll.
    ///
    /// # Cancel safety
    /// Safe: if a poll is requested between two calls, the next call returns immediately.
    pub async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Requests a poll, and waits until `view` has applied `version` or has been replaced. The caller sets the
    /// deadline.
    pub async fn reached(&self, view: &ReplicaView, version: Version) {
        self.wake();
        loop {
            // Create this future before testing the condition, so that a poll that is applied in between still wakes
            // this task.
            let applied = self.applied.notified();
            if view.applied() >= version || self.load().epoch != view.epoch {
                return;
            }
            applied.await;
        }
    }

    /// Applies the answer to a poll that read the change log from [`ReplicaView::since`] of the current view.
    pub fn apply(&self, polled: &Polled, change_log: ChangeLog) -> Applied {
        let tracks_changes = change_log == ChangeLog::Present;
        let newest = &polled.newest;
        self.database_clock.observe(newest.sent_at, newest.read_at);
        let view = self.present.load_full();
        let history = view.history();
        let (begun, before) = (history.is_begun(), history.applied());
        // Tables without a change log have no versions, so they have no history that could be lost.
        let continuity = if tracks_changes { history.judge(polled) } else { Continuity::Follow };
        if tracks_changes && !polled.triggers_intact && continuity != Continuity::Lost {
            view.lease.end();
            return Applied::Unwatched;
        }
        let floor = match continuity {
            Continuity::Lost => {
                let lost = Applied::Lost { lineage: history.lineage(), applied: before };
                drop(history);
                self.replace(&view);
                return lost;
            }
            Continuity::Follow if begun => None,
            // Changes before the first version in the answer are unknown, so values that were read before that version
            // are out of date.
            Continuity::Follow if polled.complete => {
                Some(polled.versions.first().map_or(newest.as_of, |(first, _)| *first))
            }
            Continuity::Follow | Continuity::Jump => Some(newest.as_of),
        };
        // Release the lock, so that the work below does not block checks. The history cannot change in the meantime:
        // only this function changes it, and only the poll task calls this function.
        drop(history);
        // The first poll of a view returns the changes from the last 15 minutes. Some of them may also be in the lost
        // history. Such an old change must not release a digest that was revoked after the change, so only changes that
        // are not in the lost history may release digests. A `Gone` change only adds a denial, so it is always applied.
        let is_news = |of: Version| {
            let found = polled.versions.binary_search_by_key(&of, |(version, _)| *version).ok();
            let nonce = found.map_or(newest.nonce, |index| polled.versions[index].1);
            view.lost.is_news(of, nonce)
        };
        let changes = polled.changes.iter();
        let changes =
            changes.filter(|(version, change)| begun || matches!(change, Change::Gone(_)) || is_news(*version));
        self.revoked.note(changes, newest.sent_at);
        let sent = tracks_changes.then_some(newest.sent_at);
        view.lease.renew(floor, &polled.changes, || view.history().advance(polled), sent);
        self.applied.notify_waiters();
        self.confirmed.send_if_modified(|confirmed| !std::mem::replace(confirmed, true));
        match continuity {
            _ if !begun => Applied::Begun,
            Continuity::Jump => Applied::Everything,
            _ if newest.as_of > before => Applied::Changed,
            _ => Applied::Nothing,
        }
    }

    /// Replaces `lost`, the view whose history the database no longer has. Checks that still use the old view see an
    /// expired lease.
    fn replace(&self, lost: &ReplicaView) {
        lost.lease.end();
        self.revoked.bind();
        let earlier = self.epochs.fetch_add(1, Ordering::Relaxed) + 1;
        let history = lost.history().clone();
        self.present.store(Arc::new(ReplicaView::new(earlier, self.limits, history)));
        self.applied.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        base::clock::DatabaseTime,
        freshness::lease,
        record::{ApiKeyDigest, Nonce},
    };

    const LIMITS: LeaseLimits = LeaseLimits { lease: Duration::from_secs(1), stale: Duration::from_mins(2) };

    fn polled(versions: &[(u64, u8)], changes: &[(u64, Change)]) -> Polled {
        let (version, nonce) = *versions.last().unwrap();
        let newest = Versioned {
            value: (),
            as_of: Version(version),
            nonce: Nonce([nonce; 16]),
            lineage: Lineage { system: 1, ..Lineage::default() },
            read_at: DatabaseTime::from_micros(0),
            sent_at: Moment::from_nanos(7),
        };
        Polled {
            newest,
            stamped_at: DatabaseTime::from_micros(0),
            oldest: Version(1),
            triggers_intact: true,
            versions: versions.iter().map(|(version, nonce)| (Version(*version), Nonce([*nonce; 16]))).collect(),
            changes: changes.iter().map(|(version, change)| (Version(*version), change.clone())).collect(),
            complete: true,
            peppers: crate::record::StoredPeppers::default(),
        }
    }

    fn covers_negative_entry(replica_state: &ReplicaState, as_of: u64) -> bool {
        replica_state.load().lease().covers_absence(Version(as_of), &[lease::stripe(&[1; 32])])
    }

    #[test]
    fn first_poll_covers_only_values_read_at_or_after_its_first_version() {
        let replica_state = ReplicaState::new(LIMITS);
        assert_eq!((replica_state.is_confirmed(), replica_state.load().since()), (false, None));
        let digest = ApiKeyDigest::from_bytes([1; 32]);
        assert_eq!(
            replica_state.apply(&polled(&[(5, 5), (7, 7)], &[(7, Change::Absent(digest))]), ChangeLog::Present),
            Applied::Begun
        );
        assert_eq!((replica_state.is_confirmed(), replica_state.load().since()), (true, Some(Version(7))));
        assert_eq!(replica_state.load().lease_state(Moment::from_nanos(8)), LeaseState::Fresh);
        for (as_of, covered) in [(4, false), (5, false), (6, false), (7, true)] {
            assert_eq!(covers_negative_entry(&replica_state, as_of), covered, "{as_of}");
        }
        assert!(replica_state.load().lease().covers_record(Version(5), std::iter::once(9)));
        assert!(!replica_state.load().lease().covers_record(Version(4), std::iter::once(9)));
    }

    #[test]
    fn revoked_digest_stays_denied_after_history_is_lost() {
        let replica_state = ReplicaState::new(LIMITS);
        let digest = ApiKeyDigest::from_bytes([1; 32]);
        replica_state.apply(&polled(&[(5, 5)], &[]), ChangeLog::Present);
        assert_eq!(
            replica_state.apply(&polled(&[(5, 5), (6, 6)], &[(6, Change::Gone(digest))]), ChangeLog::Present),
            Applied::Changed
        );
        let before = replica_state.load();
        // Lost history takes precedence over altered triggers.
        let lost = replica_state
            .apply(&Polled { triggers_intact: false, ..polled(&[(6, 1), (7, 7)], &[]) }, ChangeLog::Present);
        assert!(matches!(lost, Applied::Lost { applied: Version(6), .. }), "{lost:?}");
        assert_eq!(before.lease_state(Moment::from_nanos(8)), LeaseState::Expired, "the old lease has ended");
        assert_eq!(
            (replica_state.load().since(), replica_state.load().lease_state(Moment::from_nanos(8))),
            (None, LeaseState::Expired)
        );
        assert!(replica_state.revoked.binds(&digest));
        let issued = (5, Change::Absent(digest));
        let begins = polled(&[(5, 5), (6, 1), (7, 7)], std::slice::from_ref(&issued));
        assert_eq!(replica_state.apply(&begins, ChangeLog::Present), Applied::Begun);
        assert!(replica_state.revoked.binds(&digest), "the change that issued the key is older than the revocation");
        replica_state.apply(&polled(&[(7, 7), (8, 8)], &[(8, issued.1)]), ChangeLog::Present);
        assert!(!replica_state.revoked.binds(&digest), "a change in the new history releases the digest");
        assert_ne!(replica_state.load().epoch(), before.epoch());
    }

    #[test]
    fn key_issued_in_the_new_history_before_the_first_poll_is_not_denied() {
        let digest = ApiKeyDigest::from_bytes([1; 32]);
        let issued = |version| (version, Change::Absent(digest));
        // The key is issued once under a version number that the lost history also used, and once under a higher
        // number.
        for (versions, issued) in [(&[(5, 5), (6, 1)][..], issued(6)), (&[(5, 5), (6, 1), (7, 7)][..], issued(7))] {
            let replica_state = ReplicaState::new(LIMITS);
            replica_state.apply(&polled(&[(5, 5)], &[]), ChangeLog::Present);
            replica_state.apply(&polled(&[(5, 5), (6, 6)], &[(6, Change::Gone(digest))]), ChangeLog::Present);
            assert!(matches!(replica_state.apply(&polled(versions, &[]), ChangeLog::Present), Applied::Lost { .. }));
            assert!(replica_state.revoked.binds(&digest));
            assert_eq!(replica_state.apply(&polled(versions, &[issued]), ChangeLog::Present), Applied::Begun);
            assert!(!replica_state.revoked.binds(&digest), "{versions:?}");
        }
    }

    #[test]
    fn key_issued_again_before_the_first_poll_is_not_remembered_as_revoked() {
        let (replica_state, digest) = (ReplicaState::new(LIMITS), ApiKeyDigest::from_bytes([1; 32]));
        let changes = [(5, Change::Gone(digest)), (6, Change::Absent(digest))];
        replica_state.apply(&polled(&[(5, 5), (6, 6)], &changes), ChangeLog::Present);
        replica_state.apply(&polled(&[(6, 1)], &[]), ChangeLog::Present);
        assert!(!replica_state.revoked.binds(&digest));
    }

    #[test]
    fn lease_is_expired_while_triggers_are_not_intact() {
        let replica_state = ReplicaState::new(LIMITS);
        replica_state.apply(&polled(&[(5, 5)], &[]), ChangeLog::Present);
        let unwatched = Polled { triggers_intact: false, ..polled(&[(5, 5), (6, 6)], &[]) };
        assert_eq!(replica_state.apply(&unwatched, ChangeLog::Present), Applied::Unwatched);
        assert_eq!(replica_state.load().lease_state(Moment::from_nanos(8)), LeaseState::Expired);
        assert_eq!(replica_state.load().applied(), Version(5));
        let other = Polled { triggers_intact: false, ..polled(&[(5, 6)], &[]) };
        assert!(matches!(ReplicaState::new(LIMITS).apply(&other, ChangeLog::Present), Applied::Unwatched));
        assert_eq!(
            replica_state.apply(&polled(&[(5, 5), (6, 6), (7, 7)], &[(7, Change::Everything)]), ChangeLog::Present),
            Applied::Changed
        );
        assert!(!covers_negative_entry(&replica_state, 6));
    }

    #[test]
    fn incomplete_poll_makes_every_older_value_out_of_date() {
        let replica_state = ReplicaState::new(LIMITS);
        replica_state.apply(&polled(&[(5, 5)], &[]), ChangeLog::Present);
        let much = Polled { complete: false, ..polled(&[(5, 5), (9, 9)], &[]) };
        assert_eq!(replica_state.apply(&much, ChangeLog::Present), Applied::Everything);
        assert!(!covers_negative_entry(&replica_state, 8) && covers_negative_entry(&replica_state, 9));
    }

    #[test]
    fn poll_of_a_table_without_a_change_log_is_applied_but_begins_no_lease() {
        let replica_state = ReplicaState::new(LIMITS);
        let untracked = Polled { triggers_intact: false, ..polled(&[(0, 0)], &[]) };
        assert_eq!(replica_state.apply(&untracked, ChangeLog::Absent), Applied::Begun);
        assert_eq!(replica_state.load().lease_state(Moment::from_nanos(8)), LeaseState::Expired);
        assert!(replica_state.is_confirmed());
        let epoch = replica_state.load().epoch();
        assert_eq!(replica_state.apply(&Polled { versions: vec![], ..untracked }, ChangeLog::Absent), Applied::Nothing);
        assert_eq!(replica_state.load().epoch(), epoch, "no history is lost");
    }

    #[tokio::test]
    async fn waiter_for_a_version_wakes_when_the_version_is_applied_or_the_view_is_replaced() {
        let replica_state = Arc::new(ReplicaState::new(LIMITS));
        replica_state.apply(&polled(&[(5, 5)], &[]), ChangeLog::Present);
        for answer in [polled(&[(5, 5), (6, 6)], &[]), polled(&[(6, 7)], &[])] {
            let waiting = tokio::spawn({
                let replica_state = Arc::clone(&replica_state);
                async move {
                    let view = Arc::clone(&replica_state.load());
                    let version = Version(view.applied().0 + 1);
                    replica_state.reached(&view, version).await;
                }
            });
            replica_state.woken().await; // `reached` requested a poll
            replica_state.apply(&answer, ChangeLog::Present);
            waiting.await.unwrap();
        }
    }
}
