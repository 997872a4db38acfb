//! Measures the longest lookup in a full L1 cache during insertions and evictions. Part of `benches/run scale`.
//!
//! One thread looks up keys in a pseudo-random order. Another thread inserts entries for new keys, each of which evicts
//! an old entry if the cache is full. The program uses no network and prints one line of JSON: `longest_us` is the
//! longest elapsed time of one lookup, and `longest_cpu_us` is the longest processor time of one lookup, which does not
//! include pauses of the machine.

// This program measures real time.
#![allow(clippy::disallowed_methods)]

use std::{
    error::Error,
    hint::black_box,
    io::{self, Write as _},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use rustix::time::{ClockId, clock_gettime};
use trustgate::testing::{
    base::{clock::Moment, units::ByteSize},
    cache::{
        CacheSettings,
        api_key::ApiKey,
        l1::{Entry, L1, Lifetime},
    },
    record::{ApiKeyDigest, Digests, KeyId, Record, TrustId, Version},
};
use uuid::Uuid;

#[derive(Parser)]
#[command(about = "Measures lookups in a full L1 cache during insertions and evictions")]
struct Arguments {
    /// Memory of the cache, in the same form as the setting `cache.size`.
    size: String,
    /// Number of keys to insert before the measurement and to look up during it.
    keys: u64,
    /// Number of new keys to insert per second.
    #[arg(long, default_value_t = 1_000)]
    rate: u32,
    /// Length of the measurement, in seconds.
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let Arguments { size, keys, rate, seconds } = Arguments::parse();
    let size = ByteSize::parse(&size).ok_or("invalid size: expected a number with a unit, such as 128MiB")?;
    let l1 = L1::new(size, CacheSettings::default().negative_size);
    for number in 0..keys {
        put(&l1, number);
    }
    let entries = l1.entries();
    let (stop, inserted) = (AtomicBool::new(false), AtomicU64::new(0));
    let lookups = thread::scope(|scope| {
        scope.spawn(|| churn(&l1, keys, rate, &stop, &inserted));
        let lookups = run_lookups(&l1, keys, Duration::from_secs_f64(seconds));
        stop.store(true, Ordering::Relaxed);
        lookups
    });
    writeln!(
        io::stdout(),
        "{{\"entries\": {entries}, \"lookups\": {}, \"found\": {}, \"put\": {}, \"longest_us\": {:.1}, \
         \"longest_cpu_us\": {:.1}, \"over_1_ms\": {}}}",
        lookups.count,
        lookups.found,
        inserted.load(Ordering::Relaxed),
        lookups.longest.as_secs_f64() * 1e6,
        lookups.longest_cpu.as_secs_f64() * 1e6,
        lookups.over_1_ms,
    )?;
    Ok(())
}

#[derive(Default)]
struct Lookups {
    count: u64,
    found: u64,
    longest: Duration,
    longest_cpu: Duration,
    over_1_ms: u64,
}

fn run_lookups(l1: &L1<ApiKey>, keys: u64, length: Duration) -> Lookups {
    let (mut lookups, mut number, began) = (Lookups::default(), 0_u64, Instant::now());
    loop {
        // Spread the lookups over all keys, in an order that the processor cannot predict.
        number = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let key = digest(number % keys);
        let (start, start_cpu) = (Instant::now(), cpu());
        lookups.found += u64::from(black_box(l1.get(&key)).is_some());
        let (took_cpu, took) = (cpu().saturating_sub(start_cpu), start.elapsed());
        lookups.count += 1;
        lookups.longest = lookups.longest.max(took);
        lookups.longest_cpu = lookups.longest_cpu.max(took_cpu);
        lookups.over_1_ms += u64::from(took_cpu > Duration::from_millis(1));
        if start.duration_since(began) > length {
            return lookups;
        }
    }
}

fn churn(l1: &L1<ApiKey>, keys: u64, rate: u32, stop: &AtomicBool, inserted: &AtomicU64) {
    let (began, mut number) = (Instant::now(), 0_u32);
    while !stop.load(Ordering::Relaxed) {
        while Duration::from_secs(1).mul_f64(f64::from(number) / f64::from(rate)) < began.elapsed() {
            put(l1, keys + u64::from(number));
            number += 1;
        }
        inserted.store(number.into(), Ordering::Relaxed);
        thread::sleep(Duration::from_micros(200));
    }
}

fn put(l1: &L1<ApiKey>, number: u64) {
    let digest = digest(number);
    let record = Record {
        key_id: KeyId(Uuid::now_v7()),
        trust_id: TrustId(Uuid::from_u128(1)),
        trust_enabled: true,
        digest,
        scopes: [].into(),
        allowed_cidrs: [].into(),
        not_before: None,
        expires_at: None,
        revoked_at: None,
    };
    let query = Digests { current: digest, older: Vec::new() };
    let lifetime = Lifetime { born: Moment::from_nanos(0), lasts: Duration::MAX };
    l1.put(digest, Arc::new(Entry::new(&query, Some(record), Version(1), lifetime, None)));
}

/// Returns a digest whose bytes are evenly distributed, as in real digests.
fn digest(number: u64) -> ApiKeyDigest {
    let mut bytes = [0; 32];
    let mut word = number;
    for part in bytes.as_chunks_mut::<8>().0 {
        word = (word ^ (word >> 31)).wrapping_mul(0xBF58_476D_1CE4_E5B9).wrapping_add(0x94D0_49BB_1331_11EB);
        *part = word.to_le_bytes();
    }
    ApiKeyDigest::from_bytes(bytes)
}

/// Returns the processor time of this thread.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}
