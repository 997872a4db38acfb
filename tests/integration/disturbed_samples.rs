//! Tests which samples, and how many, a measurement may drop because the machine was disturbed.

use std::{panic::catch_unwind, time::Duration};

use tokio::time::Instant;

use crate::support::machine::{Sample, keep_unless};

/// Returns 20 consecutive samples of one second. The value of each sample is its index.
fn samples() -> Vec<Sample<u32>> {
    let start = Instant::now();
    let at = |second: u32| start + Duration::from_secs(second.into());
    (0..20).map(|number| Sample::new(at(number), at(number + 1), number)).collect()
}

/// Drops disturbed samples from the 20 samples. `disturbed` contains the indices of the disturbed samples, and
/// `may_drop` selects the samples that may be dropped. Returns the remaining values, or the panic message.
fn kept(disturbed: &'static [usize], may_drop: fn(&u32) -> bool) -> Result<Vec<u32>, String> {
    let judge = move || {
        let samples = samples();
        let starts: Vec<_> = samples.iter().map(Sample::start).collect();
        let was_disturbed = |from, _| disturbed.iter().any(|number| starts[*number] == from);
        keep_unless(was_disturbed, "numbers", samples, may_drop)
    };
    catch_unwind(judge).map_err(|panic| *panic.downcast::<String>().unwrap())
}

#[test]
fn a_disturbed_sample_is_dropped() {
    let kept = kept(&[3], |_| true).unwrap();
    assert_eq!(kept, (0..20).filter(|number| *number != 3).collect::<Vec<_>>());
}

#[test]
fn a_disturbed_sample_that_must_not_be_dropped_is_kept() {
    let all: Vec<_> = (0..20).collect();
    assert_eq!(kept(&[0, 1, 2, 3, 4, 5], |_| false).unwrap(), all);
    assert_eq!(kept(&[3, 4], |number| *number != 3).unwrap().len(), 19);
}

#[test]
fn dropping_more_than_a_tenth_of_the_samples_is_a_failure() {
    assert_eq!(kept(&[3, 4], |_| true).unwrap().len(), 18);
    let message = kept(&[3, 4, 5], |_| true).unwrap_err();
    assert_eq!(message, "numbers: machine disturbed too often: dropped 3 of 20 samples, at most one in 10 is allowed");
}

#[test]
fn a_single_disturbed_sample_cannot_be_dropped() {
    let now = Instant::now();
    let judge = move || keep_unless(|_, _| true, "single", vec![Sample::new(now, now, 0)], |_| true);
    assert!(catch_unwind(judge).is_err());
}
