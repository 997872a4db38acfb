//! The one message in the body of a Check call, read within bounds.
//!
//! Never turns bytes into a gRPC error: what cannot be read is a denial, and a denial is a message.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use h2::RecvStream;

use super::LimitsSettings;
use crate::{
    decision::DenyReason,
    wire::grpc::{PREFIX_BYTES, message_bytes, unframe},
};

/// The largest message whose rest is read and thrown away, so that the connection stays in order; beyond it the call
/// is answered and reset.
const DISCARD_BYTES_MAX: u64 = 4 << 20;

/// Room for messages that wait, over all connections.
pub(super) struct Room {
    free: AtomicUsize,
}

impl Room {
    /// Room for `bytes` bytes.
    pub(super) const fn new(bytes: usize) -> Self {
        Self { free: AtomicUsize::new(bytes) }
    }

    /// Takes `bytes` of it, if they are free.
    pub(super) fn hold(&self, bytes: usize) -> Option<Held<'_>> {
        let mut held = self.hold_nothing();
        held.grow_to(bytes).then_some(held)
    }

    /// Takes nothing yet.
    pub(super) const fn hold_nothing(&self) -> Held<'_> {
        Held { room: self, bytes: 0 }
    }
}

/// Room that is taken until this is dropped.
pub(super) struct Held<'r> {
    room: &'r Room,
    bytes: usize,
}

impl Held<'_> {
    /// Takes as much as is missing to `bytes`; says whether it was there.
    pub(super) fn grow_to(&mut self, bytes: usize) -> bool {
        let missing = bytes.saturating_sub(self.bytes);
        let free = |free: usize| free.checked_sub(missing);
        let taken = self.room.free.try_update(Ordering::Relaxed, Ordering::Relaxed, free).is_ok();
        self.bytes += if taken { missing } else { 0 };
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
pub(super) enum Refused {
    /// The caller's doing.
    Denied(DenyReason),
    /// Too many messages are held at the moment.
    NoRoom,
}

/// A body that is being read.
pub(super) struct Reading {
    body: RecvStream,
    kept: Option<Bytes>,
    seen: u64,
    too_large: bool,
    bytes_max: u64,
}

impl Reading {
    /// Nothing read yet of `body`. A message over `limits.message_size` will not be kept; it is read to its end, within
    /// bounds, so that the connection stays in order.
    pub(super) const fn new(body: RecvStream, limits: &LimitsSettings) -> Self {
        Self { body, kept: None, seen: 0, too_large: false, bytes_max: limits.message_size.bytes() }
    }

    /// Bytes that it holds.
    pub(super) fn bytes(&self) -> usize {
        self.kept.as_ref().map_or(0, Bytes::len)
    }

    /// Reads what has come; ready with the message, once all of it has, or with why there is none.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, Refused>> {
        loop {
            match ready!(self.body.poll_data(cx)) {
                Some(Ok(data)) => {
                    // The peer may send as much again. Where the connection is gone, nobody sends.
                    let _ = self.body.flow_control().release_capacity(data.len());
                    self.take(data);
                    if self.seen > DISCARD_BYTES_MAX || self.body.is_end_stream() {
                        return Poll::Ready(self.message());
                    }
                }
                // A stream that broke has nobody left to answer; the value is never sent.
                Some(Err(_)) => return Poll::Ready(Err(Refused::Denied(DenyReason::Undecodable))),
                None => return Poll::Ready(self.message()),
            }
        }
    }

    fn take(&mut self, data: Bytes) {
        self.seen += data.len() as u64;
        self.too_large |= self.seen > self.bytes_max + PREFIX_BYTES as u64;
        if self.too_large {
            self.kept = None;
            return;
        }
        let kept = match self.kept.take() {
            None => data, // most messages come in one frame: no copy
            Some(before) => joined(before, &data),
        };
        self.too_large |= message_bytes(&kept).is_some_and(|bytes| bytes as u64 > self.bytes_max);
        self.kept = Some(kept);
    }

    fn message(&self) -> Result<Bytes, Refused> {
        if self.too_large {
            return Err(Refused::Denied(DenyReason::TooLarge));
        }
        // Kept on, and so counted, for as long as the check may wait.
        self.kept.as_ref().and_then(unframe).ok_or(Refused::Denied(DenyReason::Undecodable))
    }
}

fn joined(before: Bytes, data: &[u8]) -> Bytes {
    // Usually we hold the only reference, and the buffer grows in place.
    let mut joined = before.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&*shared));
    joined.extend_from_slice(data);
    joined.freeze()
}
