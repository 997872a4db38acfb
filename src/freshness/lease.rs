//! What checks read of a view while the poll writes it: the lease, the floors and the stripes.
//!
//! A poll raises stripes and floors first and the lease last; a check loads the lease first and the stripes last. So a
//! check that sees a lease sees every change that was committed before that lease began. No I/O, no clock, no lock.

// `tests/loom` compiles this file by itself with loom's atomics, which can be shown in every order.
#[cfg(trustgate_loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(trustgate_loom))]
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::{
    base::clock::Moment,
    record::{Change, ChangeKind, Version},
};

/// For how long a replica may rely on what it holds.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// After the start of the last poll that was answered.
    pub lease: Duration,
    /// And this much longer while polls get no answer at all.
    pub stale: Duration,
}

/// What a lease is worth at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseState {
    /// What is held may be relied on.
    Fresh,
    /// The database does not answer: records that were held as good may still be granted, absences may not be told.
    Stale,
    /// Nothing that is held may be relied on.
    Expired,
}

/// The lease of a view and what it covers. Within a view everything here only rises; the lease may also be dropped.
#[derive(Debug)]
pub struct Lease {
    /// The moment it began, in nanoseconds of the boot clock, plus one; 0: never.
    start: AtomicU64,
    /// The moment the last poll was given up for lack of an answer, as opposed to one that could not be applied; as `start`.
    /// 0: it got one.
    unanswered: AtomicU64,
    keys: AtomicU64,
    trusts: AtomicU64,
    absences: AtomicU64,
    named_records: Stripes,
    named_absences: Stripes,
}

/// The newest version that named one of the objects that share a stripe.
#[derive(Debug)]
struct Stripes(Box<[AtomicU64]>);

/// Stripes of each sort. Objects that share one cost each other a read of the store, never a wrong answer.
const STRIPES: usize = if cfg!(trustgate_loom) { 2 } else { 1 << 16 };

/// The stripe of an object, by the bytes of its id or digest.
#[must_use]
pub fn stripe(object: &[u8]) -> u16 {
    // Ids and digests are random in most of their bytes: folding and one multiplication spread them.
    let (words, rest) = object.as_chunks::<8>();
    let folded = words.iter().fold(0, |folded: u64, word| folded.rotate_left(23) ^ u64::from_le_bytes(*word));
    let folded = rest.iter().fold(folded, |folded, byte| folded.rotate_left(8) ^ u64::from(*byte));
    let spread = folded.wrapping_mul(0x9E37_79B9_7F4A_7C15); // 2^64 divided by the golden ratio
    u16::try_from(spread >> 48).unwrap_or(0) // 16 bits are left
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
            absences: AtomicU64::new(0),
            named_records: Stripes::new(),
            named_absences: Stripes::new(),
        }
    }
}

impl Lease {
    // === what a check does ===

    /// What the lease is worth at `now`. A check calls it before it looks at any value.
    #[must_use]
    pub fn lease_state(&self, now: Moment, limits: Limits) -> LeaseState {
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

    /// Whether polls get no answer, and one was given up so lately that the next is not overdue: after a pause of this
    /// process nobody has asked. Two attempts of a poll fit into two leases.
    fn is_unanswered_at(&self, now: Moment, limits: Limits) -> bool {
        let given_up = self.unanswered.load(Ordering::Relaxed).checked_sub(1).map(Moment::from_nanos);
        given_up.is_some_and(|moment| now.since(moment) <= limits.lease.saturating_mul(2))
    }

    /// When the lease began, if there is one.
    #[must_use]
    pub fn start(&self) -> Option<Moment> {
        self.start.load(Ordering::Acquire).checked_sub(1).map(Moment::from_nanos)
    }

    /// Whether no change that was applied concerns a record read at `as_of` and made of the objects of these stripes.
    #[must_use]
    pub fn covers_record(&self, as_of: Version, mut stripes: impl Iterator<Item = u16>) -> bool {
        let floor = self.keys.load(Ordering::Relaxed).max(self.trusts.load(Ordering::Relaxed));
        as_of.0 >= floor && stripes.all(|stripe| as_of >= self.named_records.at(stripe))
    }

    /// Whether no change that was applied concerns an absence read at `as_of` that was looked for under the digests of
    /// these stripes.
    #[must_use]
    pub fn covers_absence(&self, as_of: Version, stripes: &[u16]) -> bool {
        as_of.0 >= self.absences.load(Ordering::Relaxed)
            && stripes.iter().all(|stripe| as_of >= self.named_absences.at(*stripe))
    }

    // === what a poll does ===

    /// Takes in what the poll found that was sent at `sent`: what was read before `floor`, and what `changes` name, is out
    /// of date; then, once `move_on` was called, the lease begins. `None`: there is none.
    pub fn renew(
        &self,
        floor: Option<Version>,
        changes: &[(Version, Change)],
        move_on: impl FnOnce(),
        sent: Option<Moment>,
    ) {
        if let Some(floor) = floor {
            self.apply(floor, &Change::Everything);
        }
        for (version, change) in changes {
            self.apply(*version, change);
        }
        move_on();
        let Some(sent) = sent else { return };
        self.unanswered.store(0, Ordering::Relaxed);
        // Release: whoever sees this lease sees the stripes and floors raised before it.
        self.start.fetch_max(sent.nanos().saturating_add(1), Ordering::Release);
    }

    /// Makes what `change` names at `version` out of date.
    fn apply(&self, version: Version, change: &Change) {
        match change {
            Change::Key(id) => self.named_records.raise(stripe(id.0.as_bytes()), version),
            Change::Trust(id) => self.named_records.raise(stripe(id.0.as_bytes()), version),
            Change::Absent(digest) => self.named_absences.raise(stripe(digest.as_bytes()), version),
            Change::Gone(_) | Change::Whole(ChangeKind::Gone) => {}
            Change::Whole(ChangeKind::Keys) => raise(&self.keys, version),
            Change::Whole(ChangeKind::Trusts) => raise(&self.trusts, version),
            Change::Whole(ChangeKind::Absences) => raise(&self.absences, version),
            Change::Everything => {
                for floor in [&self.keys, &self.trusts, &self.absences] {
                    raise(floor, version);
                }
            }
        }
    }

    /// Makes what was read before `version` and is made of the objects of these stripes out of date, although no change named
    /// them.
    pub fn refuse(&self, version: Version, stripes: impl Iterator<Item = u16>) {
        for stripe in stripes {
            self.named_records.raise(stripe, version);
        }
    }

    /// A poll got no answer and was given up at `now`: the lease runs on to its end, and the stale time after it as long as
    /// the next ones get none either.
    pub fn note_unanswered(&self, now: Moment) {
        self.unanswered.store(now.nanos().saturating_add(1), Ordering::Relaxed);
    }

    /// A poll was answered, but the answer could not be applied: the lease runs on to its end and no further.
    pub fn note_unusable(&self) {
        self.unanswered.store(0, Ordering::Relaxed);
    }

    /// Ends the lease at once.
    pub fn end(&self) {
        self.unanswered.store(0, Ordering::Relaxed);
        self.start.store(0, Ordering::Release);
    }

    /// Whether polls get no answer at all.
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

    const LIMITS: Limits = Limits { lease: Duration::from_nanos(100), stale: Duration::from_micros(1) };

    fn at(nanos: u64) -> Moment {
        Moment::from_nanos(nanos)
    }

    #[test]
    fn a_lease_lasts_from_the_sending_of_its_poll_and_longer_only_without_any_answer() {
        let lease = Lease::default();
        assert_eq!(lease.lease_state(at(0), LIMITS), LeaseState::Expired, "never begun");
        lease.note_unanswered(at(0));
        assert_eq!(lease.lease_state(at(0), LIMITS), LeaseState::Expired, "nothing was ever confirmed");
        let begin = |nanos| lease.renew(None, &[], || (), Some(at(nanos)));
        begin(0);
        assert_eq!(lease.lease_state(at(100), LIMITS), LeaseState::Fresh);
        assert_eq!(lease.lease_state(at(101), LIMITS), LeaseState::Expired, "the poll was answered");
        lease.note_unanswered(at(90));
        assert_eq!(lease.lease_state(at(101), LIMITS), LeaseState::Stale);
        assert_eq!(lease.lease_state(at(290), LIMITS), LeaseState::Stale);
        assert_eq!(lease.lease_state(at(291), LIMITS), LeaseState::Expired, "nobody has asked since");
        lease.note_unanswered(at(1_000));
        assert_eq!(lease.lease_state(at(1_100), LIMITS), LeaseState::Stale);
        assert_eq!(lease.lease_state(at(1_101), LIMITS), LeaseState::Expired);
        lease.note_unusable();
        assert_eq!(lease.lease_state(at(101), LIMITS), LeaseState::Expired, "an answer that confirms nothing");
        begin(500);
        begin(400);
        assert_eq!(lease.start(), Some(at(500)), "it never goes back");
        lease.end();
        assert_eq!(lease.lease_state(at(500), LIMITS), LeaseState::Expired);
    }

    #[test]
    fn a_change_makes_out_of_date_what_it_names_and_nothing_else() {
        let (key, trust) = (Uuid::from_u128(0xA1), Uuid::from_u128(0xB2));
        let digest = ApiKeyDigest::from_bytes([7; 32]);
        let covered = |change: &Change, as_of: u64| {
            let lease = Lease::default();
            lease.renew(None, &[(Version(5), change.clone())], || (), None);
            assert_eq!(lease.start(), None);
            let record = lease.covers_record(Version(as_of), [key, trust].iter().map(|id| stripe(id.as_bytes())));
            (record, lease.covers_absence(Version(as_of), &[stripe(digest.as_bytes())]))
        };
        for (change, record, absence) in [
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
            assert_eq!(covered(&change, 4), (record, absence), "{change:?}");
            assert_eq!(covered(&change, 5), (true, true), "{change:?}: read at the version that named it");
        }
    }

    #[test]
    fn what_was_found_to_differ_is_refused_where_it_was_read_before() {
        let (lease, key, other) = (Lease::default(), Uuid::from_u128(0xA1), Uuid::from_u128(0xB2));
        let covers = |id: Uuid, as_of| lease.covers_record(Version(as_of), std::iter::once(stripe(id.as_bytes())));
        lease.refuse(Version(5), std::iter::once(stripe(key.as_bytes())));
        assert_eq!((covers(key, 4), covers(key, 5), covers(other, 4)), (false, true, true));
        lease.refuse(Version(3), std::iter::once(stripe(key.as_bytes())));
        assert!(!covers(key, 4), "it never goes back");
    }

    #[test]
    fn stripes_spread_ids_that_differ_little() {
        let mut seen = std::collections::HashSet::new();
        for id in 0..1_000_u128 {
            seen.insert(stripe(Uuid::from_u128(id << 64 | 0x7000_0000_0000_0000).as_bytes()));
            seen.insert(stripe(Uuid::from_u128(id).as_bytes()));
        }
        assert!(seen.len() > 1_900, "{}", seen.len());
    }
}
