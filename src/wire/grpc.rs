//! gRPC's framing of one message: five bytes of prefix, then the message
//! (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>).
//!
//! Never refuses a call with a gRPC error because of its bytes: `failure_mode_allow` would let such a request in.

use bytes::{BufMut, Bytes, BytesMut};

/// The method that Envoy calls.
pub const CHECK_PATH: &str = "/envoy.service.auth.v3.Authorization/Check";
/// The service that health checks name.
pub const SERVICE: &str = "envoy.service.auth.v3.Authorization";
/// Bytes before each message: a flag for compression and the message's length.
pub const PREFIX_BYTES: usize = 5;

/// The one message in the body of a unary call; `None` where the body is anything but exactly one uncompressed message.
#[must_use]
pub fn unframe(body: &Bytes) -> Option<Bytes> {
    let length = message_bytes(body)?;
    (body.len() == PREFIX_BYTES.checked_add(length)?).then(|| body.slice(PREFIX_BYTES..))
}

/// The length that a body's prefix announces; `None` for a compressed message, which nobody was told we could read.
#[must_use]
pub fn message_bytes(body: &[u8]) -> Option<usize> {
    let ([0, length @ ..], _) = body.split_first_chunk::<PREFIX_BYTES>()? else { return None };
    usize::try_from(u32::from_be_bytes(*length)).ok()
}

/// `message` with its prefix.
#[must_use]
pub fn frame(message: &impl prost::Message) -> Bytes {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(PREFIX_BYTES + length);
    framed.put_u8(0);
    // Our answers are a few hundred bytes; the bounds on scopes and settings keep them far below 4 GiB.
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    message.encode_raw(&mut framed);
    framed.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exactly_one_plain_message_is_one() {
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
