//! Tests a poll and a check that use the same lease concurrently. loom runs them in every order of memory operations
//! that the memory model allows. A check that sees a lease must also see the changes that were applied before the lease
//! began.
//!
//! `make loom` compiles `src/freshness/lease.rs` into this test with loom's atomics. The library that the test links
//! keeps the standard atomics.

#![cfg(trustgate_loom)]
// The file under test is part of a library, so its items are `pub`.
#![allow(unreachable_pub)]

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use loom::thread;
// The modules that the file under test imports from its crate.
use trustgate::testing::{base, record};

use base::clock::Moment;
use lease::{Lease, stripe};
use record::{ApiKeyDigest, Change, ChangeKind, KeyId, TrustId, Version};
use uuid::Uuid;

#[path = "../../src/freshness/lease.rs"]
#[expect(dead_code, reason = "these tests do not use the stale state")]
mod lease;

const KEY: KeyId = KeyId(Uuid::from_u128(1));
const TRUST: TrustId = TrustId(Uuid::from_u128(2));
const DIGEST: ApiKeyDigest = ApiKeyDigest::from_bytes([3; 32]);

fn covers_record(lease: &Lease, as_of: u64) -> bool {
    lease.covers_record(Version(as_of), [KEY.0, TRUST.0].iter().map(|id| stripe(id.as_bytes())))
}

fn covers_negative(lease: &Lease, as_of: u64) -> bool {
    lease.covers_absence(Version(as_of), &[stripe(DIGEST.as_bytes())])
}

/// Does what a check does with a value that was read at version `as_of`: loads the lease first, and then tests whether
/// the lease covers the value. Returns when the lease began (0 if there is no lease) and true if the lease covers the
/// value.
fn check(lease: &Lease, covers: Covers, as_of: u64) -> (u64, bool) {
    let begun = lease.start().map_or(0, Moment::nanos);
    (begun, covers(lease, as_of))
}

type Covers = fn(&Lease, u64) -> bool;

/// Applies the answer to a poll that was sent at `sent` and returned no changes.
fn begin(lease: &Lease, sent: u64) {
    lease.renew(None, &[], || (), Some(Moment::from_nanos(sent)));
}

/// Runs a check and `polls` concurrently, in every order, and returns all results of [`check`] that occur.
fn seen(polls: &'static [(u64, Change)], covers: Covers, as_of: u64) -> BTreeSet<(u64, bool)> {
    let seen = Arc::new(Mutex::new(BTreeSet::new()));
    let all = Arc::clone(&seen);
    loom::model(move || {
        let lease = loom::sync::Arc::new(Lease::default());
        begin(&lease, 4); // a poll that returned version 4
        let checked = loom::sync::Arc::clone(&lease);
        let checking = thread::spawn(move || check(&checked, covers, as_of));
        for (number, change) in polls {
            let sent = Some(Moment::from_nanos(*number));
            lease.renew(None, &[(Version(*number), change.clone())], || (), sent);
        }
        let result = checking.join().expect("a check does not panic");
        all.lock().unwrap_or_else(PoisonError::into_inner).insert(result);
    });
    std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner))
}

#[test]
fn check_that_sees_a_new_lease_also_sees_earlier_changes() {
    static KEY_CHANGED: [(u64, Change); 1] = [(5, Change::Key(KEY))];
    static TRUST_CHANGED: [(u64, Change); 1] = [(5, Change::Trust(TRUST))];
    static KEYS_CHANGED: [(u64, Change); 1] = [(5, Change::Whole(ChangeKind::Keys))];
    static TRUSTS_CHANGED: [(u64, Change); 1] = [(5, Change::Whole(ChangeKind::Trusts))];
    static EVERYTHING_CHANGED: [(u64, Change); 1] = [(5, Change::Everything)];
    static ISSUED: [(u64, Change); 1] = [(5, Change::Absent(DIGEST))];
    static NEGATIVES_CHANGED: [(u64, Change); 1] = [(5, Change::Whole(ChangeKind::Absences))];
    for (change, covers) in [
        (&KEY_CHANGED, covers_record as Covers),
        (&TRUST_CHANGED, covers_record),
        (&KEYS_CHANGED, covers_record),
        (&TRUSTS_CHANGED, covers_record),
        (&EVERYTHING_CHANGED, covers_record),
        (&EVERYTHING_CHANGED, covers_negative),
        (&ISSUED, covers_negative),
        (&NEGATIVES_CHANGED, covers_negative),
    ] {
        // The new lease (5) does not cover the old value, whether the check runs before, during or after the poll.
        assert_eq!(seen(change, covers, 4), [(4, false), (4, true), (5, false)].into(), "{change:?}");
        // Both leases cover a value that was read at version 5.
        assert_eq!(seen(change, covers, 5), [(4, true), (5, true)].into(), "{change:?}");
    }
}

#[test]
fn check_that_sees_the_second_lease_sees_the_changes_of_both_polls() {
    static POLLS: [(u64, Change); 2] = [(5, Change::Key(KEY)), (6, Change::Trust(TRUST))];
    let seen_of = |as_of| seen(&POLLS, covers_record, as_of);
    assert!(seen_of(4).iter().all(|(begun, covered)| *begun < 5 || !covered), "{:?}", seen_of(4));
    assert!(seen_of(5).iter().all(|(begun, covered)| *begun < 6 || !covered), "{:?}", seen_of(5));
    assert!(seen_of(6).iter().all(|(_, covered)| *covered), "{:?}", seen_of(6));
}

#[test]
fn check_that_sees_a_lease_after_an_ended_lease_sees_the_raised_floor() {
    // The poll task ends the first lease before it begins the second. A check that sees the second lease must also see
    // the floor that was raised before that lease began.
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
