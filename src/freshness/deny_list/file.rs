//! The deny list in a file: parses the lines and detects changes to the file.
//!
//! If a line cannot be read, the last valid list stays in force, together with the readable lines of the new list. An
//! entry is removed only if it is missing from two reads of the file, one interval apart, because an editor may empty
//! the file for a moment before it writes the new content. Messages do not quote the lines, because a line may contain
//! a secret.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::entries::{Denied, Entries, add};
use crate::base::{clock::DatabaseTime, text};

/// The maximum number of entries in one file.
const ENTRIES_MAX: usize = 100_000;
/// The maximum file size in bytes: room for [`ENTRIES_MAX`] entries, each with a short comment.
const FILE_BYTES_MAX: usize = 16 << 20;

/// The parsed content of a deny file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Reading {
    /// The entries on readable lines.
    pub(crate) entries: Entries,
    /// The first line that cannot be read.
    pub(crate) problem: Option<LineProblem>,
}

/// A line that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LineProblem {
    /// The number of the line, counted from 1.
    line: usize,
    expected: &'static str,
}

impl fmt::Display for LineProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.expected)
    }
}

/// Checks that each line of the deny list at `path` can be read.
///
/// # Errors
/// Returns the I/O error if the file cannot be read, or `InvalidData` with the number of the first line that cannot be
/// read.
pub(crate) fn check_file(path: &Path) -> io::Result<()> {
    let problem = read(path)?.problem;
    problem.map_or(Ok(()), |problem| Err(io::Error::new(io::ErrorKind::InvalidData, problem.to_string())))
}

/// Reads and parses the deny file at `path`.
///
/// # Errors
/// Returns the operating system's error, or `InvalidInput` if `path` is not a regular file.
pub(crate) fn read(path: &Path) -> io::Result<Reading> {
    read_open(&open(path)?.0)
}

/// File metadata that shows whether the content may have changed. The metadata changes when the file is written or
/// replaced, and when Kubernetes updates a mounted `ConfigMap` by changing a symbolic link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// # Errors
    /// Returns `InvalidInput` if the file is not a regular file, because reading a pipe might never end.
    fn of(metadata: &fs::Metadata) -> io::Result<Self> {
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

fn open(path: &Path) -> io::Result<(File, Stamp)> {
    Stamp::of(&fs::metadata(path)?)?; // before opening, because opening a pipe waits for a writer
    let file = File::open(path)?;
    let stamp = Stamp::of(&file.metadata()?)?;
    Ok((file, stamp))
}

fn read_open(file: &File) -> io::Result<Reading> {
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
    Ok(parse(&bytes))
}

fn parse(bytes: &[u8]) -> Reading {
    let mut reading = Reading::default();
    let is_whole = bytes.len() <= FILE_BYTES_MAX;
    let Ok(bytes) = text::without_mark(&bytes[..bytes.len().min(FILE_BYTES_MAX)]) else {
        reading.problem = Some(LineProblem { line: 1, expected: "the file is UTF-16; save it as UTF-8" });
        return reading;
    };
    let mut lines = bytes.split(|byte| *byte == b'\n').zip(1..).peekable();
    while let Some((line, number)) = lines.next() {
        let cut_off = !is_whole && lines.peek().is_none();
        let got = if cut_off { Err("the file is larger than 16 MiB") } else { parse_line(line) };
        let problem = match got {
            Ok(None) => None,
            Ok(Some((denied, _))) if reading.entries.len() >= ENTRIES_MAX && !reading.entries.contains_key(&denied) => {
                Some("the file has more than 100000 entries")
            }
            Ok(Some((denied, until))) => {
                add(&mut reading.entries, denied, until);
                None
            }
            Err(expected) => Some(expected),
        };
        reading.problem = reading.problem.or(problem.map(|expected| LineProblem { line: number, expected }));
    }
    reading
}

/// Returns the entry on a line, or `None` if the line is empty or a comment. The error describes the expected format.
fn parse_line(line: &[u8]) -> Result<Option<(Denied, Option<DatabaseTime>)>, &'static str> {
    const EXPECTED: &str = "expected `key UUID`, `trust UUID` or `digest` and 64 hexadecimal digits";
    const EXPECTED_END: &str = "expected the end of the line, or `until` and a time such as 2026-01-31T12:00:00Z";
    let text = line.split(|byte| *byte == b'#').next().unwrap_or_default();
    let mut words = std::str::from_utf8(text).map_err(|_| EXPECTED)?.split_ascii_whitespace();
    let Some(kind) = words.next() else { return Ok(None) };
    let denied = words.next().and_then(|id| Denied::read(kind, id)).ok_or(EXPECTED)?;
    let until = match (words.next(), words.next(), words.next()) {
        (None, ..) => None,
        (Some("until"), Some(end), None) => Some(DatabaseTime::from_rfc3339(end).ok_or(EXPECTED_END)?),
        _ => return Err(EXPECTED_END),
    };
    Ok(Some((denied, until)))
}

/// A deny file that the server examines for changes at intervals.
pub(crate) struct Watched {
    path: PathBuf,
    /// The last list that had no unreadable line and that a second read confirmed.
    good: Arc<Entries>,
    /// The entries that were in force when a second read last confirmed that the file had not changed.
    settled: Arc<Entries>,
    /// The file's stamp at the last read, and true if the file has been read twice with that stamp.
    seen: Option<(Stamp, bool)>,
}

/// The result of examining the file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// The file is unchanged and was not read.
    Same,
    /// The file was read.
    Read {
        /// The entries that are in force now.
        in_force: Entries,
        /// The first unreadable line.
        problem: Option<String>,
    },
    /// The reason why the file could not be read. The entries that were in force stay in force.
    Failed(String),
}

impl Watched {
    /// Creates a watcher for the file at `path`. `entries` are the entries that were already read from the file.
    pub(crate) fn new(path: PathBuf, entries: Arc<Entries>) -> Self {
        Self { path, good: Arc::clone(&entries), settled: entries, seen: None }
    }

    /// Examines the file. Reads it if it has changed since the last call, or if it was read only once since its last
    /// change.
    pub(crate) fn look(&mut self) -> Look {
        match self.try_look() {
            Ok(look) => look,
            Err(error) => {
                self.seen = None; // read the file again once it is readable, even if its stamp has not changed
                Look::Failed(error.to_string())
            }
        }
    }

    fn try_look(&mut self) -> io::Result<Look> {
        if self.seen == Some((Stamp::of(&fs::metadata(&self.path)?)?, true)) {
            return Ok(Look::Same);
        }
        let (file, stamp) = open(&self.path)?;
        let Reading { entries, problem } = read_open(&file)?;
        let settled = self.seen.is_some_and(|(seen, _)| seen == stamp);
        self.seen = Some((stamp, settled));
        let mut in_force = entries;
        if problem.is_none() {
            if settled {
                self.good = Arc::new(in_force.clone());
            }
        } else {
            add_all(&mut in_force, &self.good);
        }
        if settled {
            self.settled = Arc::new(in_force.clone());
        } else {
            add_all(&mut in_force, &self.settled);
        }
        Ok(Look::Read { in_force, problem: problem.map(|problem| problem.to_string()) })
    }
}

fn add_all(entries: &mut Entries, more: &Entries) {
    for (denied, until) in more {
        add(entries, *denied, *until);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::record::{ApiKeyDigest, KeyId, TrustId};

    fn key(number: u128) -> Denied {
        Denied::Key(KeyId(Uuid::from_u128(number)))
    }

    /// Returns the content of a file with an entry for each of `keys`.
    fn text(keys: &[u128]) -> String {
        keys.iter().map(|number| key(*number).line() + "\n").collect()
    }

    fn keys(look: &Look) -> Vec<u128> {
        let Look::Read { in_force, .. } = look else { panic!("{look:?}") };
        let number = |denied: &Denied| match denied {
            Denied::Key(id) => id.0.as_u128(),
            _ => panic!("{denied:?}"),
        };
        let mut keys: Vec<_> = in_force.keys().map(number).collect();
        keys.sort_unstable();
        keys
    }

    fn problem(look: &Look) -> Option<&str> {
        match look {
            Look::Same => panic!("not read"),
            Look::Read { problem, .. } => problem.as_deref(),
            Look::Failed(problem) => Some(problem),
        }
    }

    #[test]
    fn byte_order_mark_is_ignored() {
        let line = format!("key {}", uuid::Uuid::from_u128(1));
        let plain = parse(line.as_bytes());
        let marked = parse(format!("\u{feff}{line}\r\n").as_bytes());
        assert_eq!((marked.entries.len(), marked.problem.is_none()), (1, true));
        assert_eq!(marked.entries, plain.entries);
        let problem = parse(b"\xff\xfek\0e\0").problem.unwrap();
        assert!(problem.expected.contains("UTF-16"));
    }

    #[test]
    fn each_kind_of_line_is_read_and_the_first_invalid_line_is_reported() {
        let (uuid, digest) = (Uuid::from_u128(7).to_string(), "aB".repeat(32));
        let lines = [
            "# leaked on Friday".to_owned(),
            format!("key {uuid}\r"),
            format!("  trust\t{uuid} until 1970-01-01T00:00:01.5Z # until noon"),
            format!("digest {digest} until 1970-01-01T01:00:02+01:00"),
            String::new(),
            format!("digest {digest} until 1970-01-01T00:00:01Z"),
            format!("keys {uuid}"),
            format!("digest {}", &digest[1..]),
        ];
        let reading = parse(lines.join("\n").as_bytes());
        let at = |micros| Some(DatabaseTime::from_micros(micros));
        let want = [
            (key(7), None),
            (Denied::Trust(TrustId(Uuid::from_u128(7))), at(1_500_000)),
            (Denied::Digest(ApiKeyDigest::from_bytes([0xab; 32])), at(2_000_000)),
        ];
        assert_eq!(reading.entries, want.into());
        let message = reading.problem.unwrap().to_string();
        assert!(message.starts_with("line 7: expected `key UUID`"), "{message}");
    }

    #[test]
    fn malformed_line_denies_nothing_and_is_not_quoted() {
        let uuid = Uuid::from_u128(7);
        for line in [
            format!("key {uuid} until"),
            format!("key {uuid} until tomorrow"),
            format!("key {uuid} until 2026-01-31T12:00:00"),
            format!("key {uuid} until 2026-01-31T12:00:00Z or later"),
            format!("key {uuid} 2026-01-31T12:00:00Z hunter2"),
            format!("KEY {uuid}"),
            "key".to_owned(),
            "hunter2".to_owned(),
            "digest hunter2".to_owned(),
            "trust acme".to_owned(),
        ] {
            let reading = parse(line.as_bytes());
            assert!(reading.entries.is_empty(), "{line}");
            let message = reading.problem.unwrap().to_string();
            assert!(message.starts_with("line 1: expected ") && !message.contains("hunter2"), "{line}: {message}");
        }
        assert!(parse(b"\xff\xfe").problem.is_some());
    }

    proptest! {
        #[test]
        fn parser_survives_any_bytes(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn parser_survives_almost_valid_lines(line in "(key|trust|digest)? ?[0-9a-f-]{0,70}( until [0-9TZ:.+-]{0,40})?[ #\n]?") {
            let _ = parse(line.as_bytes());
        }
    }

    #[test]
    fn file_over_a_limit_is_truncated_and_reported() {
        let numbers: Vec<u128> = (0..100_001).collect();
        let reading = parse((text(&numbers) + &text(&[0])).as_bytes());
        assert_eq!(reading.entries.len(), 100_000);
        assert!(reading.problem.unwrap().to_string().starts_with("line 100001: the file has more than 100000"));

        // The size limit cuts the second entry in the middle. The truncated line must not be read as an entry.
        let comment = "#".repeat(FILE_BYTES_MAX - 80);
        let reading = parse(format!("{}{comment}\n{}", text(&[1]), text(&[2])).as_bytes());
        assert_eq!(reading.entries, [(key(1), None)].into());
        assert!(reading.problem.unwrap().to_string().starts_with("line 3: the file is larger"));
    }

    #[test]
    fn new_entry_takes_effect_after_one_read_and_removed_entry_is_dropped_after_two() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deny");
        fs::write(&path, text(&[1])).unwrap();
        let mut watched = Watched::new(path.clone(), Arc::default());
        assert_eq!(keys(&watched.look()), [1]);
        assert_eq!(keys(&watched.look()), [1]);
        assert_eq!(watched.look(), Look::Same);

        fs::write(&path, text(&[2])).unwrap();
        assert_eq!(keys(&watched.look()), [1, 2], "1 stays denied until the file has been read twice");
        // The new content has the same size, and perhaps the same modification time.
        fs::write(&path, text(&[3])).unwrap();
        let both = keys(&watched.look());
        assert!(both == [1, 3] || both == [3], "{both:?}");
        for _ in 0..2 {
            if watched.look() == Look::Same {
                break;
            }
        }
        assert_eq!(watched.look(), Look::Same);
        assert_eq!(watched.settled.keys().collect::<Vec<_>>(), [&key(3)]);

        // An editor empties the file before it writes the new content.
        fs::write(&path, "").unwrap();
        assert_eq!(keys(&watched.look()), [3]);
        fs::write(&path, text(&[3, 4])).unwrap();
        assert_eq!(keys(&watched.look()), [3, 4]);
        assert_eq!(keys(&watched.look()), [3, 4]);
    }

    #[test]
    fn unreadable_file_or_line_removes_no_entry() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deny");
        fs::write(&path, text(&[1, 2])).unwrap();
        let mut watched = Watched::new(path.clone(), Arc::default());
        watched.look();
        watched.look();

        fs::write(&path, text(&[3]) + "hunter2\n").unwrap();
        for _ in 0..2 {
            let look = watched.look();
            assert_eq!(keys(&look), [1, 2, 3]);
            assert!(problem(&look).unwrap().starts_with("line 2: expected"), "{look:?}");
        }
        assert_eq!(watched.look(), Look::Same);
        // Entries from a file with an unreadable line disappear when that file is replaced. Entries from the last valid
        // file stay.
        fs::write(&path, text(&[4]) + "hunter2\n").unwrap();
        watched.look();
        assert_eq!(keys(&watched.look()), [1, 2, 4]);

        fs::remove_file(&path).unwrap();
        assert!(problem(&watched.look()).unwrap().contains("No such file"));
        fs::create_dir(&path).unwrap();
        assert!(problem(&watched.look()).unwrap().contains("not a regular file"));
        fs::remove_dir(&path).unwrap();
        fs::write(&path, text(&[5])).unwrap();
        assert_eq!(keys(&watched.look()), [1, 2, 4, 5]);
        let look = watched.look();
        assert_eq!((keys(&look), problem(&look)), (vec![5], None));
    }

    #[test]
    fn update_of_a_mounted_config_map_is_detected() {
        // Imitate the kubelet: `deny` is a link to `..data/deny`, and `..data` is a link that an update replaces with a
        // link to another directory.
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (version, content) in [("one", text(&[1])), ("two", text(&[2]))] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("deny"), content).unwrap();
        }
        symlink("one", at("..data")).unwrap();
        symlink("..data/deny", at("deny")).unwrap();
        let mut watched = Watched::new(at("deny"), Arc::default());
        watched.look();
        watched.look();
        assert_eq!(watched.look(), Look::Same);
        symlink("two", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        assert_eq!(keys(&watched.look()), [1, 2]);
        assert_eq!(keys(&watched.look()), [2]);
    }

    #[test]
    fn check_file_reports_a_missing_file_and_an_invalid_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deny");
        assert_eq!(check_file(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::write(&path, text(&[1]) + "trust acme").unwrap();
        assert!(check_file(&path).unwrap_err().to_string().starts_with("line 2: expected"));
        fs::write(&path, text(&[1])).unwrap();
        check_file(&path).unwrap();
    }
}
