//! Jitter: small variations in timing. Without jitter, many replicas would act at the same moment, and many cache
//! entries and connections would expire at the same moment.
//!
//! The variations depend only on numbers that the caller passes, such as the replica's id, so that simulations can be
//! repeated.

use std::time::Duration;

use uuid::Uuid;

/// The jitter of one replica.
#[derive(Clone, Debug)]
pub struct Jitter(u64);

impl Jitter {
    /// Creates the jitter for the replica with this id.
    #[must_use]
    pub const fn of(replica: Uuid) -> Self {
        let (high, low) = replica.as_u64_pair();
        Self(high ^ low)
    }

    /// Returns `time`, varied by up to 10 % in either direction.
    pub fn around(&mut self, time: Duration) -> Duration {
        // A linear congruential generator (Knuth, MMIX). Its upper bits are the most random ones.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let [upper, ..] = self.0.to_be_bytes();
        vary(time, 0.1, f64::from(upper) / 255.0)
    }
}

/// Returns `time`, varied by up to the fraction `share` in either direction. `position`, from 0 to 1, selects a point
/// in that range.
#[must_use]
pub(crate) fn vary(time: Duration, share: f64, position: f64) -> Duration {
    time.mul_f64(1.0 - share + 2.0 * share * position)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jitter_varies_a_time_by_at_most_its_share_in_either_direction() {
        let vary = |position| vary(Duration::from_secs(10), 0.2, position).as_millis();
        assert_eq!([0.0, 0.5, 1.0].map(vary), [8_000, 10_000, 12_000]);
        let mut jitter = Jitter::of(Uuid::from_u128(7));
        for _ in 0..1_000 {
            let millis = jitter.around(Duration::from_secs(1)).as_millis();
            assert!((900..=1_100).contains(&millis), "{millis}");
        }
    }
}
