//! The statements that run on an SQLite file, and their values. Only [`Query::run`] does I/O.

use sqlx::{AssertSqlSafe, SqliteConnection, sqlite::SqliteRow};

use crate::store::{
    change_log::sqlite::IN_FORCE,
    rows, schema,
    sqlite::{Access, MINUTE, NOW},
};

/// A statement and its values.
pub(crate) struct Query {
    sql: String,
    values: Vec<BoundValue>,
    pub(super) access: Access,
}

pub(super) enum BoundValue {
    Text(String),
    Bytes(Vec<u8>),
    Number(Option<i64>),
    /// True if this process can write to the database; bound when the query runs.
    Writable,
}

impl Query {
    pub(super) fn new(sql: impl Into<String>, values: impl IntoIterator<Item = BoundValue>) -> Self {
        Self { sql: sql.into(), values: values.into_iter().collect(), access: Access::Read }
    }

    pub(super) fn writing(sql: impl Into<String>, values: impl IntoIterator<Item = BoundValue>) -> Self {
        Self { access: Access::Write, ..Self::new(sql, values) }
    }

    /// Runs the statements to their end, because an unfinished SELECT would keep its snapshot.
    pub(super) async fn run(
        &self,
        connection: &mut SqliteConnection,
        writable: bool,
    ) -> Result<Vec<SqliteRow>, sqlx::Error> {
        // The statement consists only of constants in this program and placeholders.
        let mut bound = sqlx::query(AssertSqlSafe(self.sql.clone()));
        for value in &self.values {
            bound = match value {
                BoundValue::Text(text) => bound.bind(text.as_str()),
                BoundValue::Bytes(bytes) => bound.bind(bytes.as_slice()),
                BoundValue::Number(number) => bound.bind(*number),
                BoundValue::Writable => bound.bind(writable),
            };
        }
        bound.fetch_all(connection).await
    }
}

/// Returns the statement for the versions from ?2 on and their changes, in the columns of [`rows::polled`]: first a row
/// that is always present, then versions, then changes. The statement reads at most a thousand versions and a thousand
/// changes of each kind. Most polls read no new version, so the statement uses no temporary tables, which would account
/// for most of the cost of such a poll.
pub(super) fn poll() -> String {
    committed("", "?2", "?2")
}

/// Like [`poll`], but for a replica that has applied no version: starts with the first version of the last 15 minutes
/// and includes the changes of that version. The statement looks that version up only once, because the clock advances
/// while the statement runs.
pub(super) fn poll_from_start() -> String {
    let start = format!(
        "WITH start AS MATERIALIZED (
            SELECT coalesce(
                (SELECT min(version) FROM version WHERE at >= {NOW} - {RECENT}), (SELECT max(version) FROM version)
            ) AS version
         )"
    );
    committed(&start, "(SELECT version FROM start)", "(SELECT version - 1 FROM start)")
}

/// Returns the statement for the versions from `first` on and the changes after `known`. Both are SQL expressions.
/// `with` is the WITH clause before the statement.
fn committed(with: &str, first: &str, known: &str) -> String {
    const KINDS: &str = "(SELECT '*' AS kind UNION ALL SELECT 'absent' UNION ALL SELECT 'gone' UNION ALL SELECT 'key'
            UNION ALL SELECT 'trust') k";
    let too_many = format!(
        "(SELECT c.version FROM change c WHERE c.kind = k.kind AND c.version > {known}
            ORDER BY c.version LIMIT 1 OFFSET {EACH_MAX}) IS NOT NULL"
    );
    format!(
        include_str!("poll.sql"),
        with = with,
        first = first,
        known = known,
        kinds = KINDS,
        too_many = too_many,
        nothing = NOTHING,
        each_max = EACH_MAX,
        now = NOW,
        in_force = IN_FORCE,
        version = schema::VERSION,
        rows = rows::POLL_ROWS_MAX + 1,
    )
}

/// Nulls for the columns that only the first row has.
const NOTHING: &str = "NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL";
/// The maximum number of versions, and of changes of one kind, that a poll returns one by one. If there are more
/// changes of a kind, the poll returns the whole kind as changed.
const EACH_MAX: usize = 1_000;
/// 15 minutes in microseconds: longer than values stay in Redis.
const RECENT: i64 = 15 * MINUTE;
/// A day in microseconds.
pub(super) const DAY: i64 = 24 * 60 * MINUTE;

/// Returns the query for the newest version and, if a row satisfies `condition`, a key with its trust. The query is one
/// statement, so both come from one snapshot.
pub(super) fn own(condition: &str) -> String {
    format!(include_str!("find.sql"), now = NOW, condition = condition)
}

/// Returns the query for the same columns from a table `trust(id, api_key_hash)`. The table has no versions, so the
/// query returns version 0.
pub(super) fn trust_table(condition: &str) -> String {
    format!(
        "SELECT 0, '00000000000000000000000000000000', '00000000-0000-0000-0000-000000000000', 0, 0, {NOW},
            t.id, t.id, 1, t.api_key_hash, 0, '[]', '[]', NULL, NULL, NULL, 0
         FROM (SELECT 1) v
         LEFT JOIN trust t ON t.api_key_hash IS NOT NULL AND {condition}"
    )
}

/// Returns the poll statement for a table `trust(id, api_key_hash)`. The statement only proves that the table exists.
pub(super) fn trust_table_poll() -> String {
    format!(
        "SELECT ?1, 'primary', 0, 0, '00000000000000000000000000000000', '00000000-0000-0000-0000-000000000000', 0, 0,
            {NOW}, 0, 0, NULL, NULL, NULL, NULL, NULL, NULL
         FROM (SELECT 1) v LEFT JOIN trust t ON false"
    )
}
