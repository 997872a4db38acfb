//! Whether a tier is worth asking: after repeated failures it is left alone for a moment, then one caller tries it.
//!
//! What failed together failed once: a machine that stands still for a moment makes everything late that is in flight, and
//! that must not become a pause on top.
//!
//! Never waits and never reads the clock: the time is an argument.

use std::{sync::Mutex, time::Duration};

use super::clock::Moment;

/// When a breaker opens and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Failures in a row that open it, each of something that was begun after the one before.
    pub failures_max: u32,
    /// How long it stays open before one caller tries again.
    pub open_for: Duration,
}

/// Closed -> (`failures_max` in a row) -> Open -> (after `open_for`) -> Probing -> Closed or Open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Everybody may ask.
    Closed {
        /// Failures in a row so far.
        failures: u32,
        /// When the last of them was.
        last: Moment,
    },
    /// Nobody may ask before `until`.
    Open {
        /// When one caller may try again.
        until: Moment,
    },
    /// One caller is trying since `since`; if it never reports, another may after `open_for`.
    Probing {
        /// When the trial began.
        since: Moment,
    },
}

impl State {
    /// The state after somebody wants to ask at `now`, and whether they may.
    #[must_use]
    pub fn asked(self, now: Moment, rules: &Rules) -> (Self, bool) {
        match self {
            Self::Closed { .. } => (self, true),
            Self::Open { until } if now >= until => (Self::Probing { since: now }, true),
            Self::Probing { since } if now.since(since) >= rules.open_for => (Self::Probing { since: now }, true),
            Self::Open { .. } | Self::Probing { .. } => (self, false),
        }
    }

    /// The state after something failed at `now` that was begun at `began`.
    #[must_use]
    pub fn failed(self, began: Moment, now: Moment, rules: &Rules) -> Self {
        match self {
            Self::Closed { failures: 1.., last: before } | Self::Probing { since: before } if began < before => self,
            Self::Closed { failures, .. } if failures + 1 < rules.failures_max => {
                Self::Closed { failures: failures + 1, last: now }
            }
            Self::Closed { .. } | Self::Probing { .. } => Self::Open { until: now.after(rules.open_for) },
            // A call that began before the breaker opened must not keep it open.
            Self::Open { .. } => self,
        }
    }
}

/// Nothing failed.
const WELL: State = State::Closed { failures: 0, last: Moment::from_nanos(0) };

/// A shared breaker. The lock is held for a few instructions and only on a miss.
#[derive(Debug)]
pub struct Breaker {
    rules: Rules,
    state: Mutex<State>,
}

/// What a report to the breaker changed, for the log: state changes are logged, repetitions are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// It opened.
    Opened,
    /// It closed again.
    Closed,
}

impl Breaker {
    /// A closed breaker.
    #[must_use]
    pub const fn new(rules: Rules) -> Self {
        Self { rules, state: Mutex::new(WELL) }
    }

    /// Whether the caller may ask now. Whoever may, reports with [`Self::succeeded`] or [`Self::failed`].
    pub fn admits(&self, now: Moment) -> bool {
        let mut state = self.lock();
        let (next, may) = state.asked(now, &self.rules);
        *state = next;
        may
    }

    /// The tier answered.
    pub fn succeeded(&self) -> Change {
        let was = std::mem::replace(&mut *self.lock(), WELL);
        if matches!(was, State::Closed { .. }) { Change::None } else { Change::Closed }
    }

    /// The tier failed, at `now`, what it was asked at `began`.
    pub fn failed(&self, began: Moment, now: Moment) -> Change {
        let mut state = self.lock();
        let was = *state;
        *state = was.failed(began, now, &self.rules);
        let opened = matches!((was, *state), (State::Closed { .. }, State::Open { .. }));
        if opened { Change::Opened } else { Change::None }
    }

    /// Whether everybody may ask.
    pub fn is_closed(&self) -> bool {
        matches!(*self.lock(), State::Closed { .. })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // The state is a plain value, whole at every moment: a panic elsewhere cannot have left it half changed.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { failures_max: 2, open_for: Duration::from_millis(100) };
    const fn at(millis: u64) -> Moment {
        Moment::from_nanos(millis * 1_000_000)
    }

    /// Something that failed as soon as it was begun.
    fn fails(breaker: &Breaker, millis: u64) -> Change {
        breaker.failed(at(millis), at(millis))
    }

    #[test]
    fn it_opens_after_failures_in_a_row_and_lets_one_caller_try() {
        let breaker = Breaker::new(RULES);
        assert_eq!(fails(&breaker, 0), Change::None);
        breaker.succeeded();
        assert_eq!(fails(&breaker, 1), Change::None, "a success starts the count again");
        assert_eq!(fails(&breaker, 2), Change::Opened);
        assert!(!breaker.admits(at(50)));
        assert_eq!(fails(&breaker, 60), Change::None, "a late failure does not extend the pause");
        assert!(breaker.admits(at(102)), "the pause is over");
        assert!(!breaker.admits(at(103)), "but only one caller tries");
        assert_eq!(breaker.failed(at(1), at(104)), Change::None, "what was begun before says nothing of the trial");
        assert_eq!(breaker.succeeded(), Change::Closed);
        assert!(breaker.admits(at(104)));
    }

    #[test]
    fn what_failed_together_failed_once() {
        let breaker = Breaker::new(RULES);
        for began in 0..50 {
            assert_eq!(breaker.failed(at(began), at(100 + began)), Change::None);
        }
        assert!(breaker.admits(at(150)));
        assert_eq!(breaker.failed(at(100), at(200)), Change::Opened, "begun after the first had failed");
    }

    #[test]
    fn a_trial_that_fails_opens_it_again_and_one_that_vanishes_is_replaced() {
        let breaker = Breaker::new(RULES);
        fails(&breaker, 0);
        fails(&breaker, 0);
        assert!(breaker.admits(at(100)));
        breaker.failed(at(100), at(110));
        assert!(!breaker.admits(at(150)));
        assert!(breaker.admits(at(210)));
        assert!(!breaker.admits(at(300)));
        assert!(breaker.admits(at(310)), "the caller of 210 never reported");
    }
}
