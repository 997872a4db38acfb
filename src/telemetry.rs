//! Logs: what is written, and in which form.
//!
//! Never writes a key, a path or a header's value.

crate::settings! {
    /// What is logged, and in which form. Logs go to standard error.
    pub struct LogSettings in "log" {
        /// The least serious that is written: `error`, `warn`, `info`, `debug` or `trace`.
        level: Level = "info",
        /// `text`, `json`, or `auto`: text on a terminal, else JSON.
        format: Format = "auto",
    }
}

crate::words! {
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

crate::words! {
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
