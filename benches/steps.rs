//! One step of a check, or the whole of one, many times over, in this process: what `benches/run instructions` counts.
//!
//! Prints how many nanoseconds each took. Under callgrind only what happens in [`measured`] is to be collected. The whole
//! check is that of a server as it comes, made of the environment like any other, with the key already in its cache. Never
//! opens a connection to itself: what the transport costs is measured from outside.

// What is measured here is this machine's time.
#![allow(clippy::disallowed_methods)]

use std::{
    error::Error,
    hint::black_box,
    io::{self, Write as _},
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use trustgate::{
    base::clock::DatabaseTime,
    config::{self, Purpose},
    ext_authz::{
        check::Progress,
        credential::{CredentialSettings, Hasher, extract::extract},
        decision::decide,
        request::View,
        response::{OnFault, Replies, Reply},
        route::Demands,
    },
    record::{KeyId, Record, TrustId},
    server::AppBuilder,
};
use uuid::Uuid;

/// A message as Envoy 1.40 sends it, and what stands in it where the key belongs.
const MESSAGE: &[u8] = include_bytes!("check_request.bin");
const PLACE: &[u8] = b"tg_0000000000000000000000000000000000000000000000000";

#[derive(Parser)]
#[command(about = "Does one step of a check many times over")]
struct Arguments {
    /// Which.
    step: Step,
    /// How many times.
    count: u64,
    /// A key that the store of the environment's settings holds.
    #[arg(long)]
    key: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum Step {
    /// A view over the message.
    Parse,
    /// The key and the demands out of the view.
    Extract,
    /// The key to its digest.
    Hash,
    /// Record, demands and time to a decision.
    Decide,
    /// The decision to the answer's bytes.
    Encode,
    /// All of it, and the look-up, from message to answer.
    Check,
}

fn main() -> Result<(), Box<dyn Error>> {
    let Arguments { step, count, key } = Arguments::parse();
    let mut message = MESSAGE.to_vec();
    let place = message.windows(PLACE.len()).position(|part| part == PLACE).ok_or("no place for the key")?;
    message[place..place + PLACE.len()].copy_from_slice(key.as_bytes().get(..PLACE.len()).ok_or("a short key")?);

    let (settings, hasher) = (CredentialSettings::default(), Hasher::new(None, &[]));
    let replies = Replies::new(OnFault::Deny, Duration::from_secs(1));
    let view = View::parse(&message).map_err(|_| "the message cannot be read")?;
    let (extracted, demands) = (extract(&settings, &view), Demands::of(&view)?);
    let record = record(&hasher, key.as_bytes());
    let now = DatabaseTime::from_micros(0);
    let decision = decide(Some(&record), &demands, now);
    let took = match step {
        Step::Parse => measured(count, &mut || drop(black_box(View::parse(black_box(&message))))),
        Step::Extract => measured(count, &mut || {
            drop(black_box((extract(&settings, black_box(&view)), Demands::of(black_box(&view)))));
        }),
        Step::Hash => measured(count, &mut || {
            black_box(hasher.current(black_box(key.as_bytes())));
        }),
        Step::Decide => measured(count, &mut || {
            black_box(decide(Some(black_box(&record)), &demands, now));
        }),
        Step::Encode => measured(count, &mut || {
            drop(black_box(replies.decision(black_box(&decision), &extracted.removals, Basis::Confirmed)));
        }),
        Step::Check => check(count, &message)?,
    };
    writeln!(io::stdout(), "{}", took.as_nanos() / u128::from(count.max(1)))?;
    Ok(())
}

fn record(hasher: &Hasher, key: &[u8]) -> Record {
    Record {
        key_id: KeyId(Uuid::now_v7()),
        trust_id: TrustId(Uuid::now_v7()),
        trust_enabled: true,
        digest: hasher.current(key),
        scopes: [].into(),
        allowed_cidrs: [].into(),
        not_before: None,
        expires_at: None,
        revoked_at: None,
    }
}

fn check(count: u64, message: &[u8]) -> Result<Duration, Box<dyn Error>> {
    let config = config::load(None, std::env::vars_os(), Purpose::Serve)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let running =
        runtime.block_on(async { AppBuilder::new(config, &|name| std::env::var(name).ok())?.start().await })?;
    let checker = running.checker();
    runtime.block_on(async {
        running.ready().await;
        // The first is read from the store, and fills the cache.
        drop(checker.check(message).await);
    });
    let _inside = runtime.enter();
    let took = measured(count, &mut || {
        let begun = checker.try_decide(black_box(message));
        assert!(matches!(black_box(begun), Progress::Done(Reply::Message(_))), "not a hit");
    });
    Ok(took)
}

/// What is collected.
#[inline(never)]
fn measured(count: u64, step: &mut dyn FnMut()) -> Duration {
    let began = Instant::now();
    for _ in 0..count {
        step();
    }
    began.elapsed()
}
