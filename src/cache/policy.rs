//! The freshness rule, which decides whether a check may use a value.
//!
//! No other module makes this decision. A check chooses its [`ReadPolicy`] once, when it begins; `is_usable` then
//! judges each value that the check finds in L1 or gets from a load.

use std::time::Duration;

use super::{cacheable::Cacheable, l1::Entry, loaded::Loaded};
use crate::{
    base::clock::Moment,
    freshness::{Freshness, ReplicaView, history::Provenance, lease::LeaseState},
};

/// The values that a check may use. The policy follows from the freshness that the route demands and from the state of
/// the lease when the check began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadPolicy {
    /// The lease is fresh: the check may use a cache entry that no applied change affects.
    Lease,
    /// The lease is stale: the check may use a cache entry that no applied change affects, but only to grant. The
    /// database may have changed since, so the check must not use a cached denial or a negative entry.
    GrantOnly,
    /// The check may use only the result of a store read that was sent after the check began.
    Store,
    /// The check may use a value from any tier if the value is young enough.
    Age,
}

impl ReadPolicy {
    /// Returns the policy for a route that demands `freshness`, while the lease is in `state`.
    #[must_use]
    pub const fn new(freshness: Freshness, state: LeaseState) -> Self {
        match (freshness, state) {
            (Freshness::Ttl, _) => Self::Age,
            (Freshness::Lease | Freshness::Strict, LeaseState::Fresh) => Self::Lease,
            (Freshness::Lease, LeaseState::Stale) => Self::GrantOnly,
            (Freshness::Lease, LeaseState::Expired)
            | (Freshness::Strict, LeaseState::Stale | LeaseState::Expired)
            | (Freshness::Live, _) => Self::Store,
        }
    }
}

/// The maximum ages of values, counted from the database read.
#[derive(Clone, Copy, Debug)]
pub struct AgeLimits {
    /// The limit for a record under [`ReadPolicy::Age`].
    pub record: Duration,
    /// The limit for a negative entry under [`ReadPolicy::Age`].
    pub negative: Duration,
    /// The limit for any entry, under any policy. The limit of each entry varies by up to 20 % in either direction, so
    /// that entries do not all expire at the same time.
    pub any: Duration,
}

impl AgeLimits {
    fn is_young<K: Cacheable>(&self, entry: &Entry<K>, now: Moment) -> bool {
        entry.age(now) < if entry.value().is_some() { self.record } else { self.negative }
    }
}

/// A value that [`is_usable`] judges.
pub(crate) enum Candidate<'a, K: Cacheable> {
    /// An entry of L1.
    Cached(&'a Entry<K>),
    /// The result of a load, for a check that began at `began`.
    Loaded { loaded: &'a Loaded<K>, began: Moment },
}

/// Returns true if a check under `policy` may use `candidate` at `now`, given the changes that were applied in `view`.
pub(crate) fn is_usable<K: Cacheable>(
    policy: ReadPolicy,
    candidate: &Candidate<'_, K>,
    view: &ReplicaView,
    limits: &AgeLimits,
    now: Moment,
) -> bool {
    match (policy, candidate) {
        (ReadPolicy::Lease, Candidate::Cached(entry)) => entry.is_current(view, now),
        (ReadPolicy::GrantOnly, Candidate::Cached(entry)) => entry.value().is_some() && entry.is_current(view, now),
        (ReadPolicy::Store, Candidate::Cached(_)) => false,
        (ReadPolicy::Age, Candidate::Cached(entry)) => entry.is_current(view, now) && limits.is_young(entry, now),
        (ReadPolicy::Lease, Candidate::Loaded { loaded, began }) => match loaded.provenance(view) {
            Provenance::Known => loaded.entry.is_covered(view),
            // No poll has confirmed this version yet, so only the check that asked for the read may rely on it.
            Provenance::Ahead | Provenance::Foreign => loaded.is_read_after(*began),
        },
        (ReadPolicy::GrantOnly | ReadPolicy::Store, Candidate::Loaded { loaded, began }) => {
            loaded.is_read_after(*began) && !is_outdated(loaded, view)
        }
        (ReadPolicy::Age, Candidate::Loaded { loaded, .. }) => {
            !is_outdated(loaded, view) && limits.is_young(&loaded.entry, now)
        }
    }
}

/// Returns true if a change that this replica has applied affects the value. A value whose version no poll has returned
/// yet counts as newer than all applied changes.
fn is_outdated<K: Cacheable>(loaded: &Loaded<K>, view: &ReplicaView) -> bool {
    loaded.provenance(view) == Provenance::Known && !loaded.entry.is_covered(view)
}
