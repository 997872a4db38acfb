//! Sends Check calls as Envoy does and says how fast and how right they were answered, as one line of JSON.
//!
//! One thread, frames made by hand, no allocation for an answer: it must cost less than the cheapest server that it drives.
//! Looks into every answer: where one is not what it must be, the run has failed and the exit code says so. Never used but
//! to measure; `benches/run` calls it.

// What is measured here is this machine's time.
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
/// The same as `envoy/envoy.yaml` makes Envoy send it, with `encode_raw_headers`.
const RAW_MESSAGE: &[u8] = include_bytes!("../check_request_raw.bin");

#[derive(Parser)]
#[command(about = "Sends Check calls and says how they were answered, as JSON")]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of the command line")]
struct Arguments {
    /// The server: `IP:PORT` or `unix:///PATH`.
    address: Address,
    /// A file of keys, one a line; after a space the id of the trust that must come back.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["made_up", "no_key"])]
    keys: Option<PathBuf>,
    /// How keys of the file follow each other.
    #[arg(long, value_enum, default_value_t = Order::Zipf)]
    order: Order,
    /// Keys that nobody was given, each once, instead of those of a file.
    #[arg(long, conflicts_with = "keys")]
    made_up: bool,
    /// No key at all.
    #[arg(long, conflicts_with_all = ["keys", "made_up"])]
    no_key: bool,
    /// What keys are chosen by.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Connections.
    #[arg(short, long, default_value_t = 4)]
    connections: usize,
    /// Checks at one time on each connection.
    #[arg(short = 'm', long, default_value_t = 32)]
    streams: usize,
    /// Checks a second, due at even distances (open loop); without it the next goes when one came back (closed loop).
    #[arg(long)]
    rate: Option<f64>,
    /// Seconds that are measured.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Seconds before them.
    #[arg(long, default_value_t = 1.0)]
    warm_up: f64,
    /// Checks, at most.
    #[arg(long, default_value_t = u64::MAX)]
    requests: u64,
    /// What must come of every check.
    #[arg(long, value_enum, default_value_t = Expected::Grant)]
    expect: Expected,
    /// Never sleep: exact to the microsecond, at the price of a whole processor.
    #[arg(long)]
    spin: bool,
    /// Headers in the message as `encode_raw_headers` makes them.
    #[arg(long)]
    raw_headers: bool,
    /// GET this path over HTTP/1.1, one request at a time on a connection, instead of Check calls.
    #[arg(long, value_name = "PATH")]
    http1: Option<String>,
    /// Speak TLS and trust the certificates in this file.
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// Whose certificate the server must show.
    #[arg(long, value_name = "NAME", default_value = "localhost")]
    tls_name: String,
    /// Our own certificate, where the server asks for one.
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "tls_ca"])]
    tls_certificate: Option<PathBuf>,
    /// Its key.
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            tell(&format!("load: not every check came to what was expected ({:?})", arguments.expect));
            ExitCode::FAILURE
        }
        Err(error) => {
            tell(&format!("load: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn tell(line: &str) {
    // Nobody is left to tell that standard error is gone.
    let _ = writeln!(io::stderr(), "{line}");
}

fn run(arguments: &Arguments) -> Result<bool, Box<dyn Error>> {
    // Without this a sleep ends up to 50 us late, and every check of an open loop with it.
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
        Arguments::command().error(ErrorKind::ValueValidation, "numbers must be above 0").exit();
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
