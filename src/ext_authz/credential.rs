//! The credential of a request: where trustgate looks for it, its form and its digest.
//!
//! Apart from reading pepper files, this module does no I/O. It does not store keys.

pub(crate) mod digest;
pub(crate) mod extract;
pub(crate) mod format;
pub(crate) mod source;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

pub use self::digest::Hasher;
pub(crate) use self::format::Prefix;
pub use self::source::Source;
use crate::base::{
    secret::Secret,
    settings::{RawValue, Setting},
    text,
};

crate::settings! {
    /// Where trustgate looks for the API key of a request, and the form of keys.
    pub struct CredentialSettings in "credential" {
        /// Where to look for the key, in this order: `header:NAME`, `authorization:bearer`, `authorization:apikey`,
        /// `query:NAME`, `cookie:NAME`.
        sources: Vec<Source> = "header:x-api-key",
        /// What to do if two sources contain different keys. `deny`: deny the request. `first`: use the key of the
        /// first source in `sources`. In both cases, no key reaches the upstream.
        on_multiple: OnMultiple = "deny",
        /// How a key is removed from the query. `parameter`: Envoy removes the parameter, and also sorts and re-encodes
        /// the other parameters. `exact`: trustgate sets `:path` to the same path without the parameter; Envoy's
        /// `allow_expression` must then permit `:path`.
        query_removal: QueryRemoval = "parameter",
        /// The prefix of the keys that trustgate issues, without the `_` that follows it.
        prefix: Prefix = "tg",
        /// Accept only keys in the form that trustgate issues, with a correct checksum. Set this when every client has
        /// a key that trustgate issued.
        require_checksum: bool = "false",
        /// The pepper: a secret of at least 16 bytes with which keys are hashed, so that the stored digests are useless
        /// without the secret. Unset: digests are plain SHA-256.
        pepper: Option<Pepper> = "",
        /// A file that contains the pepper.
        pepper_file: Option<PathBuf> = "",
        /// Files that contain earlier peppers, newest first. Keys hashed with these peppers remain valid.
        previous_pepper_files: Vec<PathBuf> = "",
    }
}

impl CredentialSettings {
    /// Creates the hasher with the configured peppers. Reads the pepper files.
    ///
    /// # Errors
    /// If a pepper file cannot be read or does not contain one line of text.
    pub fn hasher(&self) -> io::Result<Hasher> {
        self.read_hasher(|warning| tracing::warn!("{warning}"))
    }

    /// Reads the peppers again, so that the caller can compare them with the peppers that were read at startup. Does
    /// not log the warnings a second time.
    ///
    /// # Errors
    /// Same as [`Self::hasher`].
    pub fn hasher_again(&self) -> io::Result<Hasher> {
        self.read_hasher(|_| ())
    }

    /// True if at least one pepper comes from a file.
    #[must_use]
    pub const fn has_pepper_files(&self) -> bool {
        self.pepper_file.is_some() || !self.previous_pepper_files.is_empty()
    }

    fn read_hasher(&self, warn: impl Fn(&str)) -> io::Result<Hasher> {
        let file = self.pepper_file.as_deref().map(Pepper::read_file).transpose()?;
        let pepper = self.pepper.as_ref().or(file.as_ref());
        let mut previous: Vec<_> = pepper.and_then(|pepper| pepper.untrimmed.clone()).into_iter().collect();
        if !previous.is_empty() {
            warn(
                "pepper cleaned: removed a byte order mark or line ends from credential.pepper or from the file that \
                 credential.pepper_file names; keys that were issued with the uncleaned text keep working",
            );
        }
        for file in &self.previous_pepper_files {
            let pepper = Pepper::read_file(file)?;
            if pepper.is_short() {
                warn(&format!(
                    "previous pepper too short: {} (credential.previous_pepper_files) has fewer than \
                     {PEPPER_BYTES_MIN} bytes, so it can be guessed; replace the keys that were issued under it",
                    file.display()
                ));
            }
            let Pepper { secret, untrimmed } = pepper;
            previous.extend([secret].into_iter().chain(untrimmed));
        }
        Ok(Hasher::new(pepper.map(|pepper| &pepper.secret), &previous))
    }
}

/// Minimum length of a pepper with which trustgate hashes new keys, in bytes.
const PEPPER_BYTES_MIN: usize = 16;
/// The error for a pepper that is too short.
const SHORT_PEPPER: &str = "a pepper must have 16 bytes or more: generate one with `openssl rand -hex 32`";

/// A pepper, from a setting or from a file.
#[derive(Clone, Debug)]
pub struct Pepper {
    secret: Secret,
    /// The text before a byte order mark and line ends were removed, if there were any. Earlier releases hashed keys
    /// with that text.
    untrimmed: Option<Secret>,
}

impl Pepper {
    /// True if the pepper is so short that it can be guessed.
    fn is_short(&self) -> bool {
        self.secret.expose().len() < PEPPER_BYTES_MIN
    }

    /// Returns an error if the pepper is too short to be the current pepper.
    ///
    /// # Errors
    /// `InvalidData`, with the minimum length in its message.
    pub fn check_length(&self) -> io::Result<()> {
        let short = || io::Error::new(io::ErrorKind::InvalidData, SHORT_PEPPER);
        if self.is_short() { Err(short()) } else { Ok(()) }
    }

    /// Reads a pepper from a file.
    ///
    /// # Errors
    /// Same as [`Secret::read`].
    pub fn read_file(path: &Path) -> io::Result<Self> {
        let bytes = Zeroizing::new(fs::read(path)?);
        let text = text::decode(&bytes)?;
        let secret = text::value(text)?;
        // Earlier releases removed line ends from the text of a pepper file, but not a byte order mark, so keys may
        // have been hashed with a pepper that includes the mark.
        let has_mark = text.len() < bytes.len();
        let untrimmed = has_mark.then(|| Secret::new(format!("\u{feff}{secret}")));
        Ok(Self { secret: Secret::new(secret.to_owned()), untrimmed })
    }
}

impl Setting for Pepper {
    const EXPECTED: &'static str = Secret::EXPECTED;

    fn read(written: &RawValue) -> Option<Self> {
        let secret = <Secret as Setting>::read(written)?;
        let RawValue::One(text) = written else { return None };
        let untrimmed = (text != secret.expose()).then(|| Secret::new(text.clone()));
        Some(Self { secret, untrimmed })
    }
}

crate::setting_enum! {
    /// What to do if two sources contain different keys.
    pub enum OnMultiple ("\"deny\" or \"first\"") {
        /// Deny the request, because it is unclear which key the application would use.
        Deny = "deny",
        /// Use the key of the first source in `sources`.
        First = "first",
    }
}

crate::setting_enum! {
    /// How a key is removed from the query.
    pub enum QueryRemoval ("\"parameter\" or \"exact\"") {
        /// Envoy removes the parameter (`query_parameters_to_remove`).
        Parameter = "parameter",
        /// trustgate sets a new `:path` without the parameter.
        Exact = "exact",
    }
}

/// Minimum length of a credential that is looked up, in bytes.
pub(crate) const KEY_BYTES_MIN: usize = 16;
/// Maximum length of a credential that is looked up, in bytes.
pub(crate) const KEY_BYTES_MAX: usize = 512;

/// True if `key` can be looked up. The key must have 16 to 512 bytes of visible ASCII and no comma: Envoy joins
/// repeated headers with a comma, so a key with a comma would be ambiguous. The checksum of a trustgate key must be
/// correct. If `require_checksum` is set, foreign keys are refused.
#[must_use]
pub(crate) fn is_well_formed(settings: &CredentialSettings, key: &[u8]) -> bool {
    (KEY_BYTES_MIN..=KEY_BYTES_MAX).contains(&key.len())
        && key.iter().all(|byte| byte.is_ascii_graphic() && *byte != b',')
        && match format::form(&settings.prefix, key) {
            format::Form::Ours => true,
            format::Form::Mistyped => false,
            format::Form::Foreign => !settings.require_checksum,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_with_a_comma_are_malformed() {
        let settings = CredentialSettings::default();
        assert!(is_well_formed(&settings, b"a-foreign-key-of-another-system"));
        for key in [&b"a-foreign-key-of,another-system"[..], b",a-foreign-key-of-another-system"] {
            assert!(!is_well_formed(&settings, key));
        }
    }

    #[test]
    fn keys_hashed_with_a_pepper_that_includes_its_line_end_are_found() {
        let hasher = |text: &str| {
            let pepper = Pepper::read(&RawValue::One(text.to_owned()));
            CredentialSettings { pepper, ..CredentialSettings::default() }.hasher().unwrap()
        };
        let (with, without) = (hasher("pepper\n"), hasher("pepper"));
        assert_eq!(with.current(b"key"), without.current(b"key"));
        let stored = Hasher::new(Some(&Secret::new("pepper\n".to_owned())), &[]).current(b"key");
        assert!(with.digests(with.current(b"key"), b"key").contains(&stored));
        assert!(!without.digests(without.current(b"key"), b"key").contains(&stored));
    }

    #[test]
    fn keys_hashed_with_a_pepper_that_includes_a_byte_order_mark_are_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "\u{feff}pepper\r\n").unwrap();
        let settings =
            CredentialSettings { pepper_file: Some(file.path().to_owned()), ..CredentialSettings::default() };
        let hasher = settings.hasher().unwrap();
        let hashed_with = |text: &str| Hasher::new(Some(&Secret::new(text.to_owned())), &[]).current(b"key");
        assert_eq!(hasher.current(b"key"), hashed_with("pepper"));
        assert!(hasher.digests(hasher.current(b"key"), b"key").contains(&hashed_with("\u{feff}pepper")));
    }
}
