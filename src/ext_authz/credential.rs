//! The credential of a request: where it may stand, what it must look like, and its digest.
//!
//! Needs no I/O and never keeps a key.

pub mod digest;
pub mod extract;
pub mod format;
pub mod source;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

pub use self::digest::Hasher;
pub use self::format::Prefix;
pub use self::source::Source;
use crate::base::{
    secret::Secret,
    settings::{RawValue, Setting},
    text,
};

crate::settings! {
    /// Where a request's API key stands and what it looks like.
    pub struct CredentialSettings in "credential" {
        /// Where to look, in this order: `header:NAME`, `authorization:bearer`, `authorization:apikey`, `query:NAME`,
        /// `cookie:NAME`.
        sources: Vec<Source> = "header:x-api-key",
        /// What to do when two sources hold different keys: `deny`, or take the `first`. The keys of all sources are removed either way.
        on_multiple: OnMultiple = "deny",
        /// How a key is taken out of the query. `parameter`: Envoy removes the parameter, then sorts the others and encodes them anew.
        /// `exact`: trustgate sets `:path` to the same path without the key's bytes; Envoy's `allow_expression` must then
        /// permit `:path`.
        query_removal: QueryRemoval = "parameter",
        /// What our own keys begin with, before the `_`.
        prefix: Prefix = "tg",
        /// Refuse keys that are not of our own form. Set it when every client has a key issued here.
        require_checksum: bool = "false",
        /// The pepper: a secret of 16 bytes or more, without which the stored digests are useless. Unset: digests are plain SHA-256.
        pepper: Option<Pepper> = "",
        /// A file that holds the pepper.
        pepper_file: Option<PathBuf> = "",
        /// Files that hold earlier peppers, newest first: keys stored under them keep working.
        previous_pepper_files: Vec<PathBuf> = "",
    }
}

impl CredentialSettings {
    /// The hasher under the peppers set here; reads their files.
    ///
    /// # Errors
    /// What the operating system says of a file that cannot be read.
    pub fn hasher(&self) -> io::Result<Hasher> {
        self.read_hasher(|warning| tracing::warn!("{warning}"))
    }

    /// Reads the peppers again without logging warnings a second time, to compare them with those from the start.
    ///
    /// # Errors
    /// As [`Self::hasher`].
    pub fn hasher_again(&self) -> io::Result<Hasher> {
        self.read_hasher(|_| ())
    }

    /// Whether a pepper is read from a file.
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
                    "the pepper in {} (credential.previous_pepper_files) has fewer than {PEPPER_BYTES_MIN} bytes and can be \
                     guessed: replace the keys that were made under it",
                    file.display()
                ));
            }
            let Pepper { secret, untrimmed } = pepper;
            previous.extend([secret].into_iter().chain(untrimmed));
        }
        Ok(Hasher::new(pepper.map(|pepper| &pepper.secret), &previous))
    }
}

/// The shortest pepper that new keys may be made under, in bytes.
const PEPPER_BYTES_MIN: usize = 16;
/// Why a shorter one is refused.
const SHORT_PEPPER: &str = "a pepper must have 16 bytes or more; `openssl rand -hex 32` makes a good one";

/// A pepper, as a value or from a file.
#[derive(Clone, Debug)]
pub struct Pepper {
    secret: Secret,
    /// The uncleaned text, if cleaning changed it: earlier builds hashed keys with it.
    untrimmed: Option<Secret>,
}

impl Pepper {
    /// Whether it can be guessed.
    fn is_short(&self) -> bool {
        self.secret.expose().len() < PEPPER_BYTES_MIN
    }

    /// Refuses a current pepper that can be guessed.
    ///
    /// # Errors
    /// How long it must be.
    pub fn check_length(&self) -> io::Result<()> {
        let short = || io::Error::new(io::ErrorKind::InvalidData, SHORT_PEPPER);
        if self.is_short() { Err(short()) } else { Ok(()) }
    }

    /// Reads a pepper from a file.
    ///
    /// # Errors
    /// As [`Secret::read`].
    pub fn read_file(path: &Path) -> io::Result<Self> {
        let bytes = Zeroizing::new(fs::read(path)?);
        let text = text::decode(&bytes)?;
        let secret = text::value(text)?;
        // Earlier builds removed line ends from a file, and kept a byte order mark.
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
    /// What to do when two sources hold different keys.
    pub enum OnMultiple ("\"deny\" or \"first\"") {
        /// Deny: nobody can tell which of them the application would believe.
        Deny = "deny",
        /// Take the first in the order of `sources`.
        First = "first",
    }
}

crate::setting_enum! {
    /// How a key is taken out of the query.
    pub enum QueryRemoval ("\"parameter\" or \"exact\"") {
        /// By `query_parameters_to_remove`.
        Parameter = "parameter",
        /// By another `:path`.
        Exact = "exact",
    }
}

/// The shortest credential that is looked up, in bytes.
pub const KEY_BYTES_MIN: usize = 16;
/// The longest credential that is looked up, in bytes.
pub const KEY_BYTES_MAX: usize = 512;

/// Whether `key` can be looked up: 16 to 512 bytes of visible ASCII without a comma, and not a mistyped key of ours (nor a foreign one,
/// where a checksum is required). Envoy joins repeated headers with a comma, so that a key with one would be ambiguous.
#[must_use]
pub fn is_well_formed(settings: &CredentialSettings, key: &[u8]) -> bool {
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
    fn keys_under_a_pepper_with_its_line_end_are_found() {
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
    fn keys_under_a_pepper_file_with_a_byte_order_mark_are_found() {
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
