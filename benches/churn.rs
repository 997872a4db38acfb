//! Look-ups in a full L1 while other values come and go: how long the longest of them takes. Part of `benches/run scale`.
//!
//! One thread looks keys up uniformly at random, the other puts values of new keys in, each of which pushes another out.
//! Prints a line of JSON. `longest_us` is what a caller waited; `longest_cpu_us` is the most that one look-up worked, which
//! a host that stops the machine does not change. Never leaves the process.

// What is measured here is this machine's time.
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
use trustgate::{
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
#[command(about = "Looks keys up in a full L1 while others come and go")]
struct Arguments {
    /// Memory of the cache, as `cache.size`.
    size: String,
    /// Keys that are put in before anything is measured, and looked up.
    keys: u64,
    /// New keys a second.
    #[arg(long, default_value_t = 1_000)]
    rate: u32,
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let Arguments { size, keys, rate, seconds } = Arguments::parse();
    let size = ByteSize::parse(&size).ok_or("a size has a unit")?;
    let l1 = L1::new(size, CacheSettings::default().absences_size);
    for number in 0..keys {
        put(&l1, number);
    }
    let entry = l1.entries();
    let (enough, put_in) = (AtomicBool::new(false), AtomicU64::new(0));
    let looked = thread::scope(|scope| {
        scope.spawn(|| churn(&l1, keys, rate, &enough, &put_in));
        let looked = look(&l1, keys, Duration::from_secs_f64(seconds));
        enough.store(true, Ordering::Relaxed);
        looked
    });
    writeln!(
        io::stdout(),
        "{{\"entries\": {entry}, \"lookups\": {}, \"found\": {}, \"put\": {}, \"longest_us\": {:.1}, \"longest_cpu_us\": {:.1}, \
         \"over_1_ms\": {}}}",
        looked.count,
        looked.found,
        put_in.load(Ordering::Relaxed),
        looked.longest.as_secs_f64() * 1e6,
        looked.longest_cpu.as_secs_f64() * 1e6,
        looked.over_1_ms,
    )?;
    Ok(())
}

#[derive(Default)]
struct Looked {
    count: u64,
    found: u64,
    longest: Duration,
    longest_cpu: Duration,
    over_1_ms: u64,
}

fn look(l1: &L1<ApiKey>, keys: u64, length: Duration) -> Looked {
    let (mut looked, mut number, began) = (Looked::default(), 0_u64, Instant::now());
    loop {
        number = number.wrapping_add(0x9E37_79B9_7F4A_7C15); // visits all, in no order that the processor could guess
        let key = digest(number % keys);
        let (start, start_cpu) = (Instant::now(), cpu());
        looked.found += u64::from(black_box(l1.get(&key)).is_some());
        let (took_cpu, took) = (cpu().saturating_sub(start_cpu), start.elapsed());
        looked.count += 1;
        looked.longest = looked.longest.max(took);
        looked.longest_cpu = looked.longest_cpu.max(took_cpu);
        looked.over_1_ms += u64::from(took_cpu > Duration::from_millis(1));
        if start.duration_since(began) > length {
            return looked;
        }
    }
}

fn churn(l1: &L1<ApiKey>, keys: u64, rate: u32, enough: &AtomicBool, put_in: &AtomicU64) {
    let (began, mut number) = (Instant::now(), 0_u32);
    while !enough.load(Ordering::Relaxed) {
        while Duration::from_secs(1).mul_f64(f64::from(number) / f64::from(rate)) < began.elapsed() {
            put(l1, keys + u64::from(number));
            number += 1;
        }
        put_in.store(number.into(), Ordering::Relaxed);
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

/// Spread over all bytes, as real digests are.
fn digest(number: u64) -> ApiKeyDigest {
    let mut bytes = [0; 32];
    let mut word = number;
    for part in bytes.as_chunks_mut::<8>().0 {
        word = (word ^ (word >> 31)).wrapping_mul(0xBF58_476D_1CE4_E5B9).wrapping_add(0x94D0_49BB_1331_11EB);
        *part = word.to_le_bytes();
    }
    ApiKeyDigest::from_bytes(bytes)
}

/// Processor time of this thread.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}
