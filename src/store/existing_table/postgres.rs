//! Somebody else's table on PostgreSQL: how it is read, and, once it is attached, how its changes are named.
//!
//! Attaching adds two triggers to the table and nothing else; detaching takes them away. What a trigger does is done
//! with the rights of the owner of our tables, so that whoever writes the table needs none on them.

use sha2::{Digest, Sha256};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row, postgres::PgRow};

use super::ExistingTable;
use crate::{
    record::{Digests, KeyId, hex},
    store::{
        error::StoreError,
        names::{ColumnName, SchemaName, TableName, bytes_literal, literal},
        postgres::{code, connect_within, describe, in_schema},
        reads, schema,
        settings::DigestForm,
        url::StoreUrl,
    },
};

// === how it is read ===

impl ExistingTable {
    /// The condition that a row `t` is of a key with one of `digests`.
    pub(crate) fn has_digest(&self, digests: &Digests) -> String {
        let form = |hex: String| match self.digest_form {
            DigestForm::Hex => format!("'{hex}'"),
            DigestForm::Bytes => bytes_literal(&hex),
        };
        let list: Vec<_> = digests.all().map(|digest| form(digest.to_hex())).collect();
        format!("t.{} IN ({})", self.digest.sql(), list.join(", "))
    }

    /// The condition that a row `t` is the one of `key`.
    pub(crate) fn has_id(&self, key: KeyId) -> String {
        format!("t.{} = '{key}'", self.id.sql())
    }

    /// What `find` returns (`watch.rs`) of the rows that fulfil `condition`. Where the table is not attached there are
    /// no versions: everything is dated with number 0.
    pub(crate) fn find(&self, condition: &str) -> String {
        let (system, timeline, clock) = ("c.system_identifier", reads::postgres::TIMELINE, reads::postgres::CLOCK);
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
            |scopes| {
                let listed = format!("unnest({}) AS scope WHERE scope IS NOT NULL", column(scopes));
                format!("(SELECT coalesce(json_agg(scope), '[]')::text FROM {listed})")
            },
        );
        // One without an end is none.
        let time = |column: &Option<ColumnName>, endless: &str| {
            column.as_ref().map_or_else(
                || "NULL::bigint".to_owned(),
                |column| reads::postgres::micros(&format!("nullif(t.{}, '{endless}')", column.sql())),
            )
        };
        let not_before = time(&self.not_before, "-infinity");
        let (expires_at, revoked_at) = (time(&self.expires_at, "infinity"), time(&self.revoked_at, "infinity"));
        format!(
            "SELECT {date}, {id}::text, {trust}::text, {enabled}, {digest_text}, 0::bigint, {scopes}, '[]',
                {not_before}, {expires_at}, {revoked_at}, 0::bigint
             FROM {from}
             LEFT JOIN {table} t ON {id} IS NOT NULL AND {trust} IS NOT NULL AND {digest} IS NOT NULL AND {condition}",
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
        let revoked = self.revoked_at.as_ref().map_or_else(
            || "false".to_owned(),
            |column| format!("NEW.{0} IS NOT NULL AND NEW.{0} <> 'infinity'", column.sql()),
        );
        FUNCTION
            .replace("{old row}", &row("OLD"))
            .replace("{new row}", &row("NEW"))
            .replace("{old digest}", &digest("OLD"))
            .replace("{new digest}", &digest("NEW"))
            .replace("{id}", &self.id.sql())
            .replace("{revoked}", &revoked)
    }
}

/// Columns are read in a block of their own: where one was renamed, dropped or given another type, the application's
/// statement must not fail, and nobody can tell what it changed. That block writes nothing, so it costs no transaction
/// number. A digest that is not one cannot be asked for, so nobody needs to hear of it.
const FUNCTION: &str = "
DECLARE
    old_id text;
    new_id text;
    old_digest text;
    new_digest text;
    revoked boolean;
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        INSERT INTO {s}.tx (id, at, whole)
            SELECT pg_current_xact_id(), transaction_timestamp(), kind FROM unnest(ARRAY['', 'key', 'trust']) AS kind
            ON CONFLICT DO NOTHING;
        RETURN NULL;
    END IF;
    BEGIN
        IF TG_OP = 'UPDATE' AND {old row} IS NOT DISTINCT FROM {new row} THEN
            RETURN NULL;
        END IF;
        IF TG_OP <> 'INSERT' THEN
            old_id := OLD.{id}::text;
            old_digest := {old digest};
        END IF;
        IF TG_OP <> 'DELETE' THEN
            new_id := NEW.{id}::text;
            new_digest := {new digest};
            revoked := {revoked};
        END IF;
    EXCEPTION WHEN OTHERS THEN
        PERFORM {s}.everything();
        RETURN NULL;
    END;
    IF TG_OP = 'INSERT' AND new_digest IS NULL THEN
        RETURN NULL;
    END IF;
    INSERT INTO {s}.tx (id, at, whole) VALUES (pg_current_xact_id(), transaction_timestamp(), '')
        ON CONFLICT DO NOTHING;
    IF TG_OP <> 'INSERT' THEN
        PERFORM {s}.note('key', old_id);
    END IF;
    IF TG_OP = 'UPDATE' AND new_id IS DISTINCT FROM old_id THEN
        PERFORM {s}.note('key', new_id);
    END IF;
    IF TG_OP <> 'DELETE' AND new_digest ~ '^[0-9a-f]{64}$' THEN
        PERFORM {s}.note('absent', new_digest);
    END IF;
    IF TG_OP <> 'INSERT' AND old_digest ~ '^[0-9a-f]{64}$'
        AND (TG_OP = 'DELETE' OR old_digest IS DISTINCT FROM new_digest OR revoked)
    THEN
        PERFORM {s}.note('gone', old_digest);
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

/// Whoever waits for a lock on a table makes everybody wait who comes after, and whoever holds one and is heard of no
/// more does so for hours: better to give up and be run again.
const WAITS: &str = "SET LOCAL lock_timeout = '2s';
SET LOCAL statement_timeout = '5s';
SET LOCAL idle_in_transaction_session_timeout = '5s'";

/// What to do about the triggers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AttachAction {
    /// They are to be there.
    Attach,
    /// They are to be gone.
    Detach,
}

/// Does what `action` says, in one transaction.
///
/// # Errors
/// [`StoreError::Unusable`] with everything that keeps the table from being attached; [`StoreError::Schema`] where
/// our own tables are missing; a right is missing; or the database failed. Nothing was changed then.
pub(crate) async fn run(
    address: &StoreUrl,
    name: &SchemaName,
    table: &ExistingTable,
    action: AttachAction,
    connect_timeout: std::time::Duration,
) -> Result<(), StoreError> {
    let mut connection = connect_within(address, connect_timeout).await?;
    let mut transaction = connection.begin().await?;
    let script = script(&mut transaction, address, name, table, action).await?;
    if let Err(error) = script.run(&mut transaction, name).await {
        return Err(match code(&error).as_deref() {
            Some("42501") => StoreError::Unusable(format!(
                "{error}: this needs the rights of the owners of {} and of the schema {}; or have each of them run its part of what --print prints",
                table.table,
                name.as_str()
            )),
            Some("55P03" | "57014") => StoreError::Unusable(format!(
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

/// The statements that do what `action` says, for their roles to run.
///
/// # Errors
/// As [`run`].
pub(crate) async fn print(
    address: &StoreUrl,
    name: &SchemaName,
    table: &ExistingTable,
    action: AttachAction,
    connect_timeout: std::time::Duration,
) -> Result<String, StoreError> {
    let mut connection = connect_within(address, connect_timeout).await?;
    let mut transaction = connection.begin().await?;
    let script = script(&mut transaction, address, name, table, action).await?;
    transaction.rollback().await?;
    connection.close().await?;
    Ok(script.print(name))
}

async fn script(
    connection: &mut PgConnection,
    address: &StoreUrl,
    name: &SchemaName,
    table: &ExistingTable,
    action: AttachAction,
) -> Result<Script, StoreError> {
    let place = describe(address, name);
    let tables = schema::postgres::tables(connection, name).await?;
    schema::check(tables, &place)?;
    if tables.is_some_and(|tables| tables.version > schema::VERSION) {
        return Err(StoreError::Schema(format!("{place} holds tables of a newer release: use that one to {action}")));
    }
    let owner: String = sqlx::query_scalar(in_schema(OWNER, name)).fetch_one(&mut *connection).await?;
    match action {
        AttachAction::Attach => attach(connection, name, table, owner).await,
        AttachAction::Detach => detach(connection, name, table, owner).await,
    }
}

impl std::fmt::Display for AttachAction {
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
) -> Result<Script, StoreError> {
    let Some(home) = &table.table.schema else {
        return Err(StoreError::Unusable(
            "store.table: name the table with its schema, such as \"public.trust\": what is watched must be what is read"
                .into(),
        ));
    };
    if let Some(other) = another(connection, name, table).await? {
        return Err(StoreError::Unusable(format!(
            "{other} is attached, and only one table can be: name it in store.table and run `trustgate detach` first"
        )));
    }
    let tree = sqlx::query(in_schema(TREE, name)).bind(home).bind(&table.table.name).bind(&[CHANGED, TRUNCATED][..]);
    let tree = tree.fetch_all(&mut *connection).await?;
    let problems = problems(connection, &tree, home, table).await?;
    if !problems.is_empty() {
        return Err(StoreError::Unusable(format!("{} cannot be attached:\n  {}", table.table, problems.join("\n  "))));
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
    // To fire a trigger nobody needs a right on its function. To make one, the table's owner does: now, and whenever the
    // table gets another part, which gets the trigger by itself. Nobody can call it in any other way.
    if !is_ours {
        first.push(format!("GRANT EXECUTE ON FUNCTION {{s}}.attached_changed() TO {owner}"));
    }
    let mut last = Vec::new();
    if !is_welcome {
        first.push(format!("GRANT USAGE ON SCHEMA {{s}} TO {owner}"));
        last.push(format!("REVOKE USAGE ON SCHEMA {{s}} FROM {owner}"));
    }
    let schema = format!("the schema {}", name.as_str());
    let triggers = triggers(&tree, table)?;
    Ok(Script(vec![
        Part { what: schema.clone(), owner: ours.clone(), statements: first },
        Part { what: format!("the table {}", table.table), owner, statements: triggers },
        Part { what: schema, owner: ours, statements: last },
    ]))
}

/// The table that is attached, if it is another one than `table`.
async fn another(
    connection: &mut PgConnection,
    name: &SchemaName,
    ExistingTable { table, .. }: &ExistingTable,
) -> Result<Option<TableName>, sqlx::Error> {
    let row = sqlx::query(in_schema(ATTACHED, name)).fetch_one(connection).await?;
    let (schema, attached): (Option<String>, Option<String>) = (row.try_get(0)?, row.try_get(1)?);
    let other = attached.map(|name| TableName { schema, name });
    Ok(other.filter(|other| other.name != table.name || table.schema.is_some() && other.schema != table.schema))
}

const ATTACHED: &str = "SELECT attached_schema, attached_table FROM {s}.meta";

/// Who owns the table; whether that role may use our schema, and whether it has the rights of the owner of our tables.
const THEIRS: &str = "SELECT c.relowner::regrole::text, has_schema_privilege(c.relowner, ours.relnamespace, 'USAGE'),
    pg_has_role(c.relowner, ours.relowner, 'USAGE')
 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 JOIN pg_class ours ON ours.oid = '{s}.meta'::regclass
 WHERE n.nspname = $1 AND c.relname = $2";

/// The names of the two triggers.
const CHANGED: &str = "trustgate_changed";
const TRUNCATED: &str = "trustgate_truncated";

/// The table and all that inherit from it or are parts of it, parents first; with triggers of those names ($3) that are
/// somebody else's.
const TREE: &str = "WITH RECURSIVE tree (oid, depth) AS (
    SELECT c.oid, 0 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = $1 AND c.relname = $2
    UNION ALL
    SELECT i.inhrelid, depth + 1 FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid
 )
 SELECT format('%I.%I', n.nspname, c.relname), c.relispartition, c.relkind::text, c.relrowsecurity, ARRAY(
    SELECT g.tgname::text FROM pg_trigger g WHERE g.tgrelid = c.oid AND g.tgname = ANY ($3)
        AND g.tgfoid IS DISTINCT FROM to_regprocedure('{s}.attached_changed()')
 )
 FROM tree JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace ORDER BY tree.depth, c.oid";

fn triggers(tree: &[PgRow], table: &ExistingTable) -> Result<Vec<String>, sqlx::Error> {
    // All locks in one statement, which has one limit; whoever comes after waits no longer than that.
    let mut statements = vec![format!("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE", table.table.sql())];
    for row in tree {
        let (relation, is_partition): (String, bool) = (row.try_get(0)?, row.try_get(1)?);
        let when = [
            (CHANGED, format!("INSERT OR UPDATE OR DELETE ON {relation} FOR EACH ROW")),
            (TRUNCATED, format!("TRUNCATE ON {relation}")),
        ];
        for (name, when) in when {
            // A partition gets that for its rows from the table that it is a part of, and needs no other (`watch.rs`).
            if !is_partition {
                let function = "EXECUTE FUNCTION {s}.attached_changed()";
                statements.push(format!("CREATE OR REPLACE TRIGGER {name} AFTER {when} {function}"));
            }
            if !is_partition || name == CHANGED {
                statements.push(format!("ALTER TABLE {relation} ENABLE ALWAYS TRIGGER {name}"));
            }
        }
    }
    Ok(statements)
}

/// The type of a column of the table, if there is such a column; whether an index finds a row by it, and whether it is
/// computed when it is read (PostgreSQL 18), so that no trigger sees it.
const COLUMN: &str = "SELECT format_type(a.atttypid, NULL), EXISTS (
        SELECT FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am m ON m.oid = x.relam
        WHERE i.indrelid = a.attrelid AND i.indkey[0] = a.attnum AND i.indisvalid AND m.amname IN ('btree', 'hash')
            AND (i.indpred IS NULL
                OR pg_get_expr(i.indpred, i.indrelid) = format('(%I IS NOT NULL)', a.attname))
    ), a.attgenerated = 'v'
 FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = $1 AND c.relname = $2 AND a.attname = $3 AND a.attnum > 0 AND NOT a.attisdropped";

/// Everything that keeps the table from being attached.
async fn problems(
    connection: &mut PgConnection,
    tree: &[PgRow],
    home: &str,
    table: &ExistingTable,
) -> Result<Vec<String>, sqlx::Error> {
    if tree.is_empty() {
        return Ok(vec!["there is no such table (or the role cannot see it)".to_owned()]);
    }
    let mut problems = Vec::new();
    for row in tree {
        let (relation, kind, hides_rows): (String, String, bool) = (row.try_get(0)?, row.try_get(2)?, row.try_get(3)?);
        for trigger in row.try_get::<Vec<String>, _>(4)? {
            problems.push(format!("{relation} already has another trigger {trigger}"));
        }
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
        let (of, is_indexed, is_virtual): (String, bool, bool) =
            (found.try_get(0)?, found.try_get(1)?, found.try_get(2)?);
        if is_virtual {
            problems.push(format!(
                "column {} (store.table_{purpose}) is computed when it is read, which no trigger sees: make it GENERATED ALWAYS AS (...) STORED",
                column.sql()
            ));
        }
        if !expected.contains(&of.as_str()) {
            let expected = expected.join(" or ");
            problems.push(format!("column {} (store.table_{purpose}) is of type {of}, not {expected}", column.sql()));
        }
        if ["id", "digest"].contains(&purpose) && !is_indexed {
            problems.push(format!(
                "no index of all rows begins with column {0} (store.table_{purpose}), so that every read would go through the whole table: CREATE INDEX CONCURRENTLY ON {1} ({0})",
                column.sql(),
                table.table.sql()
            ));
        }
    }
    Ok(problems)
}

/// The triggers that call our function, wherever they are by now: for each owner the tables, and what drops them.
const TRIGGERS: &str = "SELECT owner, string_agg(DISTINCT relation, ', '),
    array_agg(format('DROP TRIGGER %I ON %s', tgname, relation) ORDER BY relation, tgname)
 FROM (
    SELECT c.relowner::regrole::text AS owner, format('%I.%I', n.nspname, c.relname) AS relation, g.tgname
    FROM pg_trigger g JOIN pg_class c ON c.oid = g.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE g.tgfoid = to_regprocedure('{s}.attached_changed()') AND g.tgparentid = 0
 ) AS theirs GROUP BY owner ORDER BY owner";

async fn detach(
    connection: &mut PgConnection,
    name: &SchemaName,
    table: &ExistingTable,
    ours: String,
) -> Result<Script, StoreError> {
    if let Some(other) = another(connection, name, table).await? {
        return Err(StoreError::Unusable(format!(
            "{other} is attached, and not {}: name it in store.table",
            table.table
        )));
    }
    let mut parts: Vec<Part> = Vec::new();
    for row in sqlx::query(in_schema(TRIGGERS, name)).fetch_all(connection).await? {
        let (owner, relations, drops): (String, String, Vec<String>) =
            (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let mut statements = vec![format!("LOCK TABLE {relations} IN ACCESS EXCLUSIVE MODE")];
        statements.extend(drops);
        parts.push(Part { what: "the table".to_owned(), owner, statements });
    }
    let nothing = "attached_schema = NULL, attached_table = NULL, attached_digest = NULL, attached_identity = NULL";
    let statements = vec![
        format!("UPDATE {{s}}.meta SET {nothing} WHERE attached_identity IS NOT NULL"),
        "DROP FUNCTION IF EXISTS {s}.attached_changed()".to_owned(),
    ];
    parts.push(Part { what: format!("the schema {}", name.as_str()), owner: ours, statements });
    Ok(Script(parts))
}
