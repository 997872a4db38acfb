//! A reply in the form in which the table says what it should be; what must be true of every reply is asserted on the way.

use std::collections::BTreeSet;

use envoy_types::pb::{
    envoy::{
        config::core::v3::{HeaderValueOption, header_value_option::HeaderAppendAction},
        service::auth::v3::{CheckResponse, DeniedHttpResponse, check_response::HttpResponse},
    },
    google::protobuf::{Struct, Value as ProtoValue, value::Kind},
};
use prost::Message as _;
use serde_json::{Map, Value, json};
use trustgate::ext_authz::response::Reply;

/// The answer of a checker.
pub fn read(reply: Reply) -> Value {
    match reply {
        Reply::Unavailable => json!({ "kind": "unavailable" }),
        Reply::Message(framed) => {
            let (prefix, message) = framed.split_first_chunk::<5>().unwrap();
            let [compressed, length @ ..] = prefix;
            assert_eq!((*compressed, u32::from_be_bytes(*length) as usize), (0, message.len()));
            decode(message)
        }
    }
}

/// The answer in the bytes of a `CheckResponse`.
pub fn decode(message: &[u8]) -> Value {
    let response = CheckResponse::decode(message).unwrap();
    // `status.code` alone decides, and unset means allow: it is always stated.
    let code = response.status.expect("a reply states its status").code;
    let metadata = object(&response.dynamic_metadata.expect("a reply says why"));
    match response.http_response.expect("a reply says how") {
        HttpResponse::OkResponse(ok) => {
            assert_eq!(code, 0, "an ok_response is no denial");
            assert!(ok.query_parameters_to_set.is_empty() && ok.response_headers_to_add.is_empty());
            let set = overwrites(&ok.headers);
            let remove: BTreeSet<String> = ok.headers_to_remove.iter().cloned().collect();
            assert_eq!(remove.len(), ok.headers_to_remove.len(), "a header is removed twice");
            // Removal comes last in Envoy and would win.
            assert!(remove.iter().all(|name| !set.contains_key(name)), "set and removed: {set:?} {remove:?}");
            let query = &ok.query_parameters_to_remove;
            json!({ "kind": "ok", "code": code, "set": set, "remove": remove, "query": query, "metadata": metadata })
        }
        HttpResponse::DeniedResponse(denied) => refusal("denied", code, &denied, &metadata),
        HttpResponse::ErrorResponse(denied) => refusal("error", code, &denied, &metadata),
    }
}

fn refusal(kind: &str, code: i32, denied: &DeniedHttpResponse, metadata: &Map<String, Value>) -> Value {
    assert!([7, 16].contains(&code), "a denial with the code {code}");
    let status = denied.status.expect("a denial has a status").code;
    assert!((400..600).contains(&status), "a denial with the status {status}");
    let body: Value = serde_json::from_str(&denied.body).unwrap();
    let headers = overwrites(&denied.headers);
    json!({ "kind": kind, "code": code, "status": status, "headers": headers, "body": body, "metadata": metadata })
}

/// Headers that are set: each once, never empty, and in the only form that overwrites on every Envoy.
fn overwrites(headers: &[HeaderValueOption]) -> Map<String, Value> {
    let mut set = Map::new();
    for option in headers {
        #[expect(deprecated, reason = "Envoy up to 1.40 looks at `append` alone")]
        let append = option.append.expect("append is stated");
        assert!(!append.value);
        assert_eq!(option.append_action, i32::from(HeaderAppendAction::OverwriteIfExistsOrAdd));
        let header = option.header.as_ref().unwrap();
        assert!(header.raw_value.is_empty(), "Envoy ignores raw_value here");
        assert!(!header.value.is_empty() && header.value.trim() == header.value, "{header:?}");
        assert!(header.value.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{header:?}");
        assert_eq!(header.key, header.key.to_ascii_lowercase());
        assert!(set.insert(header.key.clone(), header.value.clone().into()).is_none(), "{header:?} is set twice");
    }
    set
}

fn object(object: &Struct) -> Map<String, Value> {
    object.fields.iter().map(|(name, value)| (name.clone(), plain(value))).collect()
}

fn plain(value: &ProtoValue) -> Value {
    match value.kind.as_ref().unwrap() {
        Kind::NullValue(_) => Value::Null,
        Kind::NumberValue(number) => json!(number),
        Kind::StringValue(text) => json!(text),
        Kind::BoolValue(truth) => json!(truth),
        Kind::StructValue(inner) => object(inner).into(),
        Kind::ListValue(list) => list.values.iter().map(plain).collect(),
    }
}
