//! Values that must never be shown: they have no `Display`, and their `Debug` prints stars.
//!
//! Never logs, never formats, never compares in variable time.

use std::{fmt, fs, io, path::Path};

use zeroize::Zeroize;

/// A secret text: a password, a pepper, a URL that may hold one. Overwritten in memory when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes charge of `text`.
    #[must_use]
    pub const fn new(text: String) -> Self {
        Self(text)
    }

    /// Reads a secret from a file, without the line end that editors put there.
    ///
    /// # Errors
    /// What the operating system says when the file cannot be read, or `InvalidData` when it is empty or not UTF-8.
    pub fn read(path: &Path) -> io::Result<Self> {
        let text = Self(fs::read_to_string(path)?);
        let bare = text.0.trim_end_matches(['\r', '\n']);
        if bare.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is empty"));
        }
        Ok(Self(bare.to_owned()))
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
