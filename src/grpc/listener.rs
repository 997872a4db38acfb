//! Binds the addresses that Envoy connects to: TCP addresses and Unix sockets.
//!
//! Binding fails if another server uses the TCP address, or still accepts connections on the Unix socket.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr, TcpStream as StdTcpStream},
    os::unix::{
        fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown},
        net::UnixStream as StdUnixStream,
    },
    path::{Path, PathBuf},
};

use tokio::net::{TcpListener, UnixListener};

use crate::base::settings::{RawValue, Setting};

/// An address to listen on, as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// A TCP address with its port.
    Tcp(SocketAddr),
    /// A Unix socket, by its absolute path.
    Unix(PathBuf),
}

impl Setting for ListenAddress {
    const EXPECTED: &'static str =
        "an address with its port, such as \"127.0.0.1:50051\", or \"unix:///run/trustgate/trustgate.sock\"";

    fn read(written: &RawValue) -> Option<Self> {
        let RawValue::One(text) = written else { return None };
        match text.strip_prefix("unix://") {
            Some(path) => (path.starts_with('/') && path.len() > 1).then(|| Self::Unix(path.into())),
            None => text.parse().ok().map(Self::Tcp),
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

/// The permission bits of a Unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketMode(u32);

impl Setting for SocketMode {
    const EXPECTED: &'static str = "permission bits in octal, such as \"0660\" or 0o660";

    fn read(written: &RawValue) -> Option<Self> {
        let RawValue::One(text) = written else { return None };
        // Require a leading zero: without it, the digits may be a decimal number, which would set different bits.
        let digits = text.strip_prefix("0o").or_else(|| text.strip_prefix('0'))?;
        u32::from_str_radix(digits, 8).ok().filter(|mode| *mode <= 0o777).map(Self)
    }
}

/// The owner of a Unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketOwner {
    user: u32,
    group: Option<u32>,
}

impl Setting for SocketOwner {
    const EXPECTED: &'static str = "a numeric user id, or a user id and a group id, such as \"101\" or \"101:101\"";

    fn read(written: &RawValue) -> Option<Self> {
        let RawValue::One(text) = written else { return None };
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group.parse().ok()?)),
            None => (text.as_str(), None),
        };
        Some(Self { user: user.parse().ok()?, group })
    }
}

/// A bound listener.
pub(crate) enum Listener {
    /// Over TCP.
    Tcp(TcpListener),
    /// Over a Unix socket. Dropping the listener removes the socket file.
    Unix(UnixListener, SocketFile),
}

/// An accepted stream that is not registered with a runtime yet.
pub(crate) enum Accepted {
    /// Over TCP, with the peer's address.
    Tcp(StdTcpStream, IpAddr),
    /// Over a Unix socket.
    Unix(StdUnixStream),
}

impl Accepted {
    /// Returns the address of the peer; `None` for a Unix socket.
    pub(crate) const fn peer(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(_, peer) => Some(*peer),
            Self::Unix(_) => None,
        }
    }
}

impl Listener {
    /// Binds `address`. For a Unix socket, sets the permission bits `mode` and, if given, the owner `owner`.
    ///
    /// # Errors
    /// The operating system's error; `AddrInUse` also if another server still accepts connections on the Unix socket.
    pub(crate) async fn bind(
        address: &ListenAddress,
        mode: SocketMode,
        owner: Option<SocketOwner>,
    ) -> io::Result<Self> {
        match address {
            ListenAddress::Tcp(address) => TcpListener::bind(address).await.map(Self::Tcp),
            ListenAddress::Unix(path) => {
                clear(path)?;
                let listener = UnixListener::bind(path)?;
                let file = SocketFile::of(path)?;
                if let Some(SocketOwner { user, group }) = owner {
                    chown(path, Some(user), group)?;
                }
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode.0))?;
                Ok(Self::Unix(listener, file))
            }
        }
    }

    /// Returns the bound address. If the configured port is 0, the returned address has the port that the operating
    /// system chose.
    ///
    /// # Errors
    /// The operating system's error.
    pub(crate) fn address(&self) -> io::Result<ListenAddress> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(ListenAddress::Tcp),
            Self::Unix(_, file) => Ok(ListenAddress::Unix(file.path.clone())),
        }
    }

    /// Accepts the next connection.
    ///
    /// # Errors
    /// The operating system's error, for example if the process is out of file descriptors.
    ///
    /// # Cancel safety
    /// Safe: no connection is lost.
    pub(crate) async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok(Accepted::Tcp(stream.into_std()?, peer.ip()))
            }
            Self::Unix(listener, _) => listener.accept().await?.0.into_std().map(Accepted::Unix),
        }
    }
}

/// Removes a socket file that a killed server left behind. Fails if a server still accepts connections on the
/// socket.
fn clear(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(found) if !found.file_type().is_socket() => {
            Err(io::Error::new(io::ErrorKind::AlreadyExists, "the file exists and is not a socket"))
        }
        Ok(_) => match StdUnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
            Err(error) => Err(error),
            Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
        },
    }
}

/// The socket file of a Unix listener. Dropping this value removes the file, unless another server has replaced
/// the file in the meantime.
pub(crate) struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), inode: inode(path)? })
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if inode(&self.path).is_ok_and(|inode| inode == self.inode) {
            // If the removal fails, the next server removes the file when it starts.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
