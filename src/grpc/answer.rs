//! Sends answers to calls: gRPC replies and HTTP errors.

use std::{future::poll_fn, sync::Arc};

use bytes::Bytes;
use h2::{Reason as ResetReason, server::SendResponse};
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::ext_authz::response::Reply;

/// The gRPC status UNAVAILABLE: the client may retry the call, on this server or another.
pub(crate) const UNAVAILABLE: HeaderValue = HeaderValue::from_static("14");

/// The answer to a call.
pub(crate) enum CallAnswer {
    /// The reply to a check: HTTP 200 with a gRPC status.
    Reply(Reply),
    /// An HTTP error, for a request that is not a complete gRPC call. An HTTP caller would treat status 200 as a grant.
    Status(StatusCode),
    /// No answer: the caller has reset the stream or disconnected.
    Nothing,
}

/// Sends the answer that `work` returns, unless the peer resets the stream first.
pub(crate) async fn answer_unless_reset(
    mut respond: SendResponse<Bytes>,
    work: impl Future<Output = CallAnswer>,
    unread: &Arc<Semaphore>,
) {
    let found = tokio::select! {
        biased; // poll `work` first: it reads the body, and counts a check that its caller cancelled
        answer = work => answer,
        _ = poll_fn(|cx| respond.poll_reset(cx)) => return,
    };
    answer(respond, found, unread);
}

/// Sends `answer`. Ignores a failure to send, because it means that the peer has disconnected or reset the stream.
/// `unread` contains the permits for answers that peers have not read yet.
pub(crate) fn answer(mut respond: SendResponse<Bytes>, answer: CallAnswer, unread: &Arc<Semaphore>) {
    match answer {
        CallAnswer::Reply(reply) => send(respond, reply, unread),
        CallAnswer::Status(status) => {
            let mut response = Response::new(());
            *response.status_mut() = status;
            if status == StatusCode::METHOD_NOT_ALLOWED {
                response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
            }
            let _ = respond.send_response(response, true);
        }
        CallAnswer::Nothing => {}
    }
}

/// An answer that waits until the peer opens its flow-control window. The message is a copy, because a slice would keep
/// the larger shared buffer allocated until the peer reads the answer.
struct Unread {
    message: Box<[u8]>,
    _permit: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Unread {
    fn as_ref(&self) -> &[u8] {
        &self.message
    }
}

/// Sends `reply`. If the peer's flow-control window is too small, h2 queues the answer. If `UNREAD_MAX` answers are
/// already queued, resets the stream.
pub(crate) fn send(mut respond: SendResponse<Bytes>, reply: Reply, unread: &Arc<Semaphore>) {
    let mut response = Response::new(());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    match reply {
        Reply::Message(message) => {
            let Ok(mut stream) = respond.send_response(response, false) else { return };
            stream.reserve_capacity(message.len());
            let message = if stream.capacity() >= message.len() {
                message
            } else if let Ok(permit) = Arc::clone(unread).try_acquire_owned() {
                Bytes::from_owner(Unread { message: message.as_ref().into(), _permit: permit })
            } else {
                return stream.send_reset(ResetReason::ENHANCE_YOUR_CALM);
            };
            if stream.send_data(message, false).is_ok() {
                let mut trailers = HeaderMap::with_capacity(1);
                trailers.insert("grpc-status", HeaderValue::from_static("0"));
                let _ = stream.send_trailers(trailers);
            }
        }
        // A Trailers-Only response: its headers include the gRPC status, and no message follows.
        Reply::Unavailable => {
            let headers = response.headers_mut();
            headers.insert("grpc-status", UNAVAILABLE);
            headers.insert("grpc-message", HeaderValue::from_static("the request could not be decided"));
            let _ = respond.send_response(response, true);
        }
    }
}
