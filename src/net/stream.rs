//! The byte stream under a connection, whatever kind it is.
//!
//! Never says that it can write several buffers at once, though it can: h2 then copies small answers behind each other and
//! one write takes them all, where it would otherwise make a write of each.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::listen::Accepted;

/// A stream that was accepted.
pub(super) enum Stream {
    /// Over TCP, as it comes.
    Tcp(TcpStream),
    /// Over a Unix socket.
    Unix(UnixStream),
    /// Over TCP, encrypted.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// Takes `accepted` into the runtime of the caller; one over TCP through the handshake of `tls`, where there is one. The
    /// caller sets the deadline.
    ///
    /// # Errors
    /// A descriptor that cannot be watched, or a handshake that failed.
    pub(super) async fn open(accepted: Accepted, tls: Option<&TlsAcceptor>) -> io::Result<Self> {
        match accepted {
            Accepted::Unix(stream) => UnixStream::from_std(stream).map(Self::Unix),
            Accepted::Tcp(stream) => {
                let stream = TcpStream::from_std(stream)?;
                // Answers are small and must not wait for more; a socket that refuses this still works.
                let _ = stream.set_nodelay(true);
                match tls {
                    None => Ok(Self::Tcp(stream)),
                    Some(tls) => tls.accept(stream).await.map(|stream| Self::Tls(Box::new(stream))),
                }
            }
        }
    }
}

/// The same call, on whatever it is.
macro_rules! on {
    ($stream:expr, $call:ident($($argument:expr),*)) => {
        match $stream.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).$call($($argument),*),
            Self::Unix(stream) => Pin::new(stream).$call($($argument),*),
            Self::Tls(stream) => Pin::new(stream).$call($($argument),*),
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        on!(self, poll_read(cx, into))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        on!(self, poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on!(self, poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on!(self, poll_shutdown(cx))
    }
}
