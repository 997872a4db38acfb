//! Strings that must not be printed. [`Secret`] has no `Display`, and its `Debug` prints `***`.

use std::{fmt, fs, io, path::Path};

use zeroize::{Zeroize, Zeroizing};

use super::text;

/// A secret string: a password, a pepper, or a URL that may contain a password. Dropping a secret overwrites its
/// memory. The type has no `PartialEq`, because `==` would not compare in constant time.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// Wraps `text` as a secret.
    #[must_use]
    pub const fn new(text: String) -> Self {
        Self(text)
    }

    /// Reads a secret from a file, without the byte order mark and the line end that editors add.
    ///
    /// # Errors
    /// The operating system's error if the file cannot be read, or `InvalidData` with the reason if the file does
    /// not contain one line of text.
    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(Self(text::value(&Self::read_text(path)?.0)?.to_owned()))
    }

    /// Reads text from a file. The text may span several lines and contain secrets.
    ///
    /// # Errors
    /// The same as for [`Self::read`], but the text may be empty or have several lines.
    pub fn read_text(path: &Path) -> io::Result<Self> {
        let bytes = Zeroizing::new(fs::read(path)?);
        Ok(Self(text::decode(&bytes)?.to_owned()))
    }

    /// Returns the secret in plaintext. The name of this method makes each use easy to find.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_does_not_contain_the_secret() {
        assert_eq!(format!("{:?}", Some(Secret::new("hunter2".into()))), "Some(***)");
    }
}
