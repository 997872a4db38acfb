//! The part of a view that checks read while the poll task writes to it: the lease, and the versions below which cached
//! values are out of date. Such a version is either a floor, which applies to all values of one kind, or belongs to a
//! stripe, a group of objects whose ids or digests have the same hash.
//!
//! The poll task raises floors and stripes first and begins the lease last. A check loads the lease first and the
//! floors and stripes last. So a check that sees a lease also sees every change that was committed before the lease
//! began (`tests/loom`). This file does no I/O, reads no clock and takes no lock.

// `tests/loom` compiles this file separately, with loom's atomics, and explores the possible orders of memory
// operations.
#[cfg(trustgate_loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(trustgate_loom))]
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::{
    base::clock::Moment,
    record::{Change, ChangeKind, Version},
};

/// The maximum times for which a replica may use its cache entries.
#[derive(Clone, Copy, Debug)]
pub struct LeaseLimits {
    /// The maximum time after the last successful poll was sent.
    pub lease: Duration,
    /// The maximum additional time for which cached records may be used to grant while polls get no answer at all.
    pub stale: Duration,
}

/// The state of a lease at a given moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseState {
    /// Cache entries may be used.
    Fresh,
    /// The database does not answer. Cached records may still be used to grant; cached denials and negative entries
    /// must not be used.
    Stale,
    /// No cache entry may be used.
    Expired,
}

/// The lease of a view, and the versions of the changes that were applied in that view. Within a view, these versions
/// and the start of the lease only increase, except that [`Self::end`] resets the start.
#[derive(Debug)]
pub struct Lease {
    /// When the lease began: nanoseconds on the boot clock, plus one. 0 means that there is no lease.
    start: AtomicU64,
    /// When the last poll was given up without an answer, encoded like `start`. 0 means that no poll was given up since
    /// the last answer, including an answer that could not be applied.
    unanswered: AtomicU64,
    /// Floor: records that were read before this version are out of date, because many keys changed.
    keys: AtomicU64,
    /// Floor: records that were read before this version are out of date, because many trusts changed.
    trusts: AtomicU64,
    /// Floor: negative entries that were read before this version are out of date.
    negatives: AtomicU64,
    /// For the stripe of each id, the newest version that changed a single key or trust.
    changed_records: Stripes,
    /// For the stripe of each digest, the newest version that made negative entries out of date.
    changed_negatives: Stripes,
}

/// For each stripe, the newest version that changed an object in this stripe.
#[derive(Debug)]
struct Stripes(Box<[AtomicU64]>);

/// The number of stripes in one [`Stripes`] table. If two objects share a stripe, a change to one object also makes
/// checks load the other object again, which costs a read but does not affect the decision.
const STRIPES: usize = if cfg!(trustgate_loom) { 2 } else { 1 << 16 };

/// Returns the stripe of an object from the bytes of its id or digest.
#[must_use]
pub(crate) fn stripe(object: &[u8]) -> u16 {
    // Most bytes of ids and digests are random, so folding and one multiplication distribute them evenly enough.
    let (words, rest) = object.as_chunks::<8>();
    let folded = words.iter().fold(0, |folded: u64, word| folded.rotate_left(23) ^ u64::from_le_bytes(*word));
    let folded = rest.iter().fold(folded, |folded, byte| folded.rotate_left(8) ^ u64::from(*byte));
    let spread = folded.wrapping_mul(0x9E37_79B9_7F4A_7C15); // 2^64 divided by the golden ratio
    let [first, second, ..] = spread.to_be_bytes();
    u16::from_be_bytes([first, second])
}

impl Stripes {
    fn new() -> Self {
        Self((0..STRIPES).map(|_| AtomicU64::new(0)).collect())
    }

    fn raise(&self, stripe: u16, version: Version) {
        self.0[usize::from(stripe) % STRIPES].fetch_max(version.0, Ordering::Relaxed);
    }

    fn at(&self, stripe: u16) -> Version {
        Version(self.0[usize::from(stripe) % STRIPES].load(Ordering::Relaxed))
    }
}

impl Default for Lease {
    fn default() -> Self {
        Self {
            start: AtomicU64::new(0),
            unanswered: AtomicU64::new(0),
            keys: AtomicU64::new(0),
            trusts: AtomicU64::new(0),
            negatives: AtomicU64::new(0),
            changed_records: Stripes::new(),
            changed_negatives: Stripes::new(),
        }
    }
}

impl Lease {
    // === used by checks ===

    /// Returns the state of the lease at `now`. A check must call this before it looks up any value, so that it sees
    /// every change that the lease covers.
    #[must_use]
    pub fn lease_state(&self, now: Moment, limits: LeaseLimits) -> LeaseState {
        let Some(start) = self.start() else { return LeaseState::Expired };
        let age = now.since(start);
        if age <= limits.lease {
            LeaseState::Fresh
        } else if age <= limits.lease.saturating_add(limits.stale) && self.is_unanswered_at(now, limits) {
            LeaseState::Stale
        } else {
            LeaseState::Expired
        }
    }

    /// Returns true if polls get no answer and the last poll was given up at most two leases ago, which is enough time
    /// for two polls. After a pause of this process, the last failed poll is older and proves nothing about the current
    /// state of the database.
    fn is_unanswered_at(&self, now: Moment, limits: LeaseLimits) -> bool {
        let given_up = self.unanswered.load(Ordering::Relaxed).checked_sub(1).map(Moment::from_nanos);
        given_up.is_some_and(|moment| now.since(moment) <= limits.lease.saturating_mul(2))
    }

    /// Returns when the lease began; `None` if there is no lease.
    #[must_use]
    pub fn start(&self) -> Option<Moment> {
        self.start.load(Ordering::Acquire).checked_sub(1).map(Moment::from_nanos)
    }

    /// Returns true if no applied change affects a record that was read at `as_of` from the objects of these stripes.
    #[must_use]
    pub fn covers_record(&self, as_of: Version, mut stripes: impl Iterator<Item = u16>) -> bool {
        let floor = self.keys.load(Ordering::Relaxed).max(self.trusts.load(Ordering::Relaxed));
        as_of.0 >= floor && stripes.all(|stripe| as_of >= self.changed_records.at(stripe))
    }

    /// Returns true if no applied change affects a negative entry that was read at `as_of` for the digests of these
    /// stripes.
    #[must_use]
    pub fn covers_absence(&self, as_of: Version, stripes: &[u16]) -> bool {
        as_of.0 >= self.negatives.load(Ordering::Relaxed)
            && stripes.iter().all(|stripe| as_of >= self.changed_negatives.at(*stripe))
    }

    // === used by the poll task ===

    /// Applies the answer to a poll. Values that were read before `floor`, and older values that `changes` affect,
    /// become out of date. Then calls `advance`, and begins the lease at `sent`, the time at which the poll was sent.
    /// If `sent` is `None`, no lease begins.
    pub fn renew(
        &self,
        floor: Option<Version>,
        changes: &[(Version, Change)],
        advance: impl FnOnce(),
        sent: Option<Moment>,
    ) {
        if let Some(floor) = floor {
            self.apply(floor, &Change::Everything);
        }
        for (version, change) in changes {
            self.apply(*version, change);
        }
        advance();
        let Some(sent) = sent else { return };
        self.unanswered.store(0, Ordering::Relaxed);
        // Release: a check that sees this lease also sees the stripes and floors raised before it.
        self.start.fetch_max(sent.nanos().saturating_add(1), Ordering::Release);
    }

    /// Marks the values that `change` affects as out of date if they were read before `version`.
    fn apply(&self, version: Version, change: &Change) {
        match change {
            Change::Key(id) => self.changed_records.raise(stripe(id.0.as_bytes()), version),
            Change::Trust(id) => self.changed_records.raise(stripe(id.0.as_bytes()), version),
            Change::Absent(digest) => self.changed_negatives.raise(stripe(digest.as_bytes()), version),
            Change::Gone(_) | Change::Whole(ChangeKind::Gone) => {}
            Change::Whole(ChangeKind::Keys) => raise(&self.keys, version),
            Change::Whole(ChangeKind::Trusts) => raise(&self.trusts, version),
            Change::Whole(ChangeKind::Absences) => raise(&self.negatives, version),
            Change::Everything => {
                for floor in [&self.keys, &self.trusts, &self.negatives] {
                    raise(floor, version);
                }
            }
        }
    }

    /// Marks records with objects in these stripes as out of date if they were read before `version`. The sampler calls
    /// this if a record differs from its row and no change explains the difference.
    pub fn refuse(&self, version: Version, stripes: impl Iterator<Item = u16>) {
        for stripe in stripes {
            self.changed_records.raise(stripe, version);
        }
    }

    /// Records that a poll got no answer and was given up at `now`. The lease still ends at the same time. After that
    /// time, the lease is stale as long as later polls get no answer either.
    pub fn note_unanswered(&self, now: Moment) {
        self.unanswered.store(now.nanos().saturating_add(1), Ordering::Relaxed);
    }

    /// Records that a poll was answered but the answer could not be applied. The end of the lease does not change, and
    /// the lease does not become stale.
    pub fn note_unusable(&self) {
        self.unanswered.store(0, Ordering::Relaxed);
    }

    /// Ends the lease immediately.
    pub fn end(&self) {
        self.unanswered.store(0, Ordering::Relaxed);
        self.start.store(0, Ordering::Release);
    }

    /// Returns true while polls get no answer at all.
    #[must_use]
    pub fn is_unanswered(&self) -> bool {
        self.unanswered.load(Ordering::Relaxed) > 0
    }
}

fn raise(floor: &AtomicU64, version: Version) {
    floor.fetch_max(version.0, Ordering::Relaxed);
}

#[cfg(all(test, not(trustgate_loom)))]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::record::{ApiKeyDigest, KeyId, TrustId};

    const LIMITS: LeaseLimits = LeaseLimits { lease: Duration::from_nanos(100), stale: Duration::from_micros(1) };

    fn at(nanos: u64) -> Moment {
        Moment::from_nanos(nanos)
    }

    #[test]
    fn lease_begins_when_its_poll_was_sent_and_becomes_stale_only_without_an_answer() {
        let lease = Lease::default();
        assert_eq!(lease.lease_state(at(0), LIMITS), LeaseState::Expired, "no poll yet");
        lease.note_unanswered(at(0));
        assert_eq!(lease.lease_state(at(0), LIMITS), LeaseState::Expired, "no poll has succeeded yet");
        let begin = |nanos| lease.renew(None, &[], || (), Some(at(nanos)));
        begin(0);
        assert_eq!(lease.lease_state(at(100), LIMITS), LeaseState::Fresh);
        assert_eq!(lease.lease_state(at(101), LIMITS), LeaseState::Expired, "the poll was answered");
        lease.note_unanswered(at(90));
        assert_eq!(lease.lease_state(at(101), LIMITS), LeaseState::Stale);
        assert_eq!(lease.lease_state(at(290), LIMITS), LeaseState::Stale);
        assert_eq!(lease.lease_state(at(291), LIMITS), LeaseState::Expired, "the last failed poll is too old");
        lease.note_unanswered(at(1_000));
        assert_eq!(lease.lease_state(at(1_100), LIMITS), LeaseState::Stale);
        assert_eq!(lease.lease_state(at(1_101), LIMITS), LeaseState::Expired);
        lease.note_unusable();
        assert_eq!(lease.lease_state(at(101), LIMITS), LeaseState::Expired, "the answer could not be applied");
        begin(500);
        begin(400);
        assert_eq!(lease.start(), Some(at(500)), "an older poll does not move the start back");
        lease.end();
        assert_eq!(lease.lease_state(at(500), LIMITS), LeaseState::Expired);
    }

    #[test]
    fn change_makes_only_the_values_it_affects_out_of_date() {
        let (key, trust) = (Uuid::from_u128(0xA1), Uuid::from_u128(0xB2));
        let digest = ApiKeyDigest::from_bytes([7; 32]);
        let covered = |change: &Change, as_of: u64| {
            let lease = Lease::default();
            lease.renew(None, &[(Version(5), change.clone())], || (), None);
            assert_eq!(lease.start(), None);
            let record = lease.covers_record(Version(as_of), [key, trust].iter().map(|id| stripe(id.as_bytes())));
            (record, lease.covers_absence(Version(as_of), &[stripe(digest.as_bytes())]))
        };
        for (change, record, negative) in [
            (Change::Key(KeyId(key)), false, true),
            (Change::Key(KeyId(Uuid::from_u128(3))), true, true),
            (Change::Trust(TrustId(trust)), false, true),
            (Change::Absent(digest), true, false),
            (Change::Absent(ApiKeyDigest::from_bytes([8; 32])), true, true),
            (Change::Gone(digest), true, true),
            (Change::Whole(ChangeKind::Keys), false, true),
            (Change::Whole(ChangeKind::Trusts), false, true),
            (Change::Whole(ChangeKind::Absences), true, false),
            (Change::Everything, false, false),
        ] {
            assert_eq!(covered(&change, 4), (record, negative), "{change:?}");
            assert_eq!(covered(&change, 5), (true, true), "{change:?}: read at the version of the change");
        }
    }

    #[test]
    fn refused_stripe_makes_older_records_out_of_date() {
        let (lease, key, other) = (Lease::default(), Uuid::from_u128(0xA1), Uuid::from_u128(0xB2));
        let covers = |id: Uuid, as_of| lease.covers_record(Version(as_of), std::iter::once(stripe(id.as_bytes())));
        lease.refuse(Version(5), std::iter::once(stripe(key.as_bytes())));
        assert_eq!((covers(key, 4), covers(key, 5), covers(other, 4)), (false, true, true));
        lease.refuse(Version(3), std::iter::once(stripe(key.as_bytes())));
        assert!(!covers(key, 4), "a lower version does not lower the stripe");
    }

    #[test]
    fn similar_ids_get_different_stripes() {
        let mut seen = std::collections::HashSet::new();
        for id in 0..1_000_u128 {
            seen.insert(stripe(Uuid::from_u128(id << 64 | 0x7000_0000_0000_0000).as_bytes()));
            seen.insert(stripe(Uuid::from_u128(id).as_bytes()));
        }
        assert!(seen.len() > 1_900, "{}", seen.len());
    }
}
