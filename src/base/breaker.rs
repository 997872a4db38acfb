//! A circuit breaker for a tier. After repeated failures, the breaker opens, and callers skip the tier. After a while,
//! the breaker lets one caller try the tier again.
//!
//! Concurrent failures count as one. If this machine pauses for a moment, all calls in flight time out together, and
//! that must not open the breaker.
//!
//! The breaker does not wait and does not read the clock: callers pass the time. When the breaker opens or closes, it
//! writes a log line and sets the gauge. Individual failures are not logged.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{clock::Moment, metrics::IntGauge};

/// The conditions under which a breaker opens and lets a caller try again.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The number of failures in a row that open the breaker. A failure counts only if its call began after the
    /// previous failure.
    pub failures_max: u32,
    /// How long the breaker stays open before one caller may try again.
    pub open_for: Duration,
}

/// Closed -> (`failures_max` in a row) -> Open -> (after `open_for`) -> Probing (half-open) -> Closed or Open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BreakerState {
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
    /// Half-open: one caller has been trying the tier since `since`. If that caller does not report a result within
    /// `open_for`, another caller may try.
    Probing {
        /// The time at which the trial began.
        since: Moment,
    },
}

impl BreakerState {
    const fn is_closed(self) -> bool {
        matches!(self, Self::Closed { .. })
    }

    /// Returns the state after a caller asked for permission at `now`, and true if that caller may use the tier.
    fn asked(self, now: Moment, rules: &Rules) -> (Self, bool) {
        match self {
            Self::Closed { .. } => (self, true),
            Self::Open { until } if now >= until => (Self::Probing { since: now }, true),
            Self::Probing { since } if now.since(since) >= rules.open_for => (Self::Probing { since: now }, true),
            Self::Open { .. } | Self::Probing { .. } => (self, false),
        }
    }

    /// Returns the state after a call that began at `began` failed at `now`.
    fn failed(self, began: Moment, now: Moment, rules: &Rules) -> Self {
        match self {
            Self::Closed { failures: 1.., last: before } | Self::Probing { since: before } if began < before => self,
            Self::Closed { failures, .. } if failures + 1 < rules.failures_max => {
                Self::Closed { failures: failures + 1, last: now }
            }
            Self::Closed { .. } | Self::Probing { .. } => Self::Open { until: now.after(rules.open_for) },
            // A call that began before the breaker opened must not extend the time for which the breaker stays open.
            Self::Open { .. } => self,
        }
    }
}

/// Closed, without failures.
const CLOSED: BreakerState = BreakerState::Closed { failures: 0, last: Moment::from_nanos(0) };

/// The strings for a breaker's log lines, and its gauge.
#[derive(Debug)]
pub(crate) struct Labels {
    /// The name of the tier, with which log lines start.
    pub tier: &'static str,
    /// The effect of an open breaker, for the log line that reports it.
    pub effect: &'static str,
    /// The gauge: 0 while the breaker is closed, 1 while it is open or half-open.
    pub open: IntGauge,
}

/// A breaker that several threads share. Only cache misses take the lock, which is held for a few instructions.
#[derive(Debug)]
pub(crate) struct Breaker {
    rules: Rules,
    labels: Labels,
    state: Mutex<BreakerState>,
}

impl Breaker {
    /// Creates a closed breaker.
    #[must_use]
    pub(crate) const fn new(rules: Rules, labels: Labels) -> Self {
        Self { rules, labels, state: Mutex::new(CLOSED) }
    }

    /// Returns true if the caller may use the tier now. The caller must then report the result with [`Self::succeeded`]
    /// or [`Self::failed`].
    pub(crate) fn admits(&self, now: Moment) -> bool {
        let mut state = self.lock();
        let (next, may) = state.asked(now, &self.rules);
        *state = next;
        may
    }

    /// Reports that the tier answered.
    pub(crate) fn succeeded(&self) {
        self.report(|_| CLOSED);
    }

    /// Reports that a call that began at `began` failed at `now`.
    pub(crate) fn failed(&self, began: Moment, now: Moment) {
        self.report(|state| state.failed(began, now, &self.rules));
    }

    fn report(&self, next: impl FnOnce(BreakerState) -> BreakerState) {
        let (was_closed, is_closed) = {
            let mut state = self.lock();
            let was = *state;
            *state = next(was);
            let (was_closed, is_closed) = (was.is_closed(), state.is_closed());
            if was_closed != is_closed {
                self.labels.open.set(i64::from(!is_closed)); // under the lock, so that gauge and state agree
            }
            (was_closed, is_closed)
        };
        let Labels { tier, effect, .. } = &self.labels;
        match (was_closed, is_closed) {
            (true, false) => tracing::warn!("{tier} circuit breaker opened: repeated failures; {effect}"),
            (false, true) => tracing::info!("{tier} circuit breaker closed: the tier is used again"),
            (true, true) | (false, false) => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, BreakerState> {
        // Ignore poisoning: the state is replaced as a whole, so a panic cannot leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { failures_max: 2, open_for: Duration::from_millis(100) };
    const fn at(millis: u64) -> Moment {
        Moment::from_nanos(millis * 1_000_000)
    }

    fn closed() -> Breaker {
        let open = IntGauge::new("open", "1 while open.").unwrap();
        Breaker::new(RULES, Labels { tier: "tier", effect: "it is skipped", open })
    }

    /// Reports a call that began at `began` and failed at `failed` (in milliseconds). Returns the resulting state.
    fn fails(breaker: &Breaker, began: u64, failed: u64) -> BreakerState {
        breaker.failed(at(began), at(failed));
        let state = *breaker.lock();
        assert_eq!(breaker.labels.open.get(), i64::from(!state.is_closed()));
        state
    }

    #[test]
    fn breaker_opens_after_consecutive_failures_and_later_admits_one_caller() {
        let breaker = closed();
        assert!(fails(&breaker, 0, 0).is_closed());
        breaker.succeeded();
        assert!(fails(&breaker, 1, 1).is_closed(), "a success resets the count");
        let open = BreakerState::Open { until: at(102) };
        assert_eq!(fails(&breaker, 2, 2), open);
        assert!(!breaker.admits(at(50)));
        assert_eq!(fails(&breaker, 60, 60), open, "a late failure does not keep the breaker open for longer");
        assert!(breaker.admits(at(102)), "the breaker was open for `open_for`");
        assert!(!breaker.admits(at(103)), "but only one caller tries");
        let trial = BreakerState::Probing { since: at(102) };
        assert_eq!(fails(&breaker, 1, 104), trial, "a call that began before the trial does not count");
        breaker.succeeded();
        assert_eq!((*breaker.lock(), breaker.labels.open.get()), (CLOSED, 0));
        assert!(breaker.admits(at(104)));
    }

    #[test]
    fn concurrent_failures_count_as_one() {
        let breaker = closed();
        for began in 0..50 {
            assert!(fails(&breaker, began, 100 + began).is_closed());
        }
        assert!(breaker.admits(at(150)));
        assert!(!fails(&breaker, 100, 200).is_closed(), "this call began after the first failure");
    }

    #[test]
    fn a_failed_trial_reopens_the_breaker_and_an_unreported_trial_admits_another_caller() {
        let breaker = closed();
        fails(&breaker, 0, 0);
        fails(&breaker, 0, 0);
        assert!(breaker.admits(at(100)));
        fails(&breaker, 100, 110);
        assert!(!breaker.admits(at(150)));
        assert!(breaker.admits(at(210)));
        assert!(!breaker.admits(at(300)));
        assert!(breaker.admits(at(310)), "the caller that was admitted at 210 did not report a result");
    }
}
