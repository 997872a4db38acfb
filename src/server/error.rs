//! Why the server did not start, or ended before it was asked to.

use std::io;

use crate::{
    grpc::{listener::ListenAddress, tls::TlsError},
    store::StoreError,
};

/// Why the server did not start, or ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// A listener cannot be had.
    #[error("cannot listen on {address} ({setting}{}): {source}", set_in(origin.as_deref()))]
    Listen {
        /// The address.
        address: ListenAddress,
        /// The setting that names it.
        setting: &'static str,
        /// Where that was set.
        origin: Option<String>,
        /// What the operating system says.
        source: io::Error,
    },
    /// A file with a secret cannot be read.
    #[error("{setting}: {source}")]
    SecretFile {
        /// The setting that names it.
        setting: &'static str,
        /// What is wrong with it.
        source: io::Error,
    },
    /// TLS cannot be had.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The file of the deny list cannot be read.
    #[error("freshness.deny_file: {source}")]
    DenyFile {
        /// What is wrong with it.
        source: io::Error,
    },
    /// The database cannot be used, and waiting would not help.
    #[error("{place}: {source}")]
    Store {
        /// Which database.
        place: String,
        /// What is wrong.
        source: StoreError,
    },
    /// The operating system refused something.
    #[error("cannot start: {0}")]
    Start(#[from] io::Error),
    /// Two metrics have one name: a mistake in the program.
    #[error("cannot start: {0}")]
    Metrics(#[from] prometheus::Error),
    /// A part ended before it was told to.
    #[error("a task of the server ended, so the server stops: {0}: {1}")]
    Ended(&'static str, String),
    /// Calls in flight did not end within `limits.drain_grace`.
    #[error("{0} connections did not end within limits.drain_grace and were closed")]
    GraceExceeded(usize),
    /// A second signal came while the server stopped.
    #[error("shutdown forced: a second signal ended the server before calls in flight were done")]
    Forced,
}

fn set_in(origin: Option<&str>) -> String {
    origin.map(|origin| format!(", set in {origin}")).unwrap_or_default()
}
