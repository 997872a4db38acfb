//! The byte stream of a connection: TCP, TLS over TCP, or a Unix socket.
//!
//! [`Stream`] reports that it does not support vectored writes, so that h2 copies small answers into one buffer and
//! sends the buffer with a single write. The sockets themselves do support vectored writes.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::BytesMut;
use rustix::net::{RecvFlags, recv};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, Interest, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    listener::Accepted,
    protocol::{FIRST_BYTES, refusal},
    refused::Reason,
};

/// An accepted stream.
pub(crate) enum Stream {
    /// Over TCP, without TLS.
    Tcp(TcpStream),
    /// Over a Unix socket.
    Unix(UnixStream),
    /// Over TCP, with TLS.
    Tls(Box<Rewound<TlsStream<TcpStream>>>),
}

impl Stream {
    /// Registers `accepted` with the caller's runtime, completes the TLS handshake if `accepted` is a TCP stream
    /// and `tls` is set, and detects the protocol. The caller is responsible for a timeout.
    ///
    /// # Errors
    /// The reason why the peer is refused.
    pub(crate) async fn open(accepted: Accepted, tls: Option<&TlsAcceptor>) -> Result<Self, Refused> {
        let mut first = [0; FIRST_BYTES];
        match accepted {
            Accepted::Unix(stream) => {
                let stream = UnixStream::from_std(stream)?;
                let peek = || Ok(recv(&stream, &mut first[..], RecvFlags::PEEK)?.0);
                let length = stream.async_io(Interest::READABLE, peek).await?;
                Self::Unix(stream).recognized(&first[..length])
            }
            Accepted::Tcp(stream, _) => {
                let stream = TcpStream::from_std(stream)?;
                // Without this option, Nagle's algorithm delays small answers. Ignore an error: the socket works
                // without the option.
                let _ = stream.set_nodelay(true);
                let length = stream.peek(&mut first).await?;
                let Some(tls) = tls else { return Self::Tcp(stream).recognized(&first[..length]) };
                if length == 0 {
                    return Err(Refused::Ended);
                }
                match refusal(&first[..length], true) {
                    None => {}
                    Some(Reason::Tls) => {
                        return Err(Refused::Peer(Reason::Tls, "the peer does not speak TLS".to_owned()));
                    }
                    Some(reason) => return Err(Refused::NotHttp2(reason, Self::Tcp(stream))),
                }
                let mut stream = tls.accept(stream).await?;
                // A TLS stream does not support peeking, so read the bytes here and let `Rewound` return them again.
                let length = stream.read(&mut first).await?;
                let rewound = BytesMut::from(&first[..length]);
                Self::Tls(Box::new(Rewound { first: rewound, stream })).recognized(&first[..length])
            }
        }
    }

    /// Returns `self` if `first`, the first bytes from the peer, begin like HTTP/2.
    fn recognized(self, first: &[u8]) -> Result<Self, Refused> {
        if first.is_empty() {
            return Err(Refused::Ended);
        }
        match refusal(first, false) {
            None => Ok(self),
            Some(Reason::Tls) => {
                let detail = "the peer speaks TLS, but grpc.tls_certificate_file is not set";
                Err(Refused::Peer(Reason::Tls, detail.to_owned()))
            }
            Some(reason) => Err(Refused::NotHttp2(reason, self)),
        }
    }
}

/// Why a connection is not served.
pub(crate) enum Refused {
    /// The peer's protocol, TLS handshake or certificate is refused. The string is a detail for the log.
    Peer(Reason, String),
    /// The peer speaks HTTP/1 or an unknown protocol on this stream.
    NotHttp2(Reason, Stream),
    /// The connection ended, or the operating system reported an error.
    Ended,
}

/// Classifies an I/O error on the connection. The error may contain a TLS handshake error.
impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(tls @ (rustls::Error::NoCertificatesPresented | rustls::Error::InvalidCertificate(_))) => {
                Self::Peer(Reason::NoClientCertificate, tls.to_string())
            }
            Some(tls) => Self::Peer(Reason::Tls, tls.to_string()),
            None => Self::Ended,
        }
    }
}

/// A stream whose first bytes were already read. `poll_read` returns these bytes again before it reads from the stream.
pub(crate) struct Rewound<T> {
    first: BytesMut,
    stream: T,
}

impl<T: AsyncRead + Unpin> AsyncRead for Rewound<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { first, stream } = self.get_mut();
        if first.is_empty() {
            return Pin::new(stream).poll_read(cx, into);
        }
        into.put_slice(&first.split_to(first.len().min(into.remaining())));
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Rewound<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// Calls a method of the socket or TLS stream inside a [`Stream`].
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
