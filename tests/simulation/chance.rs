//! Random values that are determined by a seed: the same seed gives the same run.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// A source of random values. Clones of a source draw from the same generator.
#[derive(Clone)]
pub struct Chance(Arc<Mutex<fastrand::Rng>>);

impl Chance {
    pub fn of(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(fastrand::Rng::with_seed(seed))))
    }

    /// Returns a new source whose values do not depend on later use of this source.
    pub fn fork(&self) -> Self {
        Self(Arc::new(Mutex::new(self.lock().fork())))
    }

    /// Returns true with a probability of one in `times`.
    pub fn one_in(&self, times: u32) -> bool {
        self.lock().u32(0..times) == 0
    }

    /// Returns a random number in this range.
    pub fn number(&self, of: Range<usize>) -> usize {
        self.lock().usize(of)
    }

    /// Returns a random duration in this range of microseconds.
    pub fn micros(&self, of: Range<u64>) -> Duration {
        Duration::from_micros(self.lock().u64(of))
    }

    /// Returns a random element of `all`.
    pub fn one_of<T: Copy>(&self, all: &[T]) -> T {
        all[self.number(0..all.len())]
    }

    /// Returns 16 random bytes.
    pub fn bytes(&self) -> [u8; 16] {
        self.lock().u128(..).to_be_bytes()
    }

    fn lock(&self) -> MutexGuard<'_, fastrand::Rng> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
