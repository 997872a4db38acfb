//! The form of the keys that trustgate issues: a prefix, `_`, 43 base62 characters from 32 random bytes, and 6 base62
//! characters of a CRC-32.
//!
//! The checksum detects typing errors and lets scanners recognise a leaked key. The checksum does not prove that
//! trustgate issued the key.

use crate::base::{
    secret::Secret,
    settings::{RawValue, Setting},
};

const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
/// 62^43 > 2^256: enough characters for 32 bytes.
const RANDOM_CHARS: usize = 43;
/// 62^6 > 2^32: enough characters for a CRC-32.
const CHECKSUM_CHARS: usize = 6;
/// Number of characters in a trustgate key after its prefix and `_`.
pub(crate) const BODY_CHARS: usize = RANDOM_CHARS + CHECKSUM_CHARS;
/// Number of characters after the prefix and `_` in the hint of a trustgate key.
const HINT_CHARS: usize = 5;

/// The prefix of trustgate keys: 1 to 16 letters, digits or `_`. In a key, `_` follows the prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix(String);

impl Prefix {
    /// Returns the prefix, without the `_` that follows it in a key.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the part of `key` after the prefix and `_`; `None` if `key` does not begin with them.
    fn body<'k>(&self, key: &'k [u8]) -> Option<&'k [u8]> {
        key.strip_prefix(self.0.as_bytes())?.strip_prefix(b"_")
    }
}

impl Setting for Prefix {
    const EXPECTED: &'static str = "1 to 16 letters, digits or _";
    fn read(written: &RawValue) -> Option<Self> {
        let text = String::read(written)?;
        let fits =
            (1..=16).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        fits.then_some(Self(text))
    }
}

/// The class of a key, by its form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The form of a trustgate key, with a correct checksum.
    Ours,
    /// The prefix and length of a trustgate key, with an incorrect checksum: mistyped or made up.
    Mistyped,
    /// Any other form: an opaque key that another system issued.
    Foreign,
}

/// Classifies `key` by its form, without a lookup.
#[must_use]
pub(crate) fn form(prefix: &Prefix, key: &[u8]) -> Form {
    match prefix.body(key) {
        Some(body) if body.len() == BODY_CHARS => {
            let (random, checksum) = body.split_at(RANDOM_CHARS);
            if checksum_of(prefix, random) == checksum { Form::Ours } else { Form::Mistyped }
        }
        _ => Form::Foreign,
    }
}

/// True if `text` is a trustgate key with any prefix. Callers use this function to keep keys out of error messages.
#[must_use]
pub(crate) fn is_key(text: &str) -> bool {
    let prefix = text.rsplit_once('_').and_then(|(prefix, _)| Prefix::read(&RawValue::One(prefix.to_owned())));
    prefix.is_some_and(|prefix| form(&prefix, text.as_bytes()) == Form::Ours)
}

/// Generates a new key from 32 random bytes, which the operating system provides.
///
/// # Errors
/// If the operating system provides no randomness.
pub fn generate(prefix: &Prefix) -> Result<Secret, getrandom::Error> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes)?;
    Ok(from_random(prefix, bytes))
}

fn from_random(prefix: &Prefix, bytes: [u8; 32]) -> Secret {
    let random = base62(bytes);
    let checksum = checksum_of(prefix, &random);
    let mut key = String::with_capacity(prefix.0.len() + 1 + BODY_CHARS);
    key.push_str(&prefix.0);
    key.push('_');
    key.extend(random.iter().chain(&checksum).map(|byte| char::from(*byte)));
    Secret::new(key)
}

/// Returns the leading characters of `key`, which are stored so that operators can recognise the key. For a trustgate
/// key, these are the prefix, `_` and 5 more characters; for any other key, a quarter of its length, but at most 4
/// characters.
#[must_use]
pub(crate) fn hint(prefix: &Prefix, key: &[u8]) -> String {
    let chars = match form(prefix, key) {
        Form::Ours => prefix.0.len() + 1 + HINT_CHARS,
        Form::Mistyped | Form::Foreign => (key.len() / 4).min(4),
    };
    String::from_utf8_lossy(&key[..chars]).into_owned()
}

/// Returns the CRC-32 (IEEE, as in zlib) of the prefix, `_` and the random characters, in base 62. The checksum covers
/// the prefix, so it does not match under another prefix.
fn checksum_of(prefix: &Prefix, random: &[u8]) -> [u8; CHECKSUM_CHARS] {
    let mut crc = crc32fast::Hasher::new();
    crc.update(prefix.0.as_bytes());
    crc.update(b"_");
    crc.update(random);
    let (mut number, mut digits) = (crc.finalize(), [ALPHABET[0]; CHECKSUM_CHARS]);
    for digit in digits.iter_mut().rev() {
        *digit = ALPHABET[(number % 62) as usize];
        number /= 62;
    }
    digits
}

/// Encodes a big-endian number in base 62, padded with zeros on the left.
fn base62(mut number: [u8; 32]) -> [u8; RANDOM_CHARS] {
    let mut digits = [ALPHABET[0]; RANDOM_CHARS];
    for digit in digits.iter_mut().rev() {
        let mut rest = 0_u32;
        for byte in &mut number {
            let part = rest << 8 | u32::from(*byte);
            *byte = (part / 62).to_le_bytes()[0]; // rest < 62, so part / 62 < 256
            rest = part % 62;
        }
        *digit = ALPHABET[rest as usize];
    }
    digits
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tg() -> Prefix {
        Prefix("tg".into())
    }

    #[test]
    fn key_format_is_stable_across_releases() {
        // A release must recognise the keys of earlier releases. An independent implementation of the format generated
        // this key.
        assert_eq!(from_random(&tg(), [0xff; 32]).expose(), "tg_yhjskwdA6OZ1AL1YmHWZWm8LLG7HjnuCA2j5rOw8Xp10Xwm86");
    }

    proptest! {
        #[test]
        fn generated_keys_are_recognised_and_mistyped_keys_are_not(
            bytes: [u8; 32],
            at in 3_usize..52,
            to in 0_usize..62,
        ) {
            let key = from_random(&tg(), bytes);
            prop_assert_eq!(key.expose().len(), 52);
            prop_assert_eq!(form(&tg(), key.expose().as_bytes()), Form::Ours);
            let mut wrong = key.expose().as_bytes().to_vec();
            wrong[at] = ALPHABET[to];
            let same = wrong == key.expose().as_bytes();
            prop_assert_eq!(form(&tg(), &wrong), if same { Form::Ours } else { Form::Mistyped });
        }
    }

    #[test]
    fn is_key_recognises_keys_with_any_prefix() {
        for prefix in ["tg", "acme", "a_b"] {
            let prefix = Prefix::read(&RawValue::One(prefix.to_owned())).unwrap();
            assert!(is_key(generate(&prefix).unwrap().expose()));
        }
        assert!(!is_key("acme") && !is_key("tg_acme") && !is_key(&"a".repeat(60)));
    }

    #[test]
    fn hints_reveal_only_a_few_leading_characters() {
        let key = generate(&tg()).unwrap();
        assert_eq!(hint(&tg(), key.expose().as_bytes()), key.expose()[..8]);
        assert_eq!(hint(&tg(), b"a-foreign-key-of-some-length"), "a-fo");
        assert_eq!(hint(&tg(), b"short"), "s");
    }
}
