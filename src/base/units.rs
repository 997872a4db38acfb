//! Parses and formats durations and sizes as operators write them. The unit is required: a number without a unit is
//! refused.

use std::{fmt, time::Duration};

use super::saturate::Saturate as _;

/// A number of bytes, written as `512KiB`, `128MiB` or `1GiB` (powers of 1 024), or as `300B`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(u64);

const SIZE_UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

impl ByteSize {
    /// Returns a size of `bytes` bytes.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// Returns the size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Returns the size in bytes as a `usize`, or the largest `usize` if the size is larger.
    #[must_use]
    pub fn length(self) -> usize {
        self.0.saturate()
    }

    /// Parses a size such as `128MiB`. Returns `None` if the number or the unit is missing, or if the size is too
    /// large.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (unit, bytes) = SIZE_UNITS.into_iter().find(|(unit, _)| text.ends_with(unit))?;
        let number: u64 = text.strip_suffix(unit)?.trim_end().parse().ok()?;
        number.checked_mul(bytes).map(Self)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, bytes) =
            SIZE_UNITS.into_iter().find(|(_, bytes)| self.0 != 0 && self.0.is_multiple_of(*bytes)).unwrap_or(("B", 1));
        write!(f, "{}{unit}", self.0 / bytes)
    }
}

/// Parses a duration such as `150ms`, `2s` or `90d`. Returns `None` if the number or the unit is missing.
#[must_use]
pub(crate) fn parse_duration(text: &str) -> Option<Duration> {
    // humantime accepts "0" without a unit, but trustgate requires a unit.
    text.contains(|c: char| c.is_ascii_alphabetic()).then(|| humantime::parse_duration(text).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_require_a_unit() {
        for (text, want) in [
            ("128MiB", Some(128 << 20)),
            ("1 GiB", Some(1 << 30)),
            ("300B", Some(300)),
            ("300", None),
            ("MiB", None),
            ("-1KiB", None),
            ("1.5GiB", None),
            ("99999999999GiB", None),
        ] {
            assert_eq!(ByteSize::parse(text).map(ByteSize::bytes), want, "{text}");
        }
        assert_eq!(ByteSize::from_bytes(256 << 10).to_string(), "256KiB");
        assert_eq!(ByteSize::from_bytes(0).to_string(), "0B");
    }

    #[test]
    fn durations_require_a_unit() {
        for (text, want) in [
            ("150ms", Some(Duration::from_millis(150))),
            ("90d", Some(Duration::from_hours(90 * 24))),
            ("0s", Some(Duration::ZERO)),
            ("0", None),
            ("150", None),
            ("-2s", None),
        ] {
            assert_eq!(parse_duration(text), want, "{text}");
        }
    }
}
