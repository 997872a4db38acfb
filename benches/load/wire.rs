//! A connection to the server: TCP, TLS over TCP, or a Unix socket. Once connected, the socket does not block.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use rustls::{
    ClientConfig, ClientConnection, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};

/// The timeout for connecting, and for the server's first bytes.
pub(crate) const START_MAX: Duration = Duration::from_secs(10);

/// The address of the server.
#[derive(Clone, Debug)]
pub(crate) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix://") {
            Some(path) => Ok(Self::Unix(path.into())),
            None => text.parse().map(Self::Tcp).map_err(|_| "expected IP:PORT or unix:///PATH".to_owned()),
        }
    }
}

/// The TLS configuration of the client.
#[derive(Clone)]
pub(crate) struct Tls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Tls {
    /// Creates a configuration that trusts `authority`, expects the server `name`, and authenticates with the
    /// certificate and the key in `own` if the server asks for them.
    ///
    /// # Errors
    /// If a file cannot be read or is invalid, or if `name` is invalid.
    pub(crate) fn new(
        authority: &PathBuf,
        name: String,
        own: Option<(&PathBuf, &PathBuf)>,
        protocol: &[u8],
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(authority)? {
            roots.add(certificate?)?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let builder = builder.with_root_certificates(roots);
        let mut config = match own {
            Some((certificate, key)) => {
                let chain = CertificateDer::pem_file_iter(certificate)?.collect::<Result<_, _>>()?;
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key)?)?
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![protocol.to_vec()];
        Ok(Self { config: Arc::new(config), name: name.try_into()? })
    }
}

/// One connection.
pub(crate) struct Wire {
    socket: Socket,
    tls: Option<Box<ClientConnection>>,
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Wire {
    /// Connects to `address`. Does not wait for the TLS handshake, which continues with each read and write.
    ///
    /// # Errors
    /// If the connection fails.
    pub(crate) fn connect(address: &Address, tls: Option<&Tls>) -> io::Result<Self> {
        let socket = match address {
            Address::Tcp(address) => {
                let stream = TcpStream::connect_timeout(address, START_MAX)?;
                stream.set_nodelay(true)?;
                stream.set_nonblocking(true)?;
                Socket::Tcp(stream)
            }
            Address::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_nonblocking(true)?;
                Socket::Unix(stream)
            }
        };
        let tls = tls.map(|tls| ClientConnection::new(Arc::clone(&tls.config), tls.name.clone())).transpose();
        Ok(Self { socket, tls: tls.map_err(io::Error::other)?.map(Box::new) })
    }

    /// Appends the bytes that have arrived to `input`, up to its capacity; returns true if the server has closed the
    /// connection.
    ///
    /// # Errors
    /// If the read fails, or if TLS reports an error.
    pub(crate) fn read(&mut self, input: &mut Input) -> io::Result<bool> {
        let Some(tls) = &mut self.tls else { return closed(input.fill(&mut self.socket)) };
        let ended = match tls.read_tls(&mut self.socket) {
            Ok(0) => true,
            Ok(_) => false,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        };
        tls.process_new_packets().map_err(io::Error::other)?;
        loop {
            match input.fill(&mut tls.reader()) {
                Ok(0) => return Ok(true),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(ended),
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends as many bytes of `output` as the kernel accepts, and removes them from `output`; returns true if none are
    /// left.
    ///
    /// # Errors
    /// If a write fails.
    pub(crate) fn write(&mut self, output: &mut Vec<u8>) -> io::Result<bool> {
        if let Some(tls) = &mut self.tls {
            let taken = tls.writer().write(output)?;
            output.drain(..taken);
            while tls.wants_write() {
                match tls.write_tls(&mut self.socket) {
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                    Err(error) => return Err(error),
                }
            }
            return Ok(output.is_empty());
        }
        while !output.is_empty() {
            match self.socket.write(output) {
                Ok(sent) => drop(output.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

fn closed(read: io::Result<usize>) -> io::Result<bool> {
    match read {
        Ok(count) => Ok(count == 0),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(stream) => stream.as_fd(),
            Socket::Unix(stream) => stream.as_fd(),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(buffer),
            Self::Unix(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A buffer for bytes that have arrived but are not processed yet.
pub(crate) struct Input {
    bytes: Box<[u8]>,
    from: usize,
    to: usize,
}

impl Input {
    /// Creates an empty buffer of 256 KiB, which is larger than an HTTP/2 frame of the default maximum size (16 KiB).
    pub(crate) fn new() -> Self {
        Self { bytes: vec![0; 256 << 10].into(), from: 0, to: 0 }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[self.from..self.to]
    }

    /// Removes the first `count` bytes.
    pub(crate) fn used(&mut self, count: usize) {
        self.from += count;
        if self.from == self.to {
            (self.from, self.to) = (0, 0);
        }
    }

    /// Reads once and returns the number of bytes; 0 at the end of the input. Fails if the buffer is full.
    fn fill(&mut self, source: &mut impl Read) -> io::Result<usize> {
        if self.to == self.bytes.len() {
            self.bytes.copy_within(self.from..self.to, 0);
            (self.from, self.to) = (0, self.to - self.from);
            if self.to == self.bytes.len() {
                return Err(io::Error::other("message of more than 256 KiB: not supported"));
            }
        }
        let count = source.read(&mut self.bytes[self.to..])?;
        self.to += count;
        Ok(count)
    }
}
