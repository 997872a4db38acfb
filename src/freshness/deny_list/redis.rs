//! The deny list in Redis: one hash, `trustgate:deny`. Each field is an entry, and its value is the term of the entry.
//!
//! Each value is sealed (`redis/sealed.rs`) with the line of its entry as the name. The body of a value consists of
//! `set_at` (8 bytes) and `end` (8 bytes), both in microseconds by Redis's clock. If a replica reads two values for one
//! entry, the value with the later `set_at` counts. A command removes an entry by setting a value whose `end` has
//! passed. A replica that has read an entry keeps it until its end, even if Redis no longer has the entry, for example
//! after a restart without data. So a client that can write to Redis but lacks the MAC key can neither add an entry nor
//! remove an entry that a replica has read.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use super::entries::{Denied, Entries};
use crate::{
    base::{clock::DatabaseTime, saturate::Saturate as _},
    redis::{
        MacKey, QueryError, Redis,
        sealed::{Envelope, Name, SEALED_BYTES_MIN},
    },
};

/// The Redis key of the hash.
const NAME: &str = "trustgate:deny";
/// The envelope of the values. Its kind differs from all kinds in L2, so a value copied from L2 is rejected. Values
/// with a different layout are also rejected.
const ENVELOPE: Envelope<'_> = Envelope { layout: 1, kind: "deny" };
/// The maximum number of entries in the hash. Each replica reads all entries twice a second. To deny many keys, deny
/// their trust, which is one entry, or use the file, which has a higher limit.
pub const ENTRIES_MAX: usize = 1_000;
/// The maximum number of entries that one replica remembers, including entries that are no longer in the hash.
const MEMORY_MAX: usize = 10 * ENTRIES_MAX;
/// The time for which an entry is kept after its end, in microseconds: one day. A replica that was cut off from Redis
/// can then still read that the entry was removed, and restoring an older value has no effect.
const KEPT_MICROS: i64 = 24 * 3_600 * 1_000_000;

/// The maximum number of fields in the hash, including foreign fields.
const FIELDS_MAX: usize = 4 * ENTRIES_MAX;
/// The length of the longest field, in bytes: `digest`, a space and 64 hexadecimal digits.
const FIELD_BYTES_MAX: usize = 71;
/// The length of a value, in bytes.
const VALUE_BYTES: usize = SEALED_BYTES_MIN + 8 + 8;

/// A Lua script that atomically returns Redis's clock, the number of fields, the number of foreign fields, and the
/// other fields with their values. A foreign field is a field that cannot be an entry, because of its length or the
/// length of its value. A client with write access to Redis can store anything in the hash, so the script filters by
/// length inside Redis: oversized values cannot exhaust the memory of this server.
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

/// A Lua script that deletes the foreign fields.
const DELETE_FOREIGN: &str = "\
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  if #field > tonumber(ARGV[1]) or redis.call('HSTRLEN', KEYS[1], field) ~= tonumber(ARGV[2]) then
    redis.call('HDEL', KEYS[1], field)
  end
end";

/// The deny list in Redis.
pub struct SharedList {
    redis: Redis,
    mac_key: MacKey,
}

/// The term of an entry. Both times are in microseconds since the Unix epoch, by Redis's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    /// When the entry was set.
    pub set_at: i64,
    /// When the entry ends.
    pub end: i64,
}

/// The content of the hash.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SharedEntries {
    /// Redis's clock at the time of the read, in microseconds since the Unix epoch.
    pub now: i64,
    /// The entries whose MAC verifies, including expired entries.
    pub entries: HashMap<Denied, Term>,
    /// The number of fields that have the length of an entry, but whose name, MAC or layout is not valid.
    pub refused: usize,
    /// The number of foreign fields: they cannot be entries, because of their length or the length of their value.
    pub foreign: usize,
}

impl SharedEntries {
    /// Returns the problem to log if the hash contains fields that are not valid entries.
    pub(crate) fn problem(&self) -> Option<String> {
        let count = self.refused + self.foreign;
        (count > 0).then(|| format!("{count} fields ignored: invalid MAC or format, or written by a different release"))
    }
}

/// The reason why the list cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// The MAC key is not known.
    #[error("the MAC key of the deny list is not known yet")]
    NoMacKey,
    /// Redis did not answer, or its answer cannot be used.
    #[error("Redis gave no usable answer")]
    Down(QueryError),
    /// There are more fields or entries than the limits allow.
    #[error(
        "deny list in Redis is too long: {0} fields or entries; the limits are {ENTRIES_MAX} entries and {FIELDS_MAX} \
         fields. Delete {NAME} in Redis, then add the entries again"
    )]
    TooMany(usize),
}

impl SharedList {
    /// Creates a handle to the list in `redis`. The list can be used once `mac_key`, which authenticates the entries,
    /// is set.
    #[must_use]
    pub const fn new(redis: Redis, mac_key: MacKey) -> Self {
        Self { redis, mac_key }
    }

    /// Returns true if the MAC key is known, so that the list can be read.
    pub(crate) fn has_mac_key(&self) -> bool {
        self.mac_key.get().is_some()
    }

    /// Reads the list. Waits up to `redis.timeout`.
    ///
    /// # Errors
    /// [`SharedError`]
    pub async fn read(&self) -> Result<SharedEntries, SharedError> {
        let mac_key = self.mac_key.get().ok_or(SharedError::NoMacKey)?;
        let mut command = redis::cmd("EVAL");
        command.arg(READ).arg(1).arg(NAME).arg(FIELDS_MAX).arg(FIELD_BYTES_MAX).arg(VALUE_BYTES);
        let answer = self.redis.query::<(i64, i64, usize, usize, Vec<Vec<u8>>)>(&command).await;
        let (seconds, micros, count, foreign, fields) = answer.map_err(SharedError::Down)?;
        if count > FIELDS_MAX {
            return Err(SharedError::TooMany(count));
        }
        let now = seconds.saturating_mul(1_000_000).saturating_add(micros);
        let mut found = SharedEntries { now, foreign, ..SharedEntries::default() };
        for [field, value] in fields.as_chunks().0 {
            match open(mac_key, field, value) {
                Some((denied, term)) => drop(found.entries.insert(denied, term)),
                None => found.refused += 1,
            }
        }
        // Refused fields count against `FIELDS_MAX` but not against `ENTRIES_MAX`.
        if found.entries.len() > ENTRIES_MAX {
            return Err(SharedError::TooMany(found.entries.len()));
        }
        Ok(found)
    }

    /// Adds the entries `denied`, or renews them, so that they expire after `life`. Also deletes foreign fields, and
    /// entries that expired more than a day ago. Waits up to four times `redis.timeout`.
    ///
    /// # Errors
    /// Returns a [`SharedError`]. In that case, the entries may or may not have been set.
    pub async fn set(&self, denied: &[Denied], life: Duration) -> Result<Vec<(Denied, Term)>, SharedError> {
        let SharedEntries { now, entries, foreign, .. } = self.read().await?;
        if foreign > 0 {
            let mut command = redis::cmd("EVAL");
            command.arg(DELETE_FOREIGN).arg(1).arg(NAME).arg(FIELD_BYTES_MAX).arg(VALUE_BYTES);
            self.redis.query::<()>(&command).await.map_err(SharedError::Down)?;
        }
        let mac_key = self.mac_key.get().ok_or(SharedError::NoMacKey)?;
        let (ended, kept): (Vec<_>, Vec<_>) = entries.iter().partition(|(_, term)| ended_long_ago(term.end, now));
        let new = denied.iter().filter(|one| !entries.contains_key(one)).count();
        if kept.len() + new > ENTRIES_MAX {
            return Err(SharedError::TooMany(kept.len() + new));
        }
        if !ended.is_empty() {
            let mut command = redis::cmd("HDEL");
            command.arg(NAME).arg(ended.iter().map(|(denied, _)| denied.line()).collect::<Vec<_>>());
            self.redis.query::<()>(&command).await.map_err(SharedError::Down)?;
        }
        let life = life.as_micros().saturate();
        let mut command = redis::cmd("HSET");
        command.arg(NAME);
        let terms = denied.iter().map(|denied| {
            // `set_at` must be later than in the current value, even if Redis was replaced with a server whose clock is
            // behind.
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

const fn ended_long_ago(end: i64, now: i64) -> bool {
    end.saturating_add(KEPT_MICROS) < now
}

fn seal(mac_key: &[u8; 32], denied: &Denied, term: Term) -> Vec<u8> {
    ENVELOPE.seal(mac_key, Name::Varying(&denied.line()), |body| {
        body.extend_from_slice(&term.set_at.to_be_bytes());
        body.extend_from_slice(&term.end.to_be_bytes());
    })
}

fn open(mac_key: &[u8; 32], field: &[u8], value: &[u8]) -> Option<(Denied, Term)> {
    let (kind, id) = std::str::from_utf8(field).ok()?.split_once(' ')?;
    let denied = Denied::read(kind, id)?;
    let body = ENVELOPE.open(mac_key, Name::Varying(&denied.line()), value)?;
    let (set_at, end) = body.split_first_chunk()?;
    let term = Term { set_at: i64::from_be_bytes(*set_at), end: i64::from_be_bytes(end.try_into().ok()?) };
    Some((denied, term))
}

/// The entries that one replica has read, including entries that are no longer in the hash.
#[derive(Default)]
pub(crate) struct Memory(HashMap<Denied, KnownTerm>);

struct KnownTerm {
    term: Term,
    /// The end by the database's clock. Computed once, when the database's clock is known.
    until: Option<DatabaseTime>,
}

impl Memory {
    /// Merges `found`, the content of the hash, and returns the entries in force. `now` is the time of the read, by the
    /// database's clock. While that clock is unknown, the entries are returned without an end.
    pub(crate) fn merge(&mut self, found: SharedEntries, now: Option<DatabaseTime>) -> Entries {
        let listed: HashSet<Denied> = found.entries.keys().copied().collect();
        for (denied, term) in found.entries {
            let known = self.0.entry(denied).or_insert(KnownTerm { term, until: None });
            if term.set_at > known.term.set_at {
                *known = KnownTerm { term, until: None };
            }
        }
        self.0.retain(|_, known| !ended_long_ago(known.term.end, found.now));
        if self.0.len() > MEMORY_MAX {
            self.0.retain(|denied, _| listed.contains(denied));
        }
        for known in self.0.values_mut().filter(|known| known.until.is_none()) {
            let left = u64::try_from(known.term.end.saturating_sub(found.now)).unwrap_or(0);
            known.until = now.map(|now| now.after(Duration::from_micros(left)));
        }
        let denies = |known: &KnownTerm| match (known.until, now) {
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

    fn found(now: i64, entries: &[(u128, i64, i64)]) -> SharedEntries {
        let entries = entries.iter().map(|(number, set_at, end)| (key(*number), Term { set_at: *set_at, end: *end }));
        SharedEntries { now, entries: entries.collect(), refused: 0, foreign: 0 }
    }

    #[test]
    fn entry_is_rejected_if_changed_or_moved_or_if_the_mac_key_differs() {
        let term = Term { set_at: 1, end: 9 };
        let (uuid, digest) = (Uuid::from_u128(7), ApiKeyDigest::from_bytes([7; 32]));
        for denied in [Denied::Key(KeyId(uuid)), Denied::Trust(TrustId(uuid)), Denied::Digest(digest)] {
            let (field, sealed) = (denied.line(), seal(&KEY, &denied, term));
            assert_eq!(open(&KEY, field.as_bytes(), &sealed), Some((denied, term)));
            assert_eq!(open(&[6; 32], field.as_bytes(), &sealed), None, "different MAC key");
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
            assert_eq!(open(&KEY, field.as_bytes(), &[&sealed[..], &[0]].concat()), None, "extra byte");
        }
        let moved = seal(&KEY, &Denied::Key(KeyId(uuid)), term);
        assert_eq!(open(&KEY, Denied::Trust(TrustId(uuid)).line().as_bytes(), &moved), None, "moved to a trust");
    }

    #[test]
    fn end_is_converted_only_once_from_the_redis_clock_to_the_database_clock() {
        let at = |micros| Some(DatabaseTime::from_micros(micros));
        let mut memory = Memory::default();
        // The database's clock is 1 000 microseconds behind Redis's clock, and is unknown at first.
        let listed = || found(5_000, &[(1, 4_000, 6_000), (2, 4_000, 5_000)]);
        assert_eq!(memory.merge(listed(), None), [(key(1), None)].into());
        assert_eq!(memory.merge(listed(), at(4_000)), [(key(1), at(5_000))].into());
        // The converted end is now fixed, so a change to Redis's clock has no effect.
        assert_eq!(memory.merge(found(90_000, &[(1, 4_000, 6_000)]), at(4_999)), [(key(1), at(5_000))].into());
        assert_eq!(memory.merge(found(90_000, &[(1, 4_000, 6_000)]), at(5_000)), [].into());
    }

    #[test]
    fn newer_end_removes_an_entry_but_absence_from_redis_does_not() {
        let now = Some(DatabaseTime::from_micros(0));
        let mut memory = Memory::default();
        let denied = |memory: &mut Memory, found| memory.merge(found, now).contains_key(&key(1));
        let original = || found(10, &[(1, 10, 1_000)]);
        assert!(denied(&mut memory, original()));
        assert!(denied(&mut memory, found(20, &[])), "Redis was emptied");
        assert!(!denied(&mut memory, found(30, &[(1, 30, 30)])), "removed");
        assert!(!denied(&mut memory, original()), "an older value is put back");
        assert!(denied(&mut memory, found(40, &[(1, 31, 2_000)])), "denied again");
        assert!(denied(&mut memory, found(40, &[(1, 30, 30)])), "an older removal is put back");
    }

    #[test]
    fn memory_is_bounded() {
        let now = Some(DatabaseTime::from_micros(0));
        let mut memory = Memory::default();
        for round in 0..11 {
            let entries: Vec<_> = (0..1_000).map(|number| (round * 1_000 + number, 1, 1_000)).collect();
            memory.merge(found(2, &entries), now);
        }
        assert_eq!(memory.0.len(), ENTRIES_MAX, "entries in the hash stay");
        memory.merge(found(1_000 + KEPT_MICROS, &[]), now);
        assert_eq!(memory.0.len(), ENTRIES_MAX);
        memory.merge(found(1_001 + KEPT_MICROS, &[]), now);
        assert!(memory.0.is_empty(), "ended more than a day ago");
    }
}
