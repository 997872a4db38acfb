//! Which version the tables are of, and whether this release can work with them.
//!
//! A migration only adds; what it drops goes one release later. So a release serves tables that are newer than itself,
//! as long as they say that it may: a rolled-back image keeps working.

pub(crate) mod grants;
pub(crate) mod postgres;
pub(crate) mod sqlite;

use super::error::StoreError;

/// The version of the tables that this release makes and needs.
pub(crate) const VERSION: i64 = 4;
/// The oldest release, by the version it makes, that can work with these tables.
pub(crate) const COMPATIBLE_FROM: i64 = 2;

/// The newest row of the table `schema`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tables {
    /// The version the tables are of.
    pub(crate) version: i64,
    /// Releases from this version on may use them.
    pub(crate) compatible_from: i64,
}

/// Whether the tables at `place` can be used by this release; `None` where there are none.
///
/// # Errors
/// [`StoreError::Schema`], with what to do.
pub(crate) fn check(tables: Option<Tables>, place: &str) -> Result<(), StoreError> {
    match tables {
        None => Err(missing(place)),
        Some(Tables { compatible_from, version }) if compatible_from > VERSION => Err(StoreError::Schema(format!(
            "{place} holds tables of version {version}, which need a release that knows version {compatible_from}; this one knows {VERSION}: use a newer trustgate"
        ))),
        Some(Tables { version, .. }) if version < VERSION => Err(StoreError::Schema(format!(
            "{place} holds tables of version {version}, and this release needs {VERSION}: run `trustgate migrate`"
        ))),
        Some(_) => Ok(()),
    }
}

/// There are no tables at `place`.
pub(crate) fn missing(place: &str) -> StoreError {
    StoreError::Schema(format!("{place} holds no tables of trustgate: run `trustgate migrate`"))
}

/// `N` random bytes from the operating system, for nonces and keys.
///
/// # Errors
/// [`StoreError::Unusable`]: there is no randomness, so nothing can be made.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], StoreError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| StoreError::Unusable(format!("no random bytes: {error}")))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_tables_are_used_if_they_allow_it_and_every_refusal_says_what_to_do() {
        let tables = |version, compatible_from| Some(Tables { version, compatible_from });
        for (tables, says) in [
            (tables(VERSION, COMPATIBLE_FROM), None),
            (tables(VERSION + 3, VERSION), None),
            (tables(VERSION + 3, VERSION + 1), Some("newer trustgate")),
            (tables(VERSION - 1, 0), Some("`trustgate migrate`")),
            (None, Some("`trustgate migrate`")),
        ] {
            let problem = check(tables, "here").err().map(|error| error.to_string());
            match says {
                None => assert_eq!(problem, None, "{tables:?}"),
                Some(says) => assert!(problem.as_ref().is_some_and(|text| text.contains(says)), "{problem:?}"),
            }
        }
    }
}
