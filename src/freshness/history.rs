//! What a replica knows of the store's history: the version it has applied, and the nonces by which a version is known.
//!
//! State without I/O. Decides what a poll's answer means; what that changes for checks is the lease's.

use std::{collections::VecDeque, time::Duration};

use crate::{
    base::clock::Moment,
    record::{Lineage, Nonce, Version, Versioned},
    store::Polled,
};

/// How long the nonce of a version is kept after a newer one came: longer than any value lives in Redis.
const NONCES_KEPT: Duration = Duration::from_mins(20);
/// Nonces kept, at most. Values of older versions are read again.
const NONCES_MAX: usize = 100_000;

/// The history of one view. Empty until its first poll.
#[derive(Clone, Debug, Default)]
pub struct History {
    lineage: Lineage,
    /// In order, the version applied last; never empty once begun.
    known: VecDeque<Known>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    version: Version,
    nonce: Nonce,
    /// When it was first seen.
    seen: Moment,
}

/// What a poll's answer means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Continuity {
    /// The history goes on where it was left: what the versions after it named is to be applied.
    Follow,
    /// It goes on, but what happened in between is not known in full: everything read before the newest version is out
    /// of date.
    Jump,
    /// It is another one, or a part of it is gone.
    Lost,
}

/// Whether a value belongs to the history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provenance {
    /// It was read at a version that is known.
    Known,
    /// It was read at a version that no poll has confirmed yet.
    Ahead,
    /// It was read in another history, or at a version that is not known any more.
    Foreign,
}

impl History {
    /// Whether there was a poll.
    #[must_use]
    pub fn is_begun(&self) -> bool {
        !self.known.is_empty()
    }

    /// Which history it is.
    #[must_use]
    pub const fn lineage(&self) -> Lineage {
        self.lineage
    }

    /// The version applied; 0 before the first poll.
    #[must_use]
    pub fn applied(&self) -> Version {
        self.known.back().map_or(Version(0), |known| known.version)
    }

    /// What `polled`, asked for from the version applied, means.
    #[must_use]
    pub fn judge(&self, polled: &Polled) -> Continuity {
        let Some(applied) = self.known.back() else { return Continuity::Follow };
        let newest = &polled.newest;
        if newest.lineage != self.lineage || newest.as_of < applied.version {
            return Continuity::Lost;
        }
        let same = polled.versions.iter().find(|(version, _)| *version == applied.version);
        match same {
            Some((_, nonce)) if *nonce != applied.nonce => Continuity::Lost,
            Some(_) if polled.complete => Continuity::Follow,
            Some(_) => Continuity::Jump,
            // Pruned away, unless an older version is still there: pruning takes the oldest.
            None if polled.oldest > applied.version => Continuity::Jump,
            None => Continuity::Lost,
        }
    }

    /// Whether a version of a history that came after this one was committed after what this one knows of: a later one, or
    /// another one under the same number.
    #[must_use]
    pub fn is_news(&self, version: Version, nonce: Nonce) -> bool {
        version > self.applied() || self.find(version).is_some_and(|known| known.nonce != nonce)
    }

    /// Takes in the versions that `polled` names. What they changed has been applied already.
    pub fn advance(&mut self, polled: &Polled) {
        let newest = &polled.newest;
        self.lineage = newest.lineage;
        for (version, nonce) in polled.versions.iter().copied().chain([(newest.as_of, newest.nonce)]) {
            if !self.is_begun() || version > self.applied() {
                self.known.push_back(Known { version, nonce, seen: newest.sent_at });
            }
        }
        // A version was newest until its successor was seen; the one applied stays whatever its age.
        while let Some(next) = self.known.get(1)
            && (newest.sent_at.since(next.seen) > NONCES_KEPT || self.known.len() > NONCES_MAX)
        {
            self.known.pop_front();
        }
    }

    /// Where a value belongs.
    #[must_use]
    pub fn provenance<T>(&self, value: &Versioned<T>) -> Provenance {
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

    fn find(&self, version: Version) -> Option<&Known> {
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

    /// An answer with these versions (number and nonce), the last of them the newest.
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
    fn history_goes_on_only_from_the_version_applied_with_its_own_nonce() {
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
    fn a_value_is_placed_by_number_and_nonce() {
        let mut history = begun();
        history.advance(&polled(&[(6, 6), (8, 8), (9, 9)]));
        assert_eq!(history.applied(), Version(9));
        for (value, place) in [
            (versioned(4, 4), Provenance::Foreign),
            (versioned(5, 5), Provenance::Known),
            (versioned(6, 6), Provenance::Known),
            (versioned(6, 7), Provenance::Foreign),
            (versioned(7, 7), Provenance::Foreign),
            (versioned(9, 9), Provenance::Known),
            (versioned(10, 1), Provenance::Ahead),
            (Versioned { lineage: Lineage::default(), ..versioned(9, 9) }, Provenance::Foreign),
        ] {
            assert_eq!(history.provenance(&value), place, "{value:?}");
        }
        assert_eq!(History::default().provenance(&versioned(1, 1)), Provenance::Foreign);
    }

    #[test]
    fn news_of_a_later_history_is_what_this_one_does_not_know() {
        let history = begun();
        for (version, nonce, is_news) in [(5, 5, false), (5, 1, true), (6, 6, false), (6, 1, true), (7, 7, true)] {
            assert_eq!(history.is_news(Version(version), Nonce([nonce; 16])), is_news, "{version}, {nonce}");
        }
        assert!(!history.is_news(Version(4), Nonce([4; 16])), "deleted long ago, or a number that was never drawn");
        assert!(History::default().is_news(Version(1), Nonce([1; 16])));
    }

    #[test]
    fn nonces_are_forgotten_when_no_value_can_be_of_their_time_but_never_the_one_applied() {
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
        assert_eq!(history.provenance(&versioned(6, 6)), Provenance::Known, "it was the newest until 20 minutes ago");
        history.advance(&at(NONCES_KEPT * 9, &[(7, 7)]));
        assert_eq!(history.provenance(&versioned(6, 6)), Provenance::Foreign);
        assert_eq!(history.provenance(&versioned(7, 7)), Provenance::Known);
    }
}
