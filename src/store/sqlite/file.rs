//! The file itself: who may read it, where it may lie, and that nobody makes it by mistake.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::Path,
};

use super::super::{LedgerError, lookup::Missing};

/// Filesystems that lie on another machine, by `f_type` of statfs(2). SQLite's write-ahead log needs shared memory and
/// locks that all its users see, which these do not give. FUSE is not among them: what is behind it cannot be told, and
/// much of it is local.
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

/// Makes sure that there is a file at `path` that can be used: makes it, for its owner alone, if `missing` says so.
///
/// # Errors
/// [`LedgerError::NoDatabase`], or [`LedgerError::Unusable`] with the reason.
pub(crate) fn prepare(path: &Path, missing: Missing) -> Result<(), LedgerError> {
    let unusable = |what: &str, error: &dyn std::fmt::Display| {
        LedgerError::Unusable(format!("{what} {}: {error}", path.display()))
    };
    match fs::metadata(path) {
        Ok(found) => {
            refuse_network(path)?;
            if found.mode() & 0o077 != 0 {
                let mode = format!("{:o}", found.mode() & 0o777);
                tracing::warn!(path = %path.display(), mode, "others may read the database; `chmod 600` it");
            }
            Ok(())
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if missing == Missing::Refuse {
                return Err(LedgerError::NoDatabase { path: path.to_owned() });
            }
            let directory = path.parent().unwrap_or(Path::new("/"));
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory)
                .map_err(|error| unusable("cannot make the directory of", &error))?;
            refuse_network(directory)?;
            // SQLite gives its log and its shared memory the mode of the file.
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
                Ok(_) => Ok(()),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()), // somebody was faster
                Err(error) => Err(unusable("cannot make the database", &error)),
            }
        }
        Err(error) => Err(unusable("cannot use the database", &error)),
    }
}

/// Which file it is, whatever its path: device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity(u64, u64);

/// Which file lies at `path` now.
pub(crate) fn identity(path: &Path) -> io::Result<Identity> {
    let found = fs::metadata(path)?;
    Ok(Identity(found.dev(), found.ino()))
}

fn refuse_network(path: &Path) -> Result<(), LedgerError> {
    let found = rustix::fs::statfs(path).map_err(|error| {
        LedgerError::Unusable(format!("cannot tell which filesystem holds {}: {error}", path.display()))
    })?;
    match network_name(found.f_type.cast_unsigned()) {
        None => Ok(()),
        Some(name) => Err(LedgerError::Unusable(format!(
            "{} lies on a network filesystem ({name}), where SQLite would lose or tear writes: use a local disk, or PostgreSQL (`store.url`)",
            path.display()
        ))),
    }
}

fn network_name(kind: u64) -> Option<&'static str> {
    // The kernel's numbers have 32 bits; some architectures extend their sign.
    let kind = u32::try_from(kind & u64::from(u32::MAX)).unwrap_or(0);
    NETWORK.iter().find(|(number, _)| *number == kind).map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_filesystems_are_known_by_their_number_whatever_its_sign() {
        assert_eq!(network_name(0x6969), Some("NFS"));
        assert_eq!(network_name(0xff53_4d42), Some("CIFS"));
        assert_eq!(network_name(0xffff_ffff_ff53_4d42), Some("CIFS"));
        assert_eq!(network_name(0xef53), None, "ext4");
        assert_eq!(network_name(0x6573_5546), None, "FUSE may be local");
    }
}
