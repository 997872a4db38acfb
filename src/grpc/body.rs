//! Reads the one message in the body of a gRPC call, within the limits on size and memory.
//!
//! A complete message is answered with a `CheckResponse`, even if its bytes are invalid. After a gRPC error, Envoy's
//! `failure_mode_allow` would let the request pass, so only `decision.on_fault = "error"` answers with a gRPC error. A
//! body that ends before its message is complete is not a gRPC call and is answered with an HTTP error.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use h2::RecvStream;
use http::Request;

use crate::ext_authz::{
    decision::DenyReason,
    framing::{MessagePrefix, PREFIX_BYTES, unframe},
};

/// The memory budget for incomplete messages and for the messages of pending checks. All connections share the budget.
pub(crate) struct ByteBudget {
    free: AtomicUsize,
}

impl ByteBudget {
    /// Creates a budget of `bytes` bytes.
    pub(crate) const fn new(bytes: usize) -> Self {
        Self { free: AtomicUsize::new(bytes) }
    }

    /// Reserves `bytes` bytes; returns `None` if fewer bytes are free.
    pub(crate) fn reserve(&self, bytes: usize) -> Option<ReservedBytes<'_>> {
        let mut reserved = self.reserve_nothing();
        reserved.grow_to(bytes).then_some(reserved)
    }

    /// Creates an empty reservation, which [`ReservedBytes::grow_to`] can grow.
    pub(crate) const fn reserve_nothing(&self) -> ReservedBytes<'_> {
        ReservedBytes { budget: self, bytes: 0 }
    }
}

/// A reserved part of the budget. Dropping the reservation returns its bytes to the budget.
pub(crate) struct ReservedBytes<'r> {
    budget: &'r ByteBudget,
    bytes: usize,
}

impl ReservedBytes<'_> {
    /// Grows the reservation to `bytes` bytes. If too few bytes are free, leaves the reservation unchanged and returns
    /// false.
    pub(crate) fn grow_to(&mut self, bytes: usize) -> bool {
        let missing = bytes.saturating_sub(self.bytes);
        let free = |free: usize| free.checked_sub(missing);
        let taken = self.budget.free.try_update(Ordering::Relaxed, Ordering::Relaxed, free).is_ok();
        self.bytes += if taken { missing } else { 0 };
        taken
    }
}

impl Drop for ReservedBytes<'_> {
    fn drop(&mut self) {
        self.budget.free.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

/// Why a body contains no message to decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyError {
    /// The body ended before the message was complete.
    Incomplete,
    /// A complete message arrived, but it is too large or its framing is invalid.
    Denied(DenyReason),
    /// A complete message arrived, but it is compressed.
    Compressed,
    /// The memory budget for messages is exhausted.
    NoRoom {
        /// True if the message was complete.
        is_whole: bool,
    },
    /// The peer reset the stream, or the connection closed.
    Gone,
}

/// Reads the message of one call.
pub(crate) struct MessageReader {
    request: Request<RecvStream>,
    /// The bytes of the prefix and the message that have arrived. `None` before the first bytes arrive, and for a
    /// message that is too large.
    received: Option<Bytes>,
    prefix: Option<MessagePrefix>,
    /// Number of bytes that have arrived, including discarded bytes.
    seen: u64,
    too_large: bool,
    bytes_max: u64,
}

impl MessageReader {
    /// Creates a reader for the body of `request`. The reader discards the bytes of a message larger than `bytes_max`
    /// as they arrive, so that the connection stays usable.
    pub(crate) const fn new(request: Request<RecvStream>, bytes_max: u64) -> Self {
        Self { request, received: None, prefix: None, seen: 0, too_large: false, bytes_max }
    }

    /// Returns the number of buffered bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.received.as_ref().map_or(0, Bytes::len)
    }

    /// Returns the value of the header `grpc-encoding`, the compression algorithm that the caller uses; empty if the
    /// header is absent.
    pub(crate) fn encoding(&self) -> &[u8] {
        self.request.headers().get("grpc-encoding").map_or(b"", |value| value.as_bytes())
    }

    /// Reads the data that has arrived. Ready once the body has ended, with the message or with the reason why the body
    /// contains no message to decide.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, BodyError>> {
        loop {
            let body = self.request.body_mut();
            match ready!(body.poll_data(cx)) {
                Some(Ok(data)) => {
                    // Let the peer send as many bytes again. `release_capacity` fails only after the connection has
                    // closed.
                    let _ = body.flow_control().release_capacity(data.len());
                    let is_end = body.is_end_stream();
                    self.take(data);
                    if is_end {
                        return Poll::Ready(self.message());
                    }
                }
                Some(Err(_)) => return Poll::Ready(Err(BodyError::Gone)),
                None => return Poll::Ready(self.message()),
            }
        }
    }

    fn take(&mut self, data: Bytes) {
        self.seen += data.len() as u64;
        if self.too_large {
            return;
        }
        let received = match self.received.take() {
            None => data, // most messages arrive in one frame and are not copied
            Some(before) => joined(before, &data),
        };
        self.prefix = self.prefix.or_else(|| MessagePrefix::of(&received));
        let announced = self.prefix.map_or(0, |prefix| u64::from(prefix.length));
        self.too_large = announced > self.bytes_max || self.seen > self.bytes_max + PREFIX_BYTES as u64;
        self.received = (!self.too_large).then_some(received);
    }

    fn message(&self) -> Result<Bytes, BodyError> {
        let arrived = self.prefix.filter(|prefix| self.seen >= prefix.framed_bytes());
        let prefix = arrived.ok_or(BodyError::Incomplete)?;
        if self.too_large {
            return Err(BodyError::Denied(DenyReason::TooLarge));
        }
        if prefix.flag == 1 {
            return Err(BodyError::Compressed);
        }
        // Do not take `received`: after this function returns, the caller reserves memory for `bytes()` bytes.
        self.received.as_ref().and_then(unframe).ok_or(BodyError::Denied(DenyReason::Undecodable))
    }
}

fn joined(before: Bytes, data: &[u8]) -> Bytes {
    // Usually this is the only reference to the buffer, so the buffer grows in place.
    let mut joined = before.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&*shared));
    joined.extend_from_slice(data);
    joined.freeze()
}
