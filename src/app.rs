//! The wiring: makes the parts and hands them to each other.
//!
//! Never decides anything.

use crate::{
    config::Config,
    record::{KeyId, TrustId},
    secret::Secret,
};

/// Why the server did not start or ended before it was told to.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct AppError(pub String);

/// What a check of one key came to, and why.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// Whether the key is granted.
    pub allowed: bool,
    /// The word that metrics and metadata use for the outcome: `granted`, `revoked`, ...
    pub reason: &'static str,
    /// The same in a sentence.
    pub sentence: String,
    /// Whose key it is, if it is known.
    pub trust_id: Option<TrustId>,
    /// Which key it is, if it is known.
    pub key_id: Option<KeyId>,
    /// What it may be used for.
    pub scopes: Vec<String>,
}

/// Serves until it is told to stop.
///
/// # Errors
/// When it cannot start, or a part of it ended.
pub fn serve(_config: Config) -> Result<(), AppError> {
    Err(AppError("this build cannot serve yet".to_owned()))
}

/// Decides `key` as a request without further demands would be, reading the database.
///
/// # Errors
/// When the database cannot be asked.
pub fn explain(_config: Config, _key: Secret) -> Result<Explanation, AppError> {
    Err(AppError("this build cannot check yet".to_owned()))
}
