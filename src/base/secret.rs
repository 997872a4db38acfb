//! Values that must never be shown: they have no `Display`, and their `Debug` prints stars.
//!
//! Never logs, never formats, never compares in variable time.

use std::{fmt, fs, io, path::Path};

use zeroize::{Zeroize, Zeroizing};

use super::text;

/// A secret text: a password, a pepper, a URL that may hold one. Overwritten in memory when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes charge of `text`.
    #[must_use]
    pub const fn new(text: String) -> Self {
        Self(text)
    }

    /// Reads a secret from a file, without the byte order mark and the line end that editors put there.
    ///
    /// # Errors
    /// What the operating system says when the file cannot be read, or `InvalidData` with the reason in words when it does not
    /// hold one line of text.
    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(Self(text::value(&Self::read_text(path)?.0)?.to_owned()))
    }

    /// Reads a text of several lines that may hold secrets.
    ///
    /// # Errors
    /// As [`Self::read`]; the text may be empty.
    pub fn read_text(path: &Path) -> io::Result<Self> {
        let bytes = Zeroizing::new(fs::read(path)?);
        Ok(Self(text::decode(&bytes)?.to_owned()))
    }

    /// The secret itself; the name makes every use easy to find.
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
    fn a_secret_never_prints_itself() {
        assert_eq!(format!("{:?}", Some(Secret::new("hunter2".into()))), "Some(***)");
    }
}
