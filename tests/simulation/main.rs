//! Whole replicas in a simulated world, seed after seed: no key is granted longer than promised, whatever fails.
//!
//! The replicas are those of the server, from the message of a check to its answer, with their polls, caches and the
//! redis crate. Time, database, network and what Redis holds are simulated, so a seed that fails does so each time:
//! `make simulate SEED=n` tells what happened. Not simulated: threads, listeners, SQL, and a process that stands still.

// All of it is tests: what fails here should fail loudly, nobody else uses it, and it says what it found.
#![allow(clippy::unwrap_used, clippy::print_stdout, dead_code, unreachable_pub)]

mod chance;
mod database;
mod network;
mod redis;
mod run;
#[path = "../support/mod.rs"]
mod support;

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use crate::run::{Plan, Story, run};

/// In one of so many runs nothing fails.
const CALM: u64 = 10;

fn plan(seed: u64, story: Story) -> Plan {
    Plan { seed, calm: seed.is_multiple_of(CALM), story }
}

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok().filter(|value| !value.is_empty())?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value}: not a whole number")))
}

#[test]
fn a_seed_gives_the_same_run_each_time() {
    for seed in [1, 10, 11] {
        let [first, second] = [run(plan(seed, Story::Kept)), run(plan(seed, Story::Kept))];
        let differs = first.story.iter().zip(&second.story).find(|(one, other)| one != other);
        assert_eq!(differs, None, "seed {seed}");
        assert_eq!(first, second, "seed {seed}");
    }
}

#[test]
fn no_key_is_granted_longer_than_promised_whatever_fails() {
    if let Some(seed) = variable("SEED") {
        tracing_subscriber::fmt().without_time().with_ansi(false).with_writer(std::io::stdout).init();
        let wrong = run(plan(seed, Story::Shown)).wrong;
        assert!(wrong.is_empty(), "{} wrong answers, the first: {}", wrong.len(), wrong[0]);
        return;
    }
    let seeds = variable("SEEDS").unwrap_or(100);
    let began = Instant::now();
    let (next, sum) = (AtomicU64::new(0), Mutex::new((BTreeMap::new(), Vec::new())));
    thread::scope(|threads| {
        for _ in 0..thread::available_parallelism().unwrap().get() {
            threads.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds || !sum.lock().unwrap().1.is_empty() {
                        return; // one that is wrong is enough
                    }
                    let outcome = run(plan(seed, Story::Untold));
                    let (counts, wrong) = &mut *sum.lock().unwrap();
                    for (what, times) in outcome.counts {
                        *counts.entry(what).or_default() += times;
                    }
                    wrong.extend(outcome.wrong.into_iter().map(|wrong| (seed, wrong)));
                    if (seed + 1) % 100 == 0 {
                        println!("{} of {seeds} seeds, {:.0} s", seed + 1, began.elapsed().as_secs_f64());
                    }
                }
            });
        }
    });
    let (counts, wrong): (BTreeMap<&str, u64>, Vec<(u64, String)>) = sum.into_inner().unwrap();
    let answers = ["granted at once", "granted after a read", "denied at once", "denied after a read", "faults"];
    let checks: u64 = answers.iter().filter_map(|what| counts.get(what)).sum();
    println!("{checks} checks in {seeds} runs, {:.1} s:", began.elapsed().as_secs_f64());
    for (what, times) in &counts {
        println!("{times:>12}  {what}");
    }
    if let Some((seed, first)) = wrong.iter().min() {
        panic!("{} wrong answers, the first: {first}\n`make simulate SEED={seed}` tells what happened", wrong.len());
    }
    // What never happened was not tried.
    let others = [
        "found in Redis",
        "refused from Redis",
        "refused in L1",
        "granted while unconfirmed",
        "histories found lost",
        "polls confirmed",
        "polls unanswered",
        "polls unusable",
    ];
    for what in answers.iter().chain(&others) {
        assert!(counts.get(what).is_some_and(|times| *times > 0), "never: {what}");
    }
}
