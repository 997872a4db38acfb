//! The program `trustgate`: passes its arguments and environment variables to [`trustgate::cli`].

use std::{io, process::ExitCode};

fn main() -> ExitCode {
    let environment: Vec<_> = std::env::vars_os().collect();
    let code = trustgate::cli::run(std::env::args_os(), &environment, &mut io::stdout().lock(), &mut io::stderr());
    ExitCode::from(code)
}
