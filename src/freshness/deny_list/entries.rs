//! The entries of the deny list.

use std::collections::HashMap;

use crate::{
    base::clock::DatabaseTime,
    record::{ApiKeyDigest, KeyId, TrustId},
};

/// What an entry of the list denies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Denied {
    /// One key, by the id of its row.
    Key(KeyId),
    /// Every key of a trust.
    Trust(TrustId),
    /// The key that has this digest, whether it is stored under it or only looked up by it.
    Digest(ApiKeyDigest),
}

impl Denied {
    /// The entry as a line of the file: `key UUID`, `trust UUID` or `digest HEX64`. Not a `Display`: a log must not get a
    /// digest by accident.
    #[must_use]
    pub fn line(&self) -> String {
        format!("{} {}", self.kind(), self.id())
    }

    /// The word for what is denied.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Key(_) => "key",
            Self::Trust(_) => "trust",
            Self::Digest(_) => "digest",
        }
    }

    /// Which one: a UUID, or 64 hexadecimal digits.
    #[must_use]
    pub fn id(&self) -> String {
        match self {
            Self::Key(id) => id.to_string(),
            Self::Trust(id) => id.to_string(),
            Self::Digest(digest) => digest.to_hex(),
        }
    }

    /// From the two words of [`Self::line`].
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

/// Entries and until when they deny, by the database's clock; `None`: as long as they are listed.
pub(crate) type Entries = HashMap<Denied, Option<DatabaseTime>>;

/// Adds an entry; of two ends the later one counts.
pub(crate) fn add(entries: &mut Entries, denied: Denied, until: Option<DatabaseTime>) {
    let end = entries.entry(denied).or_insert(until);
    *end = end.zip(until).map(|(one, other)| one.max(other));
}
