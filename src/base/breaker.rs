//! A circuit breaker for a tier. After repeated failures it opens, and callers skip the tier; after a while it lets one
//! caller try the tier again.
//!
//! Concurrent failures count as one. If this machine pauses for a moment, all calls in flight time out together, and
//! that must not open the breaker.
//!
//! The breaker does not wait and does not read the clock: callers pass the time.

use std::{sync::Mutex, time::Duration};

use super::clock::Moment;

/// The rules by which a breaker opens.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Failures in a row that open the breaker. A failure counts only if its call began after the previous failure.
    pub failures_max: u32,
    /// The time that the breaker stays open before one caller tries again.
    pub open_for: Duration,
}

/// Closed -> (`failures_max` in a row) -> Open -> (after `open_for`) -> Probing (half-open) -> Closed or Open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// All callers may use the tier.
    Closed {
        /// Failures in a row so far.
        failures: u32,
        /// The time of the last failure.
        last: Moment,
    },
    /// No caller may use the tier before `until`.
    Open {
        /// The time from which one caller may try again.
        until: Moment,
    },
    /// Half-open: one caller tries since `since`. If it does not report, another caller may try after `open_for`.
    Probing {
        /// The start of the trial.
        since: Moment,
    },
}

impl State {
    /// The state after a caller asked for permission at `now`, and true if the caller may use the tier.
    #[must_use]
    pub fn asked(self, now: Moment, rules: &Rules) -> (Self, bool) {
        match self {
            Self::Closed { .. } => (self, true),
            Self::Open { until } if now >= until => (Self::Probing { since: now }, true),
            Self::Probing { since } if now.since(since) >= rules.open_for => (Self::Probing { since: now }, true),
            Self::Open { .. } | Self::Probing { .. } => (self, false),
        }
    }

    /// The state after a call that began at `began` failed at `now`.
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

/// Closed, without failures.
const CLOSED: State = State::Closed { failures: 0, last: Moment::from_nanos(0) };

/// A breaker that threads share. Only misses take its lock, for a few instructions.
#[derive(Debug)]
pub struct Breaker {
    rules: Rules,
    state: Mutex<State>,
}

/// The state change that a report caused. Callers log state changes, and do not log repeated failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// No change.
    None,
    /// The breaker opened.
    Opened,
    /// The breaker closed again.
    Closed,
}

impl Breaker {
    /// A closed breaker.
    #[must_use]
    pub const fn new(rules: Rules) -> Self {
        Self { rules, state: Mutex::new(CLOSED) }
    }

    /// True if the caller may use the tier now. It must then report with [`Self::succeeded`] or [`Self::failed`].
    pub fn admits(&self, now: Moment) -> bool {
        let mut state = self.lock();
        let (next, may) = state.asked(now, &self.rules);
        *state = next;
        may
    }

    /// Reports that the tier answered.
    pub fn succeeded(&self) -> Change {
        let was = std::mem::replace(&mut *self.lock(), CLOSED);
        if matches!(was, State::Closed { .. }) { Change::None } else { Change::Closed }
    }

    /// Reports that a call that began at `began` failed at `now`.
    pub fn failed(&self, began: Moment, now: Moment) -> Change {
        let mut state = self.lock();
        let was = *state;
        *state = was.failed(began, now, &self.rules);
        let opened = matches!((was, *state), (State::Closed { .. }, State::Open { .. }));
        if opened { Change::Opened } else { Change::None }
    }

    /// True if all callers may use the tier.
    pub fn is_closed(&self) -> bool {
        matches!(*self.lock(), State::Closed { .. })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // The state is a plain value that is replaced as a whole, so a panic cannot leave it half changed.
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

    /// Reports a call that failed as soon as it began.
    fn fails(breaker: &Breaker, millis: u64) -> Change {
        breaker.failed(at(millis), at(millis))
    }

    #[test]
    fn breaker_opens_after_failures_in_a_row_and_lets_one_caller_try() {
        let breaker = Breaker::new(RULES);
        assert_eq!(fails(&breaker, 0), Change::None);
        breaker.succeeded();
        assert_eq!(fails(&breaker, 1), Change::None, "a success starts the count again");
        assert_eq!(fails(&breaker, 2), Change::Opened);
        assert!(!breaker.admits(at(50)));
        assert_eq!(fails(&breaker, 60), Change::None, "a late failure does not keep the breaker open for longer");
        assert!(breaker.admits(at(102)), "the breaker was open for `open_for`");
        assert!(!breaker.admits(at(103)), "but only one caller tries");
        assert_eq!(breaker.failed(at(1), at(104)), Change::None, "a call that began before the trial does not count");
        assert_eq!(breaker.succeeded(), Change::Closed);
        assert!(breaker.admits(at(104)));
    }

    #[test]
    fn concurrent_failures_count_as_one() {
        let breaker = Breaker::new(RULES);
        for began in 0..50 {
            assert_eq!(breaker.failed(at(began), at(100 + began)), Change::None);
        }
        assert!(breaker.admits(at(150)));
        assert_eq!(breaker.failed(at(100), at(200)), Change::Opened, "this call began after the first failure");
    }

    #[test]
    fn a_failed_trial_reopens_the_breaker_and_a_lost_trial_is_replaced() {
        let breaker = Breaker::new(RULES);
        fails(&breaker, 0);
        fails(&breaker, 0);
        assert!(breaker.admits(at(100)));
        breaker.failed(at(100), at(110));
        assert!(!breaker.admits(at(150)));
        assert!(breaker.admits(at(210)));
        assert!(!breaker.admits(at(300)));
        assert!(breaker.admits(at(310)), "the caller of 210 did not report");
    }
}
