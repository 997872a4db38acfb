//! The HTTP/2 connection preface (RFC 9113, section 3.4), read under our own deadline before hyper sees the connection:
//! hyper waits for it without end.
//!
//! Never interprets anything beyond those bytes.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    net::TcpStream,
};

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Waits for the preface.
///
/// # Errors
/// `InvalidData` when something else comes, `UnexpectedEof` when the peer leaves.
pub async fn read(stream: &mut TcpStream) -> io::Result<&'static [u8]> {
    let mut begin = [0; PREFACE.len()];
    stream.read_exact(&mut begin).await?;
    if &begin == PREFACE { Ok(PREFACE) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// A connection whose first bytes were read already and are given back to whoever reads it next.
pub struct Prefaced {
    begin: &'static [u8],
    stream: TcpStream,
}

impl Prefaced {
    /// `stream`, with `begin` in front of it.
    #[must_use]
    pub const fn new(begin: &'static [u8], stream: TcpStream) -> Self {
        Self { begin, stream }
    }
}

impl AsyncRead for Prefaced {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.begin.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, into);
        }
        let (now, later) = self.begin.split_at(self.begin.len().min(into.remaining()));
        into.put_slice(now);
        self.begin = later;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Prefaced {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
