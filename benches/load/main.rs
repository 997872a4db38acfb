//! A load generator for benchmarks, which `benches/run` starts. The load generator sends Check calls as Envoy does, and
//! prints the number, the outcomes and the times of the answers as one line of JSON.
//!
//! It runs on one thread, sends prepared frames and does not allocate memory for an answer, because it must use less
//! processor time than the fastest server that it measures. It checks each answer: if an answer does not have the
//! expected outcome, the exit code is not 0.

// This program measures real time.
#![allow(clippy::disallowed_methods)]

mod drive;
mod figures;
mod grpc;
mod hpack;
mod http1;
mod keys;
mod message;
mod session;
mod wire;

use std::{
    error::Error,
    io::{self, Write as _},
    num::NonZeroU64,
    path::PathBuf,
    process::ExitCode,
    rc::Rc,
    time::Duration,
};

use clap::{CommandFactory as _, Parser, error::ErrorKind};

use crate::{
    drive::Plan,
    figures::{Expected, Tally},
    grpc::{Call, Grpc},
    http1::{Http1, Request},
    keys::{Keys, Order},
    message::Template,
    wire::{Address, Tls},
};

/// The message of a check as Envoy 1.40 sends it, with its default encoding of headers.
const MESSAGE: &[u8] = include_bytes!("../check_request.bin");
/// The message as Envoy sends it with `encode_raw_headers`, which `envoy/envoy.yaml` sets.
const RAW_MESSAGE: &[u8] = include_bytes!("../check_request_raw.bin");

#[derive(Parser)]
#[command(about = "Sends Check calls and prints the outcomes and times of the answers as JSON")]
#[expect(clippy::struct_excessive_bools, reason = "each field is an option of the command line")]
struct Arguments {
    /// The server: `IP:PORT` or `unix:///PATH`.
    address: Address,
    /// A file of keys, one key per line. A space and the id of the expected trust may follow the key.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["made_up", "no_key"])]
    keys: Option<PathBuf>,
    /// The order in which the keys of the file are used.
    #[arg(long, value_enum, default_value_t = Order::Zipf)]
    order: Order,
    /// Send random keys, which the server does not know, instead of keys from a file.
    #[arg(long, conflicts_with = "keys")]
    made_up: bool,
    /// Send no key.
    #[arg(long, conflicts_with_all = ["keys", "made_up"])]
    no_key: bool,
    /// The seed of the random choice of keys.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Number of connections.
    #[arg(short, long, default_value_t = 4)]
    connections: usize,
    /// Maximum number of checks in flight on each connection.
    #[arg(short = 'm', long, default_value_t = 32)]
    streams: usize,
    /// Number of checks per second, evenly spaced (open loop). Default: send the next check after each answer (closed
    /// loop).
    #[arg(long)]
    rate: Option<f64>,
    /// Length of the measurement, in seconds.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Length of the warm-up before the measurement, in seconds.
    #[arg(long, default_value_t = 1.0)]
    warm_up: f64,
    /// Maximum number of checks to send.
    #[arg(long, default_value_t = u64::MAX)]
    requests: u64,
    /// The expected outcome of each check.
    #[arg(long, value_enum, default_value_t = Expected::Grant)]
    expect: Expected,
    /// Poll for answers continuously instead of sleeping. Times are then accurate to the microsecond, but the program
    /// keeps one processor fully busy.
    #[arg(long)]
    spin: bool,
    /// Encode the headers in the message as Envoy does with `encode_raw_headers`.
    #[arg(long)]
    raw_headers: bool,
    /// Send GET requests for this path over HTTP/1.1 instead of Check calls, one at a time on each connection.
    #[arg(long, value_name = "PATH")]
    http1: Option<String>,
    /// Use TLS and trust the certificate authorities in this PEM file.
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// The name that the certificate of the server must contain.
    #[arg(long, value_name = "NAME", default_value = "localhost")]
    tls_name: String,
    /// PEM file with the client certificate, for a server that requires one.
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "tls_ca"])]
    tls_certificate: Option<PathBuf>,
    /// PEM file with the private key of the client certificate.
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            report(&format!("load: unexpected outcome of at least one check: expected {:?}", arguments.expect));
            ExitCode::FAILURE
        }
        Err(error) => {
            report(&format!("load: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn report(line: &str) {
    // If standard error is closed, there is no other place to report the problem.
    let _ = writeln!(io::stderr(), "{line}");
}

fn run(arguments: &Arguments) -> Result<bool, Box<dyn Error>> {
    // With the default timer slack, each sleep ends up to 50 us late, and so does each check of an open loop.
    rustix::thread::set_current_timer_slack(NonZeroU64::new(1))?;
    let plan = plan(arguments)?;
    let keys = match &arguments.keys {
        Some(file) => Keys::from_file(file, arguments.order, arguments.seed)?,
        None => Keys::made_up(arguments.seed),
    };
    let (tally, seconds) = send(arguments, &plan, keys)?;
    writeln!(io::stdout(), "{}", tally.json(seconds))?;
    Ok(tally.is_as(arguments.expect))
}

fn send(arguments: &Arguments, plan: &Plan, keys: Keys) -> Result<(Tally, f64), Box<dyn Error>> {
    let with_key = !arguments.no_key;
    if let Some(path) = &arguments.http1 {
        let request = Rc::new(Request::of(path, with_key));
        return Ok(drive::run(plan, keys, || Http1::new(Rc::clone(&request)))?);
    }
    let message = if arguments.raw_headers { RAW_MESSAGE } else { MESSAGE };
    let call = Rc::new(Call::of(&Template::of(message, with_key)?, plan.tls.is_some()));
    Ok(drive::run(plan, keys, || Grpc::new(Rc::clone(&call), arguments.streams))?)
}

fn plan(arguments: &Arguments) -> Result<Plan, Box<dyn Error>> {
    let own = arguments.tls_certificate.as_ref().zip(arguments.tls_key.as_ref());
    let protocol: &[u8] = if arguments.http1.is_some() { b"http/1.1" } else { b"h2" };
    let tls =
        arguments.tls_ca.as_ref().map(|ca| Tls::new(ca, arguments.tls_name.clone(), own, protocol)).transpose()?;
    if arguments.connections == 0 || arguments.streams == 0 || arguments.rate.is_some_and(|rate| rate <= 0.0) {
        let message = "--connections, --streams and --rate must be above 0";
        Arguments::command().error(ErrorKind::ValueValidation, message).exit();
    }
    Ok(Plan {
        address: arguments.address.clone(),
        tls,
        connections: arguments.connections,
        rate: arguments.rate,
        warm_up: Duration::try_from_secs_f64(arguments.warm_up)?,
        length: Duration::try_from_secs_f64(arguments.seconds)?,
        requests: arguments.requests,
        spins: arguments.spin,
    })
}
