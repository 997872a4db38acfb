//! The deny list in Redis: one hash, `trustgate:deny`, whose fields are entries and whose values say until when.
//!
//! A value: version byte, MAC (32), `set_at` (8), `end` (8), both in microseconds by Redis's clock. Of two values for one
//! entry the one set later counts, and an entry is removed by setting an end that has come. So whoever can write to Redis
//! without the key of the MAC can neither deny anybody nor, on a replica that has read the entry, let anybody pass: an
//! entry that is merely gone (Redis was emptied, or restarted without its data) stays in force there until its end.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, OnceLock},
    time::Duration,
};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::entries::{Denied, Entries};
use crate::{
    base::clock::DatabaseTime,
    redis::{QueryError, Redis},
};

/// The name of the hash.
const NAME: &str = "trustgate:deny";
/// The layout of values. Another one is not understood.
const LAYOUT: u8 = 1;
const MAC_BYTES: usize = 32;
/// Entries of the hash, at most: every replica reads all of them twice a second. A trust is one entry, however many keys
/// it has, and the file takes more.
pub const ENTRIES_MAX: usize = 1_000;
/// Entries that one replica remembers, at most, with those that are gone from the hash.
const MEMORY_MAX: usize = 10 * ENTRIES_MAX;
/// How long an entry that is over is kept, in microseconds: a day, so that replicas that were cut off from Redis meanwhile
/// hear that it was removed, and no older value counts again.
const KEPT_MICROS: i64 = 24 * 3_600 * 1_000_000;

/// Fields of the hash that are looked at, at most, foreign ones included.
const FIELDS_MAX: usize = 4 * ENTRIES_MAX;
/// The longest field: `digest`, a blank and 64 hexadecimal digits.
const FIELD_BYTES_MAX: usize = 71;
/// Every value has this length.
const VALUE_BYTES: usize = 1 + MAC_BYTES + 8 + 8;

/// Atomically returns Redis's clock, the number of fields, the number of fields whose length rules them out as entries, and the
/// remaining fields with their values. A client with write access to Redis can store anything in the hash, so the script filters by
/// length inside Redis, and oversized values cannot exhaust our memory.
const READ: &str = "\
local now = redis.call('TIME')
local count = redis.call('HLEN', KEYS[1])
local foreign, entries = 0, {}
if count <= tonumber(ARGV[1]) then
  for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
    if #field <= tonumber(ARGV[2]) and redis.call('HSTRLEN', KEYS[1], field) == tonumber(ARGV[3]) then
      entries[#entries + 1] = field
      entries[#entries + 1] = redis.call('HGET', KEYS[1], field)
    else
      foreign = foreign + 1
    end
  end
end
return {now[1], now[2], count, foreign, entries}";

/// Deletes the fields that cannot be entries by their length.
const DELETE_FOREIGN: &str = "\
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  if #field > tonumber(ARGV[1]) or redis.call('HSTRLEN', KEYS[1], field) ~= tonumber(ARGV[2]) then
    redis.call('HDEL', KEYS[1], field)
  end
end";

/// The list in Redis.
pub struct SharedList {
    redis: Redis,
    mac_key: Arc<OnceLock<[u8; 32]>>,
}

/// From when on an entry is as it is, and until when it denies: microseconds since the Unix epoch by Redis's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    /// When it was set.
    pub set_at: i64,
    /// When it ends.
    pub end: i64,
}

/// What the hash holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Redis's clock, in microseconds since the Unix epoch.
    pub now: i64,
    /// Its genuine entries, those that are over included.
    pub entries: HashMap<Denied, Term>,
    /// Fields with the form of an entry that are not genuine.
    pub refused: usize,
    /// Fields that cannot be entries by their length.
    pub foreign: usize,
}

impl Found {
    /// What is wrong with it, if anything is.
    pub(crate) fn problem(&self) -> Option<String> {
        let count = self.refused + self.foreign;
        (count > 0).then(|| format!("{count} entries are not genuine, or of another release"))
    }
}

/// Why the list cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// The key of the MAC is not known.
    #[error("the key of the MAC is not known yet")]
    NoMacKey,
    /// Redis gave nothing.
    #[error("Redis does not answer")]
    Down(QueryError),
    /// There is more than is read.
    #[error(
        "deny list in Redis is too long: {0} fields or entries; the limits are {ENTRIES_MAX} entries and {FIELDS_MAX} fields. Delete \
         {NAME} in Redis, then add the entries again"
    )]
    TooMany(usize),
}

impl SharedList {
    /// The list in `redis`, authenticated with `mac_key` once that is known.
    #[must_use]
    pub const fn new(redis: Redis, mac_key: Arc<OnceLock<[u8; 32]>>) -> Self {
        Self { redis, mac_key }
    }

    /// Whether what is read can be told from what somebody else wrote.
    pub(crate) fn has_mac_key(&self) -> bool {
        self.mac_key.get().is_some()
    }

    /// Reads the list. Waits at most `redis.timeout`.
    ///
    /// # Errors
    /// [`SharedError`]
    pub async fn read(&self) -> Result<Found, SharedError> {
        let mac_key = self.mac_key.get().ok_or(SharedError::NoMacKey)?;
        let mut command = redis::cmd("EVAL");
        command.arg(READ).arg(1).arg(NAME).arg(FIELDS_MAX).arg(FIELD_BYTES_MAX).arg(VALUE_BYTES);
        let answer = self.redis.query::<(i64, i64, usize, usize, Vec<Vec<u8>>)>(&command).await;
        let (seconds, micros, count, foreign, fields) = answer.map_err(SharedError::Down)?;
        if count > FIELDS_MAX {
            return Err(SharedError::TooMany(count));
        }
        let now = seconds.saturating_mul(1_000_000).saturating_add(micros);
        let mut found = Found { now, foreign, ..Found::default() };
        for [field, value] in fields.as_chunks().0 {
            match open(mac_key, field, value) {
                Some((denied, term)) => drop(found.entries.insert(denied, term)),
                None => found.refused += 1,
            }
        }
        // Fields that are not genuine count against `FIELDS_MAX` only.
        if found.entries.len() > ENTRIES_MAX {
            return Err(SharedError::TooMany(found.entries.len()));
        }
        Ok(found)
    }

    /// Sets each of `denied` to end after `life`, and takes entries out that were over long ago. Waits at most four times
    /// `redis.timeout`.
    ///
    /// # Errors
    /// [`SharedError`]; what was set then is not known.
    pub async fn set(&self, denied: &[Denied], life: Duration) -> Result<Vec<(Denied, Term)>, SharedError> {
        let Found { now, entries, foreign, .. } = self.read().await?;
        if foreign > 0 {
            let mut command = redis::cmd("EVAL");
            command.arg(DELETE_FOREIGN).arg(1).arg(NAME).arg(FIELD_BYTES_MAX).arg(VALUE_BYTES);
            self.redis.query::<()>(&command).await.map_err(SharedError::Down)?;
        }
        let mac_key = self.mac_key.get().ok_or(SharedError::NoMacKey)?;
        let (over, kept): (Vec<_>, Vec<_>) = entries.iter().partition(|(_, term)| is_long_over(term.end, now));
        let new = denied.iter().filter(|one| !entries.contains_key(one)).count();
        if kept.len() + new > ENTRIES_MAX {
            return Err(SharedError::TooMany(kept.len() + new));
        }
        if !over.is_empty() {
            let mut command = redis::cmd("HDEL");
            command.arg(NAME).arg(over.iter().map(|(denied, _)| denied.line()).collect::<Vec<_>>());
            self.redis.query::<()>(&command).await.map_err(SharedError::Down)?;
        }
        let life = i64::try_from(life.as_micros()).unwrap_or(i64::MAX);
        let mut command = redis::cmd("HSET");
        command.arg(NAME);
        let terms = denied.iter().map(|denied| {
            // Later than what is there, also where Redis is another server by now, whose clock is behind.
            let set_at = entries.get(denied).map_or(now, |term| now.max(term.set_at.saturating_add(1)));
            let term = Term { set_at, end: set_at.saturating_add(life) };
            command.arg(denied.line()).arg(seal(mac_key, denied, term));
            (*denied, term)
        });
        let terms = terms.collect();
        self.redis.query::<()>(&command).await.map_err(SharedError::Down)?;
        Ok(terms)
    }
}

const fn is_long_over(end: i64, now: i64) -> bool {
    end.saturating_add(KEPT_MICROS) < now
}

/// The MAC of an entry: as of a value in L2, under a name that no kind of value has; then the entry, its length first.
fn mac(mac_key: &[u8; 32], line: &str, body: &[u8]) -> Hmac<Sha256> {
    let length = u8::try_from(line.len()).unwrap_or_else(|_| unreachable!("a line has 71 bytes at most"));
    Hmac::<Sha256>::new_from_slice(mac_key)
        .unwrap_or_else(|_| unreachable!("HMAC takes a key of any length (RFC 2104)"))
        .chain_update([LAYOUT, 4])
        .chain_update("deny")
        .chain_update([length])
        .chain_update(line)
        .chain_update(body)
}

fn seal(mac_key: &[u8; 32], denied: &Denied, term: Term) -> Vec<u8> {
    let body = [term.set_at.to_be_bytes(), term.end.to_be_bytes()].concat();
    let mac = mac(mac_key, &denied.line(), &body).finalize().into_bytes();
    [&[LAYOUT][..], &mac, &body].concat()
}

fn open(mac_key: &[u8; 32], field: &[u8], value: &[u8]) -> Option<(Denied, Term)> {
    let (kind, id) = std::str::from_utf8(field).ok()?.split_once(' ')?;
    let denied = Denied::read(kind, id)?;
    let (&[LAYOUT], rest) = value.split_first_chunk()? else { return None };
    let (found_mac, body) = rest.split_first_chunk::<MAC_BYTES>()?;
    mac(mac_key, &denied.line(), body).verify_slice(found_mac).ok()?;
    let (set_at, end) = body.split_first_chunk()?;
    let term = Term { set_at: i64::from_be_bytes(*set_at), end: i64::from_be_bytes(end.try_into().ok()?) };
    Some((denied, term))
}

/// What one replica knows of the list: also what was in it before.
#[derive(Default)]
pub(crate) struct Memory(HashMap<Denied, Known>);

struct Known {
    term: Term,
    /// Its end by the database's clock, fixed when both clocks were first known.
    until: Option<DatabaseTime>,
}

impl Memory {
    /// Takes in what the list holds at `now` by the database's clock, and returns what is denied from now on. While that
    /// clock is unknown an entry denies without an end.
    pub(crate) fn take_in(&mut self, found: Found, now: Option<DatabaseTime>) -> Entries {
        let listed: HashSet<Denied> = found.entries.keys().copied().collect();
        for (denied, term) in found.entries {
            let known = self.0.entry(denied).or_insert(Known { term, until: None });
            if term.set_at > known.term.set_at {
                *known = Known { term, until: None };
            }
        }
        self.0.retain(|_, known| !is_long_over(known.term.end, found.now));
        if self.0.len() > MEMORY_MAX {
            self.0.retain(|denied, _| listed.contains(denied));
        }
        for known in self.0.values_mut().filter(|known| known.until.is_none()) {
            let left = u64::try_from(known.term.end.saturating_sub(found.now)).unwrap_or(0);
            known.until = now.map(|now| now.after(Duration::from_micros(left)));
        }
        let denies = |known: &Known| match (known.until, now) {
            (Some(until), Some(now)) => now < until,
            _ => found.now < known.term.end,
        };
        self.0.iter().filter(|(_, known)| denies(known)).map(|(denied, known)| (*denied, known.until)).collect()
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::record::{ApiKeyDigest, KeyId, TrustId};

    const KEY: [u8; 32] = [5; 32];

    fn key(number: u128) -> Denied {
        Denied::Key(KeyId(Uuid::from_u128(number)))
    }

    fn found(now: i64, entries: &[(u128, i64, i64)]) -> Found {
        let entries = entries.iter().map(|(number, set_at, end)| (key(*number), Term { set_at: *set_at, end: *end }));
        Found { now, entries: entries.collect(), refused: 0, foreign: 0 }
    }

    #[test]
    fn an_entry_is_genuine_under_its_own_key_and_name_alone_and_unchanged() {
        let term = Term { set_at: 1, end: 9 };
        let (uuid, digest) = (Uuid::from_u128(7), ApiKeyDigest::from_bytes([7; 32]));
        for denied in [Denied::Key(KeyId(uuid)), Denied::Trust(TrustId(uuid)), Denied::Digest(digest)] {
            let (field, sealed) = (denied.line(), seal(&KEY, &denied, term));
            assert_eq!(open(&KEY, field.as_bytes(), &sealed), Some((denied, term)));
            assert_eq!(open(&[6; 32], field.as_bytes(), &sealed), None, "another MAC key");
            for other in
                [key(8).line(), format!("trust {}", Uuid::from_u128(8)), "key".to_owned(), field.replace(' ', "")]
            {
                assert_eq!(open(&KEY, other.as_bytes(), &sealed), None, "moved to {other}");
            }
            for at in 0..sealed.len() {
                let mut forged = sealed.clone();
                forged[at] ^= 1;
                assert_eq!(open(&KEY, field.as_bytes(), &forged), None, "byte {at}");
                assert_eq!(open(&KEY, field.as_bytes(), &sealed[..at]), None, "{at} bytes");
            }
            assert_eq!(open(&KEY, field.as_bytes(), &[&sealed[..], &[0]].concat()), None, "a byte more");
        }
        let moved = seal(&KEY, &Denied::Key(KeyId(uuid)), term);
        assert_eq!(open(&KEY, Denied::Trust(TrustId(uuid)).line().as_bytes(), &moved), None, "a key is no trust");
    }

    #[test]
    fn an_end_by_the_clock_of_redis_becomes_one_by_the_clock_of_the_database() {
        let at = |micros| Some(DatabaseTime::from_micros(micros));
        let mut memory = Memory::default();
        // The database's clock is 1 000 behind, and not known at first.
        let listed = || found(5_000, &[(1, 4_000, 6_000), (2, 4_000, 5_000)]);
        assert_eq!(memory.take_in(listed(), None), [(key(1), None)].into());
        assert_eq!(memory.take_in(listed(), at(4_000)), [(key(1), at(5_000))].into());
        // Then its end is fixed: it does not matter what Redis's clock does.
        assert_eq!(memory.take_in(found(90_000, &[(1, 4_000, 6_000)]), at(4_999)), [(key(1), at(5_000))].into());
        assert_eq!(memory.take_in(found(90_000, &[(1, 4_000, 6_000)]), at(5_000)), [].into());
    }

    #[test]
    fn an_entry_is_removed_by_a_later_end_and_not_by_its_absence() {
        let now = Some(DatabaseTime::from_micros(0));
        let mut memory = Memory::default();
        let denied = |memory: &mut Memory, found| memory.take_in(found, now).contains_key(&key(1));
        let original = || found(10, &[(1, 10, 1_000)]);
        assert!(denied(&mut memory, original()));
        assert!(denied(&mut memory, found(20, &[])), "Redis was emptied");
        assert!(!denied(&mut memory, found(30, &[(1, 30, 30)])), "removed");
        assert!(!denied(&mut memory, original()), "an older value is put back");
        assert!(denied(&mut memory, found(40, &[(1, 31, 2_000)])), "denied anew");
        assert!(denied(&mut memory, found(40, &[(1, 30, 30)])), "an older removal is put back");
    }

    #[test]
    fn memory_does_not_grow_for_ever() {
        let now = Some(DatabaseTime::from_micros(0));
        let mut memory = Memory::default();
        for round in 0..11 {
            let entries: Vec<_> = (0..1_000).map(|number| (round * 1_000 + number, 1, 1_000)).collect();
            memory.take_in(found(2, &entries), now);
        }
        assert_eq!(memory.0.len(), ENTRIES_MAX, "those that are listed stay");
        memory.take_in(found(1_000 + KEPT_MICROS, &[]), now);
        assert_eq!(memory.0.len(), ENTRIES_MAX);
        memory.take_in(found(1_001 + KEPT_MICROS, &[]), now);
        assert!(memory.0.is_empty(), "over for a day");
    }
}
