//! The entries of the deny list.

use std::collections::HashMap;

use crate::{
    base::clock::DatabaseTime,
    record::{ApiKeyDigest, KeyId, TrustId},
};

/// The object that an entry denies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Denied {
    /// One key, by the id of its row.
    Key(KeyId),
    /// Every key of a trust.
    Trust(TrustId),
    /// The key with this digest: either the digest stored in the key's row, or the digest by which a check looked up
    /// the key.
    Digest(ApiKeyDigest),
}

impl Denied {
    /// Returns the entry as a line of the file: `key UUID`, `trust UUID` or `digest HEX64`. This is not a `Display`
    /// implementation, so that no digest is logged by accident.
    #[must_use]
    pub fn line(&self) -> String {
        format!("{} {}", self.kind(), self.id())
    }

    /// Returns the first word of [`Self::line`].
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Key(_) => "key",
            Self::Trust(_) => "trust",
            Self::Digest(_) => "digest",
        }
    }

    /// Returns the second word of [`Self::line`]: a UUID, or 64 hexadecimal digits.
    #[must_use]
    pub fn id(&self) -> String {
        match self {
            Self::Key(id) => id.to_string(),
            Self::Trust(id) => id.to_string(),
            Self::Digest(digest) => digest.to_hex(),
        }
    }

    /// Parses the two words of [`Self::line`].
    pub(crate) fn read(kind: &str, id: &str) -> Option<Self> {
        let uuid = || uuid::Uuid::parse_str(id).ok();
        match kind {
            "key" => Some(Self::Key(KeyId(uuid()?))),
            "trust" => Some(Self::Trust(TrustId(uuid()?))),
            "digest" => ApiKeyDigest::from_hex(id).map(Self::Digest),
            _ => None,
        }
    }
}

/// Entries, each with the time at which the entry expires, by the database's clock. `None`: the entry does not expire.
pub(crate) type Entries = HashMap<Denied, Option<DatabaseTime>>;

/// Adds an entry. If `entries` already contains it, the later of the two expiry times applies.
pub(crate) fn add(entries: &mut Entries, denied: Denied, until: Option<DatabaseTime>) {
    let end = entries.entry(denied).or_insert(until);
    *end = end.zip(until).map(|(one, other)| one.max(other));
}
