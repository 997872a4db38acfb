//! The data types of keys and trusts, and [`Versioned`], which combines a value with the database version at which it
//! was read.
//!
//! This module does no I/O and makes no decisions.

use std::fmt;

use ipnet::{IpNet, Ipv4Net};
use subtle::ConstantTimeEq;
use uuid::Uuid;

use crate::base::clock::{DatabaseTime, Moment};

/// The id of a trust, the tenant organisation that a key belongs to. Checks take the id from the database and not from
/// the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustId(pub Uuid);

/// The id of a key's row in the database. It is not secret: logs, messages and commands may contain it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(pub Uuid);

/// The maximum length of a scope, in bytes.
const SCOPE_BYTES_MAX: usize = 128;

/// Returns true if `text` is a valid scope: a scope token as defined in RFC 6749, section 3.3, without a comma, so that
/// a comma or a space can separate the scopes in a list.
#[must_use]
pub(crate) fn is_scope(text: &str) -> bool {
    (1..=SCOPE_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"\\,".contains(&byte))
}

/// Converts a network of IPv4-mapped IPv6 addresses (RFC 4291, section 2.5.5.2) to an IPv4 network, and returns any
/// other network unchanged. The source address of a request is converted in the same way, so that the two can be
/// compared.
#[must_use]
pub(crate) fn canonical(network: IpNet) -> IpNet {
    let IpNet::V6(mapped) = network else { return network };
    let prefix = mapped.prefix_len().checked_sub(96);
    let network =
        mapped.addr().to_ipv4_mapped().zip(prefix).and_then(|(address, prefix)| Ipv4Net::new(address, prefix).ok());
    network.map_or(IpNet::V6(mapped), IpNet::V4)
}

impl fmt::Display for TrustId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The 32-byte digest of a key, which is the only form in which a key is stored: its HMAC-SHA-256 (FIPS 198-1), keyed
/// with the pepper, or its plain SHA-256 (FIPS 180-4).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ApiKeyDigest([u8; 32]);

impl ApiKeyDigest {
    /// Creates a digest from its bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Parses a digest from 64 hexadecimal digits, in upper or lower case. Returns `None` for any other string.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        bytes_from_hex(text).map(Self)
    }

    /// Returns the bytes of the digest, for storage and lookup.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Formats the digest as 64 lower-case hexadecimal digits.
    #[must_use]
    pub fn to_hex(&self) -> String {
        hex(&self.0)
    }

    /// Returns true if the two digests are equal; compares them in constant time. Map lookups may use `Eq`, which is
    /// not constant-time; the last comparison before a grant uses this function.
    #[must_use]
    pub fn matches(&self, stored: &Self) -> bool {
        self.0.ct_eq(&stored.0).into()
    }
}

/// Shows only the first four bytes, which are enough to correlate log lines but useless to an attacker.
impl fmt::Debug for ApiKeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeyDigest({}…)", hex(&self.0[..4]))
    }
}

/// Parses `N` bytes from `2 * N` hexadecimal digits, in upper or lower case.
#[must_use]
pub(crate) fn bytes_from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let bytes: Option<Vec<u8>> = pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect();
    bytes?.try_into().ok()
}

/// Formats `bytes` as lower-case hexadecimal digits.
#[must_use]
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .filter_map(|digit| char::from_digit(digit.into(), 16))
        .collect()
}

/// The algorithm that computed a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Plain SHA-256 of the key.
    Sha256,
    /// HMAC-SHA-256 of the key, keyed with the server's pepper.
    Hmac,
}

impl Scheme {
    /// Returns the number of the scheme in the database.
    #[must_use]
    pub const fn number(self) -> i16 {
        match self {
            Self::Sha256 => 0,
            Self::Hmac => 1,
        }
    }

    /// Returns the scheme with this number, if this release supports it.
    #[must_use]
    pub const fn from_number(number: i16) -> Option<Self> {
        match number {
            0 => Some(Self::Sha256),
            1 => Some(Self::Hmac),
            _ => None,
        }
    }

    /// Returns the name of the scheme, as commands print it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Hmac => "hmac-sha256",
        }
    }
}

/// Identifies a pepper without revealing it: the first 8 bytes of the HMAC-SHA-256 of a constant, keyed with the
/// pepper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 8]);

impl Fingerprint {
    /// The value that means "no pepper" in the database: keys are stored as plain SHA-256 digests.
    pub const NO_PEPPER: Self = Self([0; 8]);

    /// Parses a fingerprint from 16 hexadecimal digits.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        bytes_from_hex(text).map(Self)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// The fingerprints of the pepper that the database records for new keys, and of the pepper recorded before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoredPeppers {
    /// The pepper for new keys; `None` until one is recorded. A pepper is recorded by the first command that issues or
    /// imports keys hashed with a pepper, by `pepper use`, or by a server that reads a key hashed with its current
    /// pepper.
    pub current: Option<Fingerprint>,
    /// The pepper recorded before `current`; [`Fingerprint::NO_PEPPER`] if keys were issued without a pepper before the
    /// first pepper was recorded.
    pub previous: Option<Fingerprint>,
}

impl StoredPeppers {
    /// Returns true if a server whose peppers have the fingerprints `known` may report that it is ready: no pepper is
    /// recorded yet, or `known` contains the current or the previous recorded pepper. The previous pepper counts so
    /// that servers that still use it stay ready after `pepper use`. A server without a pepper is ready if `previous`
    /// is [`Fingerprint::NO_PEPPER`].
    #[must_use]
    pub fn fit(&self, known: &[Fingerprint]) -> bool {
        let recorded = [self.current, self.previous].into_iter().flatten();
        let has_none = known.is_empty() && self.previous == Some(Fingerprint::NO_PEPPER);
        self.current.is_none() || has_none || recorded.into_iter().any(|one| known.contains(&one))
    }

    /// Returns true if a server with the peppers `known` can recognise every key. A server without the current pepper
    /// cannot find the keys that were hashed with it, so a key that this server does not find may still exist.
    #[must_use]
    pub fn identify_all(&self, known: &[Fingerprint]) -> bool {
        self.current.is_none_or(|current| known.contains(&current))
    }
}

/// The origin of a new key's digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Made {
    /// Computed elsewhere and imported as a SHA-256 digest, so no pepper applies.
    Elsewhere,
    /// Computed by trustgate without a pepper.
    Plain,
    /// Computed by trustgate with this pepper.
    Peppered(Fingerprint),
}

impl Made {
    /// Returns the scheme of the digest.
    #[must_use]
    pub const fn scheme(self) -> Scheme {
        match self {
            Self::Elsewhere | Self::Plain => Scheme::Sha256,
            Self::Peppered(_) => Scheme::Hmac,
        }
    }

    /// Returns the fingerprint of the pepper, if the digest was computed with one.
    #[must_use]
    pub const fn fingerprint(self) -> Option<Fingerprint> {
        match self {
            Self::Elsewhere | Self::Plain => None,
            Self::Peppered(fingerprint) => Some(fingerprint),
        }
    }
}

/// The digests under which one presented key may be stored.
#[derive(Clone, Debug)]
pub struct Digests {
    /// The digest computed with the current scheme. Caches look up the key by this digest.
    pub current: ApiKeyDigest,
    /// The digests computed with earlier schemes (before a pepper was set or changed), newest first.
    pub older: Vec<ApiKeyDigest>,
}

impl Digests {
    /// Iterates over all digests, the current one first.
    pub fn all(&self) -> impl Iterator<Item = &ApiKeyDigest> {
        std::iter::once(&self.current).chain(&self.older)
    }

    /// Returns true if `stored` is one of these digests. Compares `stored` with every digest in constant time, even
    /// after a match.
    #[must_use]
    pub fn contains(&self, stored: &ApiKeyDigest) -> bool {
        self.all().fold(false, |found, digest| found | digest.matches(stored))
    }
}

/// The data that a decision needs about a key and its trust.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The id of the key's row.
    pub key_id: KeyId,
    /// The trust that the key belongs to.
    pub trust_id: TrustId,
    /// True if the trust is enabled.
    pub trust_enabled: bool,
    /// The digest under which the key is stored.
    pub digest: ApiKeyDigest,
    /// The scopes of the key, sorted, without duplicates.
    pub scopes: Box<[String]>,
    /// The networks from which the key may be used. An empty list allows any network.
    pub allowed_cidrs: Box<[IpNet]>,
    /// The key is not valid before this time.
    pub not_before: Option<DatabaseTime>,
    /// The key is not valid from this time on.
    pub expires_at: Option<DatabaseTime>,
    /// When the key was revoked. Any value, even a time in the future, means that the key is revoked.
    pub revoked_at: Option<DatabaseTime>,
}

/// The number of a committed change. Versions increase in commit order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u64);

/// The random nonce of a version. Two versions with the same number and different nonces belong to different database
/// histories.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nonce(pub [u8; 16]);

/// The database history that a version belongs to. Promoting a PostgreSQL standby starts a new lineage, and so does a
/// new incarnation, which a replica or the operator requests after committed changes have been lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    /// A random id: generated by the first migration, and again when a replica or the operator reports that the
    /// database lost committed changes.
    pub incarnation: Uuid,
    /// PostgreSQL's system identifier; 0 for SQLite.
    pub system: u64,
    /// PostgreSQL's timeline; 0 for SQLite.
    pub timeline: u32,
}

/// A value and the database version at which it was read. One statement reads the value and the version.
#[derive(Clone, Debug)]
pub struct Versioned<T> {
    /// The value.
    pub value: T,
    /// The newest version at the time of the read.
    pub as_of: Version,
    /// The nonce of `as_of`.
    pub nonce: Nonce,
    /// The lineage of `as_of`.
    pub lineage: Lineage,
    /// The time of the read, by the database's clock. Every cache computes the age of the value from this time.
    pub read_at: DatabaseTime,
    /// When this process sent the read, by its own clock. For a value from Redis: when this process fetched the value.
    pub sent_at: Moment,
}

impl<T> Versioned<T> {
    /// Converts the value with `make` and keeps the version.
    pub fn map<U>(self, make: impl FnOnce(T) -> U) -> Versioned<U> {
        let Self { value, as_of, nonce, lineage, read_at, sent_at } = self;
        Versioned { value: make(value), as_of, nonce, lineage, read_at, sent_at }
    }

    /// Returns a reference to the value, with the same version.
    pub const fn as_ref(&self) -> Versioned<&T> {
        let Self { value, as_of, nonce, lineage, read_at, sent_at } = self;
        Versioned { value, as_of: *as_of, nonce: *nonce, lineage: *lineage, read_at: *read_at, sent_at: *sent_at }
    }
}

/// An entry of the change log: the cached values that a committed change makes out of date.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// All cached records of this key.
    Key(KeyId),
    /// All cached records of keys that belong to this trust.
    Trust(TrustId),
    /// The negative entry of this digest: the key may exist now.
    Absent(ApiKeyDigest),
    /// Affects no cached value. The key with this digest was revoked or deleted, or its digest was replaced. Replicas
    /// remember the digest in case the database loses history.
    Gone(ApiKeyDigest),
    /// All cached values of one kind.
    Whole(ChangeKind),
    /// All cached values. Also represents an entry that a newer release wrote and that this release does not support.
    Everything,
}

/// The kinds of objects in the change log. If too many objects of one kind change at once, one entry for the whole kind
/// replaces their entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// Records, identified by their keys.
    Keys,
    /// Records, identified by their trusts.
    Trusts,
    /// Negative entries.
    Absences,
    /// Digests that were revoked, deleted or replaced.
    Gone,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_digests_round_trip_and_other_strings_are_rejected() {
        let digest = ApiKeyDigest::from_bytes(std::array::from_fn(|i| u8::try_from(i * 7).unwrap()));
        assert_eq!(ApiKeyDigest::from_hex(&digest.to_hex()), Some(digest));
        assert_eq!(ApiKeyDigest::from_hex(&digest.to_hex().to_uppercase()), Some(digest));
        for bad in ["", "00", &"0".repeat(63), &"0".repeat(65), &"g".repeat(64), &"é".repeat(32)] {
            assert_eq!(ApiKeyDigest::from_hex(bad), None, "{bad}");
        }
    }

    #[test]
    fn server_with_a_recorded_pepper_is_ready() {
        let print = |number| Fingerprint([number; 8]);
        let stored = |current, previous| StoredPeppers { current, previous };
        let (one, two, none) = (Some(print(1)), Some(print(2)), Some(Fingerprint::NO_PEPPER));
        for (stored, known, fits) in [
            (stored(None, None), &[][..], true),
            (stored(None, None), &[print(1)], true),
            (stored(one, None), &[print(1)], true),
            (stored(one, None), &[print(3), print(1)], true),
            (stored(one, None), &[print(3)], false),
            (stored(one, None), &[], false),
            (stored(two, one), &[print(1)], true),
            (stored(two, one), &[print(3)], false),
            (stored(two, one), &[], false),
            (stored(one, none), &[], true),
            (stored(one, none), &[print(3)], false),
        ] {
            assert_eq!(stored.fit(known), fits, "{stored:?} {known:?}");
        }
    }

    #[test]
    fn server_without_the_current_pepper_cannot_recognise_every_key() {
        let print = |number| Fingerprint([number; 8]);
        let stored = StoredPeppers { current: Some(print(2)), previous: Some(print(1)) };
        assert!(stored.identify_all(&[print(2), print(1)]) && StoredPeppers::default().identify_all(&[]));
        assert!(stored.fit(&[print(1)]) && !stored.identify_all(&[print(1)]));
    }

    #[test]
    fn debug_output_shows_four_bytes_of_a_digest() {
        assert_eq!(format!("{:?}", ApiKeyDigest::from_bytes([0xab; 32])), "ApiKeyDigest(abababab…)");
    }
}
