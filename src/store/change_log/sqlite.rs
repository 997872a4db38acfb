//! The triggers that give every committed change of a trust or key a version, and how to tell that they still do.
//!
//! They are part of the file, so whoever writes to it fires them, from SQLite 3.37 on. Never polls.
//!
//! INSERT and UPDATE with OR REPLACE remove the rows that are in their way, and unless the writer asks for it, no DELETE
//! trigger tells. So what is in the way is put into `displaced` before, and named after, once it is certain that it was
//! removed: OR IGNORE and ON CONFLICT take the first step too, and remove nothing. Nothing comes between the two steps
//! of a row as long as nobody else has a trigger on these tables, and the first step finds all that is in the way as long
//! as nothing else is unique: [`problem`] makes sure of both.

use sqlx::{AssertSqlSafe, Row, SqliteConnection};

/// Makes what is missing, replaces triggers that are not as they should be, and puts the watch in force.
///
/// # Errors
/// The database failed; or, inside, what only its owner can put right.
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

/// Puts the watch in force, where it is not, and draws a version "everything" for what may have passed unnamed. Belongs
/// into a transaction that holds the write lock.
///
/// # Errors
/// The database failed; or, inside, what keeps changes from being named.
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

/// Whether nothing of the schema was changed since it was last made sure that every change is named.
pub(crate) async fn in_force(connection: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(format!("SELECT {IN_FORCE} FROM meta m"))).fetch_one(connection).await?.try_get(0)
}

/// The same as part of a statement that reads `meta` as `m`. SQLite counts every change of the schema, and takes the
/// number from the snapshot of the statement.
pub(crate) const IN_FORCE: &str = "m.fingerprint IS (SELECT schema_version FROM pragma_schema_version)";

/// Draws a version "everything".
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
    // Names of tables are kept as they were written, in whatever case.
    let sql = "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'
        AND lower(tbl_name) IN ('api_key', 'trust', 'version', 'change', 'displaced')";
    let rows = sqlx::raw_sql(sql).fetch_all(connection).await?;
    rows.iter().map(|row| Ok(Trigger { name: row.try_get(0)?, text: row.try_get(1)? })).collect()
}

/// Why changes may go unnamed, if they may.
pub(crate) async fn problem(connection: &mut SqliteConnection) -> Result<Option<String>, sqlx::Error> {
    let found = found(connection).await?;
    for (name, text) in triggers() {
        match found.iter().find(|trigger| trigger.name == name) {
            None => return Ok(Some(format!("the trigger {name} is missing: run `trustgate migrate`"))),
            Some(trigger) if trigger.text != text => {
                return Ok(Some(format!("the trigger {name} is not as it was made: run `trustgate migrate`")));
            }
            Some(_) => {}
        }
    }
    if let Some(other) = found.iter().find(|other| triggers().all(|(name, _)| name != other.name)) {
        return Ok(Some(format!("{:?} is no trigger of trustgate's: drop it, it may hide changes", other.name)));
    }
    let other = sqlx::raw_sql(OTHER_UNIQUE).fetch_optional(connection).await?;
    other
        .map(|row| {
            let name: String = row.try_get(0)?;
            Ok(format!("{name:?} makes more unique than trustgate does: drop it, REPLACE would remove rows unseen"))
        })
        .transpose()
}

/// An index that makes something unique that the first step does not look at.
const OTHER_UNIQUE: &str = "
    SELECT i.name FROM (SELECT 'api_key' AS on_table UNION ALL SELECT 'trust') w
    JOIN pragma_index_list(w.on_table) i ON i.\"unique\"
    WHERE (
        w.on_table,
        (SELECT group_concat(coalesce(c.name, '') || ' ' || c.coll) FROM pragma_index_xinfo(i.name) c WHERE c.key)
    ) NOT IN (
        VALUES ('api_key', 'id BINARY'), ('api_key', 'digest BINARY'), ('trust', 'id BINARY'), ('trust', 'name BINARY')
    )";

/// What changes name: the kinds `key`, `trust`, `absent`, `gone` with an id or a digest in small hexadecimal digits, and
/// `*`; an empty object is the whole kind. By kind, so that a poll can look at a thousand of each whatever there is, and
/// so that it need not read what a bulk insert left to tell that no record changed.
const TABLES: &str = "
CREATE TABLE IF NOT EXISTS change (
    kind TEXT NOT NULL, version INTEGER NOT NULL, object TEXT NOT NULL, PRIMARY KEY (kind, version, object)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS displaced (id TEXT NOT NULL, digest BLOB) STRICT;
";

/// Name and text of every trigger, the text as SQLite keeps it.
fn triggers() -> impl Iterator<Item = (&'static str, String)> {
    TRIGGERS.iter().map(|(name, text)| {
        let text = text
            .replace("{draw}", DRAW)
            .replace("{v}", "last_insert_rowid()") // inside a trigger: the version it has drawn
            .replace("{forget}", FORGET)
            .replace("{removed key}", &REMOVED.replace("{table}", "api_key"))
            .replace("{removed trust}", &REMOVED.replace("{table}", "trust"));
        (*name, format!("CREATE TRIGGER {name} {text}"))
    })
}

/// A version, which SQLite numbers one higher than the highest. The time in microseconds since the Unix epoch, computed
/// in a way that the SQLite of any writer knows.
const DRAW: &str = "INSERT INTO version (nonce, at) VALUES (
        randomblob(16), CAST((julianday('now') - 2440587.5) * 86400000.0 + 0.5 AS INTEGER) * 1000
    );";

/// Without a condition SQLite would write to the table even where it is empty.
const FORGET: &str = "DELETE FROM displaced WHERE true;";

/// Those that were in the way and are not there any longer.
const REMOVED: &str = "displaced d
        WHERE NOT EXISTS (SELECT 1 FROM {table} t WHERE t.id = d.id AND t.id <> NEW.id)";

/// One version for each changed row: they become visible together. UNION leaves out what was said already.
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
    // Without foreign keys, which every writer turns on for himself, keys can be there before their trust.
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
