//! Runs one step of a check, or a complete check, many times in this process. `benches/run instructions` counts the
//! instructions.
//!
//! Prints the average time of one step in nanoseconds. Under callgrind, only the instructions in [`measured`] are
//! counted. The complete check runs in a server that is configured by environment variables and has the key in its
//! cache. The result does not include the cost of the transport, which other benchmarks measure.

// This program measures real time.
#![allow(clippy::disallowed_methods)]

use std::{
    error::Error,
    hint::black_box,
    io::{self, Write as _},
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use trustgate::testing::{
    base::clock::DatabaseTime,
    config::{self, Purpose},
    ext_authz::{
        check::Progress,
        credential::{CredentialSettings, Hasher, extract::extract},
        decision::{Basis, decide},
        request::View,
        response::{OnFault, Replies, Reply},
        route::Demands,
    },
    record::{KeyId, Record, TrustId},
    server::AppBuilder,
};
use uuid::Uuid;

/// The message of a check as Envoy 1.40 sends it.
const MESSAGE: &[u8] = include_bytes!("check_request.bin");
/// The part of the message that is replaced with the key.
const PLACEHOLDER: &[u8] = b"tg_0000000000000000000000000000000000000000000000000";

#[derive(Parser)]
#[command(about = "Runs one step of a check many times")]
struct Arguments {
    /// The step to run.
    step: Step,
    /// How many times to run the step.
    count: u64,
    /// A key that exists in the database of the server.
    #[arg(long)]
    key: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum Step {
    /// Parse the message into a view.
    Parse,
    /// Extract the key and the demands from the view.
    Extract,
    /// Compute the digest of the key.
    Hash,
    /// Decide from the record, the demands and the time.
    Decide,
    /// Encode the decision as the bytes of an answer.
    Encode,
    /// Run the complete check, including the lookup, from the message to the answer.
    Check,
}

fn main() -> Result<(), Box<dyn Error>> {
    let Arguments { step, count, key } = Arguments::parse();
    let mut message = MESSAGE.to_vec();
    let key_at = message.windows(PLACEHOLDER.len()).position(|part| part == PLACEHOLDER);
    let key_at = key_at.ok_or("the message does not contain the placeholder of the key")?;
    let key_bytes = key.as_bytes().get(..PLACEHOLDER.len()).ok_or("--key: the key is too short")?;
    message[key_at..key_at + PLACEHOLDER.len()].copy_from_slice(key_bytes);

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
        // The first check reads the key from the store and fills the cache.
        drop(checker.check(message).await);
    });
    let _inside = runtime.enter();
    let took = measured(count, &mut || {
        let progress = checker.try_decide(black_box(message));
        assert!(matches!(black_box(progress), Progress::Done(Reply::Message(_))), "not a hit");
    });
    Ok(took)
}

/// Runs `step` `count` times and returns the elapsed time. Callgrind counts only the instructions in this function.
#[inline(never)]
fn measured(count: u64, step: &mut dyn FnMut()) -> Duration {
    let began = Instant::now();
    for _ in 0..count {
        step();
    }
    began.elapsed()
}
