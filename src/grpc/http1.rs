//! Answers a caller that does not speak HTTP/2 with an HTTP error.
//!
//! Closing the connection without an answer would be dangerous, because Envoy in `http_service` mode would then
//! generate the response itself. If the request that Envoy forwarded has the `content-type` `application/grpc`, Envoy
//! generates HTTP 200 with a gRPC status, and treats that response as a grant.

use std::time::Duration;

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::timeout,
};

const ANSWER: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: 35\r\nconnection: close\r\n\r\n\
this port serves gRPC over HTTP/2\r\n";

/// Answers the request on `stream` with HTTP 400, then reads until the peer closes the connection. The whole exchange
/// takes at most `limit`. Closing a connection with unread data would reset it, and the peer could lose the answer.
pub(crate) async fn refuse(mut stream: impl AsyncRead + AsyncWrite + Unpin, limit: Duration) {
    let answered = timeout(limit, async {
        stream.write_all(ANSWER).await?;
        stream.shutdown().await?;
        let mut unread = [0; 4096];
        while stream.read(&mut unread).await? > 0 {}
        std::io::Result::Ok(())
    });
    // Ignore errors and the timeout: the peer has disconnected or is too slow.
    let _ = answered.await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_length_matches_the_body() {
        let answer = std::str::from_utf8(ANSWER).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{}", body.len());
    }
}
