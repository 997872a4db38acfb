//! Computes the digests of keys: HMAC-SHA-256 with the pepper if a pepper is set, otherwise plain SHA-256.
//!
//! Keys are hashed in place, without a copy.

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use crate::{
    base::secret::Secret,
    record::{ApiKeyDigest, Digests, Fingerprint, Made},
};

/// Hashes keys with the current scheme and with the earlier schemes that stored keys may still use.
#[derive(Clone)]
pub struct Hasher {
    /// HMAC states that are initialised with the peppers, the current pepper first. Empty: keys are hashed with plain
    /// SHA-256.
    peppers: Vec<Hmac<Sha256>>,
    /// The fingerprint of each of `peppers`, in the same order.
    fingerprints: Vec<Fingerprint>,
}

/// The message whose HMAC is a pepper's fingerprint. The message contains spaces, so it cannot be an API key.
const FINGERPRINTED: &[u8] = b"trustgate pepper fingerprint";

impl Hasher {
    /// Creates a hasher with the current `pepper` (`None`: plain SHA-256) and the `previous` peppers, newest first. The
    /// hasher also finds keys hashed with plain SHA-256, so that an operator can set a pepper when the store already
    /// contains keys.
    #[must_use]
    pub fn new(pepper: Option<&Secret>, previous: &[Secret]) -> Self {
        let keyed = |secret: &Secret| {
            // HMAC (RFC 2104) takes a key of any length.
            Hmac::new_from_slice(secret.expose().as_bytes()).unwrap_or_else(|_| unreachable!("HMAC takes any length"))
        };
        let peppers: Vec<_> = pepper.into_iter().chain(previous).map(keyed).collect();
        let fingerprints = peppers.iter().map(fingerprint).collect();
        Self { peppers, fingerprints }
    }

    /// Returns the digest of `key` with the current scheme. A cache hit needs no other digest.
    #[must_use]
    pub fn current(&self, key: &[u8]) -> ApiKeyDigest {
        self.peppers.first().map_or_else(|| plain(key), |pepper| peppered(pepper, key))
    }

    /// Returns the fingerprints of the peppers, the current pepper first, in the order of [`Digests::all`].
    #[must_use]
    pub fn fingerprints(&self) -> &[Fingerprint] {
        &self.fingerprints
    }

    /// Returns the scheme with which new keys are hashed.
    #[must_use]
    pub fn made(&self) -> Made {
        self.fingerprints.first().map_or(Made::Plain, |fingerprint| Made::Peppered(*fingerprint))
    }

    /// Returns `current` and the digests of `key` with the earlier schemes. Only cache misses call this function,
    /// because it computes one hash for each earlier scheme.
    #[must_use]
    pub fn digests(&self, current: ApiKeyDigest, key: &[u8]) -> Digests {
        Digests { current, older: self.older(key).collect() }
    }

    /// True if `stored` is a digest of `key`, whose digest with the current scheme is `current`. Compares in constant
    /// time. Hashes `key` with the earlier schemes only if `current` does not match.
    #[must_use]
    pub fn matches(&self, stored: &ApiKeyDigest, current: &ApiKeyDigest, key: &[u8]) -> bool {
        current.matches(stored) || self.older(key).any(|digest| digest.matches(stored))
    }

    fn older(&self, key: &[u8]) -> impl Iterator<Item = ApiKeyDigest> {
        let previous = self.peppers.iter().skip(1).map(|pepper| peppered(pepper, key));
        previous.chain((!self.peppers.is_empty()).then(|| plain(key)))
    }
}

fn plain(key: &[u8]) -> ApiKeyDigest {
    ApiKeyDigest::from_bytes(Sha256::digest(key).into())
}

fn fingerprint(pepper: &Hmac<Sha256>) -> Fingerprint {
    let mac: [u8; 32] = pepper.clone().chain_update(FINGERPRINTED).finalize().into_bytes().into();
    Fingerprint(std::array::from_fn(|index| mac[index]))
}

fn peppered(pepper: &Hmac<Sha256>, key: &[u8]) -> ApiKeyDigest {
    ApiKeyDigest::from_bytes(pepper.clone().chain_update(key).finalize().into_bytes().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_match_published_test_vectors() {
        // FIPS 180-4 example "abc", and RFC 4231 test case 2.
        assert_eq!(
            Hasher::new(None, &[]).current(b"abc").to_hex(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(
            Hasher::new(Some(&Secret::new("Jefe".into())), &[]).current(b"what do ya want for nothing?").to_hex(),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }

    #[test]
    fn keys_hashed_without_a_pepper_or_with_a_previous_pepper_are_found() {
        let (old, new) = (Secret::new("old".into()), Secret::new("new".into()));
        let now = Hasher::new(Some(&new), std::slice::from_ref(&old));
        let digests = now.digests(now.current(b"key"), b"key");
        for before in [Hasher::new(None, &[]), Hasher::new(Some(&old), &[]), Hasher::new(Some(&new), &[])] {
            assert!(digests.contains(&before.current(b"key")));
        }
        assert!(!digests.contains(&Hasher::new(None, &[]).current(b"other")));
    }
}
