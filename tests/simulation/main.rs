//! Runs complete replicas in a simulated environment, with many seeds and random failures. No replica may grant a
//! revoked key for longer than the revocation bound.
//!
//! The replicas run the server code, from the check request to the answer, including polls, caches and the redis crate.
//! Time, the database, the network and the Redis server are simulated, so a seed that fails once fails every time.
//! `make simulate SEED=n` prints the events of the run with seed `n`. The simulation also pauses the process that runs
//! the replicas. It does not cover threads, listeners or SQL.

// This crate contains only tests: they may panic, each uses only a part of `support`, and they print their results.
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

use crate::run::{EventLog, Plan, run};

/// Nothing fails in one out of this many runs.
const CALM_EVERY: u64 = 10;

fn plan(seed: u64, events: EventLog) -> Plan {
    Plan { seed, calm: seed.is_multiple_of(CALM_EVERY), events }
}

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok().filter(|value| !value.is_empty())?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value}: not a whole number")))
}

#[test]
fn same_seed_gives_the_same_run() {
    for seed in [1, 10, 11] {
        let [first, second] = [run(plan(seed, EventLog::Collected)), run(plan(seed, EventLog::Collected))];
        let differs = first.events.iter().zip(&second.events).find(|(one, other)| one != other);
        assert_eq!(differs, None, "seed {seed}");
        assert_eq!(first, second, "seed {seed}");
    }
}

#[test]
fn no_revoked_key_is_granted_beyond_the_bound_whatever_fails() {
    if let Some(seed) = variable("SEED") {
        tracing_subscriber::fmt().without_time().with_ansi(false).with_writer(std::io::stdout).init();
        let wrong = run(plan(seed, EventLog::Printed)).wrong;
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
                        return; // stop at the first run with a wrong answer
                    }
                    let outcome = run(plan(seed, EventLog::Off));
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
        panic!("{} wrong answers, the first: {first}\n`make simulate SEED={seed}` prints the events", wrong.len());
    }
    // Each of these events must occur in some run. Otherwise the simulation has not tested the event.
    let others = [
        "found in Redis",
        "refused from Redis",
        "refused in L1",
        "granted while stale",
        "lost histories found",
        "polls confirmed",
        "polls unanswered",
        "polls unusable",
    ];
    for what in answers.iter().chain(&others) {
        assert!(counts.get(what).is_some_and(|times| *times > 0), "did not occur: {what}");
    }
}
