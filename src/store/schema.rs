//! The version of the tables, and the check that this release can use them.
//!
//! A migration only adds objects; objects that they replace are dropped one release later. The table `schema` records
//! the oldest release that can use the tables. So an older release can use tables from a newer release, and a
//! deployment can be rolled back.

pub(crate) mod grants;
pub(crate) mod postgres;
pub(crate) mod sqlite;

use super::error::StoreError;

/// The version of the tables that this release creates and needs.
pub(crate) const VERSION: i64 = 4;
/// The oldest release that can use these tables, identified by the version of the tables that the release creates.
pub(crate) const COMPATIBLE_FROM: i64 = 2;

/// The newest row in the table `schema`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TableVersion {
    /// The version of the tables.
    pub(crate) version: i64,
    /// Releases that create tables of this version or a newer one can use these tables.
    pub(crate) compatible_from: i64,
}

/// Checks that this release can use the tables at `place`. `tables` is `None` if the database has no tables.
///
/// # Errors
/// [`StoreError::Schema`], whose message contains the remedy.
pub(crate) fn check(tables: Option<TableVersion>, place: &str) -> Result<(), StoreError> {
    match tables {
        None => Err(missing(place)),
        Some(TableVersion { compatible_from, version }) if compatible_from > VERSION => {
            Err(StoreError::Schema(format!(
                "tables too new: {place} has tables of version {version}, which require a release that supports version \
             {compatible_from}; this release supports {VERSION}: install a newer trustgate"
            )))
        }
        Some(TableVersion { version, .. }) if version < VERSION => Err(StoreError::Schema(format!(
            "{place} has tables of version {version}, but this release needs {VERSION}: run `trustgate migrate`"
        ))),
        Some(_) => Ok(()),
    }
}

/// Returns the error for a database at `place` that has no tables.
pub(crate) fn missing(place: &str) -> StoreError {
    StoreError::Schema(format!("{place} has no trustgate tables: run `trustgate migrate`"))
}

/// Returns `N` random bytes from the operating system, for nonces and keys.
///
/// # Errors
/// [`StoreError::Unusable`] if the operating system provides no random bytes.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], StoreError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| StoreError::Unusable(format!("random bytes unavailable: {error}")))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_tables_are_used_if_compatible_and_each_error_names_the_remedy() {
        let tables = |version, compatible_from| Some(TableVersion { version, compatible_from });
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
