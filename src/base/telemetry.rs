//! Logging to standard error: its level and its format.
//!
//! Only trustgate's own log lines are written, because log lines from libraries may contain secrets, such as
//! request headers.

use std::io::IsTerminal as _;

use tracing_subscriber::{Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

crate::settings! {
    /// The level and format of logs. trustgate logs to standard error.
    pub struct LogSettings in "log" {
        /// The least severe level to log: `error`, `warn`, `info`, `debug` or `trace`.
        level: Level = "info",
        /// The format of log lines: `text`, `json`, or `auto` (text on a terminal, else JSON).
        format: Format = "auto",
    }
}

crate::setting_enum! {
    /// The severity of a log line.
    pub enum Level ("\"error\", \"warn\", \"info\", \"debug\" or \"trace\"") {
        /// A failure.
        Error = "error",
        /// A problem that does not stop the server.
        Warn = "warn",
        /// A change of state.
        Info = "info",
        /// Details for finding the cause of a problem.
        Debug = "debug",
        /// All details.
        Trace = "trace",
    }
}

crate::setting_enum! {
    /// The format of log lines.
    pub enum Format ("\"auto\", \"text\" or \"json\"") {
        /// Text on a terminal, else JSON.
        Auto = "auto",
        /// Human-readable text.
        Text = "text",
        /// One JSON object per line.
        Json = "json",
    }
}

/// Starts logging to standard error with the level and the format in `settings`. Only the first call in a process has
/// an effect, so tests may call this function repeatedly.
pub fn start(settings: &LogSettings) {
    let level = match settings.level {
        Level::Error => tracing::Level::ERROR,
        Level::Warn => tracing::Level::WARN,
        Level::Info => tracing::Level::INFO,
        Level::Debug => tracing::Level::DEBUG,
        Level::Trace => tracing::Level::TRACE,
    };
    let is_terminal = std::io::stderr().is_terminal();
    // Write only trustgate's own log lines: log lines from libraries may contain secrets, such as request headers.
    let filter = tracing_subscriber::filter::Targets::new().with_target("trustgate", level);
    let format = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(is_terminal);
    let format = match settings.format {
        Format::Text => format.boxed(),
        Format::Auto if is_terminal => format.boxed(),
        Format::Json | Format::Auto => format.json().flatten_event(true).boxed(),
    };
    let _ = tracing_subscriber::registry().with(format.with_filter(filter)).try_init();
}
