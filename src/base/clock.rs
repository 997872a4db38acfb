//! Time: moments on the boot clock, times on the database's clock, and the [`Clock`] trait that tests implement.
//!
//! Apart from diagnostics, the machine's wall clock is used only for comparison with the boot clock, to detect a pause
//! of the machine that the boot clock missed. No decision depends on the time that the wall clock shows.

use std::{
    fmt,
    num::NonZeroU64,
    sync::atomic::{AtomicBool, AtomicI64, Ordering},
    time::Duration,
};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::saturate::Saturate as _;

/// A moment on `CLOCK_BOOTTIME`, in nanoseconds since the machine started. Unlike [`std::time::Instant`], this clock
/// advances while the machine is suspended, so that leases and cache entries expire during a suspension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

impl Moment {
    /// Returns the moment `nanos` nanoseconds after the machine started.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Returns the time from `earlier` to `self`; zero if `earlier` is later than `self`.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Returns `self` plus `wait`, or the latest possible moment if the sum overflows.
    #[must_use]
    pub fn after(self, wait: Duration) -> Self {
        Self(self.0.saturating_add(wait.as_nanos().saturate()))
    }

    /// Returns `self` minus `age`, or the time at which the machine started if the result would be earlier.
    #[must_use]
    pub fn before(self, age: Duration) -> Self {
        Self(self.0.saturating_sub(age.as_nanos().saturate()))
    }

    /// Returns the nanoseconds since the machine started.
    #[must_use]
    pub const fn nanos(self) -> u64 {
        self.0
    }

    const fn micros(self) -> i64 {
        (self.0 / 1_000).cast_signed() // a u64 divided by 1000 fits into an i64
    }
}

/// A point in time by the database's clock: microseconds since the Unix epoch.
///
/// The microseconds are stored with the sign bit flipped, which keeps their order. Zero is then unused, so an `Option`
/// of this type takes no extra memory. Each cached record contains three such options.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DatabaseTime(NonZeroU64);

const SIGN: u64 = 1 << 63;

impl DatabaseTime {
    /// Returns the time `micros` microseconds after the Unix epoch. `i64::MIN`, which would be stored as zero, becomes
    /// `i64::MIN + 1`.
    #[must_use]
    pub const fn from_micros(micros: i64) -> Self {
        match NonZeroU64::new(micros.cast_unsigned() ^ SIGN) {
            Some(flipped) => Self(flipped),
            None => Self(NonZeroU64::MIN),
        }
    }

    /// Returns the microseconds since the Unix epoch.
    #[must_use]
    pub const fn micros(self) -> i64 {
        (self.0.get() ^ SIGN).cast_signed()
    }

    /// Returns the time from `earlier` to `self`; zero if `earlier` is later than `self`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(u64::try_from(self.micros().saturating_sub(earlier.micros())).unwrap_or(0))
    }

    /// Formats the time as RFC 3339 in UTC. Returns `None` if the time is outside the range of the calendar.
    #[must_use]
    pub fn to_rfc3339(self) -> Option<String> {
        let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.micros()) * 1_000).ok()?;
        at.format(&Rfc3339).ok()
    }

    /// Parses a time in RFC 3339 format. Ignores digits after the microseconds.
    #[must_use]
    pub fn from_rfc3339(text: &str) -> Option<Self> {
        let nanos = OffsetDateTime::parse(text, &Rfc3339).ok()?.unix_timestamp_nanos();
        i64::try_from(nanos / 1_000).ok().map(Self::from_micros)
    }

    /// Returns `self` plus `wait`, or the latest possible time if the sum overflows.
    #[must_use]
    pub fn after(self, wait: Duration) -> Self {
        Self::from_micros(self.micros().saturating_add(wait.as_micros().saturate()))
    }
}

impl fmt::Debug for DatabaseTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DatabaseTime").field(&self.micros()).finish()
    }
}

/// Formats the time as RFC 3339 in UTC, or as a number of microseconds if it is outside the range of the calendar.
impl fmt::Display for DatabaseTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.to_rfc3339() {
            Some(text) => f.write_str(&text),
            None => write!(f, "{} us", self.micros()),
        }
    }
}

/// A source of time. The program uses [`SystemClock`]; tests use clocks that they control.
pub trait Clock: Send + Sync + 'static {
    /// Returns the current moment.
    fn now(&self) -> Moment;
    /// Returns the number of microseconds by which the wall clock is ahead of the boot clock. A jump of this offset
    /// means that the wall clock was set, or that the whole machine was paused and its boot clock stopped.
    fn wall_offset(&self) -> i64;
}

/// The clock `CLOCK_BOOTTIME` of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Moment {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        // The kernel's boot clock is not negative, and its nanoseconds are below 1e9.
        Moment(time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned())
    }

    fn wall_offset(&self) -> i64 {
        let wall = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        (wall.tv_sec * 1_000_000 + wall.tv_nsec / 1_000).saturating_sub(self.now().micros())
    }
}

/// Returns the time that the wall clock of this machine showed at `at`, unless the wall clock was set afterwards. Use
/// the result only for diagnostics, not for decisions.
#[must_use]
pub(crate) fn wall_time(clock: &dyn Clock, at: Moment) -> DatabaseTime {
    DatabaseTime::from_micros(at.micros().saturating_add(clock.wall_offset()))
}

/// An estimate of the database's clock, stored as its offset from the boot clock. Each read that the
/// database answers updates the estimate.
///
/// The estimate assumes that the database read its clock when the read was sent. The estimate may therefore be ahead of
/// the database's clock by up to the duration of that read, but not behind it. As a result, cached values and keys
/// expire slightly early, but not late.
#[derive(Debug, Default)]
pub struct DatabaseClock {
    offset_micros: AtomicI64,
    known: AtomicBool,
}

impl DatabaseClock {
    /// Records that a read sent at `sent` returned `shown` as the database's time.
    pub fn observe(&self, sent: Moment, shown: DatabaseTime) {
        self.offset_micros.store(shown.micros().saturating_sub(sent.micros()), Ordering::Relaxed);
        self.known.store(true, Ordering::Release);
    }

    /// Returns the database's time at `now`; `None` until the database has answered a read.
    #[must_use]
    pub fn at(&self, now: Moment) -> Option<DatabaseTime> {
        self.known
            .load(Ordering::Acquire)
            .then(|| DatabaseTime::from_micros(now.micros().saturating_add(self.offset_micros.load(Ordering::Relaxed))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn database_clock_is_unknown_before_the_first_read_and_not_behind_the_database_afterwards() {
        let clock = DatabaseClock::default();
        let sent = Moment::from_nanos(5_000_000_000);
        assert_eq!(clock.at(sent), None);
        clock.observe(sent, DatabaseTime::from_micros(1_000_000_000));
        let later = sent.after(Duration::from_millis(250));
        assert_eq!(clock.at(later), Some(DatabaseTime::from_micros(1_000_250_000)));
    }

    #[test]
    fn database_times_keep_their_order_and_fit_into_an_option_without_extra_memory() {
        let times = [i64::MIN + 1, -1, 0, 1, i64::MAX];
        assert!(times.windows(2).all(|pair| DatabaseTime::from_micros(pair[0]) < DatabaseTime::from_micros(pair[1])));
        assert_eq!(times.map(|micros| DatabaseTime::from_micros(micros).micros()), times);
        assert_eq!(DatabaseTime::from_micros(i64::MIN).micros(), i64::MIN + 1);
        assert_eq!(size_of::<Option<DatabaseTime>>(), 8);
    }

    #[test]
    fn moment_arithmetic_saturates() {
        let (early, late) = (Moment::from_nanos(1), Moment::from_nanos(9));
        assert_eq!(early.since(late), Duration::ZERO);
        assert_eq!(late.since(early), Duration::from_nanos(8));
        assert_eq!(late.after(Duration::MAX), Moment::from_nanos(u64::MAX));
    }
}
