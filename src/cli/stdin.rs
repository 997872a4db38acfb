//! Standard input, which may hold keys: read without a buffer that would outlive the reading.
//!
//! Never shows what it read.

use std::{
    fs::File,
    io::{self, IsTerminal, Read},
    os::fd::AsFd,
};

use zeroize::Zeroizing;

use crate::base::{secret::Secret, text};

/// The longest text that is read at once, in bytes.
const TEXT_BYTES_MAX: usize = 1 << 20;

/// Standard input as a file, past the buffer that the standard library keeps.
pub(crate) fn open() -> io::Result<File> {
    Ok(File::from(io::stdin().as_fd().try_clone_to_owned()?))
}

/// Everything on standard input. What is not UTF-8 becomes a replacement character: no key holds such.
pub(crate) fn text() -> io::Result<Secret> {
    if io::stdin().is_terminal() {
        // A hint for somebody who sees nothing happen; answers go elsewhere.
        let _ = io::Write::write_all(&mut io::stderr(), b"Reading from the terminal; end with Ctrl-D on a new line.\n");
    }
    read(open()?)
}

fn read(mut input: impl Read) -> io::Result<Secret> {
    // All of it at once, so that growing leaves no copies behind.
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
    Err(io::Error::new(io::ErrorKind::InvalidData, "more than 1 MiB on standard input"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_much_is_refused_and_not_cut() {
        assert_eq!(read(&b"a key\xff\n"[..]).unwrap().expose(), "a key\u{fffd}\n");
        assert!(read(io::repeat(b'a')).is_err());
        assert_eq!(read(io::repeat(b'a').take(1 << 20)).unwrap().expose().len(), 1 << 20);
    }
}
