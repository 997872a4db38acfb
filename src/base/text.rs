//! Decodes text from files, environment variables and standard input. All three sources use this module, so that the
//! same text has the same meaning in each source.
//!
//! Editors may add a byte order mark; shells and Kubernetes secrets may add a line end. `value` removes both. Errors
//! do not quote the text, because the text may be a secret.

use std::io;

/// Why bytes cannot be used as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// The text begins with a UTF-16 byte order mark.
    #[error("the text is UTF-16; save it as UTF-8")]
    Utf16,
    /// The bytes are not UTF-8.
    #[error("the text is not UTF-8; for a random secret, use `openssl rand -hex 32`")]
    NotUtf8,
    /// The text is empty, or contains only a byte order mark and line ends.
    #[error("the text is empty")]
    Empty,
    /// The text contains a control character.
    #[error("the text contains a control character or a line end; a value must be one line of text")]
    Control,
}

impl From<TextError> for io::Error {
    fn from(error: TextError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// Returns `bytes` without a UTF-8 byte order mark.
///
/// # Errors
/// [`TextError::Utf16`]
pub(crate) fn without_mark(bytes: &[u8]) -> Result<&[u8], TextError> {
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err(TextError::Utf16);
    }
    Ok(bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes))
}

/// Decodes `bytes` as UTF-8, and removes a byte order mark.
///
/// # Errors
/// [`TextError::Utf16`] and [`TextError::NotUtf8`]
pub(crate) fn decode(bytes: &[u8]) -> Result<&str, TextError> {
    std::str::from_utf8(without_mark(bytes)?).map_err(|_| TextError::NotUtf8)
}

/// Returns the value in `text`, without a byte order mark at the start and line ends at the end.
///
/// # Errors
/// [`TextError::Empty`] and [`TextError::Control`]
pub(crate) fn value(text: &str) -> Result<&str, TextError> {
    let value = text.strip_prefix('\u{feff}').unwrap_or(text).trim_end_matches(['\r', '\n']);
    if value.is_empty() {
        return Err(TextError::Empty);
    }
    if value.contains(char::is_control) { Err(TextError::Control) } else { Ok(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_order_mark_and_trailing_line_breaks_are_removed_and_other_text_is_kept() {
        for (bytes, want) in [
            (&b"pepper"[..], Ok("pepper")),
            (b"pepper\n", Ok("pepper")),
            (b"pepper\r\n\r\n", Ok("pepper")),
            (b"\xef\xbb\xbfpepper\r\n", Ok("pepper")),
            (b" pepper ", Ok(" pepper ")),
            ("p\u{e9}pper".as_bytes(), Ok("p\u{e9}pper")),
            (b"", Err(TextError::Empty)),
            (b"\xef\xbb\xbf\r\n", Err(TextError::Empty)),
            (b"two\nlines", Err(TextError::Control)),
            (b"nul\0", Err(TextError::Control)),
            (b"\xff\xfep\0", Err(TextError::Utf16)),
            (b"\xfe\xff\0p", Err(TextError::Utf16)),
            (b"\x80\x81", Err(TextError::NotUtf8)),
        ] {
            assert_eq!(decode(bytes).and_then(value), want, "{bytes:?}");
        }
    }
}
