//! L2: records in Redis, which the replicas share. Each record has a version and a MAC.
//!
//! Each value is sealed (`redis/sealed.rs`) under its kind, table and key. The body of a value consists of the lineage
//! (16 + 8 + 4 bytes), `as_of` (16 hexadecimal digits, so that a Lua script in Redis can compare it), the nonce (16
//! bytes), the time of the read by the database's clock (8 bytes) and the record. The MAC is verified before the body
//! is parsed.
//!
//! L2 contains no negative entries, and an older value does not replace a newer value. A value whose MAC does not
//! verify is ignored. So a client that can write to Redis but lacks the MAC key can only cause more store reads.

use std::{marker::PhantomData, sync::LazyLock, time::Duration};

use tokio::time::sleep;
use uuid::Uuid;

use super::cacheable::Cacheable;
pub(crate) use crate::redis::MacKey;
use crate::{
    base::clock::{DatabaseTime, Moment},
    record::{Lineage, Nonce, Version, Versioned, bytes_from_hex, hex},
    redis::{
        LuaScript, QueryError, Redis,
        sealed::{Envelope, Name},
    },
};

/// The layout of the values. A value with a different layout was written by a different release. Such a value counts as
/// a miss, and stays in Redis until a new value replaces it.
const LAYOUT: u8 = 2;
const AS_OF_BYTES: usize = 16;
/// The maximum length of a value, in bytes; enough for a thousand scopes of 60 bytes. Longer values are not written.
/// Reads stop at this length, so that values written by other clients cannot exhaust the memory of this server.
const VALUE_BYTES_MAX: usize = 64 << 10;

static REPLACE: LazyLock<LuaScript> = LazyLock::new(|| LuaScript::new(include_str!("l2/replace.lua")));
static DISCARD: LazyLock<LuaScript> = LazyLock::new(|| LuaScript::new(include_str!("l2/discard.lua")));

/// Records of one kind in Redis.
pub struct L2<K: Cacheable> {
    redis: Redis,
    mac_key: MacKey,
    names: Names<K>,
}

/// The result of a Redis lookup.
pub enum L2Lookup<V> {
    /// A value whose MAC verifies. It may be out of date.
    Found(Versioned<V>),
    /// There is no value, or a different release wrote it.
    Absent,
    /// A value whose MAC does not verify, or whose type is wrong. L2 has tried to delete it.
    Refused,
    /// Redis did not answer in time, or the MAC key is not known yet.
    Down,
}

impl<K: Cacheable> L2<K> {
    /// Creates a handle to the records in `redis`, which `mac_key` authenticates. `table` is the identity of the
    /// existing table that the records come from ([`crate::store::existing_table::identity_of`]); `None` for
    /// trustgate's own table.
    pub fn new(redis: Redis, mac_key: MacKey, table: Option<&str>) -> Self {
        Self { redis, mac_key, names: Names::of(table) }
    }

    /// Looks up the value for `key`. Waits up to `redis.timeout`.
    pub async fn get(&self, key: &K::Key, now: Moment) -> L2Lookup<K::Value> {
        let Some(mac_key) = self.mac_key.get() else { return L2Lookup::Down };
        let name = self.names.redis_key(key);
        let deadline = sleep(self.redis.limit());
        let mut command = redis::cmd("GETRANGE");
        command.arg(&name).arg(0).arg(VALUE_BYTES_MAX - 1);
        let bad = match self.redis.query::<Vec<u8>>(&command).await {
            // Redis returns an empty string for a missing value.
            Ok(bytes) if bytes.first().is_none_or(|layout| *layout != LAYOUT) => return L2Lookup::Absent,
            Ok(bytes) => match self.names.open(mac_key, key, &bytes, now) {
                Some(found) => return L2Lookup::Found(found),
                None => bytes,
            },
            Err(QueryError::WrongType) => Vec::new(),
            Err(QueryError::Paused | QueryError::Failed(_) | QueryError::NoScript) => return L2Lookup::Down,
        };
        // Delete the value, because every later read of it would fail. Best effort, in the remaining time.
        tokio::select! {
            biased;
            () = self.discard(&name, &bad) => {}
            () = deadline => {}
        }
        L2Lookup::Refused
    }

    async fn discard(&self, name: &str, bad: &[u8]) {
        // Best effort: `run` reports a failure to the circuit breaker.
        let _ = self.redis.run::<()>(&DISCARD, name, &[bad, VALUE_BYTES_MAX.to_string().as_bytes()]).await;
    }

    /// Writes the value for `key` to Redis for `lifetime`, unless Redis already has a value that is at least as new.
    pub async fn put(&self, key: &K::Key, found: &Versioned<&K::Value>, lifetime: Duration) {
        let Some(mac_key) = self.mac_key.get() else { return };
        let bytes = self.names.seal(mac_key, key, found);
        let lifetime = lifetime.min(LIFETIME_MAX).as_millis();
        if lifetime > 0 && bytes.len() <= VALUE_BYTES_MAX {
            let name = self.names.redis_key(key);
            // Best effort: `run` reports a failure to the circuit breaker, and no caller waits for the result.
            let written = self.redis.run::<i64>(&REPLACE, &name, &[&bytes, lifetime.to_string().as_bytes()]).await;
            if matches!(written, Ok(1)) {
                self.redis.note_written();
            }
        }
    }

    /// Deletes the value for `key` from Redis. Best effort.
    pub async fn forget(&self, key: &K::Key) {
        let mut command = redis::cmd("UNLINK");
        command.arg(self.names.redis_key(key));
        // Best effort: `query` reports a failure to the circuit breaker.
        let _ = self.redis.query::<()>(&command).await;
    }
}

/// The maximum lifetime of a value in Redis, even if checks could use the value for longer.
const LIFETIME_MAX: Duration = Duration::from_mins(10);

/// The Redis keys of records of one kind from one table. Two tables may contain the same API key in rows with different
/// ids and limits. A record from one table must not be used for the other table, because changes to the other table do
/// not make that record out of date.
struct Names<K: Cacheable> {
    /// `KIND`, or `KIND@TABLE`.
    kind: String,
    of: PhantomData<K>,
}

/// The number of digits of a table's identity that a Redis key contains: enough to distinguish the few tables that
/// share one Redis.
const TABLE_DIGITS: usize = 16;

impl<K: Cacheable> Names<K> {
    fn of(table: Option<&str>) -> Self {
        let table = table.map(|table| format!("@{table:.TABLE_DIGITS$}"));
        Self { kind: format!("{}{}", K::NAME, table.unwrap_or_default()), of: PhantomData }
    }

    /// Returns `trustgate:KIND:HEX`, where `HEX` is the digest of the API key in hexadecimal digits.
    fn redis_key(&self, key: &K::Key) -> String {
        format!("trustgate:{}:{}", self.kind, hex(key.as_ref()))
    }

    fn envelope(&self) -> Envelope<'_> {
        Envelope { layout: LAYOUT, kind: &self.kind }
    }

    fn seal(&self, mac_key: &[u8; 32], key: &K::Key, found: &Versioned<&K::Value>) -> Vec<u8> {
        let Versioned { value, as_of, nonce, lineage, read_at, sent_at: _ } = found;
        self.envelope().seal(mac_key, Name::Fixed(key.as_ref()), |body| {
            body.extend_from_slice(lineage.incarnation.as_bytes());
            body.extend_from_slice(&lineage.system.to_be_bytes());
            body.extend_from_slice(&lineage.timeline.to_be_bytes());
            body.extend_from_slice(hex(&as_of.0.to_be_bytes()).as_bytes());
            body.extend_from_slice(&nonce.0);
            body.extend_from_slice(&read_at.micros().to_be_bytes());
            K::encode(value, body);
        })
    }

    fn open(&self, mac_key: &[u8; 32], key: &K::Key, bytes: &[u8], now: Moment) -> Option<Versioned<K::Value>> {
        let body = self.envelope().open(mac_key, Name::Fixed(key.as_ref()), bytes)?;
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
    fn record_is_rejected_if_changed_or_moved_or_if_the_mac_key_differs() {
        let digest = ApiKeyDigest::from_bytes([1; 32]);
        let (ours, now) = (Names::<ApiKey>::of(None), Moment::from_nanos(0));
        let sealed = ours.seal(&[5; 32], &digest, &found(digest).as_ref());
        let opened = ours.open(&[5; 32], &digest, &sealed, now).unwrap();
        assert_eq!(opened.value, found(digest).value);
        assert_eq!((opened.as_of, opened.nonce, opened.lineage.system), (Version(7), Nonce([9; 16]), 3));
        assert!(ours.open(&[6; 32], &digest, &sealed, now).is_none(), "different MAC key");
        let other = ApiKeyDigest::from_bytes([2; 32]);
        assert!(ours.open(&[5; 32], &other, &sealed, now).is_none(), "moved to another key");
        let other_tables = ["0123456789abcdef0", "123456789abcdef01"].map(|table| Names::<ApiKey>::of(Some(table)));
        for names in &other_tables {
            assert!(names.open(&[5; 32], &digest, &sealed, now).is_none(), "moved to another table");
        }
        let names: HashSet<_> = other_tables.iter().chain([&ours]).map(|names| names.redis_key(&digest)).collect();
        assert_eq!(names.len(), 3, "{names:?}");
        for at in 0..sealed.len() {
            let mut forged = sealed.clone();
            forged[at] ^= 1;
            assert!(ours.open(&[5; 32], &digest, &forged, now).is_none(), "byte {at}");
            assert!(ours.open(&[5; 32], &digest, &sealed[..at], now).is_none(), "{at} bytes");
        }
    }
}
