//! Logs: what is written, and in which form.
//!
//! Never writes a key, a path or a header's value.

use std::io::IsTerminal as _;

use tracing_subscriber::{Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

crate::settings! {
    /// What is logged, and in which form. Logs go to standard error.
    pub struct LogSettings in "log" {
        /// The least serious that is written: `error`, `warn`, `info`, `debug` or `trace`.
        level: Level = "info",
        /// `text`, `json`, or `auto`: text on a terminal, else JSON.
        format: Format = "auto",
    }
}

crate::setting_enum! {
    /// How serious a line is.
    pub enum Level ("\"error\", \"warn\", \"info\", \"debug\" or \"trace\"") {
        /// Something is broken.
        Error = "error",
        /// Something is odd.
        Warn = "warn",
        /// Something changed.
        Info = "info",
        /// For those who look for a cause.
        Debug = "debug",
        /// Everything.
        Trace = "trace",
    }
}

crate::setting_enum! {
    /// The form of a log line.
    pub enum Format ("\"auto\", \"text\" or \"json\"") {
        /// Text on a terminal, else JSON.
        Auto = "auto",
        /// For people.
        Text = "text",
        /// One object a line.
        Json = "json",
    }
}

/// Sends logs to standard error, as `settings` say. The first call counts; a later one (in tests) changes nothing.
pub fn start(settings: &LogSettings) {
    let level = match settings.level {
        Level::Error => tracing::Level::ERROR,
        Level::Warn => tracing::Level::WARN,
        Level::Info => tracing::Level::INFO,
        Level::Debug => tracing::Level::DEBUG,
        Level::Trace => tracing::Level::TRACE,
    };
    let is_terminal = std::io::stderr().is_terminal();
    // Our own lines alone: those of libraries may hold what must not be logged, such as a request's headers.
    let filter = tracing_subscriber::filter::Targets::new().with_target("trustgate", level);
    let format = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(is_terminal);
    let format = match settings.format {
        Format::Text => format.boxed(),
        Format::Auto if is_terminal => format.boxed(),
        Format::Json | Format::Auto => format.json().flatten_event(true).boxed(),
    };
    let _ = tracing_subscriber::registry().with(format.with_filter(filter)).try_init();
}
