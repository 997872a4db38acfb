//! API keys as a kind of cached value. The cache key of a record is the digest of its API key, computed with the
//! current scheme.

use async_trait::async_trait;
use ipnet::IpNet;
use uuid::Uuid;

use super::cacheable::Cacheable;
use crate::{
    base::{
        clock::DatabaseTime,
        fault::{Fault, Tier},
        saturate::Saturate as _,
    },
    record::{ApiKeyDigest, Digests, KeyId, Record, TrustId, Versioned},
    store::Lookup,
};

/// The kind of cached value for API keys.
#[derive(Debug)]
pub enum ApiKey {}

impl AsRef<[u8]> for ApiKeyDigest {
    fn as_ref(&self) -> &[u8] {
        self.as_bytes()
    }
}

#[async_trait]
impl Cacheable for ApiKey {
    const NAME: &'static str = "api_key";
    type Key = ApiKeyDigest;
    type Query = Digests;
    type Value = Record;

    fn key(query: &Digests) -> ApiKeyDigest {
        query.current
    }

    fn asked(query: &Digests) -> impl Iterator<Item = &[u8]> {
        query.all().map(|digest| &digest.as_bytes()[..])
    }

    fn spread(key: &ApiKeyDigest) -> u8 {
        key.as_bytes()[31]
    }

    fn heap_bytes(record: &Record) -> usize {
        let scopes: usize = record.scopes.iter().map(|scope| size_of::<String>() + scope.len()).sum();
        scopes + record.allowed_cidrs.len() * size_of::<IpNet>()
    }

    fn encode(record: &Record, into: &mut Vec<u8>) {
        let Record {
            key_id,
            trust_id,
            trust_enabled,
            digest,
            scopes,
            allowed_cidrs,
            not_before,
            expires_at,
            revoked_at,
        } = record;
        into.extend_from_slice(key_id.0.as_bytes());
        into.extend_from_slice(trust_id.0.as_bytes());
        into.push(u8::from(*trust_enabled));
        into.extend_from_slice(digest.as_bytes());
        for time in [not_before, expires_at, revoked_at] {
            into.push(u8::from(time.is_some()));
            into.extend_from_slice(&time.map_or(0, DatabaseTime::micros).to_be_bytes());
        }
        put_texts(scopes.iter().map(String::as_str), into);
        let cidrs: Vec<String> = allowed_cidrs.iter().map(ToString::to_string).collect();
        put_texts(cidrs.iter().map(String::as_str), into);
    }

    fn decode(bytes: &[u8]) -> Option<Record> {
        let mut rest = bytes;
        let record = Record {
            key_id: KeyId(Uuid::from_bytes(*take(&mut rest)?)),
            trust_id: TrustId(Uuid::from_bytes(*take(&mut rest)?)),
            trust_enabled: take_flag(&mut rest)?,
            digest: ApiKeyDigest::from_bytes(*take(&mut rest)?),
            not_before: take_time(&mut rest).ok()?,
            expires_at: take_time(&mut rest).ok()?,
            revoked_at: take_time(&mut rest).ok()?,
            scopes: take_texts(&mut rest)?.map(str::to_owned).collect(),
            allowed_cidrs: take_texts(&mut rest)?.map(|cidr| cidr.parse().ok()).collect::<Option<_>>()?,
        };
        rest.is_empty().then_some(record)
    }

    fn objects(record: &Record) -> impl Iterator<Item = Uuid> {
        [record.key_id.0, record.trust_id.0].into_iter()
    }

    async fn load(store: &dyn Lookup, query: &Digests) -> Result<Versioned<Option<Record>>, Fault> {
        let found = store.find(query).await?;
        // The index lookup is not constant-time, so compare the digest again in constant time.
        match &found.value {
            Some(record) if !query.contains(&record.digest) => {
                Err(Fault::Corrupt { tier: Tier::Store, problem: "its digest does not match the query" })
            }
            _ => Ok(found),
        }
    }

    async fn load_again(store: &dyn Lookup, entry: &Record) -> Result<Versioned<Option<Record>>, Fault> {
        store.find_by_id(entry.key_id).await
    }

    fn is_same(live: &Record, entry: &Record) -> bool {
        live.digest.matches(&entry.digest)
    }
}

/// Writes the number of strings, and then the length in bytes and the content of each string. The store limits the
/// strings in a record, so each of these numbers fits into 32 bits.
fn put_texts<'t>(texts: impl ExactSizeIterator<Item = &'t str>, into: &mut Vec<u8>) {
    let length = |length: usize| length.saturate::<u32>().to_be_bytes();
    into.extend_from_slice(&length(texts.len()));
    for text in texts {
        into.extend_from_slice(&length(text.len()));
        into.extend_from_slice(text.as_bytes());
    }
}

fn take<'b, const N: usize>(rest: &mut &'b [u8]) -> Option<&'b [u8; N]> {
    let (taken, left) = rest.split_first_chunk()?;
    *rest = left;
    Some(taken)
}

fn take_flag(rest: &mut &[u8]) -> Option<bool> {
    match take::<1>(rest)? {
        [0] => Some(false),
        [1] => Some(true),
        _ => None,
    }
}

/// Reads an optional time. Returns `Err` if the bytes are not a valid encoding.
fn take_time(rest: &mut &[u8]) -> Result<Option<DatabaseTime>, ()> {
    let is_set = take_flag(rest).ok_or(())?;
    let time = DatabaseTime::from_micros(i64::from_be_bytes(*take(rest).ok_or(())?));
    Ok(is_set.then_some(time))
}

fn take_length(rest: &mut &[u8]) -> Option<usize> {
    usize::try_from(u32::from_be_bytes(*take(rest)?)).ok()
}

fn take_texts<'b>(rest: &mut &'b [u8]) -> Option<impl Iterator<Item = &'b str> + use<'b>> {
    let mut texts = Vec::new();
    for _ in 0..take_length(rest)? {
        let length = take_length(rest)?;
        let (text, left) = rest.split_at_checked(length)?;
        *rest = left;
        texts.push(std::str::from_utf8(text).ok()?);
    }
    Some(texts.into_iter())
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, option, prelude::*};

    use super::*;

    prop_compose! {
        fn record()(
            ids in any::<(u128, u128)>(), enabled: bool, digest: [u8; 32],
            times in (option::of(any::<i64>()), option::of(any::<i64>()), option::of(any::<i64>())),
            scopes in vec(any::<String>(), 0..4), cidrs in vec((any::<u32>(), 0_u8..=32), 0..3),
        ) -> Record {
            Record {
                key_id: KeyId(Uuid::from_u128(ids.0)),
                trust_id: TrustId(Uuid::from_u128(ids.1)),
                trust_enabled: enabled,
                digest: ApiKeyDigest::from_bytes(digest),
                scopes: scopes.into(),
                allowed_cidrs: cidrs.into_iter().map(|(ip, bits)| IpNet::new(ip.to_be_bytes().into(), bits).unwrap()).collect(),
                not_before: times.0.map(DatabaseTime::from_micros),
                expires_at: times.1.map(DatabaseTime::from_micros),
                revoked_at: times.2.map(DatabaseTime::from_micros),
            }
        }
    }

    proptest! {
        #[test]
        fn record_round_trips_and_a_truncated_record_is_rejected(record in record()) {
            let mut bytes = Vec::new();
            ApiKey::encode(&record, &mut bytes);
            prop_assert_eq!(ApiKey::decode(&bytes), Some(record));
            for length in 0..bytes.len() {
                prop_assert_eq!(ApiKey::decode(&bytes[..length]), None);
            }
        }

        #[test]
        fn decoding_any_bytes_does_not_panic(bytes in vec(any::<u8>(), 0..200)) {
            let _ = ApiKey::decode(&bytes);
        }
    }
}
