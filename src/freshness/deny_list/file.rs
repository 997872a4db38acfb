//! The deny list as a file: its lines, and how its changes are noticed.
//!
//! A line that cannot be read takes nothing away: then the last good list stays in force, with what can be read of the
//! new one. An entry is gone only after two readings, one interval apart, agreed on that: a file that is being written
//! is empty for a moment. Never shows what stands in a line.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::entries::{Denied, Entries, add};
use crate::base::{clock::DatabaseTime, text};

/// Entries of one file, at most.
const ENTRIES_MAX: usize = 100_000;
/// The largest file, in bytes: an entry and a short comment for each of [`ENTRIES_MAX`].
const FILE_BYTES_MAX: usize = 16 << 20;

/// What a file holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Reading {
    /// What can be read.
    pub(crate) entries: Entries,
    /// The first line that cannot.
    pub(crate) problem: Option<Problem>,
}

/// A line that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// From 1.
    line: usize,
    expected: &'static str,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.expected)
    }
}

/// Whether every line of the deny list at `path` can be read.
///
/// # Errors
/// The file cannot be read, or `InvalidData` names the first line that cannot.
pub fn check_file(path: &Path) -> io::Result<()> {
    let problem = read(path)?.problem;
    problem.map_or(Ok(()), |problem| Err(io::Error::new(io::ErrorKind::InvalidData, problem.to_string())))
}

/// Reads the file at `path` as it is now.
///
/// # Errors
/// What the operating system says, or that it is no regular file.
pub(crate) fn read(path: &Path) -> io::Result<Reading> {
    read_open(&open(path)?.0)
}

/// What a file looks like without reading it. Replacing the file, writing to it, and the change of the link by which
/// Kubernetes updates a mounted `ConfigMap` each make another one.
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
    /// It is no regular file: reading a pipe might never end.
    fn of(metadata: &fs::Metadata) -> io::Result<Self> {
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
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
    Stamp::of(&fs::metadata(path)?)?; // before opening, which waits for a writer where it is a pipe
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
    let whole = bytes.len() <= FILE_BYTES_MAX;
    let Ok(bytes) = text::without_mark(&bytes[..bytes.len().min(FILE_BYTES_MAX)]) else {
        reading.problem = Some(Problem { line: 1, expected: "the file is UTF-16: save it as UTF-8" });
        return reading;
    };
    let mut lines = bytes.split(|byte| *byte == b'\n').zip(1..).peekable();
    while let Some((line, number)) = lines.next() {
        let cut_off = !whole && lines.peek().is_none();
        let got = if cut_off { Err("the file must not be larger than 16 MiB") } else { parse_line(line) };
        let problem = match got {
            Ok(None) => None,
            Ok(Some((denied, _))) if reading.entries.len() >= ENTRIES_MAX && !reading.entries.contains_key(&denied) => {
                Some("there must not be more than 100000 entries")
            }
            Ok(Some((denied, until))) => {
                add(&mut reading.entries, denied, until);
                None
            }
            Err(expected) => Some(expected),
        };
        reading.problem = reading.problem.or(problem.map(|expected| Problem { line: number, expected }));
    }
    reading
}

/// What stands on a line, if anything does.
fn parse_line(line: &[u8]) -> Result<Option<(Denied, Option<DatabaseTime>)>, &'static str> {
    const EXPECTED: &str = "expected `key UUID`, `trust UUID` or `digest` and 64 hexadecimal digits";
    const EXPECTED_END: &str = "expected nothing more, or `until` and a time as in 2026-01-31T12:00:00Z";
    let text = line.split(|byte| *byte == b'#').next().unwrap_or_default();
    let mut words = std::str::from_utf8(text).map_err(|_| EXPECTED)?.split_ascii_whitespace();
    let Some(kind) = words.next() else { return Ok(None) };
    let denied = words.next().and_then(|id| Denied::read(kind, id)).ok_or(EXPECTED)?;
    let until = match (words.next(), words.next(), words.next()) {
        (None, ..) => None,
        (Some("until"), Some(end), None) => Some(parse_time(end).ok_or(EXPECTED_END)?),
        _ => return Err(EXPECTED_END),
    };
    Ok(Some((denied, until)))
}

fn parse_time(text: &str) -> Option<DatabaseTime> {
    let nanos = OffsetDateTime::parse(text, &Rfc3339).ok()?.unix_timestamp_nanos();
    i64::try_from(nanos / 1_000).ok().map(DatabaseTime::from_micros)
}

/// A file that is looked at again and again.
pub(crate) struct Watched {
    path: PathBuf,
    /// The last list of which every line could be read.
    good: Arc<Entries>,
    /// What was in force when the file was last seen twice the same.
    settled: Arc<Entries>,
    /// The file that was read last, and whether that was read twice.
    seen: Option<(Stamp, bool)>,
}

/// What a look at the file came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// Nothing new.
    Same,
    /// It was read.
    Read {
        /// What is denied now.
        in_force: Entries,
        /// What is wrong with it.
        problem: Option<String>,
    },
    /// It could not be read, in words. What was in force stays so.
    Failed(String),
}

impl Watched {
    /// The file at `path`, of which `entries` were read before.
    pub(crate) fn new(path: PathBuf, entries: Arc<Entries>) -> Self {
        Self { path, good: Arc::clone(&entries), settled: entries, seen: None }
    }

    /// Looks at the file, and reads it if it changed since the last look, or had changed before that.
    pub(crate) fn look(&mut self) -> Look {
        match self.try_look() {
            Ok(look) => look,
            Err(error) => {
                self.seen = None; // what comes back is read, whatever it looks like
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

    /// A file with an entry for each of these keys.
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
    fn a_byte_order_mark_is_no_part_of_the_first_line() {
        let line = format!("key {}", uuid::Uuid::from_u128(1));
        let plain = parse(line.as_bytes());
        let marked = parse(format!("\u{feff}{line}\r\n").as_bytes());
        assert_eq!((marked.entries.len(), marked.problem.is_none()), (1, true));
        assert_eq!(marked.entries, plain.entries);
        let problem = parse(b"\xff\xfek\0e\0").problem.unwrap();
        assert!(problem.expected.contains("UTF-16"));
    }

    #[test]
    fn every_kind_of_line_is_read_and_the_first_bad_one_is_named() {
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
        let told = reading.problem.unwrap().to_string();
        assert!(told.starts_with("line 7: expected `key UUID`"), "{told}");
    }

    #[test]
    fn lines_that_are_not_understood_in_full_deny_nothing_and_are_not_shown() {
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
            let told = reading.problem.unwrap().to_string();
            assert!(told.starts_with("line 1: expected ") && !told.contains("hunter2"), "{line}: {told}");
        }
        assert!(parse(b"\xff\xfe").problem.is_some());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn any_words_are_read(line in "(key|trust|digest)? ?[0-9a-f-]{0,70}( until [0-9TZ:.+-]{0,40})?[ #\n]?") {
            let _ = parse(line.as_bytes());
        }
    }

    #[test]
    fn too_much_is_cut_and_said_to_be_too_much() {
        let numbers: Vec<u128> = (0..100_001).collect();
        let reading = parse((text(&numbers) + &text(&[0])).as_bytes());
        assert_eq!(reading.entries.len(), 100_000);
        assert!(reading.problem.unwrap().to_string().starts_with("line 100001: there must not be more than 100000"));

        // Cut in the middle of the second entry, which must not be taken for another one.
        let comment = "#".repeat(FILE_BYTES_MAX - 80);
        let reading = parse(format!("{}{comment}\n{}", text(&[1]), text(&[2])).as_bytes());
        assert_eq!(reading.entries, [(key(1), None)].into());
        assert!(reading.problem.unwrap().to_string().starts_with("line 3: the file must not be larger"));
    }

    #[test]
    fn an_entry_counts_at_the_first_look_and_is_gone_at_the_second() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deny");
        fs::write(&path, text(&[1])).unwrap();
        let mut watched = Watched::new(path.clone(), Arc::default());
        assert_eq!(keys(&watched.look()), [1]);
        assert_eq!(keys(&watched.look()), [1]);
        assert_eq!(watched.look(), Look::Same);

        fs::write(&path, text(&[2])).unwrap();
        assert_eq!(keys(&watched.look()), [1, 2], "1 is denied until that was read twice");
        // Again the same size, perhaps with the same time of change.
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

        // An editor empties the file before it writes it.
        fs::write(&path, "").unwrap();
        assert_eq!(keys(&watched.look()), [3]);
        fs::write(&path, text(&[3, 4])).unwrap();
        assert_eq!(keys(&watched.look()), [3, 4]);
        assert_eq!(keys(&watched.look()), [3, 4]);
    }

    #[test]
    fn what_cannot_be_read_takes_nothing_away() {
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
        // What only ever stood in a bad file goes with it; the last good one does not.
        fs::write(&path, text(&[4]) + "hunter2\n").unwrap();
        watched.look();
        assert_eq!(keys(&watched.look()), [1, 2, 4]);

        fs::remove_file(&path).unwrap();
        assert!(problem(&watched.look()).unwrap().contains("No such file"));
        fs::create_dir(&path).unwrap();
        assert!(problem(&watched.look()).unwrap().contains("no regular file"));
        fs::remove_dir(&path).unwrap();
        fs::write(&path, text(&[5])).unwrap();
        assert_eq!(keys(&watched.look()), [1, 2, 4, 5]);
        let look = watched.look();
        assert_eq!((keys(&look), problem(&look)), (vec![5], None));
    }

    #[test]
    fn the_link_of_a_mounted_config_map_is_followed() {
        // As the kubelet does it: deny -> ..data/deny, ..data -> a directory that is replaced.
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
    fn mistakes_are_found_before_the_file_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deny");
        assert_eq!(check_file(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::write(&path, text(&[1]) + "trust acme").unwrap();
        assert!(check_file(&path).unwrap_err().to_string().starts_with("line 2: expected"));
        fs::write(&path, text(&[1])).unwrap();
        check_file(&path).unwrap();
    }
}
