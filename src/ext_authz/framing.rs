//! The gRPC framing of one message: a prefix of five bytes, then the message
//! (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>).
//!
//! [`unframe`] returns `None` for a malformed body, which the caller must deny: after a gRPC error, Envoy with
//! `failure_mode_allow` would let the request pass.

use bytes::{BufMut, Bytes, BytesMut};

use crate::base::saturate::Saturate as _;

/// The path of the gRPC method that Envoy calls.
pub const CHECK_PATH: &str = "/envoy.service.auth.v3.Authorization/Check";
/// The service name in gRPC health checks.
pub const SERVICE: &str = "envoy.service.auth.v3.Authorization";
/// Length of the prefix in bytes: a compression flag of one byte, and four bytes for the length of the message.
pub(crate) const PREFIX_BYTES: usize = 5;

/// Returns the message in the body of a unary call; `None` if the body is not exactly one uncompressed message.
#[must_use]
pub(crate) fn unframe(body: &Bytes) -> Option<Bytes> {
    let prefix = MessagePrefix::of(body).filter(|prefix| prefix.flag == 0)?;
    (body.len() as u64 == prefix.framed_bytes()).then(|| body.slice(PREFIX_BYTES..))
}

/// The five-byte prefix of a gRPC message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MessagePrefix {
    /// 0: the message is not compressed. 1: the message is compressed with the algorithm in the header `grpc-encoding`.
    pub flag: u8,
    /// Length of the message in bytes.
    pub length: u32,
}

impl MessagePrefix {
    /// Returns the prefix at the start of `body`; `None` if fewer than five bytes have arrived.
    #[must_use]
    pub(crate) fn of(body: &[u8]) -> Option<Self> {
        let ([flag, length @ ..], _) = body.split_first_chunk::<PREFIX_BYTES>()?;
        Some(Self { flag: *flag, length: u32::from_be_bytes(*length) })
    }

    /// Returns the length of the message with its prefix, in bytes.
    #[must_use]
    pub(crate) const fn framed_bytes(self) -> u64 {
        PREFIX_BYTES as u64 + self.length as u64
    }
}

/// Encodes `message` with the prefix.
#[must_use]
pub fn frame(message: &impl prost::Message) -> Bytes {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(PREFIX_BYTES + length);
    framed.put_u8(0);
    // Responses have a few hundred bytes; the limits on scopes and settings keep them far below 4 GiB.
    framed.put_u32(length.saturate());
    message.encode_raw(&mut framed);
    framed.freeze()
}

/// Copies an encoded message and puts the prefix before it.
#[must_use]
pub fn frame_bytes(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(PREFIX_BYTES + message.len());
    framed.put_u8(0);
    // `limits.message_size` keeps messages far below 4 GiB.
    framed.put_u32(message.len().saturate());
    framed.put_slice(message);
    framed.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unframe_accepts_exactly_one_uncompressed_message() {
        let body = |bytes: &'static [u8]| unframe(&Bytes::from_static(bytes));
        assert_eq!(body(b"\0\0\0\0\x02ab"), Some(Bytes::from_static(b"ab")));
        assert_eq!(body(b"\0\0\0\0\0"), Some(Bytes::new()));
        for bad in
            [&b""[..], b"\0\0\0\0", b"\x01\0\0\0\x02ab", b"\0\0\0\0\x02a", b"\0\0\0\0\x02abc", b"\0\xff\xff\xff\xff"]
        {
            assert_eq!(body(bad), None, "{bad:?}");
        }
    }
}
