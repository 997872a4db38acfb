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
    let prefix = Prefix::of(body).filter(|prefix| prefix.flag == 0)?;
    (body.len() as u64 == prefix.framed_bytes()).then(|| body.slice(PREFIX_BYTES..))
}

/// The five-byte prefix of a gRPC message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// 0 for a plain message, 1 for one that is compressed by the algorithm in the header `grpc-encoding`.
    pub flag: u8,
    /// Bytes of the message.
    pub length: u32,
}

impl Prefix {
    /// The prefix at the start of `body`; `None` where fewer bytes have arrived.
    #[must_use]
    pub fn of(body: &[u8]) -> Option<Self> {
        let ([flag, length @ ..], _) = body.split_first_chunk::<PREFIX_BYTES>()?;
        Some(Self { flag: *flag, length: u32::from_be_bytes(*length) })
    }

    /// Bytes of the message and its prefix.
    #[must_use]
    pub const fn framed_bytes(self) -> u64 {
        PREFIX_BYTES as u64 + self.length as u64
    }
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

/// The bytes of a message with their prefix.
#[must_use]
pub fn frame_bytes(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(PREFIX_BYTES + message.len());
    framed.put_u8(0);
    // Messages are bounded far below 4 GiB when they are read.
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.put_slice(message);
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
