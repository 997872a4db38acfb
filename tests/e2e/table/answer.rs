//! Converts a reply into the form of the expected answers in the table, and asserts the rules that all replies must
//! follow.

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
use trustgate::testing::ext_authz::response::Reply;

/// Converts the reply of a checker.
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

/// Converts an encoded `CheckResponse`.
pub fn decode(message: &[u8]) -> Value {
    let response = CheckResponse::decode(message).unwrap();
    // Envoy decides by `status.code` only and reads a missing status as OK, so each reply must have a status.
    let code = response.status.expect("a reply has a status").code;
    let metadata = object(&response.dynamic_metadata.expect("a reply has dynamic metadata"));
    match response.http_response.expect("a reply has an HTTP response") {
        HttpResponse::OkResponse(ok) => {
            assert_eq!(code, 0, "an ok_response must have the code 0");
            assert!(ok.query_parameters_to_set.is_empty() && ok.response_headers_to_add.is_empty());
            let set = overwrites(&ok.headers);
            let remove: BTreeSet<String> = ok.headers_to_remove.iter().cloned().collect();
            assert_eq!(remove.len(), ok.headers_to_remove.len(), "a header is removed twice");
            // Envoy removes headers after it has set them, so a header in both lists would be missing.
            assert!(remove.iter().all(|name| !set.contains_key(name)), "set and removed: {set:?} {remove:?}");
            let query = &ok.query_parameters_to_remove;
            json!({ "kind": "ok", "code": code, "set": set, "remove": remove, "query": query, "metadata": metadata })
        }
        HttpResponse::DeniedResponse(denied) => denial("denied", code, &denied, &metadata),
        HttpResponse::ErrorResponse(denied) => denial("error", code, &denied, &metadata),
    }
}

fn denial(kind: &str, code: i32, denied: &DeniedHttpResponse, metadata: &Map<String, Value>) -> Value {
    assert!([7, 16].contains(&code), "a denial with the code {code}");
    let status = denied.status.expect("a denial has a status").code;
    assert!((400..600).contains(&status), "a denial with the status {status}");
    let body: Value = serde_json::from_str(&denied.body).unwrap();
    let headers = overwrites(&denied.headers);
    json!({ "kind": kind, "code": code, "status": status, "headers": headers, "body": body, "metadata": metadata })
}

/// Returns the headers that a reply sets. Asserts that each header occurs once, is not empty, and overwrites the
/// client's header in all supported versions of Envoy.
fn overwrites(headers: &[HeaderValueOption]) -> Map<String, Value> {
    let mut set = Map::new();
    for option in headers {
        #[expect(deprecated, reason = "Envoy up to 1.40 reads only `append`")]
        let append = option.append.expect("append is set");
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
    object.fields.iter().map(|(name, value)| (name.clone(), json_value(value))).collect()
}

fn json_value(value: &ProtoValue) -> Value {
    match value.kind.as_ref().unwrap() {
        Kind::NullValue(_) => Value::Null,
        Kind::NumberValue(number) => json!(number),
        Kind::StringValue(text) => json!(text),
        Kind::BoolValue(truth) => json!(truth),
        Kind::StructValue(inner) => object(inner).into(),
        Kind::ListValue(list) => list.values.iter().map(json_value).collect(),
    }
}
