//! Answers a caller that does not speak HTTP/2 with an HTTP error.
//!
//! Closing the connection without an answer would be dangerous: Envoy in `http_service` mode then generates the
//! response itself. If it has forwarded a `content-type` of `application/grpc`, that response is HTTP 200 with a gRPC
//! status, which Envoy takes for a grant.

use std::time::Duration;

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::timeout,
};

const ANSWER: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: 35\r\nconnection: close\r\n\r\n\
this port serves gRPC over HTTP/2\r\n";

/// Answers the request on `stream` with 400, then reads until the peer closes, for at most `limit`. Closing a
/// connection with unread data resets it, and the peer may lose the answer.
pub(crate) async fn refuse(mut stream: impl AsyncRead + AsyncWrite + Unpin, limit: Duration) {
    let answered = timeout(limit, async {
        stream.write_all(ANSWER).await?;
        stream.shutdown().await?;
        let mut unread = [0; 4096];
        while stream.read(&mut unread).await? > 0 {}
        std::io::Result::Ok(())
    });
    // Ignore errors and the timeout: the peer has left or is too slow.
    let _ = answered.await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_length_is_the_length_of_the_body() {
        let answer = std::str::from_utf8(ANSWER).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{}", body.len());
    }
}
