//! L2: records in Redis, shared between replicas, each with its date and a MAC.
//!
//! A value: version byte, MAC (32), lineage (16 + 8 + 4), `as_of` (8), nonce (16), database time (8), record. The MAC is
//! HMAC-SHA-256 over kind, key and everything after it, and is checked before anything is parsed.
//! Never holds an absence, and never trusts what it reads: whoever can write to Redis can at most make us ask the store.

use std::{
    marker::PhantomData,
    sync::{Arc, OnceLock},
    time::Duration,
};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use uuid::Uuid;

use super::{kind::Kind, l1::Held};
use crate::{
    clock::{DatabaseTime, Moment},
    record::{Dated, Lineage, Nonce, Version, hex},
    redis::{Redis, RedisDown},
};

/// The layout of values. Another one is a miss.
const LAYOUT: u8 = 1;
const MAC_BYTES: usize = 32;

/// The key of the MAC: known once the store has answered, or from a file.
pub type MacKey = Arc<OnceLock<[u8; 32]>>;

/// Records of one kind in Redis.
pub struct L2<K: Kind> {
    redis: Redis,
    mac_key: MacKey,
    kind: PhantomData<K>,
}

/// What Redis said.
pub enum Answer<V> {
    /// A value that is genuine; whether it is fresh enough is not said.
    Found(Dated<V>),
    /// None.
    Absent,
    /// Something that is not a value of ours; it was deleted.
    Refused,
    /// Nothing in time.
    Down,
}

impl<K: Kind> L2<K> {
    /// Records in `redis`, authenticated with `mac_key`.
    pub const fn new(redis: Redis, mac_key: MacKey) -> Self {
        Self { redis, mac_key, kind: PhantomData }
    }

    /// The value of `key`. Waits at most `redis.timeout`.
    pub async fn get(&self, key: &K::Key, now: Moment) -> Answer<K::Value> {
        let Some(mac_key) = self.mac_key.get() else { return Answer::Down };
        let name = redis_key::<K>(key);
        match self.redis.query::<Option<Vec<u8>>>(redis::cmd("GET").arg(&name)).await {
            Ok(None) => Answer::Absent,
            Ok(Some(bytes)) => {
                if let Some(found) = open::<K>(mac_key, key, &bytes, now) {
                    return Answer::Found(found);
                }
                // Best effort: what cannot be read now cannot be read later either.
                let _ = self.redis.query::<()>(redis::cmd("DEL").arg(&name)).await;
                Answer::Refused
            }
            Err(RedisDown::Paused | RedisDown::Failed(_)) => Answer::Down,
        }
    }

    /// Shares `held` until its deadline, if it is a record.
    pub async fn put(&self, held: &Held<K>, now: Moment) {
        let Some(mac_key) = self.mac_key.get() else { return };
        let Some(bytes) = seal::<K>(mac_key, held) else { return };
        let life = u64::try_from(held.deadline().since(now).min(LIFE_MAX).as_millis()).unwrap_or(0);
        if life > 0 {
            let mut command = redis::cmd("SET");
            command.arg(redis_key::<K>(held.key())).arg(bytes).arg("PX").arg(life);
            // Redis is an optimisation: the breaker has heard of a failure, and nobody waits for this.
            let _ = self.redis.query::<()>(&command).await;
        }
    }
}

/// Values leave Redis after this time even if they might be used longer.
const LIFE_MAX: Duration = Duration::from_mins(10);

/// `trustgate:KIND:HEX`. Holds the digest, never the key.
fn redis_key<K: Kind>(key: &K::Key) -> String {
    format!("trustgate:{}:{}", K::NAME, hex(key.as_ref()))
}

fn mac<K: Kind>(mac_key: &[u8; 32], key: &K::Key, body: &[u8]) -> Hmac<Sha256> {
    // The length of the kind's name goes first, so that no two inputs run together into the same bytes; keys of a kind
    // all have one length.
    let name_length = u8::try_from(K::NAME.len()).unwrap_or(u8::MAX);
    Hmac::<Sha256>::new_from_slice(mac_key)
        .unwrap_or_else(|_| unreachable!("HMAC takes a key of any length (RFC 2104)"))
        .chain_update([LAYOUT, name_length])
        .chain_update(K::NAME)
        .chain_update(key.as_ref())
        .chain_update(body)
}

fn seal<K: Kind>(mac_key: &[u8; 32], held: &Held<K>) -> Option<Vec<u8>> {
    let Dated { value: Some(value), as_of, nonce, lineage, read_at, sent_at: _ } = held.dated() else { return None };
    let mut bytes = vec![LAYOUT];
    bytes.resize(1 + MAC_BYTES, 0);
    bytes.extend_from_slice(lineage.incarnation.as_bytes());
    bytes.extend_from_slice(&lineage.system.to_be_bytes());
    bytes.extend_from_slice(&lineage.timeline.to_be_bytes());
    bytes.extend_from_slice(&as_of.0.to_be_bytes());
    bytes.extend_from_slice(&nonce.0);
    bytes.extend_from_slice(&read_at.micros().to_be_bytes());
    K::encode(value, &mut bytes);
    let mac = mac::<K>(mac_key, held.key(), &bytes[1 + MAC_BYTES..]).finalize().into_bytes();
    bytes[1..=MAC_BYTES].copy_from_slice(&mac);
    Some(bytes)
}

fn open<K: Kind>(mac_key: &[u8; 32], key: &K::Key, bytes: &[u8], now: Moment) -> Option<Dated<K::Value>> {
    let (&[LAYOUT], rest) = bytes.split_first_chunk()? else { return None };
    let (found_mac, body) = rest.split_first_chunk::<MAC_BYTES>()?;
    mac::<K>(mac_key, key, body).verify_slice(found_mac).ok()?;
    let (incarnation, rest) = body.split_first_chunk()?;
    let (system, rest) = rest.split_first_chunk()?;
    let (timeline, rest) = rest.split_first_chunk()?;
    let (as_of, rest) = rest.split_first_chunk()?;
    let (nonce, rest) = rest.split_first_chunk()?;
    let (read_at, record) = rest.split_first_chunk()?;
    Some(Dated {
        value: K::decode(record)?,
        as_of: Version(u64::from_be_bytes(*as_of)),
        nonce: Nonce(*nonce),
        lineage: Lineage {
            incarnation: Uuid::from_bytes(*incarnation),
            system: u64::from_be_bytes(*system),
            timeline: u32::from_be_bytes(*timeline),
        },
        read_at: DatabaseTime::from_micros(i64::from_be_bytes(*read_at)),
        sent_at: now,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cache::api_key::ApiKey,
        record::{ApiKeyDigest, KeyId, Record, TrustId},
    };

    fn held(digest: ApiKeyDigest) -> Held<ApiKey> {
        let record = Record {
            key_id: KeyId(Uuid::from_u128(1)),
            trust_id: TrustId(Uuid::from_u128(2)),
            trust_enabled: true,
            digest,
            scopes: vec!["read".into()],
            allowed_cidrs: vec![],
            not_before: None,
            expires_at: None,
            revoked_at: None,
        };
        let found = Dated {
            value: Some(record),
            as_of: Version(7),
            nonce: Nonce([9; 16]),
            lineage: Lineage { system: 3, ..Lineage::default() },
            read_at: DatabaseTime::from_micros(11),
            sent_at: Moment::from_nanos(0),
        };
        let query = crate::record::Digests { current: digest, older: Vec::new() };
        let life = super::super::l1::Life { born: Moment::from_nanos(0), deadline: Moment::from_nanos(5) };
        Held::new(&query, found, crate::fault::Tier::Store, life)
    }

    #[test]
    fn a_sealed_record_opens_under_its_own_key_alone_and_unchanged() {
        let digest = ApiKeyDigest::from_bytes([1; 32]);
        let sealed = seal::<ApiKey>(&[5; 32], &held(digest)).unwrap();
        let opened = open::<ApiKey>(&[5; 32], &digest, &sealed, Moment::from_nanos(0)).unwrap();
        assert_eq!(Some(&opened.value), held(digest).value());
        assert_eq!((opened.as_of, opened.nonce, opened.lineage.system), (Version(7), Nonce([9; 16]), 3));
        assert!(open::<ApiKey>(&[6; 32], &digest, &sealed, Moment::from_nanos(0)).is_none(), "another MAC key");
        let other = ApiKeyDigest::from_bytes([2; 32]);
        assert!(open::<ApiKey>(&[5; 32], &other, &sealed, Moment::from_nanos(0)).is_none(), "moved to another key");
        for at in 0..sealed.len() {
            let mut forged = sealed.clone();
            forged[at] ^= 1;
            assert!(open::<ApiKey>(&[5; 32], &digest, &forged, Moment::from_nanos(0)).is_none(), "byte {at}");
            assert!(open::<ApiKey>(&[5; 32], &digest, &sealed[..at], Moment::from_nanos(0)).is_none(), "{at} bytes");
        }
    }
}
