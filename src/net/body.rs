//! Bodies of Check calls: one message in, one reply out.
//!
//! Never turns bytes into a gRPC error: what cannot be read is a denial, and a denial is a message.

use std::{
    pin::Pin,
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Response, header::CONTENT_TYPE};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tonic::body::Body as TonicBody;

use crate::{
    decision::DenyReason,
    wire::{
        grpc::{PREFIX_BYTES, message_bytes, unframe},
        response::Reply,
    },
};

/// Room for messages, over all connections.
pub struct Room {
    free: AtomicUsize,
}

impl Room {
    /// Room for `bytes` bytes.
    #[must_use]
    pub const fn new(bytes: usize) -> Self {
        Self { free: AtomicUsize::new(bytes) }
    }

    fn take(&self, bytes: usize) -> bool {
        self.free.try_update(Ordering::Relaxed, Ordering::Relaxed, |free| free.checked_sub(bytes)).is_ok()
    }
}

/// A message, and the room it takes until it is dropped.
pub struct Message<'r> {
    bytes: Bytes,
    _held: Held<'r>,
}

impl Message<'_> {
    /// The message's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

struct Held<'r> {
    room: &'r Room,
    bytes: usize,
}

impl Held<'_> {
    fn grow(&mut self, bytes: usize) -> bool {
        let taken = self.room.take(bytes);
        self.bytes += if taken { bytes } else { 0 };
        taken
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.room.free.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

/// Why a body gave no message.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// The caller's doing.
    Denied(DenyReason),
    /// Too many messages are held at the moment.
    NoRoom,
}

/// Reads the one message of `body`. One over `bytes_max` is not kept; it is read to its end, at most `discard_max`
/// bytes, so that the connection stays in order.
///
/// # Errors
/// [`Refused`].
pub async fn read<'r>(
    body: &mut Incoming,
    bytes_max: u64,
    discard_max: u64,
    room: &'r Room,
) -> Result<Message<'r>, Refused> {
    let mut held = Held { room, bytes: 0 };
    let mut kept: Option<Bytes> = None;
    let mut seen = 0_u64;
    let mut too_large = false;
    while let Some(frame) = body.frame().await {
        // A stream that broke has nobody left to answer; the value is never sent.
        let Ok(frame) = frame else { return Err(Refused::Denied(DenyReason::Undecodable)) };
        let Ok(data) = frame.into_data() else { continue };
        seen += data.len() as u64;
        too_large |= seen > bytes_max + PREFIX_BYTES as u64;
        if too_large {
            kept = None;
            if seen > discard_max {
                break;
            }
            continue;
        }
        if !held.grow(data.len()) {
            return Err(Refused::NoRoom);
        }
        kept = Some(match kept {
            None => data, // most messages come in one frame: no copy
            Some(before) => joined(before, &data),
        });
        too_large |= kept.as_deref().and_then(message_bytes).is_some_and(|bytes| bytes as u64 > bytes_max);
    }
    if too_large {
        return Err(Refused::Denied(DenyReason::TooLarge));
    }
    let bytes = kept.as_ref().and_then(unframe).ok_or(Refused::Denied(DenyReason::Undecodable))?;
    Ok(Message { bytes, _held: held })
}

fn joined(before: Bytes, data: &[u8]) -> Bytes {
    // Usually we hold the only reference, and the buffer grows in place.
    let mut joined = before.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&*shared));
    joined.extend_from_slice(data);
    joined.freeze()
}

/// The body of an answer.
pub enum ReplyBody {
    /// A Check call's: the message if there is one, then the gRPC status.
    Check {
        /// The framed message.
        message: Option<Bytes>,
        /// Trailers that have not been sent.
        trailers: Option<HeaderMap>,
    },
    /// Another service's.
    Other(TonicBody),
}

impl ReplyBody {
    /// The body of another service's answer.
    #[must_use]
    pub const fn other(body: TonicBody) -> Self {
        Self::Other(body)
    }
}

/// The HTTP response that carries `reply`.
#[must_use]
pub fn response(reply: Reply) -> Response<ReplyBody> {
    let content_type = HeaderValue::from_static("application/grpc");
    match reply {
        Reply::Message(message) => {
            let mut trailers = HeaderMap::with_capacity(1);
            trailers.insert("grpc-status", HeaderValue::from_static("0"));
            let mut response = Response::new(ReplyBody::Check { message: Some(message), trailers: Some(trailers) });
            response.headers_mut().insert(CONTENT_TYPE, content_type);
            response
        }
        // Trailers-Only: the status stands in the headers and nothing follows.
        Reply::Unavailable => {
            let mut response = Response::new(ReplyBody::Check { message: None, trailers: None });
            let headers = response.headers_mut();
            headers.insert(CONTENT_TYPE, content_type);
            headers.insert("grpc-status", HeaderValue::from_static("14"));
            headers.insert("grpc-message", HeaderValue::from_static("the request could not be decided"));
            response
        }
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.get_mut() {
            Self::Check { message, trailers } => {
                let frame = message.take().map(Frame::data).or_else(|| trailers.take().map(Frame::trailers));
                Poll::Ready(frame.map(Ok))
            }
            Self::Other(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Check { message, trailers } => message.is_none() && trailers.is_none(),
            Self::Other(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Check { message, .. } => SizeHint::with_exact(message.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Other(body) => body.size_hint(),
        }
    }
}
