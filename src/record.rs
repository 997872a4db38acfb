//! What the store knows of a key, and the date that belongs to every value read from it.
//!
//! Plain data: never reads, decides or sends anything.

use std::fmt;

use ipnet::{IpNet, Ipv4Net};
use subtle::ConstantTimeEq;
use uuid::Uuid;

use crate::base::clock::{DatabaseTime, Moment};

/// The tenant organisation a key speaks for. Given by the store, never taken from a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustId(pub Uuid);

/// The id of a key's row. Safe to log, show and use in commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(pub Uuid);

/// The longest scope, in bytes.
const SCOPE_BYTES_MAX: usize = 128;

/// Whether `text` can be a scope of a key: RFC 6749, section 3.3, without the comma, so that lists of scopes can be written
/// in any way.
#[must_use]
pub fn is_scope(text: &str) -> bool {
    (1..=SCOPE_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"\\,".contains(&byte))
}

/// `network` in the family that addresses are compared in: a network of IPv4-mapped addresses (RFC 4291, section 2.5.5.2) becomes
/// one of IPv4, as the source of a request does.
#[must_use]
pub fn canonical(network: IpNet) -> IpNet {
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

/// HMAC-SHA-256 (FIPS 198-1) of a key under the pepper, or its plain SHA-256 (FIPS 180-4): the only form of a key that
/// is kept. 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ApiKeyDigest([u8; 32]);

impl ApiKeyDigest {
    /// A digest that was computed or stored before.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// From 64 hexadecimal digits, in either case.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        bytes_from_hex(text).map(Self)
    }

    /// The digest as bytes, for storage and lookup.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The digest as 64 lower-case hexadecimal digits.
    #[must_use]
    pub fn to_hex(&self) -> String {
        hex(&self.0)
    }

    /// Whether two digests are the same, in constant time. Maps may use `Eq`; the last comparison before a grant uses
    /// this.
    #[must_use]
    pub fn matches(&self, stored: &Self) -> bool {
        self.0.ct_eq(&stored.0).into()
    }
}

/// Four bytes: enough to join two log lines, useless to an attacker.
impl fmt::Debug for ApiKeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeyDigest({}…)", hex(&self.0[..4]))
    }
}

/// `N` bytes from `2 * N` hexadecimal digits, in either case.
#[must_use]
pub fn bytes_from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let bytes: Option<Vec<u8>> = pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect();
    bytes?.try_into().ok()
}

/// `bytes` as lower-case hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .filter_map(|digit| char::from_digit(digit.into(), 16))
        .collect()
}

/// How a digest was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Plain SHA-256 of the key.
    Sha256,
    /// HMAC-SHA-256 of the key under the server's pepper.
    Hmac,
}

impl Scheme {
    /// The number that stands for it in the database and in Redis.
    #[must_use]
    pub const fn number(self) -> i16 {
        match self {
            Self::Sha256 => 0,
            Self::Hmac => 1,
        }
    }

    /// The scheme of `number`, if this release knows it.
    #[must_use]
    pub const fn from_number(number: i16) -> Option<Self> {
        match number {
            0 => Some(Self::Sha256),
            1 => Some(Self::Hmac),
            _ => None,
        }
    }

    /// The word for listings.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Hmac => "hmac-sha256",
        }
    }
}

/// Identifies a pepper without revealing it: the first 8 bytes of the HMAC-SHA-256 of a constant under the pepper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 8]);

impl Fingerprint {
    /// Means "no pepper" in the database: keys are stored under their plain SHA-256.
    pub const NO_PEPPER: Self = Self([0; 8]);

    /// The fingerprint written as 16 hexadecimal digits.
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

/// The pepper that the database names for new keys, and the one before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoredPeppers {
    /// Recorded by the first command that issued or imported a key, or by `pepper use`; `None`: no such command has run yet.
    pub current: Option<Fingerprint>,
    /// What `current` replaced; [`Fingerprint::NO_PEPPER`] where keys were stored without a pepper before.
    pub previous: Option<Fingerprint>,
}

impl StoredPeppers {
    /// Whether a server is ready: one of its peppers, whose fingerprints are `known`, is recorded here, or none is recorded
    /// yet. The one before counts too, so that a change of the pepper does not take out every server that was not restarted yet.
    #[must_use]
    pub fn fit(&self, known: &[Fingerprint]) -> bool {
        let recorded = [self.current, self.previous].into_iter().flatten();
        let has_none = known.is_empty() && self.previous == Some(Fingerprint::NO_PEPPER);
        self.current.is_none() || has_none || recorded.into_iter().any(|one| known.contains(&one))
    }

    /// Whether a key that a server with the peppers `known` does not find is unknown. Without the current pepper it may be a
    /// new key that the server cannot recognise.
    #[must_use]
    pub fn identify_all(&self, known: &[Fingerprint]) -> bool {
        self.current.is_none_or(|current| known.contains(&current))
    }
}

/// How the digest of a new key was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Made {
    /// Imported as a SHA-256 digest; the pepper does not apply.
    Elsewhere,
    /// Issued here without a pepper.
    Plain,
    /// Issued here under this pepper.
    Peppered(Fingerprint),
    /// Issued by the canary under this pepper, which is neither compared with the recorded one nor recorded as such.
    Probe(Fingerprint),
}

impl Made {
    /// The scheme of such a digest.
    #[must_use]
    pub const fn scheme(self) -> Scheme {
        match self {
            Self::Elsewhere | Self::Plain => Scheme::Sha256,
            Self::Peppered(_) | Self::Probe(_) => Scheme::Hmac,
        }
    }

    /// The pepper, if there is one.
    #[must_use]
    pub const fn fingerprint(self) -> Option<Fingerprint> {
        match self {
            Self::Elsewhere | Self::Plain => None,
            Self::Peppered(fingerprint) | Self::Probe(fingerprint) => Some(fingerprint),
        }
    }
}

/// The digests one presented key may be stored under.
#[derive(Clone, Debug)]
pub struct Digests {
    /// Under the scheme in force: what caches are keyed by.
    pub current: ApiKeyDigest,
    /// Under schemes that were in force before (a pepper was set or changed), newest first.
    pub older: Vec<ApiKeyDigest>,
}

impl Digests {
    /// Every digest, the current one first.
    pub fn all(&self) -> impl Iterator<Item = &ApiKeyDigest> {
        std::iter::once(&self.current).chain(&self.older)
    }

    /// Whether `stored` is one of them; compares with each, in constant time.
    #[must_use]
    pub fn contains(&self, stored: &ApiKeyDigest) -> bool {
        self.all().fold(false, |found, digest| found | digest.matches(stored))
    }
}

/// A key and its trust, as far as decisions need them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The key's row.
    pub key_id: KeyId,
    /// Whom it speaks for.
    pub trust_id: TrustId,
    /// Whether the trust is enabled.
    pub trust_enabled: bool,
    /// The digest it is stored under.
    pub digest: ApiKeyDigest,
    /// What the key may be used for; sorted, without duplicates.
    pub scopes: Box<[String]>,
    /// Where it may be used from; empty: anywhere.
    pub allowed_cidrs: Box<[IpNet]>,
    /// Not valid before this time.
    pub not_before: Option<DatabaseTime>,
    /// Not valid from this time on.
    pub expires_at: Option<DatabaseTime>,
    /// Revoked at this time; any value revokes it.
    pub revoked_at: Option<DatabaseTime>,
}

/// Number of a committed change, in commit order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u64);

/// The random name of a version: two versions with the same number but another nonce are of different histories.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nonce(pub [u8; 16]);

/// Which history a version belongs to: a restored copy or a promoted standby is another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    /// Written at the first migration, and anew whenever history is known to be lost.
    pub incarnation: Uuid,
    /// PostgreSQL's system identifier; 0 for SQLite.
    pub system: u64,
    /// PostgreSQL's timeline; 0 for SQLite.
    pub timeline: u32,
}

/// `T` as the store held it at a version. Value and date come from one statement.
#[derive(Clone, Debug)]
pub struct Versioned<T> {
    /// The value.
    pub value: T,
    /// The newest version when it was read.
    pub as_of: Version,
    /// That version's nonce.
    pub nonce: Nonce,
    /// The history that version belongs to.
    pub lineage: Lineage,
    /// The database's clock during the read. Age is counted from here, through every tier.
    pub read_at: DatabaseTime,
    /// When the read was sent, by this machine's clock; for a value out of Redis, when it was fetched from there.
    pub sent_at: Moment,
}

impl<T> Versioned<T> {
    /// The same date for something made of the value.
    pub fn map<U>(self, make: impl FnOnce(T) -> U) -> Versioned<U> {
        let Self { value, as_of, nonce, lineage, read_at, sent_at } = self;
        Versioned { value: make(value), as_of, nonce, lineage, read_at, sent_at }
    }

    /// The same with the value where it is.
    pub const fn as_ref(&self) -> Versioned<&T> {
        let Self { value, as_of, nonce, lineage, read_at, sent_at } = self;
        Versioned { value, as_of: *as_of, nonce: *nonce, lineage: *lineage, read_at: *read_at, sent_at: *sent_at }
    }
}

/// What a committed change named: which values it makes out of date.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Records of this key.
    Key(KeyId),
    /// Records of this trust.
    Trust(TrustId),
    /// "No such key" under this digest: there may be one now.
    Absent(ApiKeyDigest),
    /// Nothing that is dated; the digest was revoked, deleted or replaced, which outlives a lost history.
    Gone(ApiKeyDigest),
    /// Everything of one kind.
    Whole(ChangeKind),
    /// Everything. Also what a newer release names and this one does not know.
    Everything,
}

/// Kinds of objects that are named as a whole when too many of them change at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// Records, by their keys.
    Keys,
    /// Records, by their trusts.
    Trusts,
    /// Absences.
    Absences,
    /// Digests that are gone.
    Gone,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_goes_both_ways_and_nothing_else_passes() {
        let digest = ApiKeyDigest::from_bytes(std::array::from_fn(|i| u8::try_from(i * 7).unwrap()));
        assert_eq!(ApiKeyDigest::from_hex(&digest.to_hex()), Some(digest));
        assert_eq!(ApiKeyDigest::from_hex(&digest.to_hex().to_uppercase()), Some(digest));
        for bad in ["", "00", &"0".repeat(63), &"0".repeat(65), &"g".repeat(64), &"é".repeat(32)] {
            assert_eq!(ApiKeyDigest::from_hex(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_server_fits_a_database_whose_pepper_it_has() {
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
    fn without_the_current_pepper_an_unknown_key_may_be_a_new_one() {
        let print = |number| Fingerprint([number; 8]);
        let stored = StoredPeppers { current: Some(print(2)), previous: Some(print(1)) };
        assert!(stored.identify_all(&[print(2), print(1)]) && StoredPeppers::default().identify_all(&[]));
        assert!(stored.fit(&[print(1)]) && !stored.identify_all(&[print(1)]));
    }

    #[test]
    fn debug_shows_four_bytes_at_most() {
        assert_eq!(format!("{:?}", ApiKeyDigest::from_bytes([0xab; 32])), "ApiKeyDigest(abababab…)");
    }
}
