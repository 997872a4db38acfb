//! Imports keys that were issued elsewhere, one per line. All lines are checked before any key is stored.
//!
//! A plaintext key stays in memory only until it is hashed. Messages do not quote the input, because a line may contain
//! a key.

use std::{fmt, io::Read};

use uuid::Uuid;
use zeroize::Zeroizing;

use super::{ManageError, Manager};
use crate::{
    base::text,
    ext_authz::credential::{self, KEY_BYTES_MAX, format},
    record::{ApiKeyDigest, Digests, KeyId, Made},
    store::ledger::{NewKey, Trust, TrustRef},
};

/// The maximum number of keys in one import. Each key takes about 200 bytes of memory.
pub(crate) const KEYS_MAX: usize = 500_000;
/// The maximum length of a line, in bytes. The limit leaves room for comments and for spaces around a key.
const LINE_BYTES_MAX: usize = 2 * KEY_BYTES_MAX;

/// The format of the input lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineForm {
    /// The SHA-256 digest of a key, as 64 hexadecimal digits.
    Digests,
    /// A key in plaintext.
    Plaintext,
}

/// The result of an import.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// The trust that the keys belong to.
    pub trust: Trust,
    /// The number of keys that were stored.
    pub new: u64,
    /// The number of lines whose key was already stored or appears on an earlier line.
    pub known: u64,
}

/// The invalid lines of the input, in order. Consecutive lines with the same problem are one range.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BadLines(Vec<(usize, usize, &'static str)>);

impl BadLines {
    fn add(&mut self, line: usize, problem: &'static str) {
        match self.0.last_mut() {
            Some((_, last, same)) if *last + 1 == line && *same == problem => *last = line,
            _ => self.0.push((line, line, problem)),
        }
    }
}

impl fmt::Display for BadLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count: usize = self.0.iter().map(|(first, last, _)| last - first + 1).sum();
        write!(f, "import failed: {count} invalid line{}, nothing was stored:", if count == 1 { "" } else { "s" })?;
        for (first, last, problem) in &self.0 {
            if first == last {
                write!(f, "\n  line {first}: {problem}")?;
            } else {
                write!(f, "\n  lines {first} to {last}: {problem}")?;
            }
        }
        Ok(())
    }
}

impl Manager {
    /// Stores the keys in `input` for a trust. Each line contains one key; blank lines and lines that begin with `#`
    /// are skipped. Calls `when_read` with the number of keys after reading all of them and before storing them.
    ///
    /// # Errors
    /// The trust does not exist, the input cannot be read, some of its lines are invalid (the error lists all of them),
    /// or the database failed. After an error, no key has been stored.
    pub async fn import_keys(
        &mut self,
        trust: &TrustRef,
        form: LineForm,
        input: impl Read,
        when_read: impl FnOnce(usize),
    ) -> Result<Imported, ManageError> {
        let trust = self.ledger.trust(trust).await?; // report a missing trust before the long input is read
        let keys = self.read_keys(form, input)?;
        let count = keys.len() as u64;
        if count == 0 {
            return Err(ManageError::Invalid { what: "the input", expected: "one key per line: it contains no key" });
        }
        when_read(keys.len());
        let new = self.ledger.import_keys(&self.actor, &TrustRef::Id(trust.id), keys).await?;
        Ok(Imported { trust, new, known: count - new })
    }

    fn read_keys(&self, form: LineForm, input: impl Read) -> Result<Vec<NewKey>, ManageError> {
        let (mut lines, mut keys, mut bad) = (LineReader::of(input), Vec::new(), BadLines::default());
        while let Some(line) = lines.next()? {
            let bytes = if line.number == 1 { text::without_mark(line.bytes) } else { Ok(line.bytes) };
            let Ok(bytes) = bytes else {
                return Err(ManageError::Invalid { what: "the input", expected: "UTF-8 text, but it is UTF-16" });
            };
            let text = bytes.trim_ascii();
            if line.whole && (text.is_empty() || text.starts_with(b"#")) {
                continue;
            }
            match if line.whole { self.read_key(form, text) } else { Err("too long: a key has at most 512 bytes") } {
                Ok(_) if keys.len() == KEYS_MAX => {
                    return Err(ManageError::Invalid { what: "the input", expected: "at most 500000 keys: split it" });
                }
                Ok(key) => keys.push(key),
                Err(problem) => bad.add(line.number, problem),
            }
        }
        if bad == BadLines::default() { Ok(keys) } else { Err(ManageError::BadLines(bad)) }
    }

    fn read_key(&self, form: LineForm, text: &[u8]) -> Result<NewKey, &'static str> {
        let prefix = &self.credential.prefix;
        let (digest, older, made, hint) = match form {
            LineForm::Digests => {
                let digest = std::str::from_utf8(text).ok().and_then(ApiKeyDigest::from_hex);
                (
                    digest.ok_or("expected a SHA-256 digest of 64 hexadecimal digits")?,
                    Vec::new(),
                    Made::Elsewhere,
                    String::new(),
                )
            }
            LineForm::Plaintext if credential::is_well_formed(&self.credential, text) => {
                let Digests { current, older } = self.hasher.digests(self.hasher.current(text), text);
                (current, older, self.hasher.made(), format::hint(prefix, text))
            }
            LineForm::Plaintext if format::form(prefix, text) == format::Form::Mistyped => {
                return Err("has the form of a trustgate key, but its checksum is wrong");
            }
            LineForm::Plaintext => return Err("expected a key of 16 to 512 visible ASCII characters without a comma"),
        };
        let id = KeyId(Uuid::now_v7());
        let (scopes, allowed_cidrs) = (Vec::new(), Vec::new());
        Ok(NewKey {
            id,
            digest,
            older,
            made,
            hint,
            name: None,
            scopes,
            allowed_cidrs,
            not_before: None,
            expires_in: None,
        })
    }
}

/// One line of the input.
struct Line<'l> {
    /// The line number, from 1.
    number: usize,
    /// The line without its line end; only its beginning if the line is too long.
    bytes: &'l [u8],
    /// True if `bytes` is the complete line.
    whole: bool,
}

/// Reads the lines of an input that may contain keys. Keeps only the current line and chunk, in buffers that are not
/// reallocated and are overwritten when dropped, so that no copy of a key stays in memory.
struct LineReader<R> {
    input: R,
    chunk: Zeroizing<Vec<u8>>,
    /// The range of `chunk` that was read from the input but not processed yet.
    unused: std::ops::Range<usize>,
    line: Zeroizing<Vec<u8>>,
    number: usize,
}

impl<R: Read> LineReader<R> {
    fn of(input: R) -> Self {
        let (chunk, line) = (Zeroizing::new(vec![0; 64 << 10]), Zeroizing::new(Vec::with_capacity(LINE_BYTES_MAX)));
        Self { input, chunk, unused: 0..0, line, number: 0 }
    }

    fn next(&mut self) -> std::io::Result<Option<Line<'_>>> {
        self.line.clear();
        let (mut whole, mut any) = (true, false);
        loop {
            if self.unused.is_empty() {
                self.unused = 0..self.input.read(&mut self.chunk)?;
                if self.unused.is_empty() {
                    break; // the last line may have no line end
                }
            }
            any = true;
            let rest = &self.chunk[self.unused.clone()];
            let end = rest.iter().position(|byte| *byte == b'\n');
            let part = &rest[..end.unwrap_or(rest.len())];
            let fits = part.len().min(LINE_BYTES_MAX - self.line.len());
            whole &= fits == part.len();
            self.line.extend_from_slice(&part[..fits]);
            self.unused.start += part.len() + usize::from(end.is_some());
            if end.is_some() {
                break;
            }
        }
        self.number += usize::from(any);
        Ok(any.then_some(Line { number: self.number, bytes: &self.line, whole }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ext_authz::credential::CredentialSettings, manage::fixture::Fixture};

    async fn import(form: LineForm, input: &[u8]) -> Result<(u64, u64), String> {
        let mut fixture = Fixture::new(CredentialSettings::default()).await;
        let trust = TrustRef::Name("acme".to_owned());
        let got = fixture.manager.import_keys(&trust, form, input, |_| ()).await;
        got.map(|imported| (imported.new, imported.known)).map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn duplicate_lines_are_counted_and_stored_once() {
        let (one, two) = ("a1".repeat(32), "b2".repeat(32));
        let text = format!("# from the old gateway\n\n{one}\r\n  {two}\n{}", one.to_uppercase());
        assert_eq!(import(LineForm::Digests, text.as_bytes()).await, Ok((2, 1)));
        assert_eq!(
            import(LineForm::Plaintext, b"a-foreign-key-of-some-length\nanother-foreign-key-of-mine").await,
            Ok((2, 0))
        );
    }

    #[tokio::test]
    async fn byte_order_mark_is_not_part_of_the_first_line() {
        let digest = "a1".repeat(32);
        assert_eq!(import(LineForm::Digests, format!("\u{feff}{digest}\r\n").as_bytes()).await, Ok((1, 0)));
        let error = import(LineForm::Digests, b"\xff\xfea\x001\0").await.unwrap_err();
        assert!(error.contains("UTF-16"), "{error}");
    }

    #[tokio::test]
    async fn error_lists_the_numbers_of_invalid_lines_and_not_their_content() {
        let good = "a1".repeat(32);
        let text = format!("{good}\nhunter2\nhunter2\n{good}\n\n{}\n\u{e9}\n", "9".repeat(2_000));
        let error = import(LineForm::Digests, text.as_bytes()).await.unwrap_err();
        assert_eq!(
            error,
            "import failed: 4 invalid lines, nothing was stored:\n  \
             lines 2 to 3: expected a SHA-256 digest of 64 hexadecimal digits\n  \
             line 6: too long: a key has at most 512 bytes\n  \
             line 7: expected a SHA-256 digest of 64 hexadecimal digits"
        );
        let mistyped = format!("tg_{}\nshort\n", "0".repeat(49));
        let error = import(LineForm::Plaintext, mistyped.as_bytes()).await.unwrap_err();
        assert!(error.contains("line 1: has the form of a trustgate key"), "{error}");
        assert!(error.contains("line 2: expected a key of 16 to 512"), "{error}");
    }

    #[tokio::test]
    async fn input_without_keys_is_rejected() {
        assert!(import(LineForm::Digests, b"# nothing\n\n").await.unwrap_err().contains("it contains no key"));
    }

    #[test]
    fn line_reader_joins_lines_that_span_several_reads() {
        struct Slow<'i>(&'i [u8]);
        impl Read for Slow<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
                let count = self.0.len().min(3);
                buffer[..count].copy_from_slice(&self.0[..count]);
                self.0 = &self.0[count..];
                Ok(count)
            }
        }
        let mut lines = LineReader::of(Slow(b"first\n\nthird line\nlast"));
        let mut got = Vec::new();
        while let Some(line) = lines.next().unwrap() {
            got.push((line.number, String::from_utf8(line.bytes.to_vec()).unwrap(), line.whole));
        }
        let want = [(1, "first"), (2, ""), (3, "third line"), (4, "last")];
        assert_eq!(got, want.map(|(number, text)| (number, text.to_owned(), true)));
    }
}
