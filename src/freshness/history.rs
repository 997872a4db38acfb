//! One database history, as far as this replica knows it: the last version applied, and the nonces of recent versions.
//!
//! This module does no I/O. It decides whether the answer to a poll continues the history, and whether a value belongs
//! to the history. The module `lease` decides which values are out of date.

use std::{collections::VecDeque, time::Duration};

use crate::{
    base::clock::Moment,
    record::{Lineage, Nonce, Version, Versioned},
    store::Polled,
};

/// The time for which the nonce of a version is kept after a poll returned a newer version. This time is longer than
/// the lifetime of a value in Redis.
const NONCES_KEPT: Duration = Duration::from_mins(20);
/// The maximum number of nonces kept. Values that were read at a version whose nonce was dropped are loaded again.
const NONCES_MAX: usize = 100_000;

/// The history of one view. Empty until the first poll of the view.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    lineage: Lineage,
    /// The versions whose nonces are kept, in ascending order. The last of them is the version applied. Empty only
    /// before the first poll.
    known: VecDeque<KnownVersion>,
}

#[derive(Clone, Copy, Debug)]
struct KnownVersion {
    version: Version,
    nonce: Nonce,
    /// When the poll that first returned this version was sent.
    seen: Moment,
}

/// The relation between the answer to a poll and a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Continuity {
    /// The answer continues the history and contains all changes since the version applied.
    Follow,
    /// The answer continues the history, but lacks some of the changes since the version applied. Every value that was
    /// read before the newest version is out of date.
    Jump,
    /// The answer does not continue the history: the database has a different history, or has lost a part of this
    /// history.
    Lost,
}

/// The relation between a value and a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provenance {
    /// The value was read at a known version of this history.
    Known,
    /// The value was read at a version that no poll has returned yet.
    Ahead,
    /// The value belongs to a different history, or was read at a version whose nonce is no longer kept.
    Foreign,
}

impl History {
    /// Returns true after the first poll.
    #[must_use]
    pub(crate) fn is_begun(&self) -> bool {
        !self.known.is_empty()
    }

    #[must_use]
    pub(crate) const fn lineage(&self) -> Lineage {
        self.lineage
    }

    /// Returns the last version applied; 0 before the first poll.
    #[must_use]
    pub(crate) fn applied(&self) -> Version {
        self.known.back().map_or(Version(0), |known| known.version)
    }

    /// Decides whether `polled` continues this history. The poll must have read the change log starting at the version
    /// that this replica has applied.
    #[must_use]
    pub(crate) fn judge(&self, polled: &Polled) -> Continuity {
        let Some(applied) = self.known.back() else { return Continuity::Follow };
        let newest = &polled.newest;
        if newest.lineage != self.lineage || newest.as_of < applied.version {
            return Continuity::Lost;
        }
        let found = polled.versions.iter().find(|(version, _)| *version == applied.version);
        match found {
            Some((_, nonce)) if *nonce != applied.nonce => Continuity::Lost,
            Some(_) if polled.complete => Continuity::Follow,
            Some(_) => Continuity::Jump,
            // Pruning deletes the oldest versions first. So the version was pruned only if all remaining ones are
            // newer.
            None if polled.oldest > applied.version => Continuity::Jump,
            None => Continuity::Lost,
        }
    }

    /// Returns true if `version`, which is in the history that replaced this history, is not in this history: either
    /// `version` is higher than the last version applied here, or this history has a different nonce for it.
    #[must_use]
    pub(crate) fn is_news(&self, version: Version, nonce: Nonce) -> bool {
        version > self.applied() || self.find(version).is_some_and(|known| known.nonce != nonce)
    }

    /// Adds the versions in `polled` to this history. The caller must already have applied their changes.
    pub(crate) fn advance(&mut self, polled: &Polled) {
        let newest = &polled.newest;
        self.lineage = newest.lineage;
        for (version, nonce) in polled.versions.iter().copied().chain([(newest.as_of, newest.nonce)]) {
            if !self.is_begun() || version > self.applied() {
                self.known.push_back(KnownVersion { version, nonce, seen: newest.sent_at });
            }
        }
        // A version was the newest version until a poll returned its successor, so the age of the successor decides
        // whether the nonce is dropped. The version applied is kept at any age.
        while let Some(next) = self.known.get(1)
            && (newest.sent_at.since(next.seen) > NONCES_KEPT || self.known.len() > NONCES_MAX)
        {
            self.known.pop_front();
        }
    }

    /// Returns how `value` relates to this history.
    #[must_use]
    pub(crate) fn provenance<T>(&self, value: &Versioned<T>) -> Provenance {
        if !self.is_begun() || value.lineage != self.lineage {
            return Provenance::Foreign;
        }
        if value.as_of > self.applied() {
            return Provenance::Ahead;
        }
        match self.find(value.as_of) {
            Some(known) if known.nonce == value.nonce => Provenance::Known,
            _ => Provenance::Foreign,
        }
    }

    fn find(&self, version: Version) -> Option<&KnownVersion> {
        let found = self.known.binary_search_by_key(&version, |known| known.version);
        found.ok().and_then(|index| self.known.get(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::clock::DatabaseTime;

    fn versioned(version: u64, nonce: u8) -> Versioned<()> {
        Versioned {
            value: (),
            as_of: Version(version),
            nonce: Nonce([nonce; 16]),
            lineage: Lineage { system: 1, ..Lineage::default() },
            read_at: DatabaseTime::from_micros(0),
            sent_at: Moment::from_nanos(0),
        }
    }

    /// Returns the answer to a poll, with these versions (number and nonce) in ascending order.
    fn polled(versions: &[(u64, u8)]) -> Polled {
        let (version, nonce) = *versions.last().unwrap();
        Polled {
            newest: versioned(version, nonce),
            stamped_at: DatabaseTime::from_micros(0),
            oldest: Version(1),
            triggers_intact: true,
            versions: versions.iter().map(|(version, nonce)| (Version(*version), Nonce([*nonce; 16]))).collect(),
            changes: Vec::new(),
            complete: true,
            peppers: crate::record::StoredPeppers::default(),
        }
    }

    fn begun() -> History {
        let mut history = History::default();
        history.advance(&polled(&[(5, 5), (6, 6)]));
        history
    }

    #[test]
    fn history_continues_only_if_the_applied_version_still_has_the_same_nonce() {
        let history = begun();
        let other = |change: fn(&mut Polled), versions| {
            let mut polled = polled(versions);
            change(&mut polled);
            polled
        };
        for (polled, continuity) in [
            (polled(&[(6, 6)]), Continuity::Follow),
            (polled(&[(6, 6), (9, 9)]), Continuity::Follow),
            (polled(&[(6, 7)]), Continuity::Lost),
            (polled(&[(6, 7), (9, 9)]), Continuity::Lost),
            (polled(&[(5, 5)]), Continuity::Lost),
            (polled(&[(9, 9)]), Continuity::Lost),
            (other(|polled| polled.oldest = Version(7), &[(9, 9)]), Continuity::Jump),
            (other(|polled| polled.complete = false, &[(6, 6), (9, 9)]), Continuity::Jump),
            (other(|polled| polled.newest.lineage.timeline = 2, &[(6, 6), (9, 9)]), Continuity::Lost),
        ] {
            assert_eq!(history.judge(&polled), continuity, "{polled:?}");
        }
    }

    #[test]
    fn provenance_depends_on_version_nonce_and_lineage() {
        let mut history = begun();
        history.advance(&polled(&[(6, 6), (8, 8), (9, 9)]));
        assert_eq!(history.applied(), Version(9));
        for (value, provenance) in [
            (versioned(4, 4), Provenance::Foreign),
            (versioned(5, 5), Provenance::Known),
            (versioned(6, 6), Provenance::Known),
            (versioned(6, 7), Provenance::Foreign),
            (versioned(7, 7), Provenance::Foreign),
            (versioned(9, 9), Provenance::Known),
            (versioned(10, 1), Provenance::Ahead),
            (Versioned { lineage: Lineage::default(), ..versioned(9, 9) }, Provenance::Foreign),
        ] {
            assert_eq!(history.provenance(&value), provenance, "{value:?}");
        }
        assert_eq!(History::default().provenance(&versioned(1, 1)), Provenance::Foreign);
    }

    #[test]
    fn version_that_is_missing_from_the_lost_history_is_news() {
        let history = begun();
        for (version, nonce, is_news) in [(5, 5, false), (5, 1, true), (6, 6, false), (6, 1, true), (7, 7, true)] {
            assert_eq!(history.is_news(Version(version), Nonce([nonce; 16])), is_news, "{version}, {nonce}");
        }
        assert!(!history.is_news(Version(4), Nonce([4; 16])), "pruned long ago, or a number that was not used");
        assert!(History::default().is_news(Version(1), Nonce([1; 16])));
    }

    #[test]
    fn old_nonces_are_dropped_except_that_of_the_applied_version() {
        let mut history = begun();
        let at = |after: Duration, versions: &[(u64, u8)]| {
            let mut polled = polled(versions);
            polled.newest.sent_at = Moment::from_nanos(0).after(after);
            polled
        };
        history.advance(&at(NONCES_KEPT, &[(6, 6), (7, 7)]));
        assert_eq!(history.provenance(&versioned(5, 5)), Provenance::Known);
        history.advance(&at(NONCES_KEPT * 2, &[(7, 7)]));
        assert_eq!(history.provenance(&versioned(5, 5)), Provenance::Foreign);
        assert_eq!(history.provenance(&versioned(6, 6)), Provenance::Known, "newest until 20 minutes ago");
        history.advance(&at(NONCES_KEPT * 9, &[(7, 7)]));
        assert_eq!(history.provenance(&versioned(6, 6)), Provenance::Foreign);
        assert_eq!(history.provenance(&versioned(7, 7)), Provenance::Known);
    }
}
