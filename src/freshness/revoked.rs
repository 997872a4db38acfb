//! Remembers the digests of keys that were revoked, deleted or given a new digest while this replica was running, and
//! denies these digests if the database loses the history that contains those changes.
//!
//! Best effort: each replica keeps its list only in memory. The list can only cause denials, and it does not affect
//! values from the current history until that history is lost.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;

use crate::{
    base::clock::Moment,
    record::{ApiKeyDigest, Change, ChangeKind, Version},
};

/// The time for which a digest is remembered.
const KEPT: Duration = Duration::from_hours(24);
/// The maximum number of remembered digests. The oldest digests are dropped first.
const DIGESTS_MAX: usize = 100_000;

/// The digests of revoked keys. Only the poll task changes them; checks read them.
#[derive(Debug, Default)]
pub struct Revoked {
    digests: Mutex<RevokedDigests>,
    /// Digests that were revoked in a lost history; checks deny them. The set is replaced as a whole, so that checks
    /// can read it without a lock.
    binding: ArcSwap<HashSet<ApiKeyDigest>>,
    /// False while `binding` is empty, so that checks can skip the lookup.
    any_binds: AtomicBool,
}

#[derive(Debug, Default)]
struct RevokedDigests {
    /// Each remembered digest with its last revocation.
    seen: HashMap<ApiKeyDigest, Revocation>,
    /// The times at which digests were seen, in ascending order. A digest that was seen more than once has several
    /// entries.
    order: VecDeque<(Moment, ApiKeyDigest)>,
}

#[derive(Debug)]
struct Revocation {
    /// When this replica last saw a revocation of the digest.
    seen_at: Moment,
    /// True if the database has lost the history that contains the revocation.
    is_lost: bool,
}

impl Revoked {
    /// Applies changes from the current history: remembers revoked digests, and releases denied digests whose keys the
    /// current history has changed. `changes` may be in any order.
    pub fn note<'c>(&self, changes: impl Iterator<Item = &'c (Version, Change)>, now: Moment) {
        let mut changes: Vec<_> = changes.collect();
        // A revocation records both `Absent` and `Gone` for its digest, in the same version. Apply `Gone` last, because
        // `Absent` makes this list forget the digest.
        changes.sort_by_key(|(version, change)| (*version, matches!(change, Change::Gone(_))));
        let mut digests = self.lock();
        let mut released = Vec::new();
        for (_, change) in changes {
            match change {
                Change::Gone(digest) => {
                    // Do not reset `is_lost`: a digest that is already denied stays denied.
                    let new = Revocation { seen_at: now, is_lost: false };
                    digests.seen.entry(*digest).or_insert(new).seen_at = now;
                    digests.order.push_back((now, *digest));
                }
                // The current history has changed the key with this digest, so revocations in a lost history no longer
                // count.
                Change::Absent(digest) => {
                    let removed = digests.seen.remove(digest);
                    released.extend(removed.filter(|revocation| revocation.is_lost).map(|_| *digest));
                }
                Change::Whole(ChangeKind::Absences | ChangeKind::Gone) => {
                    released
                        .extend(digests.seen.extract_if(|_, revocation| revocation.is_lost).map(|(digest, _)| digest));
                }
                _ => {}
            }
        }
        digests.forget(now, &mut released);
        drop(digests);
        if !released.is_empty() {
            let mut binding = HashSet::clone(&self.binding.load());
            for digest in released {
                binding.remove(&digest);
            }
            self.bind_all(binding);
        }
    }

    /// Denies all remembered digests from now on. The caller has detected that the database lost history.
    pub fn bind(&self) {
        let mut digests = self.lock();
        for revocation in digests.seen.values_mut() {
            revocation.is_lost = true;
        }
        let binding = digests.seen.keys().copied().collect();
        drop(digests);
        self.bind_all(binding);
    }

    /// Returns true if checks must deny `digest`, even if the current history contains a valid key with this digest.
    #[must_use]
    pub fn binds(&self, digest: &ApiKeyDigest) -> bool {
        self.any_binds.load(Ordering::Acquire) && self.binding.load().contains(digest)
    }

    /// Returns true if checks must deny `digest` when they find it in a record whose version no poll has returned yet.
    /// Such a record may come from a different history, so all remembered digests are denied. Takes a lock.
    #[must_use]
    pub fn binds_elsewhere(&self, digest: &ApiKeyDigest) -> bool {
        self.lock().seen.contains_key(digest)
    }

    fn bind_all(&self, binding: HashSet<ApiKeyDigest>) {
        let any_binds = !binding.is_empty();
        self.binding.store(Arc::new(binding));
        self.any_binds.store(any_binds, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, RevokedDigests> {
        // No update can panic halfway, so the data behind a poisoned lock is still consistent.
        self.digests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RevokedDigests {
    /// Drops digests that are older than [`KEPT`], and the oldest digests beyond [`DIGESTS_MAX`]. Appends to `released`
    /// each dropped digest that checks still deny, so that the caller can stop denying it.
    fn forget(&mut self, now: Moment, released: &mut Vec<ApiKeyDigest>) {
        while let Some((at, digest)) = self.order.front().copied()
            && (self.order.len() > DIGESTS_MAX || now.since(at) > KEPT)
        {
            self.order.pop_front();
            if self.seen.get(&digest).is_some_and(|revocation| revocation.seen_at == at)
                && self.seen.remove(&digest).is_some_and(|revocation| revocation.is_lost)
            {
                released.push(digest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revoked_digest_is_denied_after_history_is_lost_until_the_new_history_changes_it() {
        let revoked = Revoked::default();
        let [one, other] = [1, 2].map(|byte| ApiKeyDigest::from_bytes([byte; 32]));
        let now = Moment::from_nanos(1);
        revoked.note([(Version(1), Change::Gone(one))].iter(), now);
        assert!(!revoked.binds(&one), "the current history already denies the digest");
        assert!(revoked.binds_elsewhere(&one));
        revoked.note([(Version(1), Change::Gone(one)), (Version(1), Change::Absent(one))].iter(), now);
        assert!(revoked.binds_elsewhere(&one), "`Gone` is applied after `Absent`");
        revoked.bind();
        revoked.note([(Version(1), Change::Gone(other))].iter(), now);
        assert!(revoked.binds(&one) && !revoked.binds(&other));
        revoked.note([(Version(1), Change::Everything)].iter(), now);
        assert!(revoked.binds(&one), "a change to everything releases no digest");
        revoked.note([(Version(1), Change::Absent(one))].iter(), now);
        assert!(!revoked.binds(&one) && revoked.binds_elsewhere(&other));
        revoked.bind();
        revoked.note([(Version(1), Change::Whole(ChangeKind::Absences))].iter(), now);
        assert!(!revoked.binds(&other));
    }

    #[test]
    fn oldest_digests_are_dropped_by_count_and_by_age() {
        let revoked = Revoked::default();
        let digest = |n: usize| {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&n.to_be_bytes());
            ApiKeyDigest::from_bytes(bytes)
        };
        for n in 0..=DIGESTS_MAX {
            let mut digests = revoked.lock();
            let now = Moment::from_nanos(1);
            digests.seen.insert(digest(n), Revocation { seen_at: now, is_lost: false });
            digests.order.push_back((now, digest(n)));
            digests.forget(now, &mut Vec::new());
        }
        assert!(!revoked.binds_elsewhere(&digest(0)) && revoked.binds_elsewhere(&digest(1)));
        revoked.note([(Version(1), Change::Gone(digest(0)))].iter(), Moment::from_nanos(0).after(KEPT * 2));
        assert!(!revoked.binds_elsewhere(&digest(1)) && revoked.binds_elsewhere(&digest(0)));
        revoked.bind();
        assert!(revoked.binds(&digest(0)));
        revoked.note([].iter(), Moment::from_nanos(0).after(KEPT * 4));
        assert!(!revoked.binds(&digest(0)), "an old digest is dropped even without a new revocation");
    }
}
