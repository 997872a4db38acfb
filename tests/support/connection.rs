//! An HTTP/2 connection to trustgate on which a test controls each stream. Tests use it for behaviour that a gRPC
//! client would hide.

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use tokio::io::{AsyncRead, AsyncWrite};
use trustgate::testing::ext_authz::framing::{CHECK_PATH, frame};

use super::grpc::{Verdict, request, verdict};

/// Opens an HTTP/2 connection over `stream`.
///
/// # Errors
/// If the server refuses the connection.
pub async fn try_connect<T>(stream: T) -> Result<SendRequest<Bytes>, h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    // Use flow-control windows as large as Envoy's, so that an answer arrives in one frame.
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(1 << 20).initial_connection_window_size(16 << 20);
    let (sender, connection) = builder.handshake(stream).await?;
    tokio::spawn(connection);
    sender.ready().await
}

/// Opens an HTTP/2 connection over `stream`, which the server must accept.
///
/// # Panics
/// If the server refuses the connection.
pub async fn connect(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> SendRequest<Bytes> {
    try_connect(stream).await.expect("a connection")
}

/// Returns the request head of a Check call.
pub fn head() -> ::http::Request<()> {
    head_of(CHECK_PATH)
}

/// Returns the request head of a call of the gRPC method at `path`.
///
/// # Panics
/// If `path` is not a valid path.
pub fn head_of(path: &str) -> ::http::Request<()> {
    let head = ::http::Request::post(format!("http://trustgate{path}"));
    head.header("content-type", "application/grpc").header("te", "trailers").body(()).expect("a request")
}

/// Sends a check of `key`. If the server accepts no further stream at the moment, the h2 client queues the check.
///
/// # Panics
/// If the connection is closed.
pub fn call(connection: &SendRequest<Bytes>, key: &str) -> ResponseFuture {
    // Use a new handle for each call: h2 refuses a second request on a handle while the first request waits for a
    // stream.
    let (answer, mut stream) = connection.clone().send_request(head(), false).expect("an open connection");
    stream.send_data(frame(&request(key, &[])), true).expect("an open stream");
    answer
}

/// Waits for the answer to a call; returns `None` if the call ends without an answer.
///
/// # Panics
/// If the answer is not a `CheckResponse`.
pub async fn answer(answer: ResponseFuture) -> Option<Verdict> {
    let mut body = answer.await.ok()?.into_body();
    let message = body.data().await?.ok()?;
    Some(verdict(&prost::Message::decode(&message[5..]).expect("a CheckResponse")))
}
