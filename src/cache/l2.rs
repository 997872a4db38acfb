//! L2: records in Redis, shared between replicas, each with its date and a MAC.
//!
//! A value: layout (1 byte), MAC (32), lineage (16 + 8 + 4), `as_of` (16 hexadecimal digits, so that Redis's Lua can
//! compare it), nonce (16), database time (8), record. The MAC is HMAC-SHA-256 over layout, kind, table, key and
//! everything after it, and is checked before anything is parsed.
//! Never holds an absence, never puts an older value in place of a newer one, and never trusts what it reads: whoever
//! can write to Redis can at most make us ask the store.

use std::{
    marker::PhantomData,
    sync::{Arc, LazyLock, OnceLock},
    time::Duration,
};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use tokio::time::sleep;
use uuid::Uuid;

use super::cacheable::Cacheable;
use crate::{
    base::clock::{DatabaseTime, Moment},
    record::{Lineage, Nonce, Version, Versioned, bytes_from_hex, hex},
    redis::{QueryError, Redis, Script},
};

/// The layout of values. Another one is another release's: a miss, and left alone until there is a value to put.
const LAYOUT: u8 = 2;
const MAC_BYTES: usize = 32;
const AS_OF_BYTES: usize = 16;
/// The longest value that is shared, and the most that is read of one: what others write must not fill our memory.
/// Enough for a thousand scopes.
const VALUE_BYTES_MAX: usize = 64 << 10;

static REPLACE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("l2/replace.lua")));
static DISCARD: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("l2/discard.lua")));

/// The key of the MAC: known once the store has answered, or from a file.
pub type MacKey = Arc<OnceLock<[u8; 32]>>;

/// Records of one kind in Redis.
pub struct L2<K: Cacheable> {
    redis: Redis,
    mac_key: MacKey,
    names: Names<K>,
}

/// What Redis said.
pub enum Answer<V> {
    /// A value that is genuine; whether it is fresh enough is not said.
    Found(Versioned<V>),
    /// None.
    Absent,
    /// Something that is not a value of ours; it was deleted.
    Refused,
    /// Nothing in time.
    Down,
}

impl<K: Cacheable> L2<K> {
    /// Records in `redis`, authenticated with `mac_key`. `table`: what tells the table that they are made of from others,
    /// where it is not our own ([`crate::store::existing_table::identity_of`]).
    pub fn new(redis: Redis, mac_key: MacKey, table: Option<&str>) -> Self {
        Self { redis, mac_key, names: Names::of(table) }
    }

    /// The value of `key`. Waits at most `redis.timeout`.
    pub async fn get(&self, key: &K::Key, now: Moment) -> Answer<K::Value> {
        let Some(mac_key) = self.mac_key.get() else { return Answer::Down };
        let name = self.names.redis_key(key);
        let time_is_up = sleep(self.redis.limit());
        let mut command = redis::cmd("GETRANGE");
        command.arg(&name).arg(0).arg(VALUE_BYTES_MAX - 1);
        let bad = match self.redis.query::<Vec<u8>>(&command).await {
            // Nothing at all reads as nothing.
            Ok(bytes) if bytes.first().is_none_or(|layout| *layout != LAYOUT) => return Answer::Absent,
            Ok(bytes) => match self.names.open(mac_key, key, &bytes, now) {
                Some(found) => return Answer::Found(found),
                None => bytes,
            },
            Err(QueryError::WrongType) => Vec::new(),
            Err(QueryError::Paused | QueryError::Failed(_) | QueryError::NoScript) => return Answer::Down,
        };
        // Best effort, in what is left of the time: what cannot be read now cannot be read later either.
        tokio::select! {
            biased;
            () = self.discard(&name, &bad) => {}
            () = time_is_up => {}
        }
        Answer::Refused
    }

    async fn discard(&self, name: &str, bad: &[u8]) {
        // The breaker has heard of a failure.
        let _ = self.redis.run::<()>(&DISCARD, name, &[bad, VALUE_BYTES_MAX.to_string().as_bytes()]).await;
    }

    /// Shares the value of `key` for `lifetime`, if Redis holds no newer one.
    pub async fn put(&self, key: &K::Key, found: &Versioned<&K::Value>, lifetime: Duration) {
        let Some(mac_key) = self.mac_key.get() else { return };
        let bytes = self.names.seal(mac_key, key, found);
        let lifetime = lifetime.min(LIFE_MAX).as_millis();
        if lifetime > 0 && bytes.len() <= VALUE_BYTES_MAX {
            let name = self.names.redis_key(key);
            // Redis is an optimisation: the breaker has heard of a failure, and nobody waits for this.
            let written = self.redis.run::<i64>(&REPLACE, &name, &[&bytes, lifetime.to_string().as_bytes()]).await;
            if matches!(written, Ok(1)) {
                self.redis.note_written();
            }
        }
    }

    /// Shares nothing of `key` any more. Best effort.
    pub async fn forget(&self, key: &K::Key) {
        let mut command = redis::cmd("UNLINK");
        command.arg(self.names.redis_key(key));
        // The breaker has heard of a failure.
        let _ = self.redis.query::<()>(&command).await;
    }
}

/// Values leave Redis after this time even if they might be used longer.
const LIFE_MAX: Duration = Duration::from_mins(10);

/// What records of one kind and one table are called. The same key may stand in two tables, in rows with other ids and
/// other limits: a record of one must never be taken for one of the other, which its changes do not name.
struct Names<K: Cacheable> {
    /// `KIND`, or `KIND@TABLE`.
    kind: String,
    of: PhantomData<K>,
}

/// Enough of a table's identity to tell the few that ever share a Redis apart.
const TABLE_DIGITS: usize = 16;

impl<K: Cacheable> Names<K> {
    fn of(table: Option<&str>) -> Self {
        let table = table.map(|table| format!("@{table:.TABLE_DIGITS$}"));
        Self { kind: format!("{}{}", K::NAME, table.unwrap_or_default()), of: PhantomData }
    }

    /// `trustgate:KIND:HEX`. Holds the digest, never the key.
    fn redis_key(&self, key: &K::Key) -> String {
        format!("trustgate:{}:{}", self.kind, hex(key.as_ref()))
    }

    fn mac(&self, mac_key: &[u8; 32], key: &K::Key, body: &[u8]) -> Hmac<Sha256> {
        // The length of the kind's name goes first, so that no two inputs run together into the same bytes; keys of a
        // kind all have one length.
        let name_length = u8::try_from(self.kind.len()).unwrap_or(u8::MAX);
        Hmac::<Sha256>::new_from_slice(mac_key)
            .unwrap_or_else(|_| unreachable!("HMAC takes a key of any length (RFC 2104)"))
            .chain_update([LAYOUT, name_length])
            .chain_update(&self.kind)
            .chain_update(key.as_ref())
            .chain_update(body)
    }

    fn seal(&self, mac_key: &[u8; 32], key: &K::Key, found: &Versioned<&K::Value>) -> Vec<u8> {
        let Versioned { value, as_of, nonce, lineage, read_at, sent_at: _ } = found;
        let mut bytes = vec![LAYOUT];
        bytes.resize(1 + MAC_BYTES, 0);
        bytes.extend_from_slice(lineage.incarnation.as_bytes());
        bytes.extend_from_slice(&lineage.system.to_be_bytes());
        bytes.extend_from_slice(&lineage.timeline.to_be_bytes());
        bytes.extend_from_slice(hex(&as_of.0.to_be_bytes()).as_bytes());
        bytes.extend_from_slice(&nonce.0);
        bytes.extend_from_slice(&read_at.micros().to_be_bytes());
        K::encode(value, &mut bytes);
        let mac = self.mac(mac_key, key, &bytes[1 + MAC_BYTES..]).finalize().into_bytes();
        bytes[1..=MAC_BYTES].copy_from_slice(&mac);
        bytes
    }

    fn open(&self, mac_key: &[u8; 32], key: &K::Key, bytes: &[u8], now: Moment) -> Option<Versioned<K::Value>> {
        let (&[LAYOUT], rest) = bytes.split_first_chunk()? else { return None };
        let (found_mac, body) = rest.split_first_chunk::<MAC_BYTES>()?;
        self.mac(mac_key, key, body).verify_slice(found_mac).ok()?;
        let (incarnation, rest) = body.split_first_chunk()?;
        let (system, rest) = rest.split_first_chunk()?;
        let (timeline, rest) = rest.split_first_chunk()?;
        let (as_of, rest) = rest.split_first_chunk::<AS_OF_BYTES>()?;
        let (nonce, rest) = rest.split_first_chunk()?;
        let (read_at, record) = rest.split_first_chunk()?;
        Some(Versioned {
            value: K::decode(record)?,
            as_of: Version(u64::from_be_bytes(bytes_from_hex(std::str::from_utf8(as_of).ok()?)?)),
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
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::{
        cache::api_key::ApiKey,
        record::{ApiKeyDigest, KeyId, Record, TrustId},
    };

    fn found(digest: ApiKeyDigest) -> Versioned<Record> {
        let record = Record {
            key_id: KeyId(Uuid::from_u128(1)),
            trust_id: TrustId(Uuid::from_u128(2)),
            trust_enabled: true,
            digest,
            scopes: ["read".into()].into(),
            allowed_cidrs: [].into(),
            not_before: None,
            expires_at: None,
            revoked_at: None,
        };
        Versioned {
            value: record,
            as_of: Version(7),
            nonce: Nonce([9; 16]),
            lineage: Lineage { system: 3, ..Lineage::default() },
            read_at: DatabaseTime::from_micros(11),
            sent_at: Moment::from_nanos(0),
        }
    }

    #[test]
    fn a_sealed_record_opens_under_its_own_key_alone_and_unchanged() {
        let digest = ApiKeyDigest::from_bytes([1; 32]);
        let (ours, now) = (Names::<ApiKey>::of(None), Moment::from_nanos(0));
        let sealed = ours.seal(&[5; 32], &digest, &found(digest).as_ref());
        let opened = ours.open(&[5; 32], &digest, &sealed, now).unwrap();
        assert_eq!(opened.value, found(digest).value);
        assert_eq!((opened.as_of, opened.nonce, opened.lineage.system), (Version(7), Nonce([9; 16]), 3));
        assert!(ours.open(&[6; 32], &digest, &sealed, now).is_none(), "another MAC key");
        let other = ApiKeyDigest::from_bytes([2; 32]);
        assert!(ours.open(&[5; 32], &other, &sealed, now).is_none(), "moved to another key");
        let theirs = ["0123456789abcdef0", "123456789abcdef01"].map(|table| Names::<ApiKey>::of(Some(table)));
        for names in &theirs {
            assert!(names.open(&[5; 32], &digest, &sealed, now).is_none(), "moved to another table");
        }
        let names: HashSet<_> = theirs.iter().chain([&ours]).map(|names| names.redis_key(&digest)).collect();
        assert_eq!(names.len(), 3, "{names:?}");
        for at in 0..sealed.len() {
            let mut forged = sealed.clone();
            forged[at] ^= 1;
            assert!(ours.open(&[5; 32], &digest, &forged, now).is_none(), "byte {at}");
            assert!(ours.open(&[5; 32], &digest, &sealed[..at], now).is_none(), "{at} bytes");
        }
    }
}
