//! The command line: parses the arguments, runs the command and writes its answer.
//!
//! Answers go to standard output; errors, warnings and progress go to standard error. `key issue` is the only command
//! that shows a key (`tests/integration/cli.rs`).

mod answer;
mod args;
mod canary;
mod commands;
mod deny;
mod doctor;
mod effect;
mod error;
mod exit;
mod explain;
mod key;
mod progress;
mod stdin;
mod trust;

use std::{
    ffi::OsString,
    io::{ErrorKind, Write},
};

use clap::Parser;

use self::{
    answer::Answer,
    args::{Arguments, Output},
    exit::{DONE, FAILED, USAGE},
};

use crate::ext_authz::credential::format;

/// Runs the command in `arguments` with the variables in `environment`. Returns the exit code: 0 for success,
/// 1 for failure, 2 for a usage error, and 3 if the checked key is denied.
pub fn run(
    arguments: impl IntoIterator<Item = OsString>,
    environment: &[(OsString, OsString)],
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> u8 {
    let arguments: Vec<_> = arguments.into_iter().collect();
    // Look for keys before parsing, because parse errors quote arguments and commands may store arguments.
    if arguments.iter().any(is_key) {
        let _ = writeln!(
            err,
            "error: an argument is an API key, and other users of this machine can read the command line: revoke that \
             key, and pass keys on standard input"
        );
        return USAGE;
    }
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(usage) => return show_usage(&usage, out, err),
    };
    let output = arguments.output;
    match commands::run(arguments, environment) {
        Ok(answer) => match show(&answer, output, out) {
            Ok(()) => answer.code,
            Err(error) => {
                // A reader such as `head` closes the pipe early. Report the closed pipe only if the lost output
                // matters.
                if error.kind() != ErrorKind::BrokenPipe || answer.if_lost.is_some() {
                    let _ = writeln!(err, "error: cannot write the output: {error}");
                }
                if let Some(lost) = &answer.if_lost {
                    let _ = writeln!(err, "{lost}");
                }
                FAILED
            }
        },
        Err(error) => {
            let _ = writeln!(err, "{error}");
            error.code
        }
    }
}

/// Returns true if `argument`, or the value in `--option=value`, is an API key in trustgate's own format.
fn is_key(argument: &OsString) -> bool {
    let text = argument.to_string_lossy();
    format::is_key(&text) || text.split_once('=').is_some_and(|(_, value)| format::is_key(value))
}

fn show(answer: &Answer, output: Output, out: &mut dyn Write) -> std::io::Result<()> {
    match (output, &answer.json) {
        (Output::Json, Some(json)) => writeln!(out, "{json:#}")?,
        _ => write!(out, "{}", answer.text)?,
    }
    out.flush()
}

fn show_usage(usage: &clap::Error, out: &mut dyn Write, err: &mut dyn Write) -> u8 {
    let wrong = usage.use_stderr();
    let to: &mut dyn Write = if wrong { err } else { out };
    let _ = write!(to, "{}", usage.render());
    if wrong { USAGE } else { DONE }
}
