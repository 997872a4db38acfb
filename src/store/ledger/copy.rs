//! Copies all trusts and keys from one database to another, with their ids, digests, states and times, so that clients
//! can keep using their keys.
//!
//! Does not copy data that belongs to one database only: versions and lineage, the MAC key for Redis, and audit
//! entries.

use serde_json::json;

use super::{
    audit::note,
    backend::{LedgerBackend, TxMode},
    types::Actor,
};
use crate::{
    base::secret::Secret,
    store::{
        error::StoreError,
        open::open_tables,
        settings::StoreSettings,
        url::{Env, Role, StoreUrl},
    },
};

/// The source and the target of a copy. `None` is the database that the configuration sets for management.
#[derive(Debug)]
pub(crate) struct Ends {
    /// The URL of the source.
    pub from: Option<GivenUrl>,
    /// The URL of the target.
    pub to: Option<GivenUrl>,
}

/// A URL that the operator gave to a command.
#[derive(Debug)]
pub(crate) struct GivenUrl {
    /// The name of the command's option, for messages.
    pub option: &'static str,
    pub url: Secret,
}

/// The result of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Copied {
    /// A description of the source, without secrets.
    pub from: String,
    /// A description of the target, without secrets.
    pub to: String,
    /// The number of trusts copied.
    pub trusts: u64,
    /// The number of keys copied.
    pub keys: u64,
}

/// Why nothing was copied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    /// The source cannot be used or read.
    #[error("cannot copy from {place}: {error}")]
    From {
        /// A description of the source, without secrets.
        place: String,
        error: StoreError,
    },
    /// The target cannot be used or written.
    #[error("cannot copy to {place}: {error}")]
    To {
        /// A description of the target, without secrets.
        place: String,
        error: StoreError,
    },
    /// The configuration or a URL that the operator gave makes the copy impossible.
    #[error(transparent)]
    Unusable(#[from] StoreError),
    /// The target already contains trusts.
    #[error("cannot copy to {place}: it already contains trusts ({trusts}). Copy to a database without trusts")]
    NotEmpty {
        /// A description of the target, without secrets.
        place: String,
        /// The number of trusts in it.
        trusts: usize,
    },
}

/// Copies every trust and key, in one transaction on each side, so that the copy is a consistent snapshot and a failed
/// copy writes nothing to the target. Both databases must have our tables, and the target must contain no trusts.
/// `progress` receives the number of keys copied so far and the total.
///
/// # Errors
/// [`CopyError`]. After an error, nothing has been copied.
///
/// # Cancel safety
/// Safe: if the future is dropped before the commit, the target rolls back, and nothing is copied.
pub(crate) async fn copy(
    settings: &StoreSettings,
    ends: Ends,
    env: Env<'_>,
    actor: &Actor,
    mut progress: impl FnMut(u64, u64),
) -> Result<Copied, CopyError> {
    let address = |given: Option<GivenUrl>| match given {
        Some(GivenUrl { option, url }) => StoreUrl::given(option, url),
        None => StoreUrl::of(settings, Role::Manage),
    };
    if settings.reads_existing() && (ends.from.is_none() || ends.to.is_none()) {
        return Err(StoreError::NotOurs.into());
    }
    let (from, to) = (address(ends.from), address(ends.to));
    let (from_place, to_place) = (from.checked(env)?, to.checked(env)?);
    let mut copied = Copied { from: from_place.clone(), to: to_place.clone(), trusts: 0, keys: 0 };
    let from_failed = |error| CopyError::From { place: from_place.clone(), error };
    let to_failed = |error| CopyError::To { place: to_place.clone(), error };
    let mut source = open_tables(&from, settings, env).await.map_err(from_failed)?;
    let mut target = open_tables(&to, settings, env).await.map_err(to_failed)?;
    source.begin(TxMode::Read).await.map_err(|error| from_failed(error.into()))?;
    target.begin(TxMode::Change).await.map_err(|error| to_failed(error.into()))?;
    // An early return drops the connections, and the databases roll the transactions back.
    let present = target.trusts(None).await.map_err(|error| to_failed(target.explain(error)))?;
    if !present.is_empty() {
        return Err(CopyError::NotEmpty { place: to_place.clone(), trusts: present.len() });
    }
    let pepper = source.hold_pepper(None).await.map_err(|error| from_failed(error.into()))?;
    if let Some(pepper) = pepper {
        target.use_pepper(pepper).await.map_err(|error| to_failed(target.explain(error)))?;
    }
    let trusts = source.trusts(None).await.map_err(|error| from_failed(error.into()))?;
    let total = trusts.iter().map(|trust| trust.keys).sum();
    target.put_trusts(&trusts).await.map_err(|error| to_failed(target.explain(error)))?;
    copied.trusts = trusts.len() as u64;
    let mut last_id = None;
    loop {
        progress(copied.keys, total);
        let keys = source.stored_keys(last_id).await.map_err(|error| from_failed(error.into()))?;
        let Some(last) = keys.last() else { break };
        last_id = Some(last.key.id);
        target.put_keys(&keys).await.map_err(|error| to_failed(target.explain(error)))?;
        copied.keys += keys.len() as u64;
    }
    finish(&mut *target, actor, &copied).await.map_err(|error| to_failed(target.explain(error)))?;
    Ok(copied)
}

async fn finish(target: &mut dyn LedgerBackend, actor: &Actor, copied: &Copied) -> Result<(), sqlx::Error> {
    let after = json!({ "from": copied.from, "trusts": copied.trusts, "keys": copied.keys });
    note(target, actor, "store.copy", "everything", None, Some(after)).await?;
    target.commit().await
}
