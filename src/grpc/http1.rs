//! Answers a caller that does not speak HTTP/2 with an HTTP error.
//!
//! To close the connection instead would be dangerous. Envoy in `http_service` mode then makes its own answer, and where it
//! forwards a `content-type` of `application/grpc`, that answer is HTTP 200 with a gRPC status, which it takes for a grant.

use std::time::Duration;

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::timeout,
};

const ANSWER: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: 35\r\nconnection: close\r\n\r\n\
this port serves gRPC over HTTP/2\r\n";

/// Answers the request that has begun on `stream` with 400, then reads until the peer closes, for at most `limit`: a
/// connection that is closed with unread data is reset, and the peer may lose the answer.
pub(crate) async fn refuse(mut stream: impl AsyncRead + AsyncWrite + Unpin, limit: Duration) {
    let answered = timeout(limit, async {
        stream.write_all(ANSWER).await?;
        stream.shutdown().await?;
        let mut unread = [0; 4096];
        while stream.read(&mut unread).await? > 0 {}
        std::io::Result::Ok(())
    });
    // A peer that left, or that is too slow, loses the answer.
    let _ = answered.await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_of_the_body_is_as_announced() {
        let answer = std::str::from_utf8(ANSWER).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{}", body.len());
    }
}
