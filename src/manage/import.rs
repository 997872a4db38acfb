//! Keys made elsewhere: read one a line, all checked before any is stored.
//!
//! Never keeps a plaintext key longer than it takes to hash it, and never shows a line: it may hold one.

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

/// Keys of one import, at most: some 200 bytes of memory each.
pub const KEYS_MAX: usize = 500_000;
/// The longest line that is read, in bytes: a key, spaces around it, or a comment.
const LINE_BYTES_MAX: usize = 2 * KEY_BYTES_MAX;

/// What stands on a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The SHA-256 digest of a key, as 64 hexadecimal digits.
    Digests,
    /// A key itself.
    Plaintext,
}

/// What an import did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// Whose keys they are.
    pub trust: Trust,
    /// Keys that were not there before.
    pub new: u64,
    /// Lines whose key was there already, or stood twice in the input.
    pub known: u64,
}

/// Lines that are not what they should be, in order. Neighbours with the same problem are one range.
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
        write!(f, "nothing was imported, because of {count} line{}:", if count == 1 { "" } else { "s" })?;
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
    /// Stores the keys of `input` for a trust: one a line; blank lines and those that begin with `#` are left out.
    /// `when_read` hears how many keys there are, once all are read and before they are stored.
    ///
    /// # Errors
    /// There is no such trust, the input cannot be read, some of its lines are wrong (all are named), or the database
    /// failed. Nothing was stored then.
    pub async fn import_keys(
        &mut self,
        trust: &TrustRef,
        form: Form,
        input: impl Read,
        when_read: impl FnOnce(usize),
    ) -> Result<Imported, ManageError> {
        let trust = self.ledger.trust(trust).await?; // before the reading, which may take long
        let keys = self.read_keys(form, input)?;
        let count = keys.len() as u64;
        if count == 0 {
            return Err(ManageError::Invalid { what: "the input", expected: "one key a line; there is none in it" });
        }
        when_read(keys.len());
        let new = self.ledger.import_keys(&self.actor, &TrustRef::Id(trust.id), keys).await?;
        Ok(Imported { trust, new, known: count - new })
    }

    fn read_keys(&self, form: Form, input: impl Read) -> Result<Vec<NewKey>, ManageError> {
        let (mut lines, mut keys, mut bad) = (Lines::of(input), Vec::new(), BadLines::default());
        while let Some(line) = lines.next()? {
            let bytes = if line.number == 1 { text::without_mark(line.bytes) } else { Ok(line.bytes) };
            let Ok(bytes) = bytes else {
                return Err(ManageError::Invalid { what: "the input", expected: "UTF-8 text; this is UTF-16" });
            };
            let text = bytes.trim_ascii();
            if line.whole && (text.is_empty() || text.starts_with(b"#")) {
                continue;
            }
            match if line.whole { self.read_key(form, text) } else { Err("is too long") } {
                Ok(_) if keys.len() == KEYS_MAX => {
                    return Err(ManageError::Invalid { what: "the input", expected: "500000 keys at most: split it" });
                }
                Ok(key) => keys.push(key),
                Err(problem) => bad.add(line.number, problem),
            }
        }
        if bad == BadLines::default() { Ok(keys) } else { Err(ManageError::BadLines(bad)) }
    }

    fn read_key(&self, form: Form, text: &[u8]) -> Result<NewKey, &'static str> {
        let prefix = &self.credential.prefix;
        let (digest, older, made, hint) = match form {
            Form::Digests => {
                let digest = std::str::from_utf8(text).ok().and_then(ApiKeyDigest::from_hex);
                (
                    digest.ok_or("expected a SHA-256 digest of 64 hexadecimal digits")?,
                    Vec::new(),
                    Made::Elsewhere,
                    String::new(),
                )
            }
            Form::Plaintext if credential::is_well_formed(&self.credential, text) => {
                let Digests { current, older } = self.hasher.digests(self.hasher.current(text), text);
                (current, older, self.hasher.made(), format::hint(prefix, text))
            }
            Form::Plaintext if format::form(prefix, text) == format::Form::Mistyped => {
                return Err("looks like a key made here, but its checksum is wrong");
            }
            Form::Plaintext => return Err("expected a key of 16 to 512 visible ASCII characters without a comma"),
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
    /// From 1.
    number: usize,
    /// What stands on it, or the beginning of it.
    bytes: &'l [u8],
    /// Whether that is all of it.
    whole: bool,
}

/// Lines of an input that may hold keys: nothing of it is kept but the present line, in memory that never moves and is
/// overwritten in the end.
struct Lines<R> {
    input: R,
    chunk: Zeroizing<Vec<u8>>,
    /// What of `chunk` was read and not yet used.
    unused: std::ops::Range<usize>,
    line: Zeroizing<Vec<u8>>,
    number: usize,
}

impl<R: Read> Lines<R> {
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
                    break; // the last line needs no line end
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
    use crate::{ext_authz::credential::CredentialSettings, manage::fake::FakeLedger, store::Actor};

    async fn import(form: Form, input: &[u8]) -> Result<(u64, u64), String> {
        let ledger = Box::new(FakeLedger::default());
        let mut manager = Manager::new(ledger, Actor("test".to_owned()), CredentialSettings::default()).unwrap();
        let trust = TrustRef::Name("acme".to_owned());
        let got = manager.import_keys(&trust, form, input, |_| ()).await;
        got.map(|imported| (imported.new, imported.known)).map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn good_lines_are_stored_once_each() {
        let (one, two) = ("a1".repeat(32), "b2".repeat(32));
        let text = format!("# from the old gateway\n\n{one}\r\n  {two}\n{}", one.to_uppercase());
        assert_eq!(import(Form::Digests, text.as_bytes()).await, Ok((2, 1)));
        assert_eq!(
            import(Form::Plaintext, b"a-foreign-key-of-some-length\nanother-foreign-key-of-mine").await,
            Ok((2, 0))
        );
    }

    #[tokio::test]
    async fn a_byte_order_mark_is_no_part_of_the_first_line() {
        let digest = "a1".repeat(32);
        assert_eq!(import(Form::Digests, format!("\u{feff}{digest}\r\n").as_bytes()).await, Ok((1, 0)));
        let error = import(Form::Digests, b"\xff\xfea\x001\0").await.unwrap_err();
        assert!(error.contains("UTF-16"), "{error}");
    }

    #[tokio::test]
    async fn every_bad_line_is_named_and_none_is_shown() {
        let good = "a1".repeat(32);
        let text = format!("{good}\nhunter2\nhunter2\n{good}\n\n{}\n\u{e9}\n", "9".repeat(2_000));
        let error = import(Form::Digests, text.as_bytes()).await.unwrap_err();
        assert_eq!(
            error,
            "nothing was imported, because of 4 lines:\n  \
             lines 2 to 3: expected a SHA-256 digest of 64 hexadecimal digits\n  \
             line 6: is too long\n  \
             line 7: expected a SHA-256 digest of 64 hexadecimal digits"
        );
        let mistyped = format!("tg_{}\nshort\n", "0".repeat(49));
        let error = import(Form::Plaintext, mistyped.as_bytes()).await.unwrap_err();
        assert!(error.contains("line 1: looks like a key made here"), "{error}");
        assert!(error.contains("line 2: expected a key of 16 to 512"), "{error}");
    }

    #[tokio::test]
    async fn an_input_without_keys_is_a_mistake() {
        assert!(import(Form::Digests, b"# nothing\n\n").await.unwrap_err().contains("there is none in it"));
    }

    #[test]
    fn lines_are_the_same_however_the_input_is_cut() {
        struct Slow<'i>(&'i [u8]);
        impl Read for Slow<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
                let count = self.0.len().min(3);
                buffer[..count].copy_from_slice(&self.0[..count]);
                self.0 = &self.0[count..];
                Ok(count)
            }
        }
        let mut lines = Lines::of(Slow(b"first\n\nthird line\nlast"));
        let mut got = Vec::new();
        while let Some(line) = lines.next().unwrap() {
            got.push((line.number, String::from_utf8(line.bytes.to_vec()).unwrap(), line.whole));
        }
        let want = [(1, "first"), (2, ""), (3, "third line"), (4, "last")];
        assert_eq!(got, want.map(|(number, text)| (number, text.to_owned(), true)));
    }
}
