//! One HTTP/2 connection to a trustgate, of which the test sees every stream: for what a gRPC client hides.

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use tokio::io::{AsyncRead, AsyncWrite};
use trustgate::ext_authz::framing::{CHECK_PATH, frame};

use super::grpc::{Verdict, request, verdict};

/// A connection over `stream`.
///
/// # Errors
/// When the server does not want it.
pub async fn try_connect<T>(stream: T) -> Result<SendRequest<Bytes>, h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    // Windows as large as Envoy's, so that an answer comes in one piece.
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(1 << 20).initial_connection_window_size(16 << 20);
    let (sender, connection) = builder.handshake(stream).await?;
    tokio::spawn(connection);
    sender.ready().await
}

/// The same where the server has to want it.
///
/// # Panics
/// If it does not.
pub async fn connect(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> SendRequest<Bytes> {
    try_connect(stream).await.expect("a connection")
}

/// What stands before the message of a Check call.
///
/// # Panics
/// Never: it is the same each time.
pub fn head() -> ::http::Request<()> {
    head_of(CHECK_PATH)
}

/// The same for a call of another method.
///
/// # Panics
/// If `path` is none.
pub fn head_of(path: &str) -> ::http::Request<()> {
    let head = ::http::Request::post(format!("http://trustgate{path}"));
    head.header("content-type", "application/grpc").header("te", "trailers").body(()).expect("a request")
}

/// Sends a check of `key`, or leaves it with the client's side of the connection as long as the server wants no more
/// streams.
///
/// # Panics
/// If the connection is at its end.
pub fn call(connection: &SendRequest<Bytes>, key: &str) -> ResponseFuture {
    // Each on a handle of its own: h2 refuses a second request on one whose first waits for the bound on streams.
    let (answer, mut stream) = connection.clone().send_request(head(), false).expect("it is open");
    stream.send_data(frame(&request(key, &[])), true).expect("it is open");
    answer
}

/// The answer, if the connection brings one.
///
/// # Panics
/// If it is no `CheckResponse`.
pub async fn answer(answer: ResponseFuture) -> Option<Verdict> {
    let mut body = answer.await.ok()?.into_body();
    let message = body.data().await?.ok()?;
    Some(verdict(&prost::Message::decode(&message[5..]).expect("a CheckResponse")))
}
