//! How long what was read may be relied on: the view of this replica, and the poll that keeps it.
//!
//! A view is state without I/O. Never touches a cache: a value that left the view is refused where it is used.

pub mod deny_list;
pub mod history;
pub mod lease;
pub mod mode;
pub mod pepper;
pub mod poll;
pub mod revoked;

use std::{
    num::NonZeroU32,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::{Notify, watch};

pub use self::mode::Freshness;
use self::{
    history::{Continuity, History, Provenance},
    lease::{Lease, LeaseState, Limits},
    pepper::PepperState,
    revoked::Revoked,
};
use crate::{
    base::clock::{DatabaseClock, Moment},
    record::{Change, Lineage, Version, Versioned},
    store::Polled,
};

crate::settings! {
    /// How fresh what is held must be for a decision, and how that is made sure of. See `docs/revocation.md`.
    pub struct FreshnessSettings in "freshness" {
        /// `lease`: what is held is relied on while a poll has confirmed it within `lease`, so that a revoked key stops
        /// within about a second at the worst, and for `stale_if_unconfirmed` while the database does not answer.
        /// `strict`: the same without that time. `live`: every request reads its key's row in the database. `ttl`: a
        /// record is used until it is `ttl` old. A route can say otherwise with the context extension
        /// `trustgate.freshness`. Unset: `lease`, or `ttl` with an existing table that is not attached, which
        /// names no changes.
        mode: Option<Freshness> = "",
        /// How long what is held may be relied on after the last poll that was answered (L): a revoked key is granted no
        /// longer than this while this replica reaches the database.
        lease: Duration = "1s",
        /// How much longer records that were good may be granted while polls get no answer at all (S); `0s`: not at all.
        /// While the database is down nobody can revoke a key in it; this time counts where this replica is cut off from
        /// a database that others reach.
        stale_if_unconfirmed: Duration = "120s",
        /// How often the database is asked what changed.
        poll_interval: Duration = "100ms",
        /// How long such a poll may take; connecting may take `store.connect_timeout`.
        poll_timeout: Duration = "250ms",
        /// Whether the database (`NOTIFY` of PostgreSQL) and Redis may tell that something changed, so that the poll need
        /// not wait for its turn. They only make a revocation faster: the bound holds without them.
        hints: bool = "true",
        /// In mode `ttl`: how old a record may get, counted from the database read, whatever tiers it passed through.
        ttl: Duration = "60s",
        /// In mode `ttl`: how long "no such key" is remembered. A new key that somebody tried before it was issued waits
        /// this long.
        absence_ttl: Duration = "5s",
        /// A file of keys, trusts and digests to deny, while the database is down too: lines such as `key UUID`,
        /// `trust UUID` or `digest` and 64 hexadecimal digits, each with ` until 2026-01-31T12:00:00Z` after it if it is to
        /// end; `#` begins a comment. A change counts within a second. Unset: there is none.
        deny_file: Option<PathBuf> = "",
        /// How often a record that is held here is compared with its row in the database, which proves that no change goes
        /// unnoticed; 10 ms at least, `0s`: never. One that differs though no change named it is read again, and counted.
        sample_interval: Duration = "0s",
        /// How often this replica issues a key of its own, sees it granted, revokes it and asks for it until it is refused;
        /// 1 s at least, `0s`: never. Needs a role that may change trusts and keys (`store.management_url`, or `store.url`)
        /// and writes four entries of the audit each time. Not more often than once a second over all replicas.
        canary_interval: Duration = "0s",
    }
}

impl FreshnessSettings {
    /// The bounds of the lease.
    #[must_use]
    pub const fn limits(&self) -> Limits {
        Limits { lease: self.lease, stale: self.stale_if_unconfirmed }
    }

    /// How long after its commit a revocation may go unnoticed by checks under `mode`, at most. `is_unanswered`: whether
    /// polls get no answer at all. How long the check itself may take comes on top.
    #[must_use]
    pub fn bound(&self, mode: Freshness, is_unanswered: bool) -> Duration {
        match mode {
            Freshness::Lease if is_unanswered => self.lease + self.stale_if_unconfirmed,
            Freshness::Lease | Freshness::Strict => self.lease,
            Freshness::Live => Duration::ZERO,
            Freshness::Ttl => self.ttl,
        }
    }
}

/// What this replica knows of the store's history, and which values that covers.
#[derive(Debug)]
pub struct ReplicaView {
    epoch: Epoch,
    limits: Limits,
    lease: Lease,
    history: Mutex<History>,
    /// The history that was lost before this view.
    lost: History,
}

/// Which view a value entered: stamped on it when it enters a cache. Views follow upon polls that found a lost history, so
/// that their numbers last for a decade of nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epoch(NonZeroU32);

impl ReplicaView {
    /// The view that comes after `earlier` others, of which the last knew the history `lost`.
    fn new(earlier: u32, limits: Limits, lost: History) -> Self {
        Self {
            epoch: Epoch(NonZeroU32::MIN.saturating_add(earlier)),
            limits,
            lease: Lease::default(),
            history: Mutex::default(),
            lost,
        }
    }

    /// Which view it is.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The lease and what it covers.
    #[must_use]
    pub const fn lease(&self) -> &Lease {
        &self.lease
    }

    /// What the lease is worth at `now`. A check asks before it looks at any value.
    #[must_use]
    pub fn lease_state(&self, now: Moment) -> LeaseState {
        self.lease.lease_state(now, self.limits)
    }

    /// Where a value belongs in this view's history.
    #[must_use]
    pub fn provenance<T>(&self, value: &Versioned<T>) -> Provenance {
        self.history().provenance(value)
    }

    /// The version applied; 0 before the first poll.
    #[must_use]
    pub fn applied(&self) -> Version {
        self.history().applied()
    }

    /// From which version on the next poll asks; `None` before the first.
    #[must_use]
    pub fn since(&self) -> Option<Version> {
        let history = self.history();
        history.is_begun().then(|| history.applied())
    }

    fn history(&self) -> MutexGuard<'_, History> {
        // Every step is whole at every moment.
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The present view, and what outlives it.
#[derive(Debug)]
pub struct ReplicaState {
    present: ArcSwap<ReplicaView>,
    limits: Limits,
    epochs: AtomicU32,
    /// Digests that were revoked in a history that was lost.
    pub revoked: Revoked,
    /// The database's clock as seen from here.
    pub database_clock: DatabaseClock,
    /// Whether this server has the pepper of the database.
    pub pepper: PepperState,
    confirmed: watch::Sender<bool>,
    applied: Notify,
    hint: Notify,
}

/// What the answer to a poll changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// Nothing new.
    Nothing,
    /// The first confirmation of this view.
    Begun,
    /// New versions; what they named is out of date.
    Changed,
    /// New versions, but not all of what they named is known: everything read before is out of date.
    Everything,
    /// History was lost: nothing read before is used, and the next poll begins anew.
    Lost {
        /// The history that was followed.
        lineage: Lineage,
        /// The version it had come to.
        applied: Version,
    },
    /// The store does not name all changes at the moment: nothing is relied on until it does.
    Unwatched,
}

impl ReplicaState {
    /// No view yet: nothing is relied on before the first poll.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            present: ArcSwap::from_pointee(ReplicaView::new(0, limits, History::default())),
            limits,
            epochs: AtomicU32::new(0),
            revoked: Revoked::default(),
            database_clock: DatabaseClock::default(),
            pepper: PepperState::default(),
            confirmed: watch::Sender::new(false),
            applied: Notify::new(),
            hint: Notify::new(),
        }
    }

    /// The present view. A check loads it once and keeps to it.
    #[must_use]
    pub fn load(&self) -> Guard<Arc<ReplicaView>> {
        self.present.load()
    }

    /// The bounds of the lease.
    #[must_use]
    pub const fn limits(&self) -> Limits {
        self.limits
    }

    /// Whether the store has confirmed anything yet.
    #[must_use]
    pub fn is_confirmed(&self) -> bool {
        *self.confirmed.borrow()
    }

    /// Returns once the store has confirmed something.
    pub async fn confirmed(&self) {
        // The sender is `self`'s own.
        let _ = self.confirmed.subscribe().wait_for(|confirmed| *confirmed).await;
    }

    /// Asks for a poll soon.
    pub fn wake(&self) {
        self.hint.notify_one();
    }

    /// Returns when a poll was asked for.
    ///
    /// # Cancel safety
    /// Safe: a request that comes meanwhile is kept.
    pub async fn woken(&self) {
        self.hint.notified().await;
    }

    /// Asks for a poll and returns when `view` has applied `version`, or is no longer the present one. The caller sets
    /// the deadline.
    pub async fn reached(&self, view: &ReplicaView, version: Version) {
        self.wake();
        loop {
            // Begun before the look, so that nothing comes between them.
            let applied = self.applied.notified();
            if view.applied() >= version || self.load().epoch != view.epoch {
                return;
            }
            applied.await;
        }
    }

    /// Takes in the answer to a poll that was sent for [`ReplicaView::since`] of the present view. `tracks_changes`: whether
    /// the tables are ours; others never give a lease.
    pub fn apply(&self, polled: &Polled, tracks_changes: bool) -> Applied {
        let newest = &polled.newest;
        self.database_clock.observe(newest.sent_at, newest.read_at);
        let view = self.present.load_full();
        let history = view.history();
        let (begun, before) = (history.is_begun(), history.applied());
        // Without versions there is nothing to judge: such tables have no history that could be lost.
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
            // What changed before the first of them is not known.
            Continuity::Follow if polled.complete => {
                Some(polled.versions.first().map_or(newest.as_of, |(first, _)| *first))
            }
            Continuity::Follow | Continuity::Jump => Some(newest.as_of),
        };
        // Only this function changes the history, and it is not called twice at once. Release the lock: the work below must not block checks.
        drop(history);
        // A view that begins is told of the last minutes, those before history was lost included: what was said then does
        // not make good again what was revoked.
        let is_news = |of: Version| {
            let named = polled.versions.binary_search_by_key(&of, |(version, _)| *version).ok();
            let nonce = named.map_or(newest.nonce, |index| polled.versions[index].1);
            view.lost.is_news(of, nonce)
        };
        let told = polled.changes.iter();
        let told = told.filter(|(version, change)| begun || matches!(change, Change::Gone(_)) || is_news(*version));
        self.revoked.note(told, newest.sent_at);
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

    /// A new view in place of one whose history was lost: whoever holds the old one finds its lease at an end.
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
    use super::*;
    use crate::{
        base::clock::DatabaseTime,
        record::{ApiKeyDigest, Nonce},
    };

    const LIMITS: Limits = Limits { lease: Duration::from_secs(1), stale: Duration::from_mins(2) };

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

    fn absence_covered(replica_state: &ReplicaState, as_of: u64) -> bool {
        replica_state.load().lease().covers_absence(Version(as_of), &[lease::stripe(&[1; 32])])
    }

    #[test]
    fn a_view_begins_with_all_versions_of_late_and_refuses_what_is_older() {
        let replica_state = ReplicaState::new(LIMITS);
        assert_eq!((replica_state.is_confirmed(), replica_state.load().since()), (false, None));
        let digest = ApiKeyDigest::from_bytes([1; 32]);
        assert_eq!(
            replica_state.apply(&polled(&[(5, 5), (7, 7)], &[(7, Change::Absent(digest))]), true),
            Applied::Begun
        );
        assert_eq!((replica_state.is_confirmed(), replica_state.load().since()), (true, Some(Version(7))));
        assert_eq!(replica_state.load().lease_state(Moment::from_nanos(8)), LeaseState::Fresh);
        for (as_of, covered) in [(4, false), (5, false), (6, false), (7, true)] {
            assert_eq!(absence_covered(&replica_state, as_of), covered, "{as_of}");
        }
        assert!(replica_state.load().lease().covers_record(Version(5), std::iter::once(9)));
        assert!(!replica_state.load().lease().covers_record(Version(4), std::iter::once(9)));
    }

    #[test]
    fn a_lost_history_begins_a_new_view_and_what_was_revoked_binds_there() {
        let replica_state = ReplicaState::new(LIMITS);
        let digest = ApiKeyDigest::from_bytes([1; 32]);
        replica_state.apply(&polled(&[(5, 5)], &[]), true);
        assert_eq!(
            replica_state.apply(&polled(&[(5, 5), (6, 6)], &[(6, Change::Gone(digest))]), true),
            Applied::Changed
        );
        let before = replica_state.load();
        // Also where the tables were altered with it.
        let lost = replica_state.apply(&Polled { triggers_intact: false, ..polled(&[(6, 1), (7, 7)], &[]) }, true);
        assert!(matches!(lost, Applied::Lost { applied: Version(6), .. }), "{lost:?}");
        assert_eq!(before.lease_state(Moment::from_nanos(8)), LeaseState::Expired, "the old view's lease is over");
        assert_eq!(
            (replica_state.load().since(), replica_state.load().lease_state(Moment::from_nanos(8))),
            (None, LeaseState::Expired)
        );
        assert!(replica_state.revoked.binds(&digest));
        let issued = (5, Change::Absent(digest));
        let begins = polled(&[(5, 5), (6, 1), (7, 7)], std::slice::from_ref(&issued));
        assert_eq!(replica_state.apply(&begins, true), Applied::Begun);
        assert!(replica_state.revoked.binds(&digest), "that it was issued was said before");
        replica_state.apply(&polled(&[(7, 7), (8, 8)], &[(8, issued.1)]), true);
        assert!(!replica_state.revoked.binds(&digest), "the new history speaks of it");
        assert_ne!(replica_state.load().epoch(), before.epoch());
    }

    #[test]
    fn what_a_new_history_said_before_its_first_poll_counts() {
        let digest = ApiKeyDigest::from_bytes([1; 32]);
        let issued = |version| (version, Change::Absent(digest));
        // Under a number that was another one's, and under a later one.
        for (versions, issued) in [(&[(5, 5), (6, 1)][..], issued(6)), (&[(5, 5), (6, 1), (7, 7)][..], issued(7))] {
            let replica_state = ReplicaState::new(LIMITS);
            replica_state.apply(&polled(&[(5, 5)], &[]), true);
            replica_state.apply(&polled(&[(5, 5), (6, 6)], &[(6, Change::Gone(digest))]), true);
            assert!(matches!(replica_state.apply(&polled(versions, &[]), true), Applied::Lost { .. }));
            assert!(replica_state.revoked.binds(&digest));
            assert_eq!(replica_state.apply(&polled(versions, &[issued]), true), Applied::Begun);
            assert!(!replica_state.revoked.binds(&digest), "{versions:?}");
        }
    }

    #[test]
    fn a_key_that_was_good_again_before_the_first_poll_is_not_remembered_as_revoked() {
        let (replica_state, digest) = (ReplicaState::new(LIMITS), ApiKeyDigest::from_bytes([1; 32]));
        let changes = [(5, Change::Gone(digest)), (6, Change::Absent(digest))];
        replica_state.apply(&polled(&[(5, 5), (6, 6)], &changes), true);
        replica_state.apply(&polled(&[(6, 1)], &[]), true);
        assert!(!replica_state.revoked.binds(&digest));
    }

    #[test]
    fn nothing_is_relied_on_while_changes_are_not_named() {
        let replica_state = ReplicaState::new(LIMITS);
        replica_state.apply(&polled(&[(5, 5)], &[]), true);
        let unwatched = Polled { triggers_intact: false, ..polled(&[(5, 5), (6, 6)], &[]) };
        assert_eq!(replica_state.apply(&unwatched, true), Applied::Unwatched);
        assert_eq!(replica_state.load().lease_state(Moment::from_nanos(8)), LeaseState::Expired);
        assert_eq!(replica_state.load().applied(), Version(5));
        let other = Polled { triggers_intact: false, ..polled(&[(5, 6)], &[]) };
        assert!(matches!(ReplicaState::new(LIMITS).apply(&other, true), Applied::Unwatched), "nothing is known of it");
        assert_eq!(
            replica_state.apply(&polled(&[(5, 5), (6, 6), (7, 7)], &[(7, Change::Everything)]), true),
            Applied::Changed
        );
        assert!(!absence_covered(&replica_state, 6));
    }

    #[test]
    fn too_much_at_once_makes_everything_out_of_date() {
        let replica_state = ReplicaState::new(LIMITS);
        replica_state.apply(&polled(&[(5, 5)], &[]), true);
        let much = Polled { complete: false, ..polled(&[(5, 5), (9, 9)], &[]) };
        assert_eq!(replica_state.apply(&much, true), Applied::Everything);
        assert!(!absence_covered(&replica_state, 8) && absence_covered(&replica_state, 9));
    }

    #[test]
    fn tables_that_name_no_changes_are_confirmed_but_never_give_a_lease() {
        let replica_state = ReplicaState::new(LIMITS);
        let unnamed = Polled { triggers_intact: false, ..polled(&[(0, 0)], &[]) };
        assert_eq!(replica_state.apply(&unnamed, false), Applied::Begun);
        assert_eq!(replica_state.load().lease_state(Moment::from_nanos(8)), LeaseState::Expired);
        assert!(replica_state.is_confirmed());
        let epoch = replica_state.load().epoch();
        assert_eq!(replica_state.apply(&Polled { versions: vec![], ..unnamed }, false), Applied::Nothing);
        assert_eq!(replica_state.load().epoch(), epoch, "no history is lost");
    }

    #[tokio::test]
    async fn whoever_waits_for_a_version_is_told_when_it_is_applied_or_its_view_is_gone() {
        let replica_state = Arc::new(ReplicaState::new(LIMITS));
        replica_state.apply(&polled(&[(5, 5)], &[]), true);
        for answer in [polled(&[(5, 5), (6, 6)], &[]), polled(&[(6, 7)], &[])] {
            let waiting = tokio::spawn({
                let replica_state = Arc::clone(&replica_state);
                async move {
                    let view = Arc::clone(&replica_state.load());
                    let version = Version(view.applied().0 + 1);
                    replica_state.reached(&view, version).await;
                }
            });
            replica_state.woken().await; // it asked for a poll
            replica_state.apply(&answer, true);
            waiting.await.unwrap();
        }
    }
}
