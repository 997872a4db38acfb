//! The reads that checks and the poll task make on PostgreSQL.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, PgConnection, postgres::PgRow};
use uuid::Uuid;

use super::{
    lookup::{Heartbeat, Missing, OTHER_KEYS_MAX},
    pool::Connect,
    reader::{Dialect, OwnTableQueries},
};
use crate::{
    record::{Digests, Fingerprint, KeyId, Version},
    store::{
        change_log::{listen, problem::TrackingProblem},
        error::StoreError,
        existing_table::ExistingTable,
        names::{SchemaName, bytes_literal},
        postgres::{code, connect, describe, is_missing},
        rows::{self, POLL_ROWS_MAX},
        schema,
        url::StoreUrl,
    },
};

/// A PostgreSQL database, with our own tables or with an existing table.
#[derive(Clone, Debug)]
pub(crate) struct Postgres {
    pub(crate) address: StoreUrl,
    /// The schema of our tables.
    pub(crate) schema: SchemaName,
    /// The existing table to read instead of our own tables, if the settings name one.
    pub(crate) existing: Option<ExistingTable>,
    /// The maximum time that the server may work on a read, which is longer than the time that the caller waits. The
    /// limit ends statements whose connection was closed: while a statement waits for a lock, the server does not
    /// notice that its client has disconnected.
    pub(crate) statement_timeout: Duration,
}

impl Connect for Postgres {
    type Connection = PgConnection;
    /// A complete statement, including its values: digests, ids and numbers that this program formats, but no external
    /// input. The simple query protocol needs one round trip, even on a new connection, and leaves no prepared
    /// statement on the server that a pooler could lose.
    type Query = String;
    type Row = PgRow;

    async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        connect(&self.address).await
    }

    async fn run(&self, connection: &mut PgConnection, query: &String) -> Result<Vec<PgRow>, sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(query.as_str())).fetch_all(connection).await
    }

    async fn close(connection: PgConnection) {
        // The connection is closed even after an error.
        let _ = connection.close().await;
    }

    fn lost(error: &sqlx::Error) -> bool {
        match error {
            sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => true,
            // Class 08: connection; 57P: the server stops, crashed or starts. On a server that became a standby, a read
            // fails with 55000 and a write with 25006.
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
        match &self.existing {
            None => self.timed(&format!(
                "SELECT * FROM {{s}}.find_key(ARRAY[{}]::bytea[], NULL)",
                list(&|hex| bytes_literal(&hex))
            )),
            Some(table) => self.timed(&table.find(&table.has_digest(digests))),
        }
    }

    fn find_by_id(&self, key: KeyId) -> String {
        match &self.existing {
            None => self.timed(&format!("SELECT * FROM {{s}}.find_key(NULL, '{key}')")),
            Some(table) => self.timed(&table.find(&table.has_id(key))),
        }
    }

    fn poll(&self, since: Option<Version>, echo: i64) -> String {
        if !self.tracks_changes() {
            return self.timed(&format!(
                "SELECT {echo}::bigint, CASE WHEN pg_is_in_recovery() THEN 'standby' ELSE 'primary' END,
                    0::bigint, 0::bigint, repeat('0', 32), '00000000-0000-0000-0000-000000000000', 0::bigint, 0::bigint,
                    {CLOCK}, 0::bigint, {CLOCK}, NULL::bigint, NULL, NULL, NULL, NULL, NULL"
            ));
        }
        let since = since.map_or_else(|| "NULL".to_owned(), |version| version.0.to_string());
        // If there is an existing table, the attached table must also be this one, with the columns configured here.
        let watched = self.existing.as_ref().map_or_else(
            || "watched".to_owned(),
            |table| format!("watched * ({})::int", attached_as(&table.identity())),
        );
        // Digests in an existing table have no pepper.
        let pepper = |column: &str| match self.existing {
            None => format!("(SELECT encode({column}, 'hex') FROM {{s}}.meta)"),
            Some(_) => "NULL".to_owned(),
        };
        let poll = format!(
            "SELECT {echo}::bigint, state, oldest, newest, newest_nonce, incarnation, system, timeline, clock, {watched},
                stamped_at, version, nonce, kind, object, {}, {}
             FROM {{s}}.poll({since}, {})",
            pepper("pepper_fingerprint"),
            pepper("previous_pepper_fingerprint"),
            POLL_ROWS_MAX + 1
        );
        self.within(POLL_TIMEOUT, &format!("SET LOCAL lock_timeout = {}; {poll}", POLL_LOCK_TIMEOUT.as_millis()))
    }

    fn answered(error: &sqlx::Error) -> bool {
        use sqlx::Error::{ColumnDecode, ColumnIndexOutOfBounds, ColumnNotFound, Decode, TypeNotFound};
        match code(error) {
            // Class 08: the connection (a pooler uses it for a server that it cannot reach); 57P01, 57P02, 57P03,
            // 57P05: the server stops, crashed, starts, or closes idle connections. Any other code means that the
            // server is up and that other clients may be committing revocations: it is a standby or read-only, lacks
            // our tables or the rights to them, rejects the login, has no free connection, cancelled the statement, or
            // a table is locked.
            Some(code) => !code.starts_with("08") && !["57P01", "57P02", "57P03", "57P05"].contains(&code.as_str()),
            None => matches!(
                error,
                Decode(_)
                    | ColumnDecode { .. }
                    | ColumnIndexOutOfBounds { .. }
                    | ColumnNotFound(_)
                    | TypeNotFound { .. }
            ),
        }
    }

    async fn listen(&self, changed: &(dyn Fn() + Send + Sync)) -> sqlx::Error {
        if !self.tracks_changes() {
            return std::future::pending().await; // without our tables there are no notifications
        }
        match listen::attend(&self.address, &self.schema, changed).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn restore_watch(&self) -> Result<(), sqlx::Error> {
        if let Some((question, problem)) = self.unattached() {
            let mut connection = connect(&self.address).await?;
            let rows = sqlx::raw_sql(AssertSqlSafe(question)).fetch_all(&mut connection).await?;
            connection.close().await?;
            if !rows.is_empty() {
                return Err(sqlx::Error::InvalidArgument(problem.to_string()));
            }
        }
        self.call("SELECT {s}.restore_watch()").await
    }

    async fn renew_incarnation(&self, lost: Uuid) -> Result<(), sqlx::Error> {
        self.call(&format!("SELECT {{s}}.renew_incarnation('{lost}')")).await
    }

    fn ours(&self) -> Option<OwnTableQueries<String>> {
        self.tracks_changes().then(|| OwnTableQueries {
            schema: self.timed(schema::postgres::SCHEMA),
            redis_mac_key: self.timed("SELECT encode(value, 'hex') FROM {s}.setting WHERE name = 'redis_mac_key'"),
            // The server may continue deleting after the caller has stopped waiting. The next call then has less to
            // delete.
            prune: self.within(PRUNE_TIMEOUT, "SELECT {s}.prune()"),
            // `prune` keeps the newest version that is older than its limit, so look at the second-oldest version.
            is_more: self.timed(
                "SELECT (at < clock_timestamp() - interval '21 minutes')::int::bigint
                 FROM {s}.version ORDER BY version LIMIT 1 OFFSET 1",
            ),
        })
    }

    fn record_peppers(&self, proven: &[(KeyId, Fingerprint)], current: Fingerprint) -> String {
        let list = |write: fn(&(KeyId, Fingerprint)) -> String| proven.iter().map(write).collect::<Vec<_>>().join(", ");
        self.timed(&format!(
            "SELECT {{s}}.record_peppers(ARRAY[{}]::uuid[], ARRAY[{}]::bytea[], {})",
            list(|(id, _)| format!("'{id}'")),
            list(|(_, fingerprint)| Self::fingerprint_literal(*fingerprint)),
            Self::fingerprint_literal(current),
        ))
    }

    fn fingerprint_literal(fingerprint: Fingerprint) -> String {
        format!("{}::bytea", bytes_literal(&fingerprint.to_string()))
    }

    fn count_keys(&self, conditions: &[String]) -> String {
        let ranges = conditions.iter().map(|condition| {
            format!(
                "(SELECT expires_at FROM {{s}}.api_key WHERE {condition} AND revoked_at IS NULL LIMIT {OTHER_KEYS_MAX})"
            )
        });
        let ranges = ranges.collect::<Vec<_>>().join(" UNION ALL ");
        // A new column has no statistics yet, so the planner might otherwise choose to read the whole table.
        self.timed(&format!(
            "SET LOCAL enable_seqscan = off; SELECT least(count(*), {OTHER_KEYS_MAX}) FROM ({ranges}) k
             WHERE expires_at IS NULL OR expires_at > statement_timestamp()"
        ))
    }

    fn has_own_keys(&self) -> bool {
        self.existing.is_none()
    }

    fn report(&self, heartbeat: &Heartbeat) -> String {
        let Heartbeat { replica, name, applied, lasts } = heartbeat;
        // Send the host name as a list of character codes: external input must not become part of a statement.
        let name = name.chars().filter(char::is_ascii_graphic).take(NAME_CHARS_MAX);
        let name = name.map(|c| u32::from(c).to_string()).collect::<Vec<_>>().join(", ");
        self.timed(&format!(
            include_str!("postgres/heartbeat.sql"),
            s = self.schema.as_str(),
            replica = replica,
            name = name,
            applied = applied.0,
            lasts = rows::micros(*lasts),
        ))
    }

    async fn prepare(&self, _missing: Missing) -> Result<(), StoreError> {
        Ok(()) // `trustgate migrate` creates the tables, `serve` does not
    }

    fn backend(&self) -> String {
        if self.tracks_changes() { describe(&self.address, &self.schema) } else { self.address.describe_postgres() }
    }

    fn is_missing(error: &sqlx::Error) -> bool {
        is_missing(error)
    }
}

impl Postgres {
    /// Returns true if the database has our tables, whose change log records changes: our own tables, or an attached
    /// table.
    pub(crate) fn tracks_changes(&self) -> bool {
        self.existing.as_ref().is_none_or(|table| table.attached)
    }

    /// Returns a query and the description of a problem: the existing table is not attached with the columns configured
    /// here. The problem exists if the query returns a row. Returns `None` if the settings name no attached table.
    pub(crate) fn unattached(&self) -> Option<(String, TrackingProblem)> {
        let table = self.existing.as_ref().filter(|table| table.attached)?;
        let problem = format!(
            "{} is not attached, or was attached with columns different from those configured here",
            table.table
        );
        let question = format!("SELECT 1 WHERE NOT {}", attached_as(&table.identity()));
        Some((self.within(CALL_TIMEOUT, &question), TrackingProblem::AttachedTable(problem)))
    }

    /// Calls one of our functions, on a separate connection.
    async fn call(&self, call: &str) -> Result<(), sqlx::Error> {
        if !self.tracks_changes() {
            return Ok(()); // without our tables there are no functions
        }
        let mut connection = connect(&self.address).await?;
        // These limits are for the server. The caller has its own timeout.
        let call = format!("SET LOCAL lock_timeout = '1s'; {}", self.within(CALL_TIMEOUT, call));
        sqlx::raw_sql(AssertSqlSafe(call)).execute(&mut connection).await?;
        connection.close().await
    }

    /// Fills in our schema in `text` and adds the server's time limit for a read.
    fn timed(&self, text: &str) -> String {
        self.within(self.statement_timeout, text)
    }

    /// Fills in our schema in `text` and adds a time limit for the server. `SET LOCAL` ends with the implicit
    /// transaction around all statements in the string. The string sets the isolation level because SERIALIZABLE may be
    /// the database default, and SERIALIZABLE reads would make writers fail.
    fn within(&self, limit: Duration, text: &str) -> String {
        format!(
            "SET LOCAL transaction_isolation = 'read committed'; SET LOCAL statement_timeout = {}; {}",
            limit.as_millis().max(1),
            text.replace("{s}", self.schema.as_str())
        )
    }
}

/// The maximum time that the server may work on a poll: longer than the default of `freshness.poll_timeout`, for the
/// reason explained at [`Postgres::statement_timeout`].
const POLL_TIMEOUT: Duration = Duration::from_secs(1);
/// The maximum time that a poll may wait for a lock on our tables. It is well below `freshness.poll_timeout`, so that
/// the server reports in time that a table is locked. Such a report counts as an answer, which allows no stale grants.
/// Without this limit the poll would count as unanswered.
const POLL_LOCK_TIMEOUT: Duration = Duration::from_millis(50);
/// The maximum time that the server may work on deleting old versions.
const PRUNE_TIMEOUT: Duration = Duration::from_secs(10);
/// The maximum time that the server may work on a function call.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// The maximum length of a host name in a heartbeat, in characters (RFC 1035, section 2.3.4).
const NAME_CHARS_MAX: usize = 255;

/// Returns the SQL condition that the attached table has this identity.
fn attached_as(identity: &str) -> String {
    format!("(SELECT attached_identity IS NOT DISTINCT FROM '{identity}' FROM {{s}}.meta)")
}

/// SQL for the timeline of the write-ahead log that the server is writing.
pub(crate) const TIMELINE: &str = "('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint";
/// SQL for the database's clock, in microseconds since the Unix epoch.
pub(crate) const CLOCK: &str = "(extract(epoch FROM statement_timestamp()) * 1000000)::bigint";

/// Returns SQL for the time in `column`, in microseconds since the Unix epoch. A time that does not fit, such as
/// `infinity`, becomes the latest or earliest time of the supported range.
pub(crate) fn micros(column: &str) -> String {
    format!(
        "(extract(epoch FROM CASE WHEN {column} > '200000-01-01+00' THEN '200000-01-01+00'
            WHEN {column} < '4000-01-01+00 BC' THEN '4000-01-01+00 BC' ELSE {column} END) * 1000000)::bigint"
    )
}
