//! The errors that commands show to the operator: the problem, its remedy, and the place where the relevant setting is
//! set.
//!
//! The messages contain no secrets, because the underlying errors contain none.

use std::fmt;

use super::exit::{FAILED, USAGE};
use crate::{
    config::{Config, LoadError},
    manage::{ManageError, deny::DenyError},
    server::AppError,
    store::StoreError,
};

/// Why a command failed.
#[derive(Debug)]
pub(crate) struct CliError {
    problem: String,
    /// Human-readable text: the setting that may have caused the problem, and the place where it is set.
    place: Option<String>,
    /// The program's exit code.
    pub(crate) code: u8,
}

impl CliError {
    /// Creates the error for a failure, with exit code 1.
    pub(crate) const fn new(problem: String) -> Self {
        Self { problem, place: None, code: FAILED }
    }

    /// Creates the error for an invalid argument or input, with exit code 2.
    pub(crate) const fn usage(problem: String) -> Self {
        Self { problem, place: None, code: USAGE }
    }

    /// Creates the error for a database failure. If a wrong setting may be the cause, adds the place where the database
    /// is configured.
    pub(crate) fn of_store(error: StoreError, config: &Config) -> Self {
        ManageError::from(error).at(config)
    }
}

/// Converts an error to a [`CliError`], which also names the setting that may have caused the error.
pub(crate) trait At {
    fn at(self, config: &Config) -> CliError;
}

impl At for ManageError {
    fn at(self, config: &Config) -> CliError {
        let code = if matches!(self, Self::Invalid { .. }) { USAGE } else { FAILED };
        let place = match &self {
            Self::Ledger(StoreError::NotOurs) => {
                let set = |name| Some(format!("store.{name} is set in {}", config.origin("store", name)?));
                ["preset", "table"].into_iter().find_map(set)
            }
            Self::Ledger(error) if may_be_misconfigured(error) => Some(database_place(config)),
            _ => None,
        };
        CliError { problem: with_option(&self), place, code }
    }
}

/// Returns the message of `error`. If an option of the command solves the problem, the message names that option.
fn with_option(error: &ManageError) -> String {
    match error {
        ManageError::Ledger(StoreError::HasKeys(_)) => format!("{error}, or delete it with --with-keys"),
        ManageError::Ledger(StoreError::NotOwner(_)) => {
            format!("{error}, or let each owner run its part of the --print output")
        }
        error => error.to_string(),
    }
}

impl At for DenyError {
    fn at(self, config: &Config) -> CliError {
        let code = if matches!(self, Self::Invalid { .. }) { USAGE } else { FAILED };
        let place = match &self {
            Self::Redis(_) => redis_place(config),
            Self::Store(error) if may_be_misconfigured(error) => Some(database_place(config)),
            _ => None,
        };
        CliError { problem: self.to_string(), place, code }
    }
}

fn redis_place(config: &Config) -> Option<String> {
    let set = |name| Some(format!("redis.{name} is set in {}", config.origin("redis", name)?));
    ["url", "url_file"].into_iter().find_map(set)
}

/// Returns true if a wrong database URL may be the cause, so that the operator needs to know where the URL is set.
const fn may_be_misconfigured(error: &StoreError) -> bool {
    !matches!(
        error,
        StoreError::NotOurs
            | StoreError::NoTrust(_)
            | StoreError::NoKey(_)
            | StoreError::NameTaken(_)
            | StoreError::DigestTaken(_)
            | StoreError::HasKeys(_)
            | StoreError::OtherPepper { .. }
    )
}

fn database_place(config: &Config) -> String {
    let settings = ["management_url", "management_url_file", "url", "url_file"];
    let set = settings.iter().find_map(|name| Some((name, config.origin("store", name)?)));
    set.map_or_else(
        || "store.url is not set, so the embedded database at its default path is used".to_owned(),
        |(name, origin)| format!("store.{name} is set in {origin}"),
    )
}

impl From<LoadError> for CliError {
    fn from(error: LoadError) -> Self {
        Self::new(error.to_string())
    }
}

impl From<AppError> for CliError {
    fn from(error: AppError) -> Self {
        Self::new(error.to_string())
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.problem)?;
        self.place.as_ref().map_or(Ok(()), |place| write!(f, "\n  {place}"))
    }
}
