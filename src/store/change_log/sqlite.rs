//! The change log on SQLite: triggers give each committed change to a trust or key a version, and a check detects
//! whether the triggers have been altered.
//!
//! The triggers are part of the database file, so they run in each program that writes to it with SQLite 3.37 or later.
//!
//! INSERT OR REPLACE and UPDATE OR REPLACE delete the rows that conflict with the new row. By default, SQLite does not
//! run DELETE triggers for these rows. So a BEFORE trigger copies the conflicting rows to `displaced`, and an AFTER
//! trigger records those that no longer exist. The AFTER trigger must check which rows still exist, because with OR
//! IGNORE and ON CONFLICT the BEFORE trigger runs even if no row is deleted. This mechanism works only if no other
//! trigger on these tables runs between the two triggers, and if there is no additional unique index, because the
//! BEFORE trigger would miss conflicts on that index. [`problem`] checks both conditions.

use sqlx::{AssertSqlSafe, Row, SqliteConnection};

use super::problem::{NotIntact, TrackingProblem};
use crate::store::{
    sql::without_newline,
    sqlite::{MINUTE, NOW},
};

/// Creates missing tables and triggers, replaces triggers that differ, and records that the change log is intact.
///
/// # Errors
/// The database failed, or has a problem that only the operator can repair.
pub(crate) async fn install(connection: &mut SqliteConnection) -> Result<(), NotIntact> {
    sqlx::raw_sql(TABLES).execute(&mut *connection).await?;
    let found = found(connection).await?;
    for (name, text) in triggers() {
        if !found.iter().any(|trigger| trigger.name == name && trigger.text == text) {
            let sql = format!("DROP TRIGGER IF EXISTS {name}; {text}");
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *connection).await?;
        }
    }
    restore(connection).await
}

/// Records that the change log is intact. If the database did not record this before, also adds a version that marks
/// everything as changed, because changes may be missing from the change log. The caller must have begun a transaction
/// that holds the write lock.
///
/// # Errors
/// The database failed, or has a problem that keeps changes from being recorded.
pub(crate) async fn restore(connection: &mut SqliteConnection) -> Result<(), NotIntact> {
    if let Some(problem) = problem(connection).await? {
        return Err(problem.into());
    }
    if !in_force(connection).await? {
        let sql = "UPDATE meta SET fingerprint = (SELECT schema_version FROM pragma_schema_version)";
        sqlx::raw_sql(sql).execute(&mut *connection).await?;
        everything(connection).await?;
    }
    Ok(())
}

/// Returns true if the schema has not changed since [`restore`] last found the change log intact.
pub(crate) async fn in_force(connection: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(format!("SELECT {IN_FORCE} FROM meta m"))).fetch_one(connection).await?.try_get(0)
}

/// The condition of [`in_force`] in SQL, for a statement that reads `meta` as `m`. SQLite increments `schema_version`
/// with each change to the schema, and the statement reads `schema_version` from the snapshot that it sees.
pub(crate) const IN_FORCE: &str = "m.fingerprint IS (SELECT schema_version FROM pragma_schema_version)";

/// Adds a version that marks everything as changed.
pub(crate) async fn everything(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    let sql = format!("{DRAW} INSERT INTO change (kind, version, object) VALUES ('*', last_insert_rowid(), '')");
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(drop)
}

/// Returns the statements that delete up to a thousand of the oldest versions, and their changes. They delete only
/// versions whose successor is older than 20 minutes. If a poll starts from a deleted version, the answer does not
/// contain that version, and the replica then uses no value that is older than the newest version.
pub(crate) fn prune() -> String {
    format!(include_str!("sqlite/prune.sql"), now = NOW, old = OLD)
}

/// Returns the query whose result is true if [`prune`] has more to delete. `prune` keeps the newest version that is
/// older than its limit, so the query looks at the second-oldest version.
pub(crate) fn is_more() -> String {
    format!("SELECT at < {NOW} - {OLD} - {MINUTE} FROM version ORDER BY version LIMIT 1 OFFSET 1")
}

/// 20 minutes in microseconds. Replicas do not poll from a version that was superseded longer ago.
const OLD: i64 = 20 * MINUTE;

/// A trigger on one of our tables.
struct Trigger {
    name: String,
    text: String,
}

async fn found(connection: &mut SqliteConnection) -> Result<Vec<Trigger>, sqlx::Error> {
    // `tbl_name` is spelt as in the CREATE statement, in upper or lower case.
    let sql = "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'
        AND lower(tbl_name) IN ('api_key', 'trust', 'version', 'change', 'displaced')";
    let rows = sqlx::raw_sql(sql).fetch_all(connection).await?;
    rows.iter().map(|row| Ok(Trigger { name: row.try_get(0)?, text: row.try_get(1)? })).collect()
}

/// Returns the first problem that keeps changes from being recorded, or `None` if the triggers are intact.
pub(crate) async fn problem(connection: &mut SqliteConnection) -> Result<Option<TrackingProblem>, sqlx::Error> {
    let found = found(connection).await?;
    for (name, text) in triggers() {
        match found.iter().find(|trigger| trigger.name == name) {
            None => return Ok(Some(TrackingProblem::MissingTrigger(name))),
            Some(trigger) if trigger.text != text => {
                return Ok(Some(TrackingProblem::AlteredTrigger(name)));
            }
            Some(_) => {}
        }
    }
    if let Some(other) = found.iter().find(|other| triggers().all(|(name, _)| name != other.name)) {
        return Ok(Some(TrackingProblem::OtherTrigger(other.name.clone())));
    }
    let other = sqlx::raw_sql(OTHER_UNIQUE).fetch_optional(connection).await?;
    other.map(|row| Ok(TrackingProblem::OtherUniqueIndex(row.try_get(0)?))).transpose()
}

/// A query for a unique index whose conflicts the BEFORE triggers do not detect.
const OTHER_UNIQUE: &str = include_str!("sqlite/other_unique.sql");

const TABLES: &str = include_str!("sqlite/tables.sql");

/// Returns the name and the text of each trigger. The text is identical to the text that SQLite stores in
/// `sqlite_schema`.
fn triggers() -> impl Iterator<Item = (&'static str, String)> {
    TRIGGERS.iter().map(|(name, text)| {
        let text = text
            .replace("{draw}", DRAW)
            .replace("{v}", "last_insert_rowid()") // inside a trigger: the version that it inserted
            .replace("{forget}", FORGET)
            .replace("{removed key}", &REMOVED.replace("{table}", "api_key"))
            .replace("{removed trust}", &REMOVED.replace("{table}", "trust"));
        (*name, text)
    })
}

/// Inserts a version, whose number is one higher than the highest number so far. The time is in microseconds since the
/// Unix epoch; the expression for it also works in the older SQLite versions that other writers may use.
const DRAW: &str = "INSERT INTO version (nonce, at) VALUES (
        randomblob(16), CAST((julianday('now') - 2440587.5) * 86400000.0 + 0.5 AS INTEGER) * 1000
    );";

/// Empties `displaced`. Without a condition, SQLite would write to the table even if it is empty.
const FORGET: &str = "DELETE FROM displaced WHERE true;";

/// The rows of `displaced` that were deleted from `{table}`.
const REMOVED: &str = "displaced d
        WHERE NOT EXISTS (SELECT 1 FROM {table} t WHERE t.id = d.id AND t.id <> NEW.id)";

/// Expands to the name of a trigger and the content of the file with the same name.
macro_rules! trigger {
    ($name:literal) => {
        ($name, without_newline(include_str!(concat!("sqlite/triggers/", $name, ".sql"))))
    };
}

/// The triggers. They give each changed row its own version; all versions of a transaction become visible at once.
/// Their statements use UNION to remove duplicates. SQLite stores the text of a trigger as it was created, so after a
/// change to a file, [`install`] replaces the trigger in each database.
const TRIGGERS: [(&str, &str); 10] = [
    trigger!("api_key_before_insert"),
    trigger!("api_key_insert"),
    trigger!("api_key_before_update"),
    trigger!("api_key_update"),
    trigger!("api_key_delete"),
    trigger!("trust_before_insert"),
    // SQLite checks foreign keys only in connections that turn this check on, so keys can exist before their trust.
    trigger!("trust_insert"),
    trigger!("trust_before_update"),
    trigger!("trust_update"),
    trigger!("trust_delete"),
];
