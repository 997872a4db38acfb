//! The one message in the body of a gRPC call, read within bounds.
//!
//! A complete message never causes a gRPC error here, even if its bytes are invalid: Envoy's `failure_mode_allow` would let
//! such a request in. (Only `decision.on_fault = "error"` answers with one.) A body that ends early is not a gRPC call.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use h2::RecvStream;
use http::Request;

use crate::ext_authz::{
    decision::DenyReason,
    framing::{PREFIX_BYTES, Prefix, unframe},
};

/// Room for messages that wait, over all connections.
pub(crate) struct ByteBudget {
    free: AtomicUsize,
}

impl ByteBudget {
    /// Room for `bytes` bytes.
    pub(crate) const fn new(bytes: usize) -> Self {
        Self { free: AtomicUsize::new(bytes) }
    }

    /// Takes `bytes` of it, if they are free.
    pub(crate) fn reserve(&self, bytes: usize) -> Option<ReservedBytes<'_>> {
        let mut held = self.reserve_nothing();
        held.grow_to(bytes).then_some(held)
    }

    /// Takes nothing yet.
    pub(crate) const fn reserve_nothing(&self) -> ReservedBytes<'_> {
        ReservedBytes { budget: self, bytes: 0 }
    }
}

/// Room that is taken until this is dropped.
pub(crate) struct ReservedBytes<'r> {
    budget: &'r ByteBudget,
    bytes: usize,
}

impl ReservedBytes<'_> {
    /// Takes as much as is missing to `bytes`; says whether it was there.
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

/// Why a body gave no message that can be decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyError {
    /// The body ended before a whole message had arrived.
    Incomplete,
    /// A whole message arrived, and it is denied.
    Denied(DenyReason),
    /// A whole message arrived, and it is compressed.
    Compressed,
    /// Too many messages are held at the moment.
    NoRoom {
        /// Whether the message arrived whole.
        is_whole: bool,
    },
    /// The peer reset the stream, or the connection ended.
    Gone,
}

/// Reads the message of one call.
pub(crate) struct MessageReader {
    request: Request<RecvStream>,
    /// The prefix and what has arrived of the message; `None` for a message that is too large.
    kept: Option<Bytes>,
    prefix: Option<Prefix>,
    seen: u64,
    too_large: bool,
    bytes_max: u64,
}

impl MessageReader {
    /// Reads the body of `request`. The bytes of a message over `bytes_max` are discarded as they arrive, so that the
    /// connection stays usable.
    pub(crate) const fn new(request: Request<RecvStream>, bytes_max: u64) -> Self {
        Self { request, kept: None, prefix: None, seen: 0, too_large: false, bytes_max }
    }

    /// Bytes that it holds.
    pub(crate) fn bytes(&self) -> usize {
        self.kept.as_ref().map_or(0, Bytes::len)
    }

    /// The compression algorithm that the caller announced.
    pub(crate) fn encoding(&self) -> &[u8] {
        self.request.headers().get("grpc-encoding").map_or(b"", |value| value.as_bytes())
    }

    /// Reads what has arrived; ready with the message once the body has ended, or with why there is none.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, BodyError>> {
        loop {
            let body = self.request.body_mut();
            match ready!(body.poll_data(cx)) {
                Some(Ok(data)) => {
                    // The peer may send as much again. This fails only once the connection has ended.
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
        let kept = match self.kept.take() {
            None => data, // most messages come in one frame: no copy
            Some(before) => joined(before, &data),
        };
        self.prefix = self.prefix.or_else(|| Prefix::of(&kept));
        let announced = self.prefix.map_or(0, |prefix| u64::from(prefix.length));
        self.too_large = announced > self.bytes_max || self.seen > self.bytes_max + PREFIX_BYTES as u64;
        self.kept = (!self.too_large).then_some(kept);
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
        // Kept on, and so counted, for as long as the check may wait.
        self.kept.as_ref().and_then(unframe).ok_or(BodyError::Denied(DenyReason::Undecodable))
    }
}

fn joined(before: Bytes, data: &[u8]) -> Bytes {
    // Usually we hold the only reference, and the buffer grows in place.
    let mut joined = before.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&*shared));
    joined.extend_from_slice(data);
    joined.freeze()
}
