//! Encodes the response to a request that passes. Most responses have this form, and generated code makes about thirty
//! allocations for each. This hand-written encoder makes none (`tests/allocations.rs`): it appends a thread's
//! responses to one buffer, and reuses the buffer once these responses have been sent.
//!
//! A test decodes the output with the generated decoder. Field numbers: `envoy/service/auth/v3/external_auth.proto`,
//! `envoy/config/core/v3/base.proto`, `google/protobuf/struct.proto`.

use std::cell::RefCell;

use bytes::{BufMut, Bytes, BytesMut};
use uuid::fmt::Hyphenated;

use crate::{
    base::saturate::Saturate as _,
    ext_authz::{
        credential::extract::Removals,
        decision::{Basis, Grant},
        framing, identity,
    },
};

/// Size of a thread's buffer, in bytes. If the responses in one batch need more space, further responses go into a
/// new buffer.
const BUFFER_BYTES: usize = 64 << 10;

thread_local! {
    static BUFFER: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// Encodes the framed `CheckResponse` that lets a request pass. `grant` contains the identity (`None`: anonymous);
/// `removals` lists the credentials that the upstream must not see.
pub(crate) fn allowed(grant: Option<&Grant<'_>>, removals: &Removals<'_>, basis: Basis) -> Bytes {
    let answer = GrantReply::new(grant, removals, basis);
    BUFFER.with_borrow_mut(|buffer| {
        let sizes = answer.sizes();
        let bytes = framing::PREFIX_BYTES + sizes.message;
        // When more than half of the buffer is used, try to reclaim it. This succeeds only if all responses in the
        // buffer have been sent.
        let has_room = buffer.capacity() >= BUFFER_BYTES / 2 || buffer.try_reclaim(BUFFER_BYTES);
        if !has_room && buffer.capacity() < bytes {
            buffer.reserve(BUFFER_BYTES);
        }
        buffer.reserve(bytes); // needed only for a response that is larger than a whole buffer
        answer.put(sizes, buffer);
        buffer.split().freeze()
    })
}

/// A string value: one string, or several words joined with spaces.
#[derive(Clone, Copy)]
enum Text<'t> {
    Whole(&'t [u8]),
    /// Words to join with spaces.
    Words(&'t [String]),
}

impl Text<'_> {
    fn bytes(self) -> usize {
        match self {
            Self::Whole(text) => text.len(),
            Self::Words(words) => words.iter().map(|word| word.len() + 1).sum::<usize>().saturating_sub(1),
        }
    }

    fn put(self, into: &mut BytesMut) {
        match self {
            Self::Whole(text) => into.put_slice(text),
            Self::Words(words) => {
                for (number, word) in words.iter().enumerate() {
                    into.put_slice(if number == 0 { b"" } else { b" " });
                    into.put_slice(word.as_bytes());
                }
            }
        }
    }
}

/// A value in the dynamic metadata.
#[derive(Clone, Copy)]
enum MetadataValue<'t> {
    Text(&'t [u8]),
    List(&'t [String]),
    Yes,
}

/// Encoded lengths of the parts of a response in bytes, each without its own tag and length prefix.
#[derive(Clone, Copy)]
struct Sizes {
    message: usize,
    /// The `OkHttpResponse`.
    ok: usize,
    /// The `Struct`.
    metadata: usize,
}

/// The content of one response.
struct GrantReply<'a, 's> {
    ids: Option<[[u8; Hyphenated::LENGTH]; 2]>,
    scopes: &'a [String],
    removals: &'a Removals<'s>,
    basis: Basis,
}

impl<'a, 's> GrantReply<'a, 's> {
    fn new(grant: Option<&Grant<'a>>, removals: &'a Removals<'s>, basis: Basis) -> Self {
        let ids = grant.map(|grant| {
            [grant.trust_id().0, grant.key_id().0].map(|id| {
                let mut text = [0; Hyphenated::LENGTH];
                id.hyphenated().encode_lower(&mut text);
                text
            })
        });
        Self { ids, scopes: grant.map_or(&[], Grant::scopes), removals, basis }
    }

    fn ids(&self) -> Option<[&[u8]; 2]> {
        self.ids.as_ref().map(|ids| ids.each_ref().map(<[u8; Hyphenated::LENGTH]>::as_slice))
    }

    /// Returns the headers to set. Envoy removes headers after it sets headers, so no header may be both set and
    /// removed. A header with an empty value is not set but removed, because Envoy would forward the empty header.
    fn headers(&self) -> impl Iterator<Item = (&str, Text<'_>)> {
        let [trust_id, key_id] = self.ids().map_or([None; 2], |ids| ids.map(Some));
        let identity = [
            (identity::TRUST_ID, trust_id.map(Text::Whole)),
            (identity::KEY_ID, key_id.map(Text::Whole)),
            (identity::SCOPES, (!self.scopes.is_empty()).then_some(Text::Words(self.scopes))),
        ];
        let cookies = self.removals.cookies.as_deref().filter(|left| !left.is_empty());
        let path = self.removals.path.as_deref();
        let headers = identity.into_iter().chain([
            ("cookie", cookies.map(|left| Text::Whole(left.as_bytes()))),
            (":path", path.map(|left| Text::Whole(left.as_bytes()))),
        ]);
        headers.filter_map(|(name, value)| Some((name, value?)))
    }

    /// Returns the headers to remove: the headers that contained a credential, and the identity headers that are not
    /// set.
    fn removed(&self) -> impl Iterator<Item = &str> {
        let (has_identity, has_scopes) = (self.ids.is_some(), !self.scopes.is_empty());
        let identity = identity::HEADERS.into_iter().filter(move |name| match *name {
            identity::TRUST_ID | identity::KEY_ID => !has_identity,
            identity::SCOPES => !has_scopes,
            _ => true,
        });
        let cookies = self.removals.cookies.as_deref().filter(|left| left.is_empty()).map(|_| "cookie");
        self.removals.headers.iter().copied().chain(identity).chain(cookies)
    }

    fn metadata(&self) -> impl Iterator<Item = (&'static str, MetadataValue<'_>)> {
        let identity = self.ids().map(|[trust_id, key_id]| {
            let stale = (self.basis == Basis::Stale).then_some(("stale", MetadataValue::Yes));
            [
                Some(("trust_id", MetadataValue::Text(trust_id))),
                Some(("key_id", MetadataValue::Text(key_id))),
                Some(("scopes", MetadataValue::List(self.scopes))),
                stale,
            ]
        });
        let anonymous = self.ids.is_none().then_some(("anonymous", MetadataValue::Yes));
        identity.into_iter().flatten().flatten().chain(anonymous)
    }

    fn sizes(&self) -> Sizes {
        let headers = self.headers().map(|(name, value)| field_bytes(option_bytes(name, value)));
        let removed = self.removed().chain(self.removals.query.iter().copied()).map(|name| field_bytes(name.len()));
        let ok = headers.chain(removed).sum();
        let metadata = self.metadata().map(|(name, value)| field_bytes(entry_bytes(name, value))).sum();
        // The status is present but empty, so its code is OK.
        Sizes { message: field_bytes(0) + field_bytes(ok) + field_bytes(metadata), ok, metadata }
    }

    fn put(&self, sizes: Sizes, into: &mut BytesMut) {
        into.put_u8(0);
        // The limits on scopes and messages keep the response far below 4 GiB.
        into.put_u32(sizes.message.saturate());
        put_field(into, 1, 0);
        put_field(into, 3, sizes.ok);
        for (name, value) in self.headers() {
            put_field(into, 2, option_bytes(name, value));
            put_field(into, 1, pair_bytes(name, value.bytes()));
            put_name(into, 1, name);
            put_text(into, 2, value);
            // Set both fields, so that every version of Envoy replaces the client's header: `append` to false, and
            // `append_action` to OVERWRITE_IF_EXISTS_OR_ADD. Envoy up to 1.40 reads only `append`, and Envoy 1.37.0
            // appends if both fields are unset.
            into.put_slice(OVERWRITE);
        }
        for name in self.removed() {
            put_name(into, 5, name);
        }
        for name in &self.removals.query {
            put_name(into, 8, name);
        }
        put_field(into, 4, sizes.metadata);
        for (name, value) in self.metadata() {
            put_field(into, 1, entry_bytes(name, value));
            put_name(into, 1, name);
            put_field(into, 2, value_bytes(value));
            match value {
                MetadataValue::Text(text) => put_text(into, 3, Text::Whole(text)),
                MetadataValue::List(texts) => {
                    put_field(into, 6, list_bytes(texts));
                    for text in texts {
                        put_field(into, 1, field_bytes(text.len()));
                        put_name(into, 3, text);
                    }
                }
                MetadataValue::Yes => into.put_slice(YES),
            }
        }
    }
}

/// `HeaderValueOption`: `append` = `BoolValue {}`, `append_action` = 2.
const OVERWRITE: &[u8] = &[2 << 3 | 2, 0, 3 << 3, 2];
/// `Value.bool_value` = true.
const YES: &[u8] = &[4 << 3, 1];

/// Returns the encoded length in bytes of a `HeaderValueOption` that overwrites a header.
fn option_bytes(name: &str, value: Text<'_>) -> usize {
    field_bytes(pair_bytes(name, value.bytes())) + OVERWRITE.len()
}

/// Returns the encoded length in bytes of a message with two fields: a name, and a value of `value` bytes.
fn pair_bytes(name: &str, value: usize) -> usize {
    field_bytes(name.len()) + field_bytes(value)
}

fn entry_bytes(name: &str, value: MetadataValue<'_>) -> usize {
    pair_bytes(name, value_bytes(value))
}

/// Returns the encoded length of a `MetadataValue` in bytes.
fn value_bytes(value: MetadataValue<'_>) -> usize {
    match value {
        MetadataValue::Text(text) => field_bytes(text.len()),
        MetadataValue::List(texts) => field_bytes(list_bytes(texts)),
        MetadataValue::Yes => YES.len(),
    }
}

/// Returns the encoded length in bytes of a `ListValue` of strings.
fn list_bytes(texts: &[String]) -> usize {
    texts.iter().map(|text| field_bytes(field_bytes(text.len()))).sum()
}

/// Returns the encoded length in bytes of a length-delimited field with a number below 16 and `bytes` bytes of content.
fn field_bytes(bytes: usize) -> usize {
    let bits = usize::BITS - (bytes | 1).leading_zeros();
    1 + bits.div_ceil(7) as usize + bytes
}

fn put_field(into: &mut BytesMut, number: u8, mut bytes: usize) {
    into.put_u8(number << 3 | 2);
    while bytes >= 0x80 {
        into.put_u8(bytes.to_le_bytes()[0] | 0x80);
        bytes >>= 7;
    }
    into.put_u8(bytes.to_le_bytes()[0]);
}

fn put_name(into: &mut BytesMut, number: u8, name: &str) {
    put_text(into, number, Text::Whole(name.as_bytes()));
}

fn put_text(into: &mut BytesMut, number: u8, text: Text<'_>) {
    put_field(into, number, text.bytes());
    text.put(into);
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use envoy_types::pb::{
        envoy::service::auth::v3::{CheckResponse, check_response::HttpResponse},
        google::protobuf::{Struct, Value as Known, value::Kind},
    };
    use proptest::{collection::vec, option, prelude::*};
    use prost::Message as _;
    use uuid::Uuid;

    use super::*;
    use crate::{
        base::clock::DatabaseTime,
        ext_authz::{
            decision::{Decision, decide},
            route::Demands,
        },
        record::{ApiKeyDigest, KeyId, Record, TrustId},
    };

    fn record(trust: u128, key: u128, scopes: Vec<String>) -> Record {
        Record {
            key_id: KeyId(Uuid::from_u128(key)),
            trust_id: TrustId(Uuid::from_u128(trust)),
            trust_enabled: true,
            digest: ApiKeyDigest::from_bytes([0; 32]),
            scopes: scopes.into(),
            allowed_cidrs: [].into(),
            not_before: None,
            expires_at: None,
            revoked_at: None,
        }
    }

    fn decoded(framed: &Bytes) -> CheckResponse {
        let length = u32::try_from(framed.len() - framing::PREFIX_BYTES).unwrap();
        assert_eq!(framed[..framing::PREFIX_BYTES], [&[0][..], &length.to_be_bytes()].concat());
        CheckResponse::decode(&framed[framing::PREFIX_BYTES..]).unwrap()
    }

    fn known(kind: Kind) -> Known {
        Known { kind: Some(kind) }
    }

    proptest! {
        #[test]
        fn generated_code_decodes_the_encoded_response(
            ids in option::of((any::<u128>(), any::<u128>())),
            scopes in vec("[a-z:]{1,300}", 0..5),
            (headers, query) in (vec("[a-z-]{1,200}", 0..3), vec("[a-z]{1,9}", 0..3)),
            cookies in option::of(".{0,200}"),
            path in option::of("/[a-z?&=]{0,200}"),
            is_stale: bool,
        ) {
            let basis = if is_stale { Basis::Stale } else { Basis::Confirmed };
            let record = ids.map(|(trust, key)| record(trust, key, scopes.clone()));
            let removals = Removals {
                headers: headers.iter().map(String::as_str).collect(),
                query: query.iter().map(String::as_str).collect(),
                path: path.clone(),
                cookies: cookies.clone(),
            };
            let demands = Demands::default();
            let decision = record.as_ref().map(|record| decide(Some(record), &demands, DatabaseTime::from_micros(0)));
            let grant = match &decision {
                Some(Decision::Allow(grant)) => Some(grant),
                Some(other) => panic!("{other:?}"),
                None => None,
            };
            let response = decoded(&allowed(grant, &removals, basis));
            prop_assert_eq!(response.status.unwrap().code, 0);
            let Some(HttpResponse::OkResponse(ok)) = response.http_response else { panic!("not OK") };

            let mut set = HashMap::new();
            for option in ok.headers {
                #[expect(deprecated, reason = "Envoy up to 1.40 only looks at `append`")]
                let append = option.append.unwrap().value;
                prop_assert_eq!((append, option.append_action), (false, 2));
                let header = option.header.unwrap();
                prop_assert!(set.insert(header.key, header.value).is_none());
            }
            let mut removed = headers.clone();
            let mut fields = HashMap::new();
            if let Some(record) = &record {
                let (trust_id, key_id) = (record.trust_id.to_string(), record.key_id.to_string());
                prop_assert_eq!(set.remove("x-trust-id"), Some(trust_id.clone()));
                prop_assert_eq!(set.remove("x-trust-key-id"), Some(key_id.clone()));
                fields.insert("trust_id".to_owned(), known(Kind::StringValue(trust_id)));
                fields.insert("key_id".to_owned(), known(Kind::StringValue(key_id)));
                let values = scopes.iter().cloned().map(|scope| known(Kind::StringValue(scope))).collect();
                let list = envoy_types::pb::google::protobuf::ListValue { values };
                fields.insert("scopes".to_owned(), known(Kind::ListValue(list)));
                if basis == Basis::Stale {
                    fields.insert("stale".to_owned(), known(Kind::BoolValue(true)));
                }
                if scopes.is_empty() {
                    removed.push("x-trust-scopes".to_owned());
                } else {
                    prop_assert_eq!(set.remove("x-trust-scopes"), Some(scopes.join(" ")));
                }
            } else {
                fields.insert("anonymous".to_owned(), known(Kind::BoolValue(true)));
                removed.extend(identity::HEADERS.map(str::to_owned));
            }
            match cookies {
                Some(left) if left.is_empty() => removed.push("cookie".to_owned()),
                Some(left) => prop_assert_eq!(set.remove("cookie"), Some(left)),
                None => {}
            }
            if let Some(left) = path {
                prop_assert_eq!(set.remove(":path"), Some(left));
            }
            prop_assert_eq!(set, HashMap::new());
            prop_assert_eq!(ok.headers_to_remove, removed);
            prop_assert_eq!(ok.query_parameters_to_remove, query.clone());
            prop_assert_eq!(response.dynamic_metadata, Some(Struct { fields }));
        }
    }
}
