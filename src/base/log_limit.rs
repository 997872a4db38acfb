//! Limits how often one kind of event is logged, so that a flood of events does not become a flood of log lines.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use super::clock::Moment;

/// Permits one log line per interval, and counts the events that were not logged since the last line.
pub(crate) struct LogLimit {
    interval: Duration,
    /// The time from which the next line is permitted, in nanoseconds of [`Moment`]; 0 until the first line.
    next: AtomicU64,
    suppressed: AtomicU64,
}

impl LogLimit {
    /// Creates a limit of one log line per `interval`.
    #[must_use]
    pub(crate) const fn every(interval: Duration) -> Self {
        Self { interval, next: AtomicU64::new(0), suppressed: AtomicU64::new(0) }
    }

    /// If this event may be logged, returns the number of events suppressed since the last logged line; otherwise
    /// returns `None`.
    pub(crate) fn permit(&self, now: Moment) -> Option<u64> {
        let next = self.next.load(Ordering::Relaxed);
        let after = now.after(self.interval).nanos();
        // If several threads arrive at once, only one of them moves `next` forward and may log.
        let is_permitted = now.nanos() >= next
            && self.next.compare_exchange(next, after, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if is_permitted {
            return Some(self.suppressed.swap(0, Ordering::Relaxed));
        }
        self.suppressed.fetch_add(1, Ordering::Relaxed);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_per_interval_is_permitted_with_the_number_of_suppressed_lines() {
        let limit = LogLimit::every(Duration::from_mins(1));
        let at = |seconds: u64| Moment::from_nanos(seconds * 1_000_000_000);
        assert_eq!(limit.permit(at(5)), Some(0));
        assert_eq!([limit.permit(at(5)), limit.permit(at(64))], [None, None]);
        assert_eq!(limit.permit(at(65)), Some(2));
        assert_eq!(limit.permit(at(125)), Some(0));
    }
}
