//! Digests that this replica saw revoked, deleted or replaced. A history that is lost does not make them good again.
//!
//! Best effort, in one replica's memory. Never grants anything, and says nothing while history goes on.

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

/// How long a digest is remembered.
const KEPT: Duration = Duration::from_hours(24);
/// Digests remembered, at most; the oldest go first.
const DIGESTS_MAX: usize = 100_000;

/// What was revoked here. Changed by one caller at a time, the poll; read by every check.
#[derive(Debug, Default)]
pub struct Revoked {
    digests: Mutex<Digests>,
    /// Digests revoked in a lost history that are still denied. Replaced as a whole, so that checks look them up without a lock.
    binding: ArcSwap<HashSet<ApiKeyDigest>>,
    /// False while `binding` is empty, so that checks skip the lookup.
    any_binds: AtomicBool,
}

#[derive(Debug, Default)]
struct Digests {
    /// Each with when it was seen, and whether the history in which it was seen is lost.
    seen: HashMap<ApiKeyDigest, (Moment, bool)>,
    order: VecDeque<(Moment, ApiKeyDigest)>,
}

impl Revoked {
    /// Takes note of changes of the present history, in whatever order they come.
    pub fn note<'c>(&self, changes: impl Iterator<Item = &'c (Version, Change)>, now: Moment) {
        let mut changes: Vec<_> = changes.collect();
        // A revocation names its digest as absent and as gone: gone it is.
        changes.sort_by_key(|(version, change)| (*version, matches!(change, Change::Gone(_))));
        let mut digests = self.lock();
        let mut released = Vec::new();
        for (_, change) in changes {
            match change {
                Change::Gone(digest) => {
                    // Of one that binds already it changes nothing: it is as revoked as before.
                    digests.seen.entry(*digest).or_insert((now, false)).0 = now;
                    digests.order.push_back((now, *digest));
                }
                // The present history has spoken of it: what an earlier one said no longer counts.
                Change::Absent(digest) => {
                    if let Some((_, true)) = digests.seen.remove(digest) {
                        released.push(*digest);
                    }
                }
                Change::Whole(ChangeKind::Absences | ChangeKind::Gone) => {
                    released.extend(digests.seen.extract_if(|_, (_, lost)| *lost).map(|(digest, _)| digest));
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

    /// History was lost: from now on what was seen in it binds.
    pub fn bind(&self) {
        let mut digests = self.lock();
        for (_, lost) in digests.seen.values_mut() {
            *lost = true;
        }
        let binding = digests.seen.keys().copied().collect();
        drop(digests);
        self.bind_all(binding);
    }

    /// Whether a value of the present history may not be granted although it is good there.
    #[must_use]
    pub fn binds(&self, digest: &ApiKeyDigest) -> bool {
        self.any_binds.load(Ordering::Acquire) && self.binding.load().contains(digest)
    }

    /// Whether a value of a history that no poll has seen yet may not be granted although it is good there.
    #[must_use]
    pub fn binds_elsewhere(&self, digest: &ApiKeyDigest) -> bool {
        self.lock().seen.contains_key(digest)
    }

    fn bind_all(&self, binding: HashSet<ApiKeyDigest>) {
        let any_binds = !binding.is_empty();
        self.binding.store(Arc::new(binding));
        self.any_binds.store(any_binds, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Digests> {
        // Every change is whole at every moment.
        self.digests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Digests {
    /// Forgets the oldest, and adds those of them that bound to `released`.
    fn forget(&mut self, now: Moment, released: &mut Vec<ApiKeyDigest>) {
        while let Some((at, digest)) = self.order.front().copied()
            && (self.order.len() > DIGESTS_MAX || now.since(at) > KEPT)
        {
            self.order.pop_front();
            if self.seen.get(&digest).is_some_and(|(seen, _)| *seen == at)
                && let Some((_, true)) = self.seen.remove(&digest)
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
    fn what_was_revoked_binds_after_history_is_lost_until_the_new_one_speaks_of_it() {
        let revoked = Revoked::default();
        let [one, other] = [1, 2].map(|byte| ApiKeyDigest::from_bytes([byte; 32]));
        let now = Moment::from_nanos(1);
        revoked.note([(Version(1), Change::Gone(one))].iter(), now);
        assert!(!revoked.binds(&one), "the present history says it itself");
        assert!(revoked.binds_elsewhere(&one));
        revoked.note([(Version(1), Change::Gone(one)), (Version(1), Change::Absent(one))].iter(), now);
        assert!(revoked.binds_elsewhere(&one), "a revocation names both");
        revoked.bind();
        revoked.note([(Version(1), Change::Gone(other))].iter(), now);
        assert!(revoked.binds(&one) && !revoked.binds(&other));
        revoked.note([(Version(1), Change::Everything)].iter(), now);
        assert!(revoked.binds(&one), "everything is not this digest");
        revoked.note([(Version(1), Change::Absent(one))].iter(), now);
        assert!(!revoked.binds(&one) && revoked.binds_elsewhere(&other));
        revoked.bind();
        revoked.note([(Version(1), Change::Whole(ChangeKind::Absences))].iter(), now);
        assert!(!revoked.binds(&other));
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let revoked = Revoked::default();
        let digest = |n: usize| {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&n.to_be_bytes());
            ApiKeyDigest::from_bytes(bytes)
        };
        for n in 0..=DIGESTS_MAX {
            let mut digests = revoked.lock();
            let now = Moment::from_nanos(1);
            digests.seen.insert(digest(n), (now, false));
            digests.order.push_back((now, digest(n)));
            digests.forget(now, &mut Vec::new());
        }
        assert!(!revoked.binds_elsewhere(&digest(0)) && revoked.binds_elsewhere(&digest(1)));
        revoked.note([(Version(1), Change::Gone(digest(0)))].iter(), Moment::from_nanos(0).after(KEPT * 2));
        assert!(!revoked.binds_elsewhere(&digest(1)) && revoked.binds_elsewhere(&digest(0)));
        revoked.bind();
        assert!(revoked.binds(&digest(0)));
        revoked.note([].iter(), Moment::from_nanos(0).after(KEPT * 4));
        assert!(!revoked.binds(&digest(0)), "also where nothing else is revoked");
    }
}
