//! Random values that a seed determines: the same seed gives the same run.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// A source of random values; clones share it.
#[derive(Clone)]
pub struct Chance(Arc<Mutex<fastrand::Rng>>);

impl Chance {
    /// The source with this seed.
    pub fn of(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(fastrand::Rng::with_seed(seed))))
    }

    /// A new source, which from now on is independent of this one.
    pub fn fork(&self) -> Self {
        Self(Arc::new(Mutex::new(self.lock().fork())))
    }

    /// True once in `times`.
    pub fn one_in(&self, times: u32) -> bool {
        self.lock().u32(0..times) == 0
    }

    /// A whole number in this range.
    pub fn number(&self, of: Range<usize>) -> usize {
        self.lock().usize(of)
    }

    /// A duration in this range of microseconds.
    pub fn micros(&self, of: Range<u64>) -> Duration {
        Duration::from_micros(self.lock().u64(of))
    }

    /// One of `all`.
    pub fn one_of<T: Copy>(&self, all: &[T]) -> T {
        all[self.number(0..all.len())]
    }

    /// 16 random bytes.
    pub fn bytes(&self) -> [u8; 16] {
        self.lock().u128(..).to_be_bytes()
    }

    fn lock(&self) -> MutexGuard<'_, fastrand::Rng> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
