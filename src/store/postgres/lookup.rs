//! The reads of checks on PostgreSQL.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, PgConnection, postgres::PgRow};
use uuid::Uuid;

use super::{
    super::{
        LedgerError, Preset, SchemaName,
        lookup::{Missing, SignOfLife},
        place::Address,
        pool::Connect,
        reader::{Dialect, Ours},
    },
    code, connect, describe, is_missing, migrate,
};
use crate::record::{Digests, KeyId, Version};

/// One PostgreSQL database and whose tables it holds.
#[derive(Clone, Debug)]
pub(crate) struct Postgres {
    /// Where it is.
    pub(crate) address: Address,
    /// Where our tables are in it.
    pub(crate) schema: SchemaName,
    /// Somebody else's table, if it is one.
    pub(crate) preset: Option<Preset>,
    /// How long the server may work on a statement. Longer than anybody waits for it: it is there to end statements
    /// whose connection was closed, which the server would not notice while one waits for a lock.
    pub(crate) statement_timeout: Duration,
}

impl Connect for Postgres {
    type Connection = PgConnection;
    /// The whole text of a statement, values included: digests, ids and numbers as this release writes them, never a
    /// text from outside. One round trip, also on a new connection, and nothing for a pooler to lose.
    type Query = String;
    type Row = PgRow;

    async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        connect(&self.address).await
    }

    async fn run(&self, connection: &mut PgConnection, query: &String) -> Result<Vec<PgRow>, sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(query.as_str())).fetch_all(connection).await
    }

    async fn close(connection: PgConnection) {
        // It is gone either way.
        let _ = connection.close().await;
    }

    fn lost(error: &sqlx::Error) -> bool {
        match error {
            sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => true,
            // Class 08: connection; 57P: the server stops, crashed or starts. 55000 is what a read says on a server
            // that became a standby; 25006, what a write says there.
            _ => code(error).is_some_and(|code| {
                code.starts_with("08") || code.starts_with("57P") || code == "55000" || code == "25006"
            }),
        }
    }
}

impl Dialect for Postgres {
    fn find(&self, digests: &Digests) -> String {
        let list = |write: &dyn Fn(String) -> String| {
            digests.all().map(|digest| write(digest.to_hex())).collect::<Vec<_>>().join(", ")
        };
        match self.preset {
            None => self.own(&format!("k.digest IN ({})", list(&|hex| format!("decode('{hex}', 'hex')")))),
            Some(Preset::TrustTable) => {
                self.trust_table(&format!("t.api_key_hash IN ({})", list(&|hex| format!("'{hex}'"))))
            }
        }
    }

    fn find_by_id(&self, key: KeyId) -> String {
        match self.preset {
            None => self.own(&format!("k.id = '{key}'")),
            Some(Preset::TrustTable) => self.trust_table(&format!("t.id = '{key}'")),
        }
    }

    fn poll(&self, _since: Option<Version>, _echo: i64) -> String {
        todo!()
    }

    fn answered(_error: &sqlx::Error) -> bool {
        todo!()
    }

    async fn listen(&self, _changed: &(dyn Fn() + Send + Sync)) -> sqlx::Error {
        todo!()
    }

    async fn restore_watch(&self) -> Result<(), sqlx::Error> {
        todo!()
    }

    async fn renew_incarnation(&self, _lost: Uuid) -> Result<(), sqlx::Error> {
        todo!()
    }

    fn ours(&self) -> Option<Ours<String>> {
        self.preset.is_none().then(|| Ours {
            schema: self.timed(migrate::SCHEMA),
            redis_mac_key: self.timed("SELECT encode(value, 'hex') FROM {s}.setting WHERE name = 'redis_mac_key'"),
            prune: todo!(),
        })
    }

    fn report(&self, _sign: &SignOfLife) -> String {
        todo!()
    }

    async fn prepare(&self, _missing: Missing) -> Result<(), LedgerError> {
        Ok(()) // made by `migrate`, never by who serves
    }

    fn place(&self) -> String {
        if self.preset.is_some() { self.address.describe_postgres() } else { describe(&self.address, &self.schema) }
    }

    fn is_missing(error: &sqlx::Error) -> bool {
        is_missing(error)
    }
}

impl Postgres {
    /// The newest version and, where `condition` holds, a key with its trust: one statement, so one snapshot.
    ///
    /// `statement_timestamp()` is when the server got the statement: never after the snapshot, so that no age is
    /// counted too short. The timeline is taken from the log being written: the one in the control file changes only
    /// with the first checkpoint after a promotion. Asking for it fails on a standby, as it should.
    fn own(&self, condition: &str) -> String {
        self.timed(&format!(
            "SELECT v.version, encode(v.nonce, 'hex'), m.incarnation::text, c.system_identifier, {TIMELINE}, {CLOCK},
                k.id::text, t.id::text, t.enabled::int::bigint, encode(k.digest, 'hex'), k.scheme::bigint,
                array_to_json(k.scopes)::text, array_to_json(k.allowed_cidrs)::text,
                {not_before}, {expires_at}, {revoked_at}
             FROM (SELECT version, nonce FROM {{s}}.version ORDER BY version DESC LIMIT 1) v
             CROSS JOIN {{s}}.meta m
             CROSS JOIN pg_control_system() c
             LEFT JOIN ({{s}}.api_key k JOIN {{s}}.trust t ON t.id = k.trust_id) ON {condition}",
            not_before = micros("k.not_before"),
            expires_at = micros("k.expires_at"),
            revoked_at = micros("k.revoked_at"),
        ))
    }

    /// The same columns from a table `trust(id, api_key_hash)`, found by the role's `search_path`. It has no versions:
    /// everything is dated with number 0.
    fn trust_table(&self, condition: &str) -> String {
        self.timed(&format!(
            "SELECT 0::bigint, repeat('0', 32), '00000000-0000-0000-0000-000000000000', 0::bigint, 0 * {TIMELINE}, {CLOCK},
                t.id::text, t.id::text, 1::bigint, t.api_key_hash::text, 0::bigint, '[]', '[]',
                NULL::bigint, NULL::bigint, NULL::bigint
             FROM (SELECT 1) v
             LEFT JOIN trust t ON t.api_key_hash IS NOT NULL AND {condition}"
        ))
    }

    /// `text` in our schema, with a limit for the server. `SET LOCAL` ends with the implicit transaction around both.
    fn timed(&self, text: &str) -> String {
        let limit = self.statement_timeout.as_millis().max(1);
        format!("SET LOCAL statement_timeout = {limit}; {}", text.replace("{s}", self.schema.as_str()))
    }
}

/// The timeline of the log being written.
const TIMELINE: &str = "('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint";
/// The database's clock in microseconds since the Unix epoch.
const CLOCK: &str = "(extract(epoch FROM statement_timestamp()) * 1000000)::bigint";

/// A point in time in microseconds since the Unix epoch.
pub(super) fn micros(column: &str) -> String {
    format!("(extract(epoch FROM {column}) * 1000000)::bigint")
}
