//! The results of a run: the number of checks, their outcomes and their times.
//!
//! Times are counted in a histogram whose steps have a width of at most 1/64 of the value. A quantile is the upper end
//! of a step, so it is at most 1.6 % too high, but not too low.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::message::Outcome;

/// There are 2^6 steps between one power of two and the next.
const STEP_BITS: u32 = 6;

/// A histogram of times.
#[derive(Default)]
pub(crate) struct Times {
    counts: Vec<u64>,
    count: u64,
    max: u64,
}

impl Times {
    pub(crate) fn add(&mut self, nanos: u64) {
        let step = step_of(nanos);
        if self.counts.len() <= step {
            self.counts.resize(step + 1, 0);
        }
        self.counts[step] += 1;
        self.count += 1;
        self.max = self.max.max(nanos);
    }

    /// Returns the time, in nanoseconds, that the given share of all checks did not exceed. The share is in
    /// thousandths.
    fn quantile(&self, thousandths: u64) -> u64 {
        let wanted = (self.count * thousandths).div_ceil(1_000);
        let mut seen = 0;
        for (step, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return end_of(step).min(self.max);
            }
        }
        self.max
    }

    fn json(&self) -> Value {
        if self.count == 0 {
            return Value::Null;
        }
        let micros = |nanos: u64| micros(nanos);
        json!({
            "p50": micros(self.quantile(500)), "p90": micros(self.quantile(900)), "p99": micros(self.quantile(990)),
            "p99.9": micros(self.quantile(999)), "max": micros(self.max),
        })
    }
}

/// Returns the step of a value. Each value below 128 has a separate step; for larger values, the highest 7 bits select
/// the step.
fn step_of(nanos: u64) -> usize {
    let shift = (u64::BITS - nanos.leading_zeros()).saturating_sub(STEP_BITS + 1);
    ((shift as usize) << STEP_BITS) + usize::try_from(nanos >> shift).unwrap_or(usize::MAX)
}

/// Returns the largest value of a step.
fn end_of(step: usize) -> u64 {
    let shift = (step >> STEP_BITS).saturating_sub(1);
    let high = (step - (shift << STEP_BITS)) as u64;
    ((high + 1) << shift) - 1
}

/// Converts nanoseconds to microseconds.
#[expect(clippy::cast_precision_loss, reason = "53 bits of nanoseconds are 104 days")]
fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1_000.0
}

/// The expected outcome of each check. If a check has another outcome, the run fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Expected {
    /// Each check is granted.
    Grant,
    /// Each check is denied.
    Denial,
    /// Each check is granted or denied.
    Any,
    /// Each check is granted, denied or answered with a fault, as an overloaded server does.
    Answer,
}

/// The outcomes of the checks of a run.
#[derive(Default)]
pub(crate) struct Tally {
    grants: u64,
    denials: u64,
    faults: u64,
    errors: BTreeMap<&'static str, u64>,
    /// The number of checks that were answered during the measurement.
    measured: u64,
    times: Times,
}

impl Tally {
    pub(crate) fn add(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Grant => self.grants += 1,
            Outcome::Denial => self.denials += 1,
            Outcome::Fault => self.faults += 1,
            Outcome::Wrong(why) => self.add_errors(why, 1),
        }
    }

    pub(crate) fn add_errors(&mut self, why: &'static str, count: u64) {
        *self.errors.entry(why).or_default() += count;
    }

    pub(crate) fn add_measured(&mut self, nanos: u64) {
        self.measured += 1;
        self.times.add(nanos);
    }

    /// Returns the number of checks that were answered.
    pub(crate) const fn answered(&self) -> u64 {
        self.grants + self.denials + self.faults
    }

    /// True if at least one check was answered and each check had the expected outcome.
    pub(crate) fn is_as(&self, expected: Expected) -> bool {
        let wrong = match expected {
            Expected::Grant => self.denials + self.faults,
            Expected::Denial => self.grants + self.faults,
            Expected::Any => self.faults,
            Expected::Answer => 0,
        };
        wrong == 0 && self.errors.is_empty() && self.answered() > 0
    }

    /// Returns the results as JSON. `seconds` is the length of the measurement.
    #[expect(clippy::cast_precision_loss, reason = "a run has far fewer than 2^53 checks")]
    pub(crate) fn json(&self, seconds: f64) -> Value {
        json!({
            "seconds": seconds,
            "checks": self.measured,
            "checks_per_second": self.measured as f64 / seconds,
            "latency_us": self.times.json(),
            "answered": self.answered(),
            "grants": self.grants,
            "denials": self.denials,
            "faults": self.faults,
            "errors": self.errors,
        })
    }
}
