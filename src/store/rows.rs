//! Converts the rows of both adapters to records, trusts, keys and poll answers.
//!
//! Both adapters select the same columns in the same order and in the same plain types: whole numbers, strings, lists
//! as JSON, times in microseconds, digests and nonces in hexadecimal. This module does no I/O.

use std::{sync::Arc, time::Duration};

use ipnet::IpNet;
use sqlx::{ColumnIndex, Decode, Row, Type};
use uuid::Uuid;

use super::{
    ledger::{
        backend::StoredKey,
        types::{KeyDetails, ReplicaStatus, Trust},
    },
    reads::lookup::{PollError, Polled},
};
use crate::{
    base::{
        clock::{DatabaseTime, Moment},
        fault::{Fault, Tier},
        saturate::Saturate as _,
    },
    record::{
        ApiKeyDigest, Change, ChangeKind, Digests, Fingerprint, KeyId, Lineage, Nonce, Record, Scheme, StoredPeppers,
        TrustId, Version, Versioned, bytes_from_hex, canonical,
    },
};

/// The columns that a read for a decision returns, in this order. The columns of the key are null if no key was found.
pub(crate) struct ReadRow {
    version: i64,
    nonce: String,
    incarnation: String,
    system: i64,
    timeline: i64,
    clock: i64,
    key: Option<KeyRow>,
}

struct KeyRow {
    id: String,
    trust_id: String,
    trust_enabled: i64,
    digest: String,
    scheme: i64,
    scopes: String,
    allowed_cidrs: String,
    not_before: Option<i64>,
    expires_at: Option<i64>,
    revoked_at: Option<i64>,
    pepper_unrecorded: i64,
}

/// Reads whole numbers and strings from a row, by the column's index (from 0).
pub(crate) trait RowExt {
    fn number(&self, column: usize) -> Result<i64, sqlx::Error>;
    fn number_or_null(&self, column: usize) -> Result<Option<i64>, sqlx::Error>;
    fn text(&self, column: usize) -> Result<String, sqlx::Error>;
    fn text_or_null(&self, column: usize) -> Result<Option<String>, sqlx::Error>;
}

impl<R> RowExt for R
where
    R: Row,
    usize: ColumnIndex<R>,
    i64: Type<R::Database> + for<'r> Decode<'r, R::Database>,
    String: Type<R::Database> + for<'r> Decode<'r, R::Database>,
{
    fn number(&self, column: usize) -> Result<i64, sqlx::Error> {
        self.try_get(column)
    }
    fn number_or_null(&self, column: usize) -> Result<Option<i64>, sqlx::Error> {
        self.try_get(column)
    }
    fn text(&self, column: usize) -> Result<String, sqlx::Error> {
        self.try_get(column)
    }
    fn text_or_null(&self, column: usize) -> Result<Option<String>, sqlx::Error> {
        self.try_get(column)
    }
}

/// The error for a row that does not have the expected format.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Corrupt(pub(crate) &'static str);

impl From<Corrupt> for Fault {
    fn from(Corrupt(problem): Corrupt) -> Self {
        Self::Corrupt { tier: Tier::Store, problem }
    }
}

impl From<Corrupt> for sqlx::Error {
    fn from(corrupt: Corrupt) -> Self {
        Self::Decode(Box::new(corrupt))
    }
}

impl ReadRow {
    /// Reads the columns of a row.
    pub(crate) fn of(row: &impl RowExt) -> Result<Self, sqlx::Error> {
        let key = match row.text_or_null(6)? {
            None => None,
            Some(id) => Some(KeyRow {
                id,
                trust_id: row.text(7)?,
                trust_enabled: row.number(8)?,
                digest: row.text(9)?,
                scheme: row.number(10)?,
                scopes: row.text(11)?,
                allowed_cidrs: row.text(12)?,
                not_before: row.number_or_null(13)?,
                expires_at: row.number_or_null(14)?,
                revoked_at: row.number_or_null(15)?,
                pepper_unrecorded: row.number(16)?,
            }),
        };
        Ok(Self {
            version: row.number(0)?,
            nonce: row.text(1)?,
            incarnation: row.text(2)?,
            system: row.number(3)?,
            timeline: row.number(4)?,
            clock: row.number(5)?,
            key,
        })
    }

    /// Returns the digest of the key if the database does not record the pepper under which it was computed.
    pub(crate) fn unrecorded(&self) -> Option<ApiKeyDigest> {
        let key = self.key.as_ref().filter(|key| key.pepper_unrecorded != 0)?;
        ApiKeyDigest::from_hex(&key.digest)
    }

    pub(crate) fn key_id(&self) -> Option<KeyId> {
        self.key.as_ref().and_then(|key| uuid(&key.id).ok()).map(KeyId)
    }

    fn date(&self, sent_at: Moment) -> Result<Versioned<()>, Corrupt> {
        Ok(Versioned {
            value: (),
            as_of: version(self.version)?,
            nonce: nonce(&self.nonce)?,
            lineage: Lineage {
                incarnation: uuid(&self.incarnation)?,
                system: self.system.cast_unsigned(), // PostgreSQL returns these 64 bits as a signed number
                timeline: u32::try_from(self.timeline).map_err(|_| Corrupt("the timeline is not a 32-bit number"))?,
            },
            read_at: DatabaseTime::from_micros(self.clock),
            sent_at,
        })
    }
}

impl KeyRow {
    fn record(self) -> Result<Record, Corrupt> {
        scheme(self.scheme)?;
        Ok(Record {
            key_id: KeyId(uuid(&self.id)?),
            trust_id: TrustId(uuid(&self.trust_id)?),
            trust_enabled: self.trust_enabled != 0,
            digest: ApiKeyDigest::from_hex(&self.digest).ok_or(Corrupt("a digest is not 32 bytes"))?,
            scopes: scopes(&self.scopes)?.into(),
            allowed_cidrs: cidrs(&self.allowed_cidrs)?.into(),
            not_before: time(self.not_before),
            expires_at: time(self.expires_at),
            revoked_at: time(self.revoked_at),
        })
    }
}

/// The maximum number of rows that a poll accepts. The statement asks for one more: if that row arrives, the answer is
/// incomplete.
pub(crate) const POLL_ROWS_MAX: usize = 5_000;

/// Converts the rows of a poll. `echo` is the number that was sent with the poll.
///
/// The first row has all columns below. Further rows need only columns 11 to 14.
///
/// - 0: `echo`
/// - 1: the state of the server: `primary`, `standby` or `read-only`
/// - 2: the oldest version, or the version that the poll started from if that version still exists
/// - 3, 4: the newest version and its nonce
/// - 5, 6, 7: incarnation, system identifier and timeline
/// - 8: the database's clock
/// - 9: 1 if the triggers of the change log are intact, else 0
/// - 10: the time at which the newest version was recorded
/// - 11 to 14: either a version and its nonce, or a version, null, the kind of a change and its object (null: the whole
///   kind); all null if the row has neither
/// - 15, 16: the fingerprints of the recorded pepper and of the one before it
pub(crate) fn polled(rows: &[impl RowExt], echo: i64, sent_at: Moment) -> Result<Polled, PollError> {
    let unusable = |problem: &str| PollError::Unusable(problem.into());
    let read = || -> Result<Option<Polled>, sqlx::Error> {
        let Some(first) = rows.first() else { return Ok(None) };
        if first.number(0)? != echo {
            return Err(Corrupt("the answer belongs to a different poll").into());
        }
        if first.text(1)? != "primary" {
            return Ok(None);
        }
        let newest = ReadRow {
            version: first.number(3)?,
            nonce: first.text(4)?,
            incarnation: first.text(5)?,
            system: first.number(6)?,
            timeline: first.number(7)?,
            clock: first.number(8)?,
            key: None,
        };
        let mut polled = Polled {
            newest: newest.date(sent_at)?,
            stamped_at: DatabaseTime::from_micros(first.number(10)?),
            oldest: version(first.number(2)?)?,
            triggers_intact: first.number(9)? != 0,
            versions: Vec::new(),
            changes: Vec::new(),
            complete: rows.len() <= POLL_ROWS_MAX,
            peppers: StoredPeppers {
                current: fingerprint(first.text_or_null(15)?)?,
                previous: fingerprint(first.text_or_null(16)?)?,
            },
        };
        for row in rows.iter().take(POLL_ROWS_MAX) {
            let Some(number) = row.number_or_null(11)? else { continue };
            let number = version(number)?;
            match row.text_or_null(12)? {
                Some(nonce) => polled.versions.push((number, self::nonce(&nonce)?)),
                None => polled.changes.push((number, change(&row.text(13)?, row.text_or_null(14)?.as_deref()))),
            }
        }
        polled.versions.sort_by_key(|(version, _)| *version);
        // A revocation records two changes for its digest in the same version: `Absent`, like every update of a key,
        // and `Gone`. `Absent` makes replicas forget the revocation of a digest, so `Gone` must come last.
        polled.changes.sort_by_key(|(version, change)| (*version, matches!(change, Change::Gone(_))));
        Ok(Some(polled))
    };
    match read() {
        Ok(Some(polled)) => Ok(polled),
        Ok(None) => Err(match rows.first().map(|row| row.text(1)) {
            None => unusable(NO_VERSION.0),
            Some(state) => PollError::Unusable(Arc::from(match state.as_deref() {
                Ok("standby") => {
                    "the database is a standby and cannot confirm commits of its primary: connect to the primary"
                }
                Ok("read-only") => {
                    "the database is read-only for this server and cannot confirm changes: allow the server to write"
                }
                _ => "the answer to the poll does not have the expected format",
            })),
        }),
        Err(error) => Err(unusable(&error.to_string())),
    }
}

/// Parses the fingerprint of a pepper from hexadecimal, if there is one.
pub(crate) fn fingerprint(hex: Option<String>) -> Result<Option<Fingerprint>, Corrupt> {
    hex.map(|hex| Fingerprint::from_hex(&hex).ok_or(Corrupt("the fingerprint of a pepper is not 8 bytes"))).transpose()
}

/// Parses the change that a row of the change log records. A kind that this release does not know counts as
/// "everything", and an object that cannot be parsed counts as its whole kind, so that one unexpected row does not make
/// the whole poll unusable.
fn change(kind: &str, object: Option<&str>) -> Change {
    let digest = |change: fn(ApiKeyDigest) -> Change| object.and_then(ApiKeyDigest::from_hex).map(change);
    let id = |change: fn(Uuid) -> Change| object.and_then(|id| uuid(id).ok()).map(change);
    match kind {
        "key" => id(|id| Change::Key(KeyId(id))).unwrap_or(Change::Whole(ChangeKind::Keys)),
        "trust" => id(|id| Change::Trust(TrustId(id))).unwrap_or(Change::Whole(ChangeKind::Trusts)),
        "absent" => digest(Change::Absent).unwrap_or(Change::Whole(ChangeKind::Absences)),
        "gone" => digest(Change::Gone).unwrap_or(Change::Whole(ChangeKind::Gone)),
        _ => Change::Everything,
    }
}

/// Converts the rows of a read by id.
pub(crate) fn by_id(mut rows: Vec<ReadRow>, sent_at: Moment) -> Result<Versioned<Option<Record>>, Corrupt> {
    if rows.len() > 1 {
        return Err(Corrupt("two rows have the same id"));
    }
    let row = rows.pop().ok_or(NO_VERSION)?;
    let date = row.date(sent_at)?;
    let record = row.key.map(KeyRow::record).transpose()?;
    Ok(date.map(|()| record))
}

/// Converts the rows of a read by digests. If there are several keys, returns the key whose digest comes first in
/// `digests`.
pub(crate) fn by_digests(
    rows: Vec<ReadRow>,
    digests: &Digests,
    sent_at: Moment,
) -> Result<Versioned<Option<Record>>, Corrupt> {
    let date = rows.first().ok_or(NO_VERSION)?.date(sent_at)?;
    let found: Vec<Record> =
        rows.into_iter().filter_map(|row| row.key).map(KeyRow::record).collect::<Result<_, _>>()?;
    for digest in digests.all() {
        let mut same = found.iter().filter(|record| record.digest.matches(digest));
        if let Some(record) = same.next() {
            if same.next().is_some() {
                return Err(Corrupt("two rows have the same digest"));
            }
            return Ok(date.map(|()| Some(record.clone())));
        }
    }
    if found.is_empty() { Ok(date.map(|()| None)) } else { Err(Corrupt("a row has a digest that was not requested")) }
}

/// Reads a trust from the columns id, name, enabled, creation time and number of keys.
pub(crate) fn trust(row: &impl RowExt) -> Result<Trust, sqlx::Error> {
    Ok(Trust {
        id: TrustId(uuid(&row.text(0)?)?),
        name: row.text(1)?,
        enabled: row.number(2)? != 0,
        created_at: DatabaseTime::from_micros(row.number(3)?),
        keys: row.number(4)?.cast_unsigned(), // a count
    })
}

/// Reads a key from the columns id, trust (id, name, enabled), hint, scheme, name, scopes, allowed CIDRs, creation
/// time, not before, expiry, revocation, and the fingerprint of its pepper.
pub(crate) fn key(row: &impl RowExt) -> Result<KeyDetails, sqlx::Error> {
    Ok(KeyDetails {
        id: KeyId(uuid(&row.text(0)?)?),
        trust_id: TrustId(uuid(&row.text(1)?)?),
        trust_name: row.text(2)?,
        trust_enabled: row.number(3)? != 0,
        hint: row.text(4)?,
        scheme: scheme(row.number(5)?)?,
        name: row.text_or_null(6)?,
        scopes: scopes(&row.text(7)?)?,
        allowed_cidrs: cidrs(&row.text(8)?)?,
        created_at: DatabaseTime::from_micros(row.number(9)?),
        not_before: time(row.number_or_null(10)?),
        expires_at: time(row.number_or_null(11)?),
        revoked_at: time(row.number_or_null(12)?),
        pepper: fingerprint(row.text_or_null(13)?)?,
    })
}

/// Reads a key and its digest from the columns of [`key`] and the column after them.
pub(crate) fn stored_key(row: &impl RowExt) -> Result<StoredKey, sqlx::Error> {
    let digest = ApiKeyDigest::from_hex(&row.text(14)?).ok_or(Corrupt("a digest is not 32 bytes"))?;
    Ok(StoredKey { key: key(row)?, digest })
}

/// Reads a replica from the columns id, name, applied version, time of the last heartbeat, and the time at which that
/// heartbeat expires.
pub(crate) fn replica(row: &impl RowExt) -> Result<ReplicaStatus, sqlx::Error> {
    Ok(ReplicaStatus {
        id: uuid(&row.text(0)?)?,
        name: row.text(1)?,
        applied: version(row.number(2)?)?,
        seen_at: DatabaseTime::from_micros(row.number(3)?),
        until: DatabaseTime::from_micros(row.number(4)?),
    })
}

/// Reads digests in hexadecimal, one from each row.
pub(crate) fn digests(rows: &[impl RowExt]) -> Result<Vec<ApiKeyDigest>, sqlx::Error> {
    let digest = |row: &_| {
        let hex = RowExt::text(row, 0)?;
        ApiKeyDigest::from_hex(&hex).ok_or_else(|| Corrupt("a digest is not 32 bytes").into())
    };
    rows.iter().map(digest).collect()
}

/// Formats a list as a JSON array of strings, the form in which both adapters send lists.
pub(crate) fn json_list<T: ToString>(list: &[T]) -> String {
    serde_json::Value::from(list.iter().map(ToString::to_string).collect::<Vec<_>>()).to_string()
}

/// Clears the host bits of the networks, because PostgreSQL's type `cidr` rejects a network that has any of them set.
pub(crate) fn networks(cidrs: &[IpNet]) -> Vec<IpNet> {
    cidrs.iter().map(IpNet::trunc).collect()
}

/// Converts a duration to microseconds, at most [`FOR_EVER`].
pub(crate) fn micros(time: Duration) -> i64 {
    time.as_micros().saturate::<i64>().min(FOR_EVER)
}

/// About 146 000 years in microseconds. The current time plus this duration is still a valid time in both databases.
const FOR_EVER: i64 = i64::MAX / 2;

const NO_VERSION: Corrupt = Corrupt("the tables have no version, or no incarnation");

fn version(number: i64) -> Result<Version, Corrupt> {
    u64::try_from(number).map(Version).map_err(|_| Corrupt("a version is negative"))
}

fn nonce(hex: &str) -> Result<Nonce, Corrupt> {
    bytes_from_hex(hex).map(Nonce).ok_or(Corrupt("the nonce of a version is not 16 bytes"))
}

fn uuid(text: &str) -> Result<Uuid, Corrupt> {
    Uuid::parse_str(text).map_err(|_| Corrupt("an id is not a UUID"))
}

fn scheme(number: i64) -> Result<Scheme, Corrupt> {
    i16::try_from(number).ok().and_then(Scheme::from_number).ok_or(Corrupt("a digest's scheme is unknown"))
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && !text.chars().any(|char| char.is_whitespace() || char.is_control())
}

/// Parses the scopes. Drops a scope that is empty or contains white space or control characters. In the header that
/// lists the scopes, white space would split such a scope into several scopes, and a line break would end the header.
fn scopes(json: &str) -> Result<Vec<String>, Corrupt> {
    let texts: Vec<String> = serde_json::from_str(json).map_err(|_| Corrupt("scopes are not a list of strings"))?;
    Ok(texts.into_iter().filter(|text| is_word(text)).collect())
}

fn cidrs(json: &str) -> Result<Vec<IpNet>, Corrupt> {
    const PROBLEM: Corrupt = Corrupt("allowed addresses are not a list of CIDRs");
    let texts: Vec<String> = serde_json::from_str(json).map_err(|_| PROBLEM)?;
    texts.iter().map(|text| text.parse().map(canonical)).collect::<Result<_, _>>().map_err(|_| PROBLEM)
}

fn time(micros: Option<i64>) -> Option<DatabaseTime> {
    micros.map(DatabaseTime::from_micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_mapped_networks_are_converted_to_ipv4() {
        let networks = cidrs(r#"["::ffff:10.0.0.0/104", "::ffff:10.1.2.3/128", "2001:db8::/32"]"#).unwrap();
        let texts: Vec<_> = networks.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["10.0.0.0/8", "10.1.2.3/32", "2001:db8::/32"]);
    }
}
