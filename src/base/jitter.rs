//! Jitter: small variations of intervals, so that replicas do not act at the same moments.
//!
//! The variations depend only on the replica's id, so they are the same in each run.

use std::time::Duration;

use uuid::Uuid;

/// The jitter of one replica.
#[derive(Clone, Debug)]
pub struct Jitter(u64);

impl Jitter {
    /// The jitter of `replica`.
    #[must_use]
    pub const fn of(replica: Uuid) -> Self {
        let (high, low) = replica.as_u64_pair();
        Self(high ^ low)
    }

    /// `time`, varied by up to 10 % in either direction.
    pub fn around(&mut self, time: Duration) -> Duration {
        // A linear congruential generator (Knuth, MMIX). Its upper bits are the most random ones.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let [upper, ..] = self.0.to_be_bytes();
        time.mul_f64(0.9 + 0.2 * f64::from(upper) / 255.0)
    }
}
