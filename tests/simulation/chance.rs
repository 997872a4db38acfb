//! Chance that a seed determines: the same seed, the same run.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// A source of chance; clones share it.
#[derive(Clone)]
pub struct Chance(Arc<Mutex<fastrand::Rng>>);

impl Chance {
    /// What follows from `seed`.
    pub fn of(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(fastrand::Rng::with_seed(seed))))
    }

    /// One that goes on by itself from here.
    pub fn fork(&self) -> Self {
        Self(Arc::new(Mutex::new(self.lock().fork())))
    }

    /// True once in `times`.
    pub fn one_in(&self, times: u32) -> bool {
        self.lock().u32(0..times) == 0
    }

    /// A whole number of this range.
    pub fn number(&self, of: Range<usize>) -> usize {
        self.lock().usize(of)
    }

    /// A time of this range, in microseconds.
    pub fn micros(&self, of: Range<u64>) -> Duration {
        Duration::from_micros(self.lock().u64(of))
    }

    /// One of these.
    pub fn one_of<T: Copy>(&self, all: &[T]) -> T {
        all[self.number(0..all.len())]
    }

    /// 16 bytes.
    pub fn bytes(&self) -> [u8; 16] {
        self.lock().u128(..).to_be_bytes()
    }

    fn lock(&self) -> MutexGuard<'_, fastrand::Rng> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
