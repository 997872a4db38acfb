//! Somebody else's table on PostgreSQL: how it is read, and, once it is attached, how its changes are named.
//!
//! Attaching adds two triggers to the table and nothing else; detaching takes them away. What a trigger does is done
//! with the rights of the owner of our tables, so that whoever writes the table needs none on them.

use sha2::{Digest, Sha256};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};

use super::{
    super::{
        ColumnName, LedgerError, SchemaName,
        existing::{DigestForm, ExistingTable, literal},
        place::Address,
        schema,
    },
    connect_within, describe, in_schema, lookup, migrate,
};
use crate::record::{Digests, KeyId, hex};

// === how it is read ===

impl ExistingTable {
    /// The condition that a row `t` is of a key with one of `digests`.
    pub(super) fn has_digest(&self, digests: &Digests) -> String {
        let form = |hex: String| match self.digest_form {
            DigestForm::Hex => format!("'{hex}'"),
            DigestForm::Bytes => format!(r"'\x{hex}'"),
        };
        let list: Vec<_> = digests.all().map(|digest| form(digest.to_hex())).collect();
        format!("t.{} IN ({})", self.digest.sql(), list.join(", "))
    }

    /// The condition that a row `t` is the one of `key`.
    pub(super) fn has_id(&self, key: KeyId) -> String {
        format!("t.{} = '{key}'", self.id.sql())
    }

    /// What `find` returns (`watch.rs`) of the rows that fulfil `condition`. Where the table is not attached there are
    /// no versions: everything is dated with number 0.
    pub(super) fn find(&self, condition: &str) -> String {
        let (system, timeline, clock) = ("c.system_identifier", lookup::TIMELINE, lookup::CLOCK);
        let (date, from) = if self.attached {
            (
                format!("v.version, encode(v.nonce, 'hex'), m.incarnation::text, {system}, {timeline}, {clock}"),
                "(SELECT version, nonce FROM {s}.version ORDER BY version DESC LIMIT 1) v
                 CROSS JOIN {s}.meta m CROSS JOIN pg_control_system() c",
            )
        } else {
            // That of the log being written fails on a standby, as it should.
            (
                format!(
                    "0::bigint, repeat('0', 32), '00000000-0000-0000-0000-000000000000', 0::bigint, 0 * {timeline}, {clock}"
                ),
                "(SELECT 1) v",
            )
        };
        let column = |column: &ColumnName| format!("t.{}", column.sql());
        let (id, trust, digest) = (column(&self.id), column(&self.trust), column(&self.digest));
        let digest_text = match self.digest_form {
            DigestForm::Hex => format!("{digest}::text"),
            DigestForm::Bytes => format!("encode({digest}, 'hex')"),
        };
        let enabled = self.enabled.as_ref().map_or_else(
            || "1::bigint".to_owned(),
            |enabled| format!("coalesce({}, false)::int::bigint", column(enabled)),
        );
        let scopes = self.scopes.as_ref().map_or_else(
            || "'[]'".to_owned(),
            |scopes| format!("coalesce(array_to_json({})::text, '[]')", column(scopes)),
        );
        // A time without an end is none; one that cannot be put into a number makes the read fail.
        let time = |column: &Option<ColumnName>, endless: &str| {
            column.as_ref().map_or_else(
                || "NULL::bigint".to_owned(),
                |column| lookup::micros(&format!("nullif(t.{}, '{endless}')", column.sql())),
            )
        };
        let not_before = time(&self.not_before, "-infinity");
        let (expires_at, revoked_at) = (time(&self.expires_at, "infinity"), time(&self.revoked_at, "infinity"));
        format!(
            "SELECT {date}, {id}::text, {trust}::text, {enabled}, {digest_text}, 0::bigint, {scopes}, '[]',
                {not_before}, {expires_at}, {revoked_at}
             FROM {from}
             LEFT JOIN {table} t ON {digest} IS NOT NULL AND {condition}",
            table = self.table.sql(),
        )
    }

    // === how its changes are named ===

    /// The function that both triggers call. As those on our own tables (`watch.rs`) it only inserts, and a change of a
    /// column that no decision reads is none.
    fn function(&self) -> String {
        let row = |row: &str| {
            let columns: Vec<_> = self.columns().map(|(_, column)| format!("{row}.{}", column.sql())).collect();
            format!("ROW({})", columns.join(", "))
        };
        let digest = |row: &str| match self.digest_form {
            DigestForm::Hex => format!("{row}.{}::text", self.digest.sql()),
            DigestForm::Bytes => format!("encode({row}.{}, 'hex')", self.digest.sql()),
        };
        let revoked =
            self.revoked_at.as_ref().map_or_else(String::new, |column| format!(" OR NEW.{} IS NOT NULL", column.sql()));
        FUNCTION
            .replace("{old row}", &row("OLD"))
            .replace("{new row}", &row("NEW"))
            .replace("{old digest}", &digest("OLD"))
            .replace("{new digest}", &digest("NEW"))
            .replace("{id}", &self.id.sql())
            .replace("{revoked}", &revoked)
    }
}

/// A digest that is not one cannot be asked for, so nobody needs to hear of it.
const FUNCTION: &str = "
DECLARE
    digest text;
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        INSERT INTO {s}.tx (id, at, whole)
            SELECT pg_current_xact_id(), transaction_timestamp(), kind FROM unnest(ARRAY['', 'key', 'trust']) AS kind
            ON CONFLICT DO NOTHING;
        RETURN NULL;
    END IF;
    IF TG_OP = 'UPDATE' AND {old row} IS NOT DISTINCT FROM {new row}
        OR TG_OP = 'INSERT' AND {new digest} IS NULL
    THEN
        RETURN NULL;
    END IF;
    INSERT INTO {s}.tx (id, at, whole) VALUES (pg_current_xact_id(), transaction_timestamp(), '')
        ON CONFLICT DO NOTHING;
    IF TG_OP <> 'INSERT' THEN
        PERFORM {s}.note('key', OLD.{id}::text);
    END IF;
    IF TG_OP = 'UPDATE' AND NEW.{id} IS DISTINCT FROM OLD.{id} THEN
        PERFORM {s}.note('key', NEW.{id}::text);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        digest := {new digest};
        IF digest ~ '^[0-9a-f]{64}$' THEN
            PERFORM {s}.note('absent', digest);
        END IF;
    END IF;
    IF TG_OP <> 'INSERT' THEN
        digest := {old digest};
        IF digest ~ '^[0-9a-f]{64}$' AND (TG_OP = 'DELETE' OR digest IS DISTINCT FROM {new digest}{revoked}) THEN
            PERFORM {s}.note('gone', digest);
        END IF;
    END IF;
    RETURN NULL;
END
";

/// What one role has to run.
struct Part {
    /// What it must own.
    what: String,
    /// Who owns that.
    owner: String,
    statements: Vec<String>,
}

/// What has to be run, in this order.
struct Script(Vec<Part>);

impl Script {
    /// For people who run it by other means.
    fn print(&self, name: &SchemaName) -> String {
        let parts = self.0.iter().filter(|part| !part.statements.is_empty());
        let parts = parts.map(|Part { what, owner, statements }| {
            let statements: Vec<_> = statements.iter().map(|statement| format!("{statement};\n")).collect();
            format!("-- As the owner of {what}, {owner}:\nBEGIN;\n{WAITS};\n{}COMMIT;\n", statements.concat())
        });
        parts.collect::<Vec<_>>().join("\n").replace("{s}", name.as_str())
    }

    async fn run(&self, connection: &mut PgConnection, name: &SchemaName) -> Result<(), sqlx::Error> {
        let statements = self.0.iter().flat_map(|part| &part.statements);
        for statement in [WAITS.to_owned()].iter().chain(statements) {
            sqlx::raw_sql(AssertSqlSafe(statement.replace("{s}", name.as_str()))).execute(&mut *connection).await?;
        }
        Ok(())
    }
}

/// Whoever waits for a lock on a table makes everybody wait who comes after: better to give up and be run again.
const WAITS: &str = "SET LOCAL lock_timeout = '2s'";

/// What to do about the triggers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// They are to be there.
    Attach,
    /// They are to be gone.
    Detach,
}

/// Does what `wish` says, in one transaction.
///
/// # Errors
/// [`LedgerError::Unusable`] with everything that keeps the table from being attached; [`LedgerError::Schema`] where
/// our own tables are missing; a right is missing; or the database failed. Nothing was changed then.
pub(crate) async fn run(
    address: &Address,
    name: &SchemaName,
    table: &ExistingTable,
    wish: Wish,
    connect_timeout: std::time::Duration,
) -> Result<(), LedgerError> {
    let mut connection = connect_within(address, connect_timeout).await?;
    let mut transaction = connection.begin().await?;
    let script = script(&mut transaction, address, name, table, wish).await?;
    if let Err(error) = script.run(&mut transaction, name).await {
        return Err(match super::code(&error).as_deref() {
            Some("42501") => LedgerError::Unusable(format!(
                "{error}: this needs the rights of the owners of {} and of the schema {}; or have each of them run its part of what --print prints",
                table.table,
                name.as_str()
            )),
            Some("55P03") => LedgerError::Unusable(format!(
                "{} was in use for too long to be altered: nothing was changed; try again",
                table.table
            )),
            _ => error.into(),
        });
    }
    sqlx::raw_sql(in_schema("SELECT {s}.restore_watch()", name)).execute(&mut *transaction).await?;
    transaction.commit().await?;
    Ok(connection.close().await?)
}

/// The statements that do what `wish` says, for their roles to run.
///
/// # Errors
/// As [`run`].
pub(crate) async fn print(
    address: &Address,
    name: &SchemaName,
    table: &ExistingTable,
    wish: Wish,
    connect_timeout: std::time::Duration,
) -> Result<String, LedgerError> {
    let mut connection = connect_within(address, connect_timeout).await?;
    let mut transaction = connection.begin().await?;
    let script = script(&mut transaction, address, name, table, wish).await?;
    transaction.rollback().await?;
    connection.close().await?;
    Ok(script.print(name))
}

async fn script(
    connection: &mut PgConnection,
    address: &Address,
    name: &SchemaName,
    table: &ExistingTable,
    wish: Wish,
) -> Result<Script, LedgerError> {
    let place = describe(address, name);
    let tables = migrate::tables(connection, name).await?;
    schema::check(tables, &place)?;
    if tables.is_some_and(|tables| tables.version > schema::VERSION) {
        return Err(LedgerError::Schema(format!("{place} holds tables of a newer release: use that one to {wish}")));
    }
    let owner: String = sqlx::query_scalar(in_schema(OWNER, name)).fetch_one(&mut *connection).await?;
    match wish {
        Wish::Attach => attach(connection, name, table, owner).await,
        Wish::Detach => detach(connection, name, owner).await,
    }
}

impl std::fmt::Display for Wish {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Attach => "attach",
            Self::Detach => "detach",
        })
    }
}

const OWNER: &str = "SELECT relowner::regrole::text FROM pg_class WHERE oid = '{s}.meta'::regclass";

async fn attach(
    connection: &mut PgConnection,
    name: &SchemaName,
    table: &ExistingTable,
    ours: String,
) -> Result<Script, LedgerError> {
    let Some(home) = &table.table.schema else {
        return Err(LedgerError::Unusable(
            "store.table: name the table with its schema, such as \"public.trust\": what is watched must be what is read"
                .into(),
        ));
    };
    let attached: Option<String> = sqlx::query_scalar(in_schema(ATTACHED, name)).fetch_one(&mut *connection).await?;
    if let Some(other) = attached.filter(|other| *other != table.table.to_string()) {
        return Err(LedgerError::Unusable(format!(
            "{other} is attached, and only one table can be: run `trustgate detach` first"
        )));
    }
    let problems = problems(connection, home, table).await?;
    if !problems.is_empty() {
        return Err(LedgerError::Unusable(format!("{} cannot be attached:\n  {}", table.table, problems.join("\n  "))));
    }
    let theirs = sqlx::query(in_schema(THEIRS, name)).bind(home).bind(&table.table.name);
    let theirs = theirs.fetch_one(&mut *connection).await?;
    let (owner, is_welcome, is_ours): (String, bool, bool) =
        (theirs.try_get(0)?, theirs.try_get(1)?, theirs.try_get(2)?);

    let body = table.function().replace("{s}", name.as_str());
    let digest = hex(&Sha256::digest(&body));
    let mut first = vec![
        format!(
            "CREATE OR REPLACE FUNCTION {{s}}.attached_changed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body${body}$body$"
        ),
        format!("ALTER FUNCTION {{s}}.attached_changed() OWNER TO {ours}"),
        "REVOKE ALL ON FUNCTION {s}.attached_changed() FROM PUBLIC".to_owned(),
        format!(
            "UPDATE {{s}}.meta SET attached_schema = {}, attached_table = {},
    attached_digest = '{digest}', attached_identity = '{}'",
            literal(home),
            literal(&table.table.name),
            table.identity(),
        ),
    ];
    let mut last = Vec::new();
    // To make a trigger, the table's owner must be allowed to name its function; to fire it, nobody must.
    for (right, is_there) in
        [("USAGE ON SCHEMA {s}", is_welcome), ("EXECUTE ON FUNCTION {s}.attached_changed()", is_ours)]
    {
        if !is_there {
            first.push(format!("GRANT {right} TO {owner}"));
            last.push(format!("REVOKE {right} FROM {owner}"));
        }
    }
    let schema = format!("the schema {}", name.as_str());
    let triggers = triggers(connection, home, table).await?;
    Ok(Script(vec![
        Part { what: schema.clone(), owner: ours.clone(), statements: first },
        Part { what: format!("the table {}", table.table), owner, statements: triggers },
        Part { what: schema, owner: ours, statements: last },
    ]))
}

const ATTACHED: &str = "SELECT attached_schema || '.' || attached_table FROM {s}.meta";

/// Who owns the table; whether that role may use our schema, and whether it has the rights of the owner of our tables.
const THEIRS: &str = "SELECT c.relowner::regrole::text, has_schema_privilege(c.relowner, ours.relnamespace, 'USAGE'),
    pg_has_role(c.relowner, ours.relowner, 'USAGE')
 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 JOIN pg_class ours ON ours.oid = '{s}.meta'::regclass
 WHERE n.nspname = $1 AND c.relname = $2";

/// The table and all that inherit from it or are parts of it, parents first.
const TREE: &str = "WITH RECURSIVE tree (oid, depth) AS (
    SELECT c.oid, 0 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = $1 AND c.relname = $2
    UNION ALL
    SELECT i.inhrelid, depth + 1 FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid
 )
 SELECT format('%I.%I', n.nspname, c.relname), c.relispartition, c.relkind::text, c.relrowsecurity
 FROM tree JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace ORDER BY tree.depth, c.oid";

async fn triggers(
    connection: &mut PgConnection,
    home: &str,
    table: &ExistingTable,
) -> Result<Vec<String>, sqlx::Error> {
    let mut statements = Vec::new();
    for row in sqlx::query(TREE).bind(home).bind(&table.table.name).fetch_all(connection).await? {
        let (relation, is_partition): (String, bool) = (row.try_get(0)?, row.try_get(1)?);
        let mut trigger = |name: &str, when: &str| {
            statements.push(format!(
                "CREATE OR REPLACE TRIGGER {name} AFTER {when} EXECUTE FUNCTION {{s}}.attached_changed()"
            ));
        };
        // A partition gets those for its rows from the table that it is a part of.
        if !is_partition {
            trigger("trustgate_changed", &format!("INSERT OR UPDATE OR DELETE ON {relation} FOR EACH ROW"));
        }
        trigger("trustgate_truncated", &format!("TRUNCATE ON {relation}"));
        for name in ["trustgate_changed", "trustgate_truncated"] {
            statements.push(format!("ALTER TABLE {relation} ENABLE ALWAYS TRIGGER {name}"));
        }
    }
    Ok(statements)
}

/// The type of a column of the table, if there is such a column, and whether an index begins with it.
const COLUMN: &str = "SELECT format_type(a.atttypid, NULL), EXISTS (
        SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indkey[0] = a.attnum AND i.indisvalid
    )
 FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = $1 AND c.relname = $2 AND a.attname = $3 AND a.attnum > 0 AND NOT a.attisdropped";

/// Everything that keeps the table from being attached.
async fn problems(
    connection: &mut PgConnection,
    home: &str,
    table: &ExistingTable,
) -> Result<Vec<String>, sqlx::Error> {
    let tree = sqlx::query(TREE).bind(home).bind(&table.table.name).fetch_all(&mut *connection).await?;
    if tree.is_empty() {
        return Ok(vec!["there is no such table (or the role cannot see it)".to_owned()]);
    }
    let mut problems = Vec::new();
    for row in tree {
        let (relation, kind, hides_rows): (String, String, bool) = (row.try_get(0)?, row.try_get(2)?, row.try_get(3)?);
        if !["r", "p"].contains(&kind.as_str()) {
            problems.push(format!(
                "{relation} is a view or a foreign table, of which no trigger sees every change: name the tables behind it, or use freshness.mode = \"ttl\""
            ));
        }
        if hides_rows {
            problems.push(format!(
                "{relation} has row level security: what a policy shows may change without any change of a row"
            ));
        }
    }
    for (purpose, column) in table.columns() {
        let expected: &[&str] = match (purpose, table.digest_form) {
            ("id" | "trust", _) => &["uuid"],
            ("digest", DigestForm::Hex) => &["character", "character varying", "text"],
            ("digest", DigestForm::Bytes) => &["bytea"],
            ("enabled", _) => &["boolean"],
            ("scopes", _) => &["text[]", "character varying[]"],
            _ => &["timestamp with time zone"],
        };
        let found = sqlx::query(COLUMN).bind(home).bind(&table.table.name).bind(column.as_str());
        let Some(found) = found.fetch_optional(&mut *connection).await? else {
            problems.push(format!("there is no column {} (store.table_{purpose})", column.sql()));
            continue;
        };
        let (of, is_indexed): (String, bool) = (found.try_get(0)?, found.try_get(1)?);
        if !expected.contains(&of.as_str()) {
            let expected = expected.join(" or ");
            problems.push(format!("column {} (store.table_{purpose}) is of type {of}, not {expected}", column.sql()));
        }
        if ["id", "digest"].contains(&purpose) && !is_indexed {
            problems.push(format!(
                "no index begins with column {0} (store.table_{purpose}), so that every read would go through the whole table: CREATE INDEX CONCURRENTLY ON {1} ({0})",
                column.sql(),
                table.table.sql()
            ));
        }
    }
    Ok(problems)
}

/// The triggers that call our function, wherever they are by now, with whose tables they are on.
const TRIGGERS: &str = "SELECT c.relowner::regrole::text, format('%I.%I', n.nspname, c.relname), format('%I', g.tgname)
 FROM pg_trigger g JOIN pg_class c ON c.oid = g.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE g.tgfoid = to_regprocedure('{s}.attached_changed()') AND g.tgparentid = 0 ORDER BY 1, 2, 3";

async fn detach(connection: &mut PgConnection, name: &SchemaName, ours: String) -> Result<Script, LedgerError> {
    let mut parts: Vec<Part> = Vec::new();
    for row in sqlx::query(in_schema(TRIGGERS, name)).fetch_all(connection).await? {
        let (owner, relation, trigger): (String, String, String) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let statement = format!("DROP TRIGGER {trigger} ON {relation}");
        match parts.last_mut().filter(|part| part.owner == owner) {
            Some(part) => part.statements.push(statement),
            None => parts.push(Part { what: "the table".to_owned(), owner, statements: vec![statement] }),
        }
    }
    let nothing = "attached_schema = NULL, attached_table = NULL, attached_digest = NULL, attached_identity = NULL";
    let statements = vec![
        format!("UPDATE {{s}}.meta SET {nothing} WHERE attached_identity IS NOT NULL"),
        "DROP FUNCTION IF EXISTS {s}.attached_changed()".to_owned(),
    ];
    parts.push(Part { what: format!("the schema {}", name.as_str()), owner: ours, statements });
    Ok(Script(parts))
}
