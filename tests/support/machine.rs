//! What the machine did while a test measured: a virtual machine whose host is busy stands still now and then, all
//! programs in it, and what they are late by then is not theirs.

// What the machine does is measured by its own clocks.
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

/// How often each processor is looked at.
const STEP: Duration = Duration::from_millis(4);
/// A thread that goes before all others, and wants a processor for a moment only, gets it much sooner than this.
const PAUSE: Duration = Duration::from_millis(25);

/// When a processor stood still.
#[derive(Clone, Copy)]
struct Pause {
    from: Instant,
    to: Instant,
}

/// Of the watch that is on, or was last.
static PAUSES: Mutex<Vec<Pause>> = Mutex::new(Vec::new());
/// Of the same: when the hypervisor kept more than a tenth of the processors for others, in pieces however small.
static STARVED: Mutex<Vec<Pause>> = Mutex::new(Vec::new());
/// How often that is looked at. The system counts in hundredths of a second.
const COUNTED: Duration = Duration::from_millis(100);
/// A tenth of the time of all processors: what runs here takes most of what is left.
const KEPT_PART: u64 = 10;

/// Whether a processor stood still between two moments, or too much of them was kept for others, or so shortly before that
/// what had queued up meanwhile was still being worked off: for as long again.
pub fn was_disturbed(from: impl Into<Instant>, to: impl Into<Instant>) -> bool {
    let (from, to) = (from.into(), to.into());
    let meets = |pause: &Pause| pause.from <= to && from <= pause.to + (pause.to - pause.from);
    pauses().iter().any(meets) || lock(&STARVED).iter().any(meets)
}

/// For how long processors stood still between two moments, taken together.
pub fn stood_still(from: impl Into<Instant>, to: impl Into<Instant>) -> Duration {
    let (from, to) = (from.into(), to.into());
    pauses().iter().map(|pause| pause.to.min(to).saturating_duration_since(pause.from.max(from))).sum()
}

/// How long ago `from` was, without what the machine stood still.
pub fn elapsed(from: impl Into<Instant>) -> Duration {
    let (from, now) = (from.into(), Instant::now());
    now.saturating_duration_since(from).saturating_sub(stood_still(from, now))
}

/// A moment of the past that another program took down by the clock on the wall.
///
/// # Panics
/// If it is in the future, or of before the machine's start.
pub fn moment(wall: SystemTime) -> Instant {
    let age = SystemTime::now().duration_since(wall).expect("in the past");
    Instant::now().checked_sub(age).expect("since the machine's start")
}

fn pauses() -> MutexGuard<'static, Vec<Pause>> {
    lock(&PAUSES)
}

fn lock<T>(mutex: &'static Mutex<T>) -> MutexGuard<'static, T> {
    // Whole at every moment, whoever panicked elsewhere.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long a processor must not have stood still before anything is measured.
const CALM: Duration = Duration::from_secs(2);
/// How long all tests of a binary together wait for that. Then they measure what there is: a machine that is never calm
/// is to be seen.
const WAITED_MAX: Duration = Duration::from_mins(8);

/// What is left of [`WAITED_MAX`].
static LEFT: Mutex<Duration> = Mutex::new(WAITED_MAX);

/// Waits until the machine is fit to measure on. A condition of measuring, decided before there is anything to be
/// measured: no result ever leads here again.
pub async fn is_calm() {
    let began = Instant::now();
    let left = *lock(&LEFT);
    let _watch = Watch::start();
    let last = |list: &'static Mutex<Vec<Pause>>| lock(list).last().map_or(began, |pause| pause.to);
    let is_calm = || last(&PAUSES).max(last(&STARVED)).elapsed() >= CALM;
    while began.elapsed() < left {
        tokio::time::sleep(STEP).await;
        // Some hosts keep processors for others only as soon as they are wanted.
        if is_calm() && tokio::task::spawn_blocking(work).await.is_ok() && is_calm() {
            break;
        }
    }
    let waited = began.elapsed();
    *lock(&LEFT) = left.saturating_sub(waited.saturating_sub(CALM));
    if waited > 2 * CALM {
        println!("waited {waited:?} until the machine stood still no more");
    }
}

/// Keeps every processor busy, for somewhat longer than it takes to see what the hypervisor keeps of them.
fn work() {
    let enough = Instant::now() + 3 * COUNTED;
    thread::scope(|threads| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            threads.spawn(|| while Instant::now() < enough {});
        }
    });
}

/// Watches every processor, each by a thread that is bound to it, until it is dropped. One at a time.
pub struct Watch {
    enough: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Watch {
    /// Watches from now on.
    ///
    /// # Panics
    /// If the system does not say which processors are ours.
    pub fn start() -> Self {
        pauses().clear();
        lock(&STARVED).clear();
        let enough = Arc::new(AtomicBool::new(false));
        let ours = sched_getaffinity(None).expect("the system says which processors are ours");
        let processors = (0..CpuSet::MAX_CPU).filter(|processor| ours.is_set(*processor));
        let threads = processors.map(|processor| {
            let enough = Arc::clone(&enough);
            thread::spawn(move || watch(processor, &enough))
        });
        let mut threads: Vec<_> = threads.collect();
        let until = Arc::clone(&enough);
        threads.push(thread::spawn(move || count(&until)));
        Self { enough, threads }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.enough.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A test that failed shows its own reason.
            let _ = thread.join();
        }
        let pauses = pauses().clone();
        if let Some(longest) = pauses.iter().map(|pause| pause.to - pause.from).max() {
            println!("the machine stood still {} times, up to {longest:?}", pauses.len());
        }
        let starved = lock(&STARVED).len();
        if starved > 0 {
            println!("{starved} times {COUNTED:?} the hypervisor kept more than a tenth of it for others");
        }
    }
}

fn watch(processor: usize, enough: &AtomicBool) {
    let mut only = CpuSet::new();
    only.set(processor);
    sched_setaffinity(None, &only).expect("it is among ours");
    // So that what programs do to each other is not taken for a pause. Where we may not, it mostly is not anyway.
    let _ = setpriority_process(None, -20);
    let mut looked = Instant::now();
    while !enough.load(Ordering::Relaxed) {
        thread::sleep(STEP);
        let now = Instant::now();
        if now - looked > STEP + PAUSE {
            pauses().push(Pause { from: looked, to: now });
        }
        looked = now;
    }
}

fn count(enough: &AtomicBool) {
    let mut last = (Instant::now(), kept());
    while !enough.load(Ordering::Relaxed) {
        thread::sleep(COUNTED);
        let (now, kept) = (Instant::now(), kept());
        let (all, stolen) = (kept.0.saturating_sub(last.1.0), kept.1.saturating_sub(last.1.1));
        if stolen > all / KEPT_PART {
            lock(&STARVED).push(Pause { from: last.0, to: now });
        }
        last = (now, kept);
    }
}

/// Time of all processors so far, and how much of it the hypervisor kept for others (`proc_stat(5)`, `steal`).
fn kept() -> (u64, u64) {
    let all = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let times: Vec<u64> =
        all.lines().next().unwrap_or("").split_whitespace().skip(1).filter_map(|time| time.parse().ok()).collect();
    (times.iter().take(8).sum(), times.get(7).copied().unwrap_or(0))
}
