//! Compares [`View`] with the generated decoder, on well-formed messages and on arbitrary bytes.

use std::collections::HashMap;

use envoy_types::pb::envoy::{
    config::core::v3::{Address, HeaderMap, HeaderValue, Pipe, SocketAddress, address::Address as Variant},
    service::auth::v3::{
        AttributeContext, CheckRequest,
        attribute_context::{HttpRequest, Peer as ProtoPeer, Request},
    },
};
use proptest::{collection::vec, option, prelude::*};
use prost::Message;

use super::*;

fn address() -> impl Strategy<Value = Address> {
    let socket =
        "[0-9.:]{0,15}".prop_map(|address| Variant::SocketAddress(SocketAddress { address, ..Default::default() }));
    let pipe = "[a-z/]{0,9}".prop_map(|path| Variant::Pipe(Pipe { path, mode: 0 }));
    option::of(prop_oneof![socket, pipe]).prop_map(|address| Address { address })
}

fn source() -> impl Strategy<Value = ProtoPeer> {
    (option::of(address()), any::<String>(), any::<String>()).prop_map(|(address, principal, service)| ProtoPeer {
        address,
        principal,
        service,
        ..Default::default()
    })
}

fn header_value() -> impl Strategy<Value = HeaderValue> {
    ("[a-zA-Z0-9:_-]{0,12}", any::<String>(), vec(any::<u8>(), 0..20)).prop_map(|(key, value, raw_value)| HeaderValue {
        key,
        value,
        raw_value,
    })
}

fn http() -> impl Strategy<Value = HttpRequest> {
    (
        (any::<String>(), any::<String>(), any::<String>(), any::<i64>()),
        proptest::collection::hash_map("[a-z:-]{0,8}", any::<String>(), 0..8),
        option::of(vec(header_value(), 0..8)),
        vec(any::<u8>(), 0..40),
    )
        .prop_map(|((method, path, host, size), headers, raw, raw_body)| HttpRequest {
            method,
            path,
            host,
            size,
            headers,
            header_map: raw.map(|headers| HeaderMap { headers }),
            raw_body,
            ..Default::default()
        })
}

fn attributes() -> impl Strategy<Value = AttributeContext> {
    (
        option::of(source()),
        option::of(option::of(http())),
        proptest::collection::hash_map("[a-z.]{0,8}", any::<String>(), 0..5),
    )
        .prop_map(|(source, request, context_extensions)| AttributeContext {
            source,
            request: request.map(|http| Request { http, ..Default::default() }),
            context_extensions,
            ..Default::default()
        })
}

fn message() -> impl Strategy<Value = CheckRequest> {
    option::of(attributes()).prop_map(|attributes| CheckRequest { attributes })
}

/// Asserts that the view of `bytes` equals `decoded`, the result of the generated decoder.
fn assert_same(bytes: &[u8], decoded: &CheckRequest) {
    let view = View::parse(bytes).expect("a well-formed message is accepted");
    let attributes = decoded.attributes.clone().unwrap_or_default();
    let source = attributes.source.clone().unwrap_or_default();
    let http = attributes.request.clone().and_then(|request| request.http);
    assert_eq!(view.is_http, http.is_some());
    let http = http.unwrap_or_default();
    assert_eq!((view.method, view.path, view.host), (&*http.method, &*http.path, &*http.host));
    assert_eq!(view.principal, source.principal);
    let peer = match source.address.as_ref().and_then(|address| address.address.as_ref()) {
        Some(Variant::SocketAddress(socket)) => Some(Peer::Socket(&socket.address)),
        Some(Variant::Pipe(_)) => Some(Peer::Pipe),
        _ => None,
    };
    assert_eq!(view.peer, peer);
    let extensions: HashMap<&str, &str> = view.context_extensions().collect();
    let named = attributes.context_extensions.iter().filter(|(name, _)| !name.is_empty());
    assert_eq!(extensions, named.map(|(name, value)| (&**name, &**value)).collect());
    let mut raw = http.header_map.unwrap_or_default().headers;
    raw.retain(|header| !header.key.is_empty());
    if raw.is_empty() {
        let headers: HashMap<&str, &[u8]> =
            view.headers().iter().map(|header| (str::from_utf8(header.name).unwrap(), header.value)).collect();
        let named = http.headers.iter().filter(|(name, _)| !name.is_empty());
        assert_eq!(headers, named.map(|(name, value)| (&**name, value.as_bytes())).collect());
    } else {
        let expected: Vec<Header> = raw
            .iter()
            .map(|header| Header {
                name: header.key.as_bytes(),
                value: if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value },
            })
            .collect();
        assert_eq!(view.headers(), expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn view_agrees_with_the_generated_decoder(message in message()) {
        assert_same(&message.encode_to_vec(), &message);
    }

    /// The concatenation of two encoded messages is one message: the scalars of the second message win, and lists are
    /// concatenated.
    #[test]
    fn view_merges_fields_like_the_generated_decoder(first in message(), second in message()) {
        let bytes = [first.encode_to_vec(), second.encode_to_vec()].concat();
        let merged = CheckRequest::decode(&*bytes).unwrap();
        assert_same(&bytes, &merged);
    }

    #[test]
    fn view_of_arbitrary_bytes_agrees_with_the_generated_decoder(bytes in vec(any::<u8>(), 0..300)) {
        if let (Ok(decoded), Ok(_)) = (CheckRequest::decode(&*bytes), View::parse(&bytes)) {
            assert_same(&bytes, &decoded);
        }
    }

    /// Well-formed messages with a few changed bytes exercise more of the parser than random bytes do.
    #[test]
    fn parsing_damaged_messages_does_not_panic(
        message in message(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = message.encode_to_vec();
        if !bytes.is_empty() {
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
        }
        if let Ok(view) = View::parse(&bytes) {
            // A header in the view takes at least 5 bytes of the message.
            prop_assert!(view.map.len() + view.raw.len() <= bytes.len() / 5);
            if let Ok(decoded) = CheckRequest::decode(&*bytes) {
                assert_same(&bytes, &decoded);
            }
        }
    }
}

#[test]
fn truncated_messages_have_no_http_request() {
    let request = Request { http: Some(HttpRequest { path: "/".into(), ..Default::default() }), ..Default::default() };
    let attributes = AttributeContext { request: Some(request), ..Default::default() };
    let bytes = CheckRequest { attributes: Some(attributes) }.encode_to_vec();
    for length in 0..bytes.len() {
        let truncated = View::parse(&bytes[..length]);
        assert!(truncated.is_err() || !truncated.unwrap().is_http, "{length} bytes");
    }
}

#[test]
fn header_values_may_contain_any_bytes() {
    // attributes { request { http { headers { "x": "\xff" } header_map { headers { key: "x" value: "\xfe" } } } } }
    let entry = [10, 1, b'x', 18, 1, 0xff];
    let raw = [10, 6, 10, 1, b'x', 18, 1, 0xfe];
    let wrap = |tag: u8, inner: &[u8]| [&[tag, u8::try_from(inner.len()).unwrap()], inner].concat();
    for (field, want) in [(wrap(26, &entry), 0xff), (wrap(106, &raw), 0xfe)] {
        let bytes = wrap(10, &wrap(34, &wrap(18, &field)));
        let view = View::parse(&bytes).unwrap();
        assert_eq!(view.headers(), [Header { name: b"x", value: &[want] }]);
    }
}
