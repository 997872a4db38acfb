//! Creates the database file with safe permissions, refuses locations where SQLite would lose writes, and detects the
//! replacement of files that a connection has open.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use crate::store::{error::StoreError, reads::lookup::Missing};

/// Network filesystems, by `f_type` of statfs(2). SQLite's write-ahead log needs shared memory and locks that work
/// between all processes that use the file, and these filesystems do not provide them. FUSE is not in the list, because
/// its `f_type` does not identify the actual filesystem, and many FUSE filesystems are local.
const NETWORK: &[(u32, &str)] = &[
    (0x0000_6969, "NFS"),
    (0x0000_517b, "SMB"),
    (0xfe53_4d42, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0x0102_1997, "9P"),
    (0x00c3_6400, "Ceph"),
    (0x5346_414f, "AFS"),
    (0x6b41_4653, "AFS"),
    (0x7375_7245, "Coda"),
    (0x0bd0_0bd0, "Lustre"),
    (0x0116_1970, "GFS2"),
    (0x7461_636f, "OCFS2"),
    (0x4750_4653, "GPFS"),
    (0x1983_0326, "BeeGFS"),
];

/// Checks that the file at `path` can be used. If there is no file and `missing` allows it, creates one with mode 0600.
///
/// # Errors
/// [`StoreError::NoDatabase`], or [`StoreError::Unusable`] with the reason.
pub(crate) fn prepare(path: &Path, missing: Missing) -> Result<(), StoreError> {
    let unusable =
        |what: &str, error: &dyn std::fmt::Display| StoreError::Unusable(format!("{what} {}: {error}", path.display()));
    match fs::metadata(path) {
        Ok(found) => {
            refuse_network(path)?;
            refuse_aliases(path)?;
            if found.mode() & 0o077 != 0 {
                let mode = format!("{:o}", found.mode() & 0o777);
                tracing::warn!(
                    path = %path.display(), mode,
                    "database file accessible to other users: set its mode to 0600"
                );
            }
            Ok(())
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if missing == Missing::Refuse {
                return Err(StoreError::NoDatabase { path: path.to_owned() });
            }
            let directory = path.parent().unwrap_or(Path::new("/"));
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory)
                .map_err(|error| unusable("cannot create the directory of", &error))?;
            refuse_network(directory)?;
            // SQLite creates `-wal` and `-shm` with the mode of the database file.
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
                Ok(_) => Ok(()),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()), // another process created it first
                Err(error) => Err(unusable("cannot create the database", &error)),
            }
        }
        Err(error) => Err(unusable("cannot use the database", &error)),
    }
}

/// Identifies a file independently of its path: device and inode.
type FileId = (u64, u64);

fn identity(path: &Path) -> io::Result<FileId> {
    let found = fs::metadata(path)?;
    Ok((found.dev(), found.ino()))
}

/// The files that one connection works with: the database, its write-ahead log (`-wal`) and the index of that log
/// (`-shm`).
///
/// SQLite opens each file once, by its path, and all connections of a process share one `-shm`. If `-wal` or `-shm` is
/// removed, moved or not shared between processes, this process and the next command use different files: neither sees
/// the other's changes, and each can overwrite them (<https://www.sqlite.org/howtocorrupt.html>, sections 1.3 and 2.5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OpenFiles {
    /// The path with all symbolic links resolved: SQLite puts the other two files beside it.
    resolved: PathBuf,
    main: FileId,
    /// `None` for a database without a write-ahead log.
    beside: Option<[FileId; 2]>,
}

/// The suffixes that SQLite appends to the database path for the log and its index.
const BESIDE: [&str; 2] = ["-wal", "-shm"];

impl OpenFiles {
    /// Records the database file at `path` before a connection is opened.
    ///
    /// # Errors
    /// The operating system's error if the database cannot be found.
    pub(crate) fn before_connect(path: &Path) -> io::Result<Self> {
        Ok(Self { resolved: fs::canonicalize(path)?, main: identity(path)?, beside: None })
    }

    /// Records the files beside the database. Call this after a connection has read from the database, because SQLite
    /// opens the files at the first read. `has_log`: true if the database uses a write-ahead log.
    ///
    /// # Errors
    /// [`Replaced`] if the files at the paths are not those that this process has open: an older connection may still
    /// share its `-shm` with this one.
    pub(crate) fn after_first_read(&mut self, path: &Path, has_log: bool) -> io::Result<()> {
        self.verify(path)?;
        if has_log {
            let beside = self.beside()?;
            let open = open_files()?;
            if let Some(missing) = beside.iter().position(|file| !open.contains(file)) {
                return Err(Replaced(BESIDE[missing]).into());
            }
            self.beside = Some(beside);
        }
        Ok(())
    }

    /// Checks that `path` still refers to these files. Returns the number of hard links to the database file.
    ///
    /// # Errors
    /// [`Replaced`] if `path` leads to other files; the operating system's error if there is no database.
    pub(crate) fn verify(&self, path: &Path) -> io::Result<u64> {
        let main = fs::metadata(path)?;
        if (main.dev(), main.ino()) != self.main {
            return Err(Replaced("").into());
        }
        if let Some(beside) = &self.beside {
            let found = self.beside()?;
            if let Some(other) = (0..BESIDE.len()).find(|file| found[*file] != beside[*file]) {
                return Err(Replaced(BESIDE[other]).into());
            }
        }
        Ok(main.nlink())
    }

    fn beside(&self) -> io::Result<[FileId; 2]> {
        let [wal, shm] = BESIDE.map(|suffix| {
            let mut path = self.resolved.clone().into_os_string();
            path.push(suffix);
            identity(Path::new(&path)).map_err(|_| io::Error::from(Replaced(suffix)))
        });
        Ok([wal?, shm?])
    }
}

/// Returns true if any connection of this process has the database of `files` open.
pub(crate) fn is_open(files: &OpenFiles) -> io::Result<bool> {
    Ok(open_files()?.contains(&files.main))
}

/// Returns the identities of all files that this process has open.
fn open_files() -> io::Result<Vec<FileId>> {
    let descriptors = fs::read_dir("/proc/self/fd")?;
    // Skip a descriptor that is closed while this function runs.
    Ok(descriptors.filter_map(|descriptor| identity(&descriptor.ok()?.path()).ok()).collect())
}

/// The error if a path leads to different files from those that a connection has open. The value is the suffix of the
/// replaced file; it is empty for the database file.
#[derive(Debug, thiserror::Error)]
#[error(
    "the database file{} was replaced, removed or moved while it was in use: its connections are closed and opened \
     again; stop the server before you restore files, and do not remove -wal or -shm while it runs",
    if .0.is_empty() { String::new() } else { format!("'s {}", .0) }
)]
struct Replaced(&'static str);

impl From<Replaced> for io::Error {
    fn from(replaced: Replaced) -> Self {
        Self::other(replaced)
    }
}

/// Returns the error for a connect that is attempted while this process still has replaced files open.
pub(crate) fn still_open() -> io::Error {
    Replaced(BESIDE[1]).into()
}

/// The file that was replaced, according to a read error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileChange {
    /// The database file. A new connection opens the file that is now at the path.
    Main,
    /// The log or its index. All connections of a process share the index, so a new connection uses the files at the
    /// paths only after all old connections are closed.
    Beside,
}

/// Returns the file that was replaced, if `error` is [`Replaced`].
pub(crate) fn change(error: &sqlx::Error) -> Option<FileChange> {
    let sqlx::Error::Io(error) = error else { return None };
    let Replaced(suffix) = error.get_ref()?.downcast_ref()?;
    Some(if suffix.is_empty() { FileChange::Main } else { FileChange::Beside })
}

/// Returns why the database file can be reached by more than one path, or `None`. If a process opens it through a hard
/// link, or through a bind mount of the file without its directory, SQLite looks for `-wal` and `-shm` under another
/// name or in another directory, and misses committed changes.
pub(crate) fn alias_problem(path: &Path) -> io::Result<Option<String>> {
    let links = fs::metadata(path)?.nlink();
    if links > 1 {
        return Ok(Some(format!("the file has {links} names (hard links)")));
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let is_mounted = is_mount_point(&mounts, &fs::canonicalize(path)?);
    Ok(is_mounted.then(|| "the file is mounted without its directory".to_owned()))
}

/// Returns true if `mountinfo` (`proc_pid_mountinfo(5)`) has a mount at exactly this path.
fn is_mount_point(mountinfo: &str, path: &Path) -> bool {
    let unescaped = |field: &str| {
        ["\\040", "\\011", "\\012", "\\134"]
            .into_iter()
            .zip([" ", "\t", "\n", "\\"])
            .fold(field.to_owned(), |text, (escape, plain)| text.replace(escape, plain))
    };
    let mut points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4));
    points.any(|point| Path::new(&unescaped(point)) == path)
}

fn refuse_aliases(path: &Path) -> Result<(), StoreError> {
    let unusable = |why: String| {
        StoreError::Unusable(format!(
            "{}: {why}: SQLite keeps its log beside the path that was opened, so changes made through another path \
             would be lost. Remove the other names, and mount the directory, not the file (in Kubernetes: no subPath)",
            path.display()
        ))
    };
    match alias_problem(path) {
        Ok(None) => Ok(()),
        Ok(Some(why)) => Err(unusable(why)),
        Err(error) => {
            Err(StoreError::Unusable(format!("{}: cannot determine how the file is mounted: {error}", path.display())))
        }
    }
}

fn refuse_network(path: &Path) -> Result<(), StoreError> {
    let found = rustix::fs::statfs(path).map_err(|error| {
        StoreError::Unusable(format!("cannot determine the filesystem of {}: {error}", path.display()))
    })?;
    match network_name(found.f_type.cast_unsigned()) {
        None => Ok(()),
        Some(name) => Err(StoreError::Unusable(format!(
            "{} is on a network filesystem ({name}), where SQLite can lose or corrupt writes: use a local disk, or \
             PostgreSQL (`store.url`)",
            path.display()
        ))),
    }
}

fn network_name(kind: u64) -> Option<&'static str> {
    // The kernel's numbers have 32 bits; some architectures sign-extend them.
    let kind = u32::try_from(kind & u64::from(u32::MAX)).unwrap_or(0);
    NETWORK.iter().find(|(number, _)| *number == kind).map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_point_at_the_database_file_is_detected() {
        let mountinfo = "63 43 254:0 /a /data/trust\\040gate.db rw,relatime - ext4 /dev/vda rw\n\
                         64 43 254:0 /b /data rw - ext4 /dev/vda rw\n";
        assert!(is_mount_point(mountinfo, Path::new("/data/trust gate.db")));
        assert!(is_mount_point(mountinfo, Path::new("/data")));
        assert!(!is_mount_point(mountinfo, Path::new("/data/trustgate.db")));
    }

    #[test]
    fn network_filesystems_are_recognized_even_if_their_numbers_are_sign_extended() {
        assert_eq!(network_name(0x6969), Some("NFS"));
        assert_eq!(network_name(0xff53_4d42), Some("CIFS"));
        assert_eq!(network_name(0xffff_ffff_ff53_4d42), Some("CIFS"));
        assert_eq!(network_name(0xef53), None, "ext4");
        assert_eq!(network_name(0x6573_5546), None, "FUSE may be local");
    }
}
