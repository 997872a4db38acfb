//! Reads standard input, which may contain API keys. This module bypasses the standard library's buffer, which
//! would keep the keys in memory. It uses its own buffer, and overwrites that buffer after use.

use std::{
    fs::File,
    io::{self, IsTerminal, Read},
    os::fd::AsFd,
};

use zeroize::Zeroizing;

use crate::base::{secret::Secret, text};

/// The maximum length of the text that [`text()`] accepts, in bytes.
const TEXT_BYTES_MAX: usize = 1 << 20;

/// Opens standard input as a file, which bypasses the standard library's buffer.
pub(crate) fn open() -> io::Result<File> {
    Ok(File::from(io::stdin().as_fd().try_clone_to_owned()?))
}

/// Reads all of standard input, and removes a byte order mark. Bytes that are not UTF-8 become replacement characters,
/// which no key contains.
///
/// # Errors
/// Standard input cannot be read, is UTF-16, or is longer than [`TEXT_BYTES_MAX`].
pub(crate) fn text() -> io::Result<Secret> {
    if io::stdin().is_terminal() {
        // Without a prompt, the command would seem to hang. If the prompt cannot be written, read anyway.
        let _ = io::Write::write_all(&mut io::stderr(), b"Reading from the terminal; end with Ctrl-D on a new line.\n");
    }
    read(open()?)
}

fn read(mut input: impl Read) -> io::Result<Secret> {
    // Allocate the maximum at once: a buffer that grows leaves copies of its content in freed memory.
    let mut bytes = Zeroizing::new(vec![0; TEXT_BYTES_MAX + 1]);
    let mut length = 0;
    while length < bytes.len() {
        match input.read(&mut bytes[length..]) {
            Ok(0) => {
                let text = String::from_utf8_lossy(text::without_mark(&bytes[..length])?).into_owned();
                return Ok(Secret::new(text));
            }
            Ok(more) => length += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "standard input is longer than 1 MiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_over_the_limit_is_an_error_and_not_truncated() {
        assert_eq!(read(&b"a key\xff\n"[..]).unwrap().expose(), "a key\u{fffd}\n");
        assert!(read(io::repeat(b'a')).is_err());
        assert_eq!(read(io::repeat(b'a').take(1 << 20)).unwrap().expose().len(), 1 << 20);
    }
}
