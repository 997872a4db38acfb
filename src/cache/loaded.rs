//! The result of a load: a value, and the read that returned it.

use std::sync::Arc;

use super::{cacheable::Cacheable, l1::Entry};
use crate::{
    base::{clock::Moment, fault::Tier},
    freshness::{ReplicaView, history::Provenance},
    record::{Version, Versioned},
};

/// The result of a load.
pub struct Loaded<K: Cacheable> {
    /// The value.
    pub entry: Arc<Entry<K>>,
    /// The read that returned the value; `None` if another load put the value into L1 in the meantime.
    pub(crate) read: Option<TierRead>,
}

/// The read that returned the value of a load.
#[derive(Clone)]
pub(crate) struct TierRead {
    /// The version and the time of the read.
    pub(crate) version: Versioned<()>,
    /// L2 or the store.
    pub(crate) tier: Tier,
}

impl<K: Cacheable> Loaded<K> {
    /// Returns how the value relates to the history of `view`.
    #[must_use]
    pub fn provenance(&self, view: &ReplicaView) -> Provenance {
        match &self.read {
            _ if self.entry.is_of(view) => Provenance::Known,
            Some(read) => view.provenance(&read.version),
            None => Provenance::Foreign,
        }
    }

    /// Returns the version at which the value was read, if `view` does not contain that version yet because no poll has
    /// returned it.
    #[must_use]
    pub fn ahead_of(&self, view: &ReplicaView) -> Option<Version> {
        let read = self.read.as_ref()?;
        (self.provenance(view) == Provenance::Ahead).then_some(read.version.as_of)
    }

    /// Returns true if the value comes from a read of the store that was sent at `began` or later.
    #[must_use]
    pub fn is_read_after(&self, began: Moment) -> bool {
        self.read.as_ref().is_some_and(|read| read.tier == Tier::Store && read.version.sent_at >= began)
    }
}

impl<K: Cacheable> Clone for Loaded<K> {
    fn clone(&self) -> Self {
        Self { entry: Arc::clone(&self.entry), read: self.read.clone() }
    }
}
