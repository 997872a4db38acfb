//! What a peer speaks, by the first bytes of its connection. They are looked at and stay in the socket.

use super::refused::Reason;

/// How many bytes decide: as long as the preface of HTTP/2 (RFC 9113, section 3.4).
pub(super) const FIRST_BYTES: usize = HTTP2_PREFACE.len();
const HTTP2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The methods of HTTP/1 requests, as they begin a connection (RFC 9110, section 9, and RFC 5789).
const HTTP1_METHODS: [&[u8]; 9] =
    [b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"CONNECT ", b"OPTIONS ", b"TRACE ", b"PATCH "];
/// A TLS record that holds a handshake (RFC 8446, section 5.1).
const TLS_HANDSHAKE: u8 = 22;

/// Why a peer that begins with `first` is refused, where the listener has TLS or not; `None` where it may go on.
pub(super) fn refusal(first: &[u8], has_tls: bool) -> Option<Reason> {
    let speaks_tls = first.first() == Some(&TLS_HANDSHAKE);
    if HTTP1_METHODS.iter().any(|method| first.starts_with(method)) {
        Some(Reason::Http1)
    } else if speaks_tls || HTTP2_PREFACE.starts_with(first) {
        (speaks_tls != has_tls).then_some(Reason::Tls)
    } else {
        Some(Reason::Unrecognized)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_say_what_a_peer_speaks() {
        for (first, plain, tls) in [
            (&HTTP2_PREFACE[..], None, Some(Reason::Tls)),
            (b"PRI * HT", None, Some(Reason::Tls)),
            (b"\x16\x03\x01\x02\x00\x01\x00", Some(Reason::Tls), None),
            (b"GET / HTTP/1.1\r\nhost: a\r\n", Some(Reason::Http1), Some(Reason::Http1)),
            (b"POST /envoy.service.auth", Some(Reason::Http1), Some(Reason::Http1)),
            (b"\x00\x01\x02", Some(Reason::Unrecognized), Some(Reason::Unrecognized)),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Some(Reason::Unrecognized), Some(Reason::Unrecognized)),
        ] {
            assert_eq!((refusal(first, false), refusal(first, true)), (plain, tls), "{first:?}");
        }
    }
}
