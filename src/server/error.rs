//! The errors with which the server ends.

use std::io;

use crate::{
    grpc::{listener::ListenAddress, tls::TlsError},
    store::StoreError,
};

/// Why the server did not start, ended without a signal, or did not shut down gracefully.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// A listener cannot be bound.
    #[error("cannot listen on {address} ({setting}{}): {source}", set_in(origin.as_deref()))]
    Listen {
        /// The address that cannot be bound.
        address: ListenAddress,
        /// The setting that contains the address.
        setting: &'static str,
        /// The file and line, or the environment variable, that sets the address.
        origin: Option<String>,
        /// The operating system's error.
        source: io::Error,
    },
    /// A file with a secret cannot be read.
    #[error("{setting}: {source}")]
    SecretFile {
        /// The setting that contains the path.
        setting: &'static str,
        /// The problem with the file.
        source: io::Error,
    },
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The deny list file cannot be read.
    #[error("freshness.deny_file: {source}")]
    DenyFile {
        /// The problem with the file.
        source: io::Error,
    },
    /// The database cannot be used, and retrying would not help.
    #[error("{place}: {source}")]
    Store {
        /// A human-readable description of the database.
        place: String,
        /// The problem with the database.
        source: StoreError,
    },
    /// The operating system returned an error during startup.
    #[error("cannot start: {0}")]
    Start(#[from] io::Error),
    /// Two metrics have the same name: a bug in the program.
    #[error("cannot start: {0}")]
    Metrics(#[from] prometheus::Error),
    /// A server task ended before shutdown began.
    #[error("server task ended unexpectedly: {0} ({1}); the server stops")]
    Ended(&'static str, String),
    /// Calls in flight did not end within `limits.drain_grace`.
    #[error("grace period exceeded: {0} connections did not end within limits.drain_grace and were closed")]
    GraceExceeded(usize),
    /// A second signal arrived during the shutdown.
    #[error("shutdown forced: a second signal arrived before the calls in flight had finished")]
    Forced,
}

fn set_in(origin: Option<&str>) -> String {
    origin.map(|origin| format!(", set in {origin}")).unwrap_or_default()
}
