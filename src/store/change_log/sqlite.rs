//! The change log on SQLite: triggers give each committed change to a trust or key a version, and a check shows when
//! they were altered.
//!
//! The triggers are part of the database file, so they run in each program that writes to it with SQLite 3.37 or later.
//!
//! INSERT OR REPLACE and UPDATE OR REPLACE delete the rows that conflict with the new row. By default, SQLite does not
//! run DELETE triggers for these rows. So a BEFORE trigger copies the conflicting rows to `displaced`, and an AFTER
//! trigger records those that no longer exist. It must look, because with OR IGNORE and ON CONFLICT the BEFORE trigger
//! runs, and no row is deleted. This works if no other trigger on these tables runs between the two, and if there is no
//! other unique index, with conflicts that the BEFORE trigger does not look for. [`problem`] checks both conditions.

use sqlx::{AssertSqlSafe, Row, SqliteConnection};

/// Creates missing tables and triggers, replaces triggers that differ, and records that the change log is intact.
///
/// # Errors
/// The database failed. The inner error is a problem that only the owner of the database can repair.
pub(crate) async fn install(connection: &mut SqliteConnection) -> Result<Result<(), String>, sqlx::Error> {
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

/// Records that the change log is intact. If that was not recorded before, also adds a version "everything changed",
/// because changes may be missing. The caller must be in a transaction that has the write lock.
///
/// # Errors
/// The database failed. The inner error is a problem that keeps changes from being recorded.
pub(crate) async fn restore(connection: &mut SqliteConnection) -> Result<Result<(), String>, sqlx::Error> {
    if let Some(problem) = problem(connection).await? {
        return Ok(Err(problem));
    }
    if !in_force(connection).await? {
        let sql = "UPDATE meta SET fingerprint = (SELECT schema_version FROM pragma_schema_version)";
        sqlx::raw_sql(sql).execute(&mut *connection).await?;
        everything(connection).await?;
    }
    Ok(Ok(()))
}

/// True if the schema has not changed since [`restore`] last found the change log intact.
pub(crate) async fn in_force(connection: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(format!("SELECT {IN_FORCE} FROM meta m"))).fetch_one(connection).await?.try_get(0)
}

/// The condition of [`in_force`] in SQL, for a statement that reads `meta` as `m`. SQLite increments `schema_version`
/// with each change to the schema, and reads it from the snapshot of the statement.
pub(crate) const IN_FORCE: &str = "m.fingerprint IS (SELECT schema_version FROM pragma_schema_version)";

/// Adds a version "everything changed".
pub(crate) async fn everything(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    let sql = format!("{DRAW} INSERT INTO change (kind, version, object) VALUES ('*', last_insert_rowid(), '')");
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(drop)
}

/// A trigger on one of our tables.
struct Trigger {
    name: String,
    text: String,
}

async fn found(connection: &mut SqliteConnection) -> Result<Vec<Trigger>, sqlx::Error> {
    // `tbl_name` keeps upper and lower case as the CREATE statement had it.
    let sql = "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'
        AND lower(tbl_name) IN ('api_key', 'trust', 'version', 'change', 'displaced')";
    let rows = sqlx::raw_sql(sql).fetch_all(connection).await?;
    rows.iter().map(|row| Ok(Trigger { name: row.try_get(0)?, text: row.try_get(1)? })).collect()
}

/// The first problem that keeps changes from being recorded; `None`: the triggers are intact.
pub(crate) async fn problem(connection: &mut SqliteConnection) -> Result<Option<String>, sqlx::Error> {
    let found = found(connection).await?;
    for (name, text) in triggers() {
        match found.iter().find(|trigger| trigger.name == name) {
            None => return Ok(Some(format!("the trigger {name} is missing: run `trustgate migrate`"))),
            Some(trigger) if trigger.text != text => {
                return Ok(Some(format!("the trigger {name} was altered: run `trustgate migrate`")));
            }
            Some(_) => {}
        }
    }
    if let Some(other) = found.iter().find(|other| triggers().all(|(name, _)| name != other.name)) {
        return Ok(Some(format!(
            "the trigger {:?} is not one of trustgate's: drop it, because it can hide changes from the change log",
            other.name
        )));
    }
    let other = sqlx::raw_sql(OTHER_UNIQUE).fetch_optional(connection).await?;
    other
        .map(|row| {
            let name: String = row.try_get(0)?;
            Ok(format!(
                "the unique index {name:?} is not one of trustgate's: drop it, because REPLACE could delete rows \
                 without a record in the change log"
            ))
        })
        .transpose()
}

/// A query for a unique index with conflicts that the BEFORE triggers do not look for.
const OTHER_UNIQUE: &str = "
    SELECT i.name FROM (SELECT 'api_key' AS on_table UNION ALL SELECT 'trust') w
    JOIN pragma_index_list(w.on_table) i ON i.\"unique\"
    WHERE (
        w.on_table,
        (SELECT group_concat(coalesce(c.name, '') || ' ' || c.coll) FROM pragma_index_xinfo(i.name) c WHERE c.key)
    ) NOT IN (
        VALUES ('api_key', 'id BINARY'), ('api_key', 'digest BINARY'), ('trust', 'id BINARY'), ('trust', 'name BINARY')
    )";

/// The table `change` has one row per changed object: its kind (`key`, `trust`, `absent`, `gone`, or `*` for
/// everything) and its id, or its digest in lower-case hexadecimal. An empty object means the whole kind. The primary
/// key begins with the kind, so a poll can read a limited number of rows of each kind, and can see that no record
/// changed without reading the `absent` rows of a bulk insert.
const TABLES: &str = "
CREATE TABLE IF NOT EXISTS change (
    kind TEXT NOT NULL, version INTEGER NOT NULL, object TEXT NOT NULL, PRIMARY KEY (kind, version, object)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS displaced (id TEXT NOT NULL, digest BLOB) STRICT;
";

/// The name and the text of each trigger. The text equals the one that SQLite stores in `sqlite_schema`.
fn triggers() -> impl Iterator<Item = (&'static str, String)> {
    TRIGGERS.iter().map(|(name, text)| {
        let text = text
            .replace("{draw}", DRAW)
            .replace("{v}", "last_insert_rowid()") // inside a trigger: the version that it inserted
            .replace("{forget}", FORGET)
            .replace("{removed key}", &REMOVED.replace("{table}", "api_key"))
            .replace("{removed trust}", &REMOVED.replace("{table}", "trust"));
        (*name, format!("CREATE TRIGGER {name} {text}"))
    })
}

/// Inserts a version, which SQLite numbers one higher than the highest. The time is in microseconds since the Unix
/// epoch; the expression for it also works in the old SQLite versions of other writers.
const DRAW: &str = "INSERT INTO version (nonce, at) VALUES (
        randomblob(16), CAST((julianday('now') - 2440587.5) * 86400000.0 + 0.5 AS INTEGER) * 1000
    );";

/// Empties `displaced`. Without a condition, SQLite would write to the table even if it is empty.
const FORGET: &str = "DELETE FROM displaced WHERE true;";

/// The rows of `displaced` that were deleted from `{table}`.
const REMOVED: &str = "displaced d
        WHERE NOT EXISTS (SELECT 1 FROM {table} t WHERE t.id = d.id AND t.id <> NEW.id)";

/// Each changed row gets one version; the versions of a transaction become visible together. UNION removes duplicates.
const TRIGGERS: [(&str, &str); 10] = [
    (
        "api_key_before_insert",
        "BEFORE INSERT ON api_key BEGIN
    {forget}
    INSERT INTO displaced (id, digest)
        SELECT id, digest FROM api_key WHERE id = NEW.id OR digest = NEW.digest OR rowid = NEW.rowid;
END",
    ),
    (
        "api_key_insert",
        "AFTER INSERT ON api_key BEGIN
    {draw}
    INSERT INTO change (kind, version, object) VALUES ('absent', {v}, lower(hex(NEW.digest)));
    INSERT INTO change (kind, version, object) SELECT 'key', {v}, d.id FROM {removed key};
    INSERT INTO change (kind, version, object) SELECT 'gone', {v}, lower(hex(d.digest)) FROM {removed key}
        AND (d.digest <> NEW.digest OR NEW.revoked_at IS NOT NULL);
    {forget}
END",
    ),
    (
        "api_key_before_update",
        "BEFORE UPDATE ON api_key BEGIN
    {forget}
    INSERT INTO displaced (id, digest)
        SELECT id, digest FROM api_key
        WHERE (id = NEW.id OR digest = NEW.digest OR rowid = NEW.rowid) AND rowid <> OLD.rowid;
END",
    ),
    (
        "api_key_update",
        "AFTER UPDATE ON api_key WHEN
    (OLD.id, OLD.trust_id, OLD.digest, OLD.scheme, OLD.scopes, OLD.allowed_cidrs,
        OLD.not_before, OLD.expires_at, OLD.revoked_at) IS NOT
    (NEW.id, NEW.trust_id, NEW.digest, NEW.scheme, NEW.scopes, NEW.allowed_cidrs,
        NEW.not_before, NEW.expires_at, NEW.revoked_at)
    OR EXISTS (SELECT 1 FROM displaced)
BEGIN
    {draw}
    INSERT INTO change (kind, version, object) VALUES ('absent', {v}, lower(hex(NEW.digest)));
    INSERT INTO change (kind, version, object)
        SELECT 'key', {v}, OLD.id UNION SELECT 'key', {v}, NEW.id UNION SELECT 'key', {v}, d.id FROM {removed key};
    INSERT INTO change (kind, version, object)
        SELECT 'gone', {v}, lower(hex(OLD.digest)) WHERE OLD.digest <> NEW.digest OR NEW.revoked_at IS NOT NULL
        UNION SELECT 'gone', {v}, lower(hex(d.digest)) FROM {removed key}
            AND (d.digest <> NEW.digest OR NEW.revoked_at IS NOT NULL);
    {forget}
END",
    ),
    (
        "api_key_delete",
        "AFTER DELETE ON api_key BEGIN
    {draw}
    INSERT INTO change (kind, version, object)
        VALUES ('key', {v}, OLD.id), ('gone', {v}, lower(hex(OLD.digest)));
    DELETE FROM displaced WHERE id = OLD.id;
END",
    ),
    (
        "trust_before_insert",
        "BEFORE INSERT ON trust BEGIN
    {forget}
    INSERT INTO displaced (id) SELECT id FROM trust WHERE id = NEW.id OR name = NEW.name OR rowid = NEW.rowid;
END",
    ),
    // SQLite checks foreign keys only in connections that turn this on, so keys can exist before their trust.
    (
        "trust_insert",
        "AFTER INSERT ON trust BEGIN
    {draw}
    INSERT INTO change (kind, version, object)
        SELECT 'trust', {v}, NEW.id UNION SELECT 'trust', {v}, d.id FROM {removed trust};
    INSERT INTO change (kind, version, object) SELECT 'absent', {v}, lower(hex(digest)) FROM api_key
        WHERE trust_id = NEW.id AND NOT EXISTS (SELECT 1 FROM displaced WHERE id = NEW.id);
    {forget}
END",
    ),
    (
        "trust_before_update",
        "BEFORE UPDATE ON trust BEGIN
    {forget}
    INSERT INTO displaced (id)
        SELECT id FROM trust WHERE (id = NEW.id OR name = NEW.name OR rowid = NEW.rowid) AND rowid <> OLD.rowid;
END",
    ),
    (
        "trust_update",
        "AFTER UPDATE ON trust
WHEN (OLD.id, OLD.enabled) IS NOT (NEW.id, NEW.enabled) OR EXISTS (SELECT 1 FROM displaced)
BEGIN
    {draw}
    INSERT INTO change (kind, version, object)
        SELECT 'trust', {v}, OLD.id UNION SELECT 'trust', {v}, NEW.id
        UNION SELECT 'trust', {v}, d.id FROM {removed trust};
    INSERT INTO change (kind, version, object) SELECT 'absent', {v}, lower(hex(digest)) FROM api_key
        WHERE trust_id = NEW.id AND OLD.id <> NEW.id;
    {forget}
END",
    ),
    (
        "trust_delete",
        "AFTER DELETE ON trust BEGIN
    {draw}
    INSERT INTO change (kind, version, object) VALUES ('trust', {v}, OLD.id);
    DELETE FROM displaced WHERE id = OLD.id;
END",
    ),
];
