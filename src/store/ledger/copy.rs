//! The trusts and keys of one database into another, as they are: ids, digests, states and times. Whoever holds a key goes
//! on using it.
//!
//! Never copies what belongs to a database itself: its versions and history, the key of Redis values, its audit.

use serde_json::json;

use super::{
    Actor,
    sql_ledger::{self, BATCH, LedgerBackend, TxMode},
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

/// From where to where; `None` is what the configuration names for management.
#[derive(Debug)]
pub struct Ends {
    /// The URL that is copied from.
    pub from: Option<Secret>,
    /// The URL that is copied to.
    pub to: Option<Secret>,
}

/// What was copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copied {
    /// From where, in words without secrets.
    pub from: String,
    /// To where, in words without secrets.
    pub to: String,
    /// How many trusts.
    pub trusts: u64,
    /// How many keys.
    pub keys: u64,
}

/// Why nothing was copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// What is copied from cannot be used or read.
    #[error("cannot copy from {place}: {error}")]
    From {
        /// In words.
        place: String,
        /// Why.
        error: StoreError,
    },
    /// What is copied to cannot be used or written.
    #[error("cannot copy to {place}: {error}")]
    To {
        /// In words.
        place: String,
        /// Why.
        error: StoreError,
    },
    /// An end that cannot be, as it was written.
    #[error(transparent)]
    Unusable(#[from] StoreError),
    /// There are trusts already where it should go.
    #[error("cannot copy to {place}: it holds trusts already ({trusts}), and only an empty one is filled")]
    NotEmpty {
        /// In words.
        place: String,
        /// How many.
        trusts: usize,
    },
}

/// Copies every trust and key, in one transaction at either end: of one moment, and all or nothing. The tables must be
/// there, and hold no trust yet at the other end. `progress` hears how many keys of how many are copied.
///
/// Cancel safe: nothing was copied then.
///
/// # Errors
/// [`CopyError`]; nothing was copied then.
pub async fn copy(
    settings: &StoreSettings,
    ends: Ends,
    env: Env<'_>,
    actor: &Actor,
    mut progress: impl FnMut(u64, u64),
) -> Result<Copied, CopyError> {
    let address = |name, url: Option<Secret>| match url {
        Some(url) => StoreUrl::given(name, url),
        None => StoreUrl::of(settings, Role::Manage),
    };
    if settings.reads_existing() && (ends.from.is_none() || ends.to.is_none()) {
        return Err(StoreError::NotOurs.into());
    }
    let (from, to) = (address("--from", ends.from), address("--to", ends.to));
    let (from_place, to_place) = (from.checked(env)?, to.checked(env)?);
    let mut copied = Copied { from: from_place.clone(), to: to_place.clone(), trusts: 0, keys: 0 };
    let from_failed = |error| CopyError::From { place: from_place.clone(), error };
    let to_failed = |error| CopyError::To { place: to_place.clone(), error };
    let mut source = open_tables(&from, settings, env).await.map_err(from_failed)?;
    let mut target = open_tables(&to, settings, env).await.map_err(to_failed)?;
    source.begin(TxMode::Read).await.map_err(|error| from_failed(error.into()))?;
    target.begin(TxMode::Change).await.map_err(|error| to_failed(error.into()))?;
    // Where this is left early, the connections close, which undoes what was begun.
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
    let mut behind = None;
    loop {
        progress(copied.keys, total);
        let keys = source.stored_keys(behind, BATCH).await.map_err(|error| from_failed(error.into()))?;
        let Some(last) = keys.last() else { break };
        behind = Some(last.key.id);
        target.put_keys(&keys).await.map_err(|error| to_failed(target.explain(error)))?;
        copied.keys += keys.len() as u64;
    }
    finish(&mut *target, actor, &copied).await.map_err(|error| to_failed(target.explain(error)))?;
    Ok(copied)
}

async fn finish(target: &mut dyn LedgerBackend, actor: &Actor, copied: &Copied) -> Result<(), sqlx::Error> {
    let after = json!({ "from": copied.from, "trusts": copied.trusts, "keys": copied.keys });
    sql_ledger::note(target, actor, "store.copy", "everything", None, Some(after)).await?;
    target.commit().await
}
