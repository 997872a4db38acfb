//! How long what was read may be relied on: the view of this replica, and the poll that keeps it.
//!
//! The view is state without I/O. Never touches a cache: a value that left the view is refused where it is used.

pub mod poll;

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

use crate::{
    clock::DatabaseClock,
    demand::Freshness,
    record::{Dated, Lineage, Nonce, Version},
};

crate::settings! {
    /// How fresh a record must be for a decision.
    pub struct FreshnessSettings in "freshness" {
        /// `ttl`: a record is used until it is `ttl` old. `live`: every request reads its key's row in the database and
        /// compares the digest, so that a revocation counts at once. A route can say otherwise with the context
        /// extension `trustgate.freshness`.
        mode: Freshness = "ttl",
        /// How old a record may get, counted from the database read, whatever tiers it passed through: a revoked key
        /// is granted no longer than this.
        ttl: Duration = "60s",
        /// How long "no such key" is remembered: a new key that somebody tried before it was issued waits this long.
        absence_ttl: Duration = "5s",
        /// How often the database is asked whether the caches were cleared, and its clock is read.
        poll_interval: Duration = "100ms",
    }
}

/// What this replica knows of the store's history: which values are of it, and not older than the last clearing.
///
/// Within one epoch `floor` only rises. A lost history (another lineage, a version gone back, another nonce) begins a
/// new epoch, to which no value read before belongs.
#[derive(Debug, Default)]
pub struct View {
    confirmed: watch::Sender<bool>,
    epoch: AtomicU64,
    floor: AtomicU64,
    known: Mutex<Option<Known>>,
    /// The database's clock as seen from here.
    pub database_clock: DatabaseClock,
}

/// The newest version that was applied.
#[derive(Clone, Copy, Debug)]
struct Known {
    lineage: Lineage,
    version: Version,
    nonce: Nonce,
}

/// The part of the view's history that a value belongs to: stamped on it when it enters a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epoch(u64);

/// What a confirmation of the store changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// Nothing new.
    Nothing,
    /// The first confirmation: the replica may serve.
    First,
    /// Everything changed: what was read before is no longer used.
    Cleared,
    /// History was lost: what was read before is no longer used.
    LostHistory,
}

impl View {
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

    /// The version applied.
    #[must_use]
    pub fn applied(&self) -> Version {
        self.known().map_or(Version(0), |known| known.version)
    }

    /// Takes in what the store said of its newest version.
    pub fn apply(&self, newest: &Dated<()>) -> Applied {
        self.database_clock.observe(newest.sent_at, newest.read_at);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let next = Known { lineage: newest.lineage, version: newest.as_of, nonce: newest.nonce };
        let applied = match known.replace(next) {
            None => Applied::First,
            Some(was) if was.lineage != next.lineage || next.version < was.version => Applied::LostHistory,
            Some(was) if next.version == was.version && next.nonce != was.nonce => Applied::LostHistory,
            // Until changes are named one by one, every version means "everything changed".
            Some(was) if next.version > was.version => Applied::Cleared,
            Some(_) => Applied::Nothing,
        };
        if applied == Applied::LostHistory {
            self.epoch.fetch_add(1, Ordering::AcqRel);
        }
        if applied != Applied::Nothing {
            self.floor.store(next.version.0, Ordering::Release);
        }
        self.confirmed.send_if_modified(|confirmed| !std::mem::replace(confirmed, true));
        applied
    }

    /// Lets a value enter a cache under this view; `None` where it is of another history or from before a clearing.
    #[must_use]
    pub fn admit<T>(&self, value: &Dated<T>) -> Option<Epoch> {
        // Read before the lineage is compared: a history lost in between leaves the value with the old epoch.
        let epoch = Epoch(self.epoch.load(Ordering::Acquire));
        let known = self.known()?;
        (known.lineage == value.lineage && self.is_current(epoch, value.as_of)).then_some(epoch)
    }

    /// Whether a value that entered at `epoch` and was read at `as_of` may still be used.
    #[must_use]
    pub fn is_current(&self, epoch: Epoch, as_of: Version) -> bool {
        epoch.0 == self.epoch.load(Ordering::Acquire) && as_of.0 >= self.floor.load(Ordering::Acquire)
    }

    /// Whether what a flight read from the store may serve those who waited for it: not from before a clearing. A read
    /// of a history that the poll has not seen yet is newer than all we know, and serves without being kept.
    #[must_use]
    pub fn stands<T>(&self, value: &Dated<T>) -> bool {
        let floor = Version(self.floor.load(Ordering::Acquire));
        self.known().is_none_or(|known| known.lineage != value.lineage || value.as_of >= floor)
    }

    fn known(&self) -> Option<Known> {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{DatabaseTime, Moment};

    fn newest(system: u64, version: u64, nonce: u8) -> Dated<()> {
        Dated {
            value: (),
            as_of: Version(version),
            nonce: Nonce([nonce; 16]),
            lineage: Lineage { system, ..Lineage::default() },
            read_at: DatabaseTime::from_micros(0),
            sent_at: Moment::from_nanos(0),
        }
    }

    #[test]
    fn what_was_read_before_a_clearing_or_of_another_history_is_refused() {
        let view = View::default();
        assert!(!view.is_confirmed());
        assert_eq!(view.admit(&newest(1, 5, 0)), None, "nothing enters before the first confirmation");
        assert_eq!(view.apply(&newest(1, 5, 0)), Applied::First);
        let epoch = view.admit(&newest(1, 5, 0)).unwrap();
        assert_eq!(view.admit(&newest(2, 5, 0)), None, "another lineage");
        assert_eq!(view.apply(&newest(1, 5, 0)), Applied::Nothing);
        assert!(view.is_current(epoch, Version(5)));
        assert_eq!(view.apply(&newest(1, 6, 1)), Applied::Cleared);
        assert!(!view.is_current(epoch, Version(5)));
        assert!(view.is_current(epoch, Version(6)));
        for lost in [newest(1, 6, 2), newest(1, 3, 2), newest(2, 9, 2)] {
            let epoch = Epoch(view.epoch.load(Ordering::Relaxed));
            assert_eq!(view.apply(&lost), Applied::LostHistory);
            assert!(!view.is_current(epoch, Version(99)));
        }
    }
}
