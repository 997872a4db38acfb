//! The lease and what it covers, with a poll and a check at the same time, in every order in which the memory of a
//! machine may show the one what the other did.
//!
//! Compiles `src/freshness/lease.rs` by itself, with loom's atomics: `make loom`. Never touches the library's own.

#![cfg(trustgate_loom)]
// The file under test is written for a library.
#![allow(unreachable_pub)]

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use loom::thread;
// What the file under test imports of its crate.
use trustgate::{base, record};

use base::clock::Moment;
use lease::{Lease, stripe};
use record::{ApiKeyDigest, Change, ChangeKind, KeyId, TrustId, Version};
use uuid::Uuid;

#[path = "../../src/freshness/lease.rs"]
#[expect(dead_code, reason = "the stale time has no part in this")]
mod lease;

const KEY: KeyId = KeyId(Uuid::from_u128(1));
const TRUST: TrustId = TrustId(Uuid::from_u128(2));
const DIGEST: ApiKeyDigest = ApiKeyDigest::from_bytes([3; 32]);

fn covers_record(lease: &Lease, as_of: u64) -> bool {
    lease.covers_record(Version(as_of), [KEY.0, TRUST.0].iter().map(|id| stripe(id.as_bytes())))
}

fn covers_absence(lease: &Lease, as_of: u64) -> bool {
    lease.covers_absence(Version(as_of), &[stripe(DIGEST.as_bytes())])
}

/// What a check does with a value that was read at `as_of`: the lease first, then what it covers.
fn check(lease: &Lease, covers: Covers, as_of: u64) -> (u64, bool) {
    let begun = lease.start().map_or(0, Moment::nanos);
    (begun, covers(lease, as_of))
}

type Covers = fn(&Lease, u64) -> bool;

/// A poll that found nothing new.
fn begin(lease: &Lease, sent: u64) {
    lease.renew(None, &[], || (), Some(Moment::from_nanos(sent)));
}

/// Takes a check through a poll, in every order, and returns what it may see: when the lease it saw began, and whether
/// that covered its value.
fn seen(polls: &'static [(u64, Change)], covers: Covers, as_of: u64) -> BTreeSet<(u64, bool)> {
    let seen = Arc::new(Mutex::new(BTreeSet::new()));
    let all = Arc::clone(&seen);
    loom::model(move || {
        let lease = loom::sync::Arc::new(Lease::default());
        begin(&lease, 4); // of the poll that found version 4
        let checked = loom::sync::Arc::clone(&lease);
        let checking = thread::spawn(move || check(&checked, covers, as_of));
        for (number, change) in polls {
            let sent = Some(Moment::from_nanos(*number));
            lease.renew(None, &[(Version(*number), change.clone())], || (), sent);
        }
        let came = checking.join().expect("a check does not panic");
        all.lock().unwrap_or_else(PoisonError::into_inner).insert(came);
    });
    std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner))
}

#[test]
fn whoever_sees_a_lease_sees_every_change_before_it() {
    static KEY_CHANGED: [(u64, Change); 1] = [(5, Change::Key(KEY))];
    static TRUST_CHANGED: [(u64, Change); 1] = [(5, Change::Trust(TRUST))];
    static KEYS_CHANGED: [(u64, Change); 1] = [(5, Change::Whole(ChangeKind::Keys))];
    static TRUSTS_CHANGED: [(u64, Change); 1] = [(5, Change::Whole(ChangeKind::Trusts))];
    static EVERYTHING_CHANGED: [(u64, Change); 1] = [(5, Change::Everything)];
    static ISSUED: [(u64, Change); 1] = [(5, Change::Absent(DIGEST))];
    static ABSENCES_CHANGED: [(u64, Change); 1] = [(5, Change::Whole(ChangeKind::Absences))];
    for (change, covers) in [
        (&KEY_CHANGED, covers_record as Covers),
        (&TRUST_CHANGED, covers_record),
        (&KEYS_CHANGED, covers_record),
        (&TRUSTS_CHANGED, covers_record),
        (&EVERYTHING_CHANGED, covers_record),
        (&EVERYTHING_CHANGED, covers_absence),
        (&ISSUED, covers_absence),
        (&ABSENCES_CHANGED, covers_absence),
    ] {
        // Before, in between, and after; never the new lease with the old value.
        assert_eq!(seen(change, covers, 4), [(4, false), (4, true), (5, false)].into(), "{change:?}");
        // What was read at the version itself is covered by both leases.
        assert_eq!(seen(change, covers, 5), [(4, true), (5, true)].into(), "{change:?}");
    }
}

#[test]
fn a_later_lease_speaks_for_all_changes_before_it() {
    static POLLS: [(u64, Change); 2] = [(5, Change::Key(KEY)), (6, Change::Trust(TRUST))];
    let seen_of = |as_of| seen(&POLLS, covers_record, as_of);
    assert!(seen_of(4).iter().all(|(begun, covered)| *begun < 5 || !covered), "{:?}", seen_of(4));
    assert!(seen_of(5).iter().all(|(begun, covered)| *begun < 6 || !covered), "{:?}", seen_of(5));
    assert!(seen_of(6).iter().all(|(_, covered)| *covered), "{:?}", seen_of(6));
}

#[test]
fn a_lease_that_was_ended_is_not_seen_with_what_was_applied_after_it() {
    // Between two leases there is none: whatever a check sees of the second, it sees all that came before.
    loom::model(|| {
        let lease = loom::sync::Arc::new(Lease::default());
        begin(&lease, 4);
        let checked = loom::sync::Arc::clone(&lease);
        let checking = thread::spawn(move || check(&checked, covers_record, 4));
        lease.end();
        lease.renew(Some(Version(5)), &[], || (), Some(Moment::from_nanos(5)));
        let (begun, covered) = checking.join().expect("a check does not panic");
        assert!(begun < 5 || !covered);
    });
}
