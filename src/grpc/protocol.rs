//! Detects the protocol of a peer from the first bytes of its connection. `stream` peeks at these bytes (or, under TLS,
//! reads and replays them), so that h2 still receives them.

use super::refused::Reason;

/// Number of bytes to inspect: the length of the HTTP/2 preface (RFC 9113, section 3.4).
pub(crate) const FIRST_BYTES: usize = HTTP2_PREFACE.len();
const HTTP2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A TLS record that contains a handshake (RFC 8446, section 5.1).
const TLS_HANDSHAKE: u8 = 22;

/// Returns the reason to refuse a connection that begins with `first`, or `None` to accept it. `has_tls`: true if the
/// listener expects TLS.
pub(crate) fn refusal(first: &[u8], has_tls: bool) -> Option<Reason> {
    let speaks_tls = first.first() == Some(&TLS_HANDSHAKE);
    if speaks_tls || HTTP2_PREFACE.starts_with(first) {
        (speaks_tls != has_tls).then_some(Reason::Tls)
    } else if is_http1(first) {
        Some(Reason::Http1)
    } else {
        Some(Reason::Unrecognized)
    }
}

/// True if `first` begins like an HTTP/1 request: a method and a space (RFC 9112, section 3). The standard allows any
/// token as a method, but the methods in use consist of capital letters, `-` and `_`. A peer that uses another method
/// gets the same answer but is counted as `unrecognized`.
fn is_http1(first: &[u8]) -> bool {
    let method = first.iter().take_while(|byte| byte.is_ascii_uppercase() || b"-_".contains(byte)).count();
    method > 0 && first.get(method).is_none_or(|byte| *byte == b' ')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_identify_the_protocol() {
        for (first, plain, tls) in [
            (&HTTP2_PREFACE[..], None, Some(Reason::Tls)),
            (b"PRI * HT", None, Some(Reason::Tls)),
            (b"\x16\x03\x01\x02\x00\x01\x00", Some(Reason::Tls), None),
            (b"GET / HTTP/1.1\r\nhost: a\r\n", Some(Reason::Http1), Some(Reason::Http1)),
            (b"POST /envoy.service.auth", Some(Reason::Http1), Some(Reason::Http1)),
            (b"PROPFIND /admin HTTP/1.1", Some(Reason::Http1), Some(Reason::Http1)),
            (b"M-SEARCH * HTTP/1.1", Some(Reason::Http1), Some(Reason::Http1)),
            (b"\x00\x01\x02", Some(Reason::Unrecognized), Some(Reason::Unrecognized)),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Some(Reason::Unrecognized), Some(Reason::Unrecognized)),
        ] {
            assert_eq!((refusal(first, false), refusal(first, true)), (plain, tls), "{first:?}");
        }
    }
}
