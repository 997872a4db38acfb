//! Detects disturbances of the machine while a test measures times, and decides which results to excuse because of
//! them. A busy host now and then pauses a virtual machine with all programs in it, and the tests must not blame the
//! server for such delays.
//!
//! The tests do not correct measured times: [`keep_undisturbed`] either drops a sample or keeps it unchanged.

// Measuring pauses needs the system clocks, which the lint forbids in the server.
#![allow(clippy::disallowed_methods)]

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use rustix::{
    process::setpriority_process,
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

/// The interval at which each watching thread wakes up.
const STEP: Duration = Duration::from_millis(4);
/// A wake-up that is late by more than this counts as a pause of the processor. On an undisturbed machine, a thread
/// with the highest priority usually wakes up with a much shorter delay.
const PAUSE: Duration = Duration::from_millis(25);

/// A period in which the machine was disturbed.
#[derive(Clone, Copy)]
struct Pause {
    from: Instant,
    to: Instant,
}

/// The periods in which a processor was paused, as recorded by the current or the previous [`Watch`].
static PAUSES: Mutex<Vec<Pause>> = Mutex::new(Vec::new());
/// The periods in which the hypervisor took more than a tenth of the processor time (steal time), as recorded by the
/// current or the previous [`Watch`]. The single pauses in such a period may be too short for [`PAUSES`].
static STARVED: Mutex<Vec<Pause>> = Mutex::new(Vec::new());
/// The interval at which a [`Watch`] reads the steal time. The kernel counts steal time in hundredths of a second.
const STEAL_INTERVAL: Duration = Duration::from_millis(100);
/// Steal time above one tenth of the processor time is a disturbance, because the tests need most of the processor
/// time.
const STEAL_DIVISOR: u64 = 10;

/// The margin that a test adds to the limit of a time that it measures only once, because it cannot drop its only
/// sample. Pauses of up to half a second have been observed on the machines that run the tests.
pub const PAUSE_MARGIN: Duration = Duration::from_millis(500);

/// [`keep_undisturbed`] may drop at most one sample in this many.
const DROPPED_DIVISOR: usize = 10;

/// The maximum time from the end of a disturbance until a [`Watch`] has recorded it.
const RECORDED_WITHIN: Duration = STEAL_INTERVAL.saturating_mul(2);

/// One result of a measurement, with the period in which a disturbance can affect the result.
#[derive(Clone, Copy, Debug)]
pub struct Sample<T> {
    from: Instant,
    to: Instant,
    pub value: T,
}

impl<T> Sample<T> {
    /// Creates a sample of a result that was measured between `from` and `to`.
    pub fn new(from: impl Into<Instant>, to: impl Into<Instant>, value: T) -> Self {
        Self { from: from.into(), to: to.into(), value }
    }

    /// Returns the start of the period.
    pub fn start(&self) -> Instant {
        self.from
    }

    /// Replaces the result and keeps the period.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Sample<U> {
        Sample { from: self.from, to: self.to, value: change(self.value) }
    }
}

impl Sample<Duration> {
    /// Combines the samples of two replicas: returns the longer time, with the period that covers both samples.
    pub fn or_longer(self, other: Self) -> Self {
        Self { from: self.from.min(other.from), to: self.to.max(other.to), value: self.value.max(other.value) }
    }
}

/// Drops the samples that a disturbance of the machine may have affected, prints how many it dropped, and returns the
/// values of the remaining samples. No other function excuses a result because of a disturbance.
///
/// `may_drop` selects the samples that may be dropped. A test that computes quantiles of times must select all
/// samples, so that the choice does not depend on the result. Other tests select only failures that a pause can cause,
/// such as faults and slow answers. No test may select a grant that should have been a denial, because the lease must
/// hold through a pause.
///
/// # Panics
/// If more than a tenth of the samples are dropped.
#[track_caller]
pub fn keep_undisturbed<T>(
    name: &str,
    samples: impl IntoIterator<Item = Sample<T>>,
    may_drop: impl Fn(&T) -> bool,
) -> Vec<T> {
    let samples: Vec<_> = samples.into_iter().collect();
    // The watch's threads record a disturbance only after it has ended, so wait until they have recorded the
    // disturbances during the last of the samples that may be dropped.
    if let Some(last) = samples.iter().filter(|sample| may_drop(&sample.value)).map(|sample| sample.to).max() {
        thread::sleep((last + RECORDED_WITHIN).saturating_duration_since(Instant::now()));
    }
    keep_unless(was_disturbed, name, samples, may_drop)
}

/// Like [`keep_undisturbed`], but `was_disturbed` decides whether the machine was disturbed between two moments.
///
/// # Panics
/// If more than a tenth of the samples are dropped.
#[track_caller]
pub fn keep_unless<T>(
    was_disturbed: impl Fn(Instant, Instant) -> bool,
    name: &str,
    samples: Vec<Sample<T>>,
    may_drop: impl Fn(&T) -> bool,
) -> Vec<T> {
    let all = samples.len();
    let is_dropped = |sample: &Sample<T>| may_drop(&sample.value) && was_disturbed(sample.from, sample.to);
    let kept: Vec<_> = samples.into_iter().filter(|sample| !is_dropped(sample)).map(|sample| sample.value).collect();
    let dropped = all - kept.len();
    println!("{name}: dropped {dropped} of {all} samples because the machine was disturbed");
    assert!(
        dropped * DROPPED_DIVISOR <= all,
        "{name}: machine disturbed too often: dropped {dropped} of {all} samples, at most one in {DROPPED_DIVISOR} is \
         allowed"
    );
    kept
}

/// Returns true if the machine was disturbed between two moments. A disturbance counts for twice its length, because
/// work queues up during the disturbance and is done only afterwards.
fn was_disturbed(from: Instant, to: Instant) -> bool {
    let meets = |pause: &Pause| pause.from <= to && from <= pause.to + (pause.to - pause.from);
    pauses().iter().any(meets) || lock(&STARVED).iter().any(meets)
}

/// Converts a wall-clock time in the past, which another program recorded, to an [`Instant`].
///
/// # Panics
/// If the time is in the future, or before the machine was started.
pub fn moment(wall: SystemTime) -> Instant {
    let age = SystemTime::now().duration_since(wall).expect("in the past");
    Instant::now().checked_sub(age).expect("since the machine's start")
}

fn pauses() -> MutexGuard<'static, Vec<Pause>> {
    lock(&PAUSES)
}

fn lock<T>(mutex: &'static Mutex<T>) -> MutexGuard<'static, T> {
    // Each lock holder changes the value in a single step, so a panic in another thread cannot leave the value half
    // changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The time for which the machine must have been undisturbed before a measurement starts.
const UNDISTURBED: Duration = Duration::from_secs(2);
/// The maximum total time that the tests of one binary wait for an undisturbed machine. After that, the tests measure
/// anyway, so that their results show that the machine is constantly disturbed.
const WAITED_MAX: Duration = Duration::from_mins(8);

/// The part of [`WAITED_MAX`] that the tests of this binary have not used yet.
static LEFT: Mutex<Duration> = Mutex::new(WAITED_MAX);

/// Waits until the machine has been undisturbed for [`UNDISTURBED`], or until [`WAITED_MAX`] is used up. Tests call
/// this function before a measurement; they do not repeat a measurement because of its result.
pub async fn until_undisturbed() {
    let began = Instant::now();
    let left = *lock(&LEFT);
    let _watch = Watch::start();
    let last = |list: &'static Mutex<Vec<Pause>>| lock(list).last().map_or(began, |pause| pause.to);
    let is_undisturbed = || last(&PAUSES).max(last(&STARVED)).elapsed() >= UNDISTURBED;
    while began.elapsed() < left {
        tokio::time::sleep(STEP).await;
        // Some hosts take processor time away only while the processors are busy, so look again after some work.
        if is_undisturbed() && tokio::task::spawn_blocking(work).await.is_ok() && is_undisturbed() {
            break;
        }
    }
    let waited = began.elapsed();
    *lock(&LEFT) = left.saturating_sub(waited.saturating_sub(UNDISTURBED));
    if waited > 2 * UNDISTURBED {
        println!("waited {waited:?} until the machine was undisturbed");
    }
}

/// Keeps every processor busy for long enough to measure the steal time.
fn work() {
    let end = Instant::now() + 3 * STEAL_INTERVAL;
    thread::scope(|threads| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            threads.spawn(|| while Instant::now() < end {});
        }
    });
}

/// Records disturbances of the machine until this value is dropped. One thread is pinned to each processor and measures
/// pauses; one more thread reads the steal time. Only one watch may exist at a time.
pub struct Watch {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Watch {
    /// Clears the records of the previous watch and starts a new watch.
    ///
    /// # Panics
    /// If the kernel does not report which processors this process may use.
    pub fn start() -> Self {
        pauses().clear();
        lock(&STARVED).clear();
        let stop = Arc::new(AtomicBool::new(false));
        let ours = sched_getaffinity(None).expect("the processors of this process");
        let processors = (0..CpuSet::MAX_CPU).filter(|processor| ours.is_set(*processor));
        let threads = processors.map(|processor| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || watch(processor, &stop))
        });
        let mut threads: Vec<_> = threads.collect();
        let stop_of_steal = Arc::clone(&stop);
        threads.push(thread::spawn(move || watch_steal(&stop_of_steal)));
        Self { stop, threads }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // Ignore a panic of the thread, so that it does not hide the message of a failed test.
            let _ = thread.join();
        }
        let pauses = pauses().clone();
        if let Some(longest) = pauses.iter().map(|pause| pause.to - pause.from).max() {
            println!("the machine was paused {} times, for up to {longest:?}", pauses.len());
        }
        let starved = lock(&STARVED).len();
        if starved > 0 {
            println!("steal time above a tenth of the processor time: {starved} intervals of {STEAL_INTERVAL:?}");
        }
    }
}

fn watch(processor: usize, stop: &AtomicBool) {
    let mut only = CpuSet::new();
    only.set(processor);
    sched_setaffinity(None, &only).expect("a processor of this process");
    // Raise this thread to the highest priority, so that a delay caused by another program is not recorded as a pause.
    // If this thread may not raise its priority, most such delays are still shorter than `PAUSE`.
    let _ = setpriority_process(None, -20);
    let mut woke = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        thread::sleep(STEP);
        let now = Instant::now();
        if now - woke > STEP + PAUSE {
            pauses().push(Pause { from: woke, to: now });
        }
        woke = now;
    }
}

fn watch_steal(stop: &AtomicBool) {
    let mut last = (Instant::now(), processor_times());
    while !stop.load(Ordering::Relaxed) {
        thread::sleep(STEAL_INTERVAL);
        let (now, times) = (Instant::now(), processor_times());
        let (all, stolen) = (times.0.saturating_sub(last.1.0), times.1.saturating_sub(last.1.1));
        if stolen > all / STEAL_DIVISOR {
            lock(&STARVED).push(Pause { from: last.0, to: now });
        }
        last = (now, times);
    }
}

/// Returns the total time of all processors since the machine booted, and the part of it that the hypervisor took
/// (`steal` in `proc_stat(5)`), both in clock ticks.
fn processor_times() -> (u64, u64) {
    let all = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let times: Vec<u64> =
        all.lines().next().unwrap_or("").split_whitespace().skip(1).filter_map(|time| time.parse().ok()).collect();
    (times.iter().take(8).sum(), times.get(7).copied().unwrap_or(0))
}
