//! Sealed values: the format of data in Redis that only programs with the MAC key can write.
//!
//! A sealed value consists of the layout (1 byte), a MAC (32 bytes) and the body. The MAC is HMAC-SHA-256 over the
//! layout, the kind, the name and the body. So a client that can write to Redis but lacks the MAC key can neither
//! create a value nor move a value to a different name or kind.

use std::sync::{Arc, OnceLock};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::base::saturate::Saturate as _;

/// The MAC key. It comes from a file, or from the store once the store has answered.
pub type MacKey = Arc<OnceLock<[u8; 32]>>;

/// The length of a sealed value with an empty body, in bytes.
pub(crate) const SEALED_BYTES_MIN: usize = 1 + MAC_BYTES;
const MAC_BYTES: usize = 32;

/// The part of a sealed value that all values of one kind share.
#[derive(Clone, Copy)]
pub(crate) struct Envelope<'k> {
    /// The format version of the body. [`Envelope::open`] rejects a value with a different version.
    pub(crate) layout: u8,
    /// The kind of value, at most 255 bytes long. Kinds that share a MAC key must have different names.
    pub(crate) kind: &'k str,
}

impl Envelope<'_> {
    /// Seals the body that `write_body` appends, and returns the value to store under `name`.
    pub(crate) fn seal(self, mac_key: &[u8; 32], name: Name<'_>, write_body: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = vec![self.layout];
        bytes.resize(SEALED_BYTES_MIN, 0);
        write_body(&mut bytes);
        let mac = self.mac(mac_key, name, &bytes[SEALED_BYTES_MIN..]).finalize().into_bytes();
        bytes[1..SEALED_BYTES_MIN].copy_from_slice(&mac);
        bytes
    }

    /// Returns the body of `value`, or `None` unless the value was sealed with this MAC key, under this name and in
    /// this envelope.
    pub(crate) fn open<'v>(self, mac_key: &[u8; 32], name: Name<'_>, value: &'v [u8]) -> Option<&'v [u8]> {
        let ([layout], rest) = value.split_first_chunk()?;
        let (mac, body) = rest.split_first_chunk::<MAC_BYTES>()?;
        let is_genuine = *layout == self.layout && self.mac(mac_key, name, body).verify_slice(mac).is_ok();
        is_genuine.then_some(body)
    }

    /// Computes the MAC. The kind, and a name whose length varies, are preceded by their length, so that two different
    /// inputs do not produce the same bytes.
    fn mac(self, mac_key: &[u8; 32], name: Name<'_>, body: &[u8]) -> Hmac<Sha256> {
        let mac = Hmac::<Sha256>::new_from_slice(mac_key)
            .unwrap_or_else(|_| unreachable!("HMAC takes a key of any length (RFC 2104)"))
            .chain_update([self.layout, self.kind.len().saturate::<u8>()])
            .chain_update(self.kind);
        let mac = match name {
            Name::Fixed(name) => mac.chain_update(name),
            Name::Varying(name) => mac.chain_update([name.len().saturate::<u8>()]).chain_update(name),
        };
        mac.chain_update(body)
    }
}

/// The name of a value, which the MAC covers.
#[derive(Clone, Copy)]
pub(crate) enum Name<'n> {
    /// All names of this kind have the same length.
    Fixed(&'n [u8]),
    /// The lengths of the names vary, up to 255 bytes.
    Varying(&'n str),
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC_KEY: [u8; 32] = [5; 32];
    const ENVELOPE: Envelope<'_> = Envelope { layout: 1, kind: "kind" };

    #[test]
    fn value_is_rejected_if_changed_or_if_the_envelope_name_or_mac_key_differs() {
        let name = Name::Varying("name");
        let sealed = ENVELOPE.seal(&MAC_KEY, name, |body| body.extend(b"body"));
        assert_eq!(ENVELOPE.open(&MAC_KEY, name, &sealed), Some(&b"body"[..]));
        assert_eq!(ENVELOPE.open(&[6; 32], name, &sealed), None, "different MAC key");
        for other in [Name::Varying("nam"), Name::Varying("eman"), Name::Fixed(b"name")] {
            assert_eq!(ENVELOPE.open(&MAC_KEY, other, &sealed), None);
        }
        for other in [Envelope { layout: 2, ..ENVELOPE }, Envelope { kind: "kin", ..ENVELOPE }] {
            assert_eq!(other.open(&MAC_KEY, name, &sealed), None);
        }
        for at in 0..sealed.len() {
            let mut forged = sealed.clone();
            forged[at] ^= 1;
            assert_eq!(ENVELOPE.open(&MAC_KEY, name, &forged), None, "byte {at}");
            assert_eq!(ENVELOPE.open(&MAC_KEY, name, &sealed[..at]), None, "{at} bytes");
        }
    }

    /// Replicas of different releases share values, so the bytes must stay the same.
    #[test]
    fn sealed_bytes_match_those_from_earlier_releases() {
        let hex = |value: Vec<u8>| crate::record::hex(&value);
        let varying = ENVELOPE.seal(&MAC_KEY, Name::Varying("name"), |body| body.extend(b"body"));
        assert_eq!(hex(varying), "01403271eb280d0b81519b85673cb16417e2d0a2a1aa30a94c38207c5718be9693626f6479");
        let fixed = ENVELOPE.seal(&MAC_KEY, Name::Fixed(b"name"), |body| body.extend(b"body"));
        assert_eq!(hex(fixed), "01dea7ecdece5bd54f8f903d96c67d253f02128cf8dedce9a763418f44f3407cec626f6479");
    }
}
