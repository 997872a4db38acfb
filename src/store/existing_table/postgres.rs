//! An existing table of the operator on PostgreSQL: the queries that read it and, once it is attached, the triggers
//! that record its changes.
//!
//! Attaching adds two triggers to the table and changes nothing else in it; detaching removes them. The triggers run
//! with the rights of the owner of our tables, so clients that write the table need no rights on ours.

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

// === reads ===

impl ExistingTable {
    /// The condition that row `t` stores one of `digests`.
    pub(crate) fn has_digest(&self, digests: &Digests) -> String {
        let form = |hex: String| match self.digest_form {
            DigestForm::Hex => format!("'{hex}'"),
            DigestForm::Bytes => bytes_literal(&hex),
        };
        let list: Vec<_> = digests.all().map(|digest| form(digest.to_hex())).collect();
        format!("t.{} IN ({})", self.digest.sql(), list.join(", "))
    }

    /// The condition that row `t` has the id `key`.
    pub(crate) fn has_id(&self, key: KeyId) -> String {
        format!("t.{} = '{key}'", self.id.sql())
    }

    /// A query for the rows that fulfil `condition`, with the columns of `find_key` (`change_log/postgres.rs`). A table
    /// that is not attached has no versions: all its values get version 0.
    pub(crate) fn find(&self, condition: &str) -> String {
        let (system, timeline, clock) = ("c.system_identifier", reads::postgres::TIMELINE, reads::postgres::CLOCK);
        let (date, from) = if self.attached {
            (
                format!("v.version, encode(v.nonce, 'hex'), m.incarnation::text, {system}, {timeline}, {clock}"),
                "(SELECT version, nonce FROM {s}.version ORDER BY version DESC LIMIT 1) v
                 CROSS JOIN {s}.meta m CROSS JOIN pg_control_system() c",
            )
        } else {
            // Reading the timeline fails on a standby, as intended. The value itself is not used.
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
        // An infinite time means no limit.
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

    // === change log ===

    /// The body of the function that both triggers call. Like the trigger functions of our own tables
    /// (`change_log/postgres.rs`), it only inserts, and it ignores changes to columns that no decision reads.
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

/// The function reads the columns in a nested block. If a column was renamed, dropped or given another type, the block
/// fails, and the function records that everything changed, so that the application's statement still succeeds. The
/// block writes nothing, so it uses no transaction number. The function does not record a value that has not the form
/// of a digest, because no request can look it up.
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

/// The statements that one role has to run.
struct Part {
    /// The object that the role must own.
    what: String,
    /// The role that owns it.
    owner: String,
    statements: Vec<String>,
}

/// The statements of all roles, in the order in which they have to be run.
struct Script(Vec<Part>);

impl Script {
    /// The script as text, for operators who run it with other tools.
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

/// A statement that waits for a table lock blocks all later statements on that table. A session whose client has
/// disappeared can keep a lock for hours. So the script gives up early, and the operator can run it again.
const WAITS: &str = "SET LOCAL lock_timeout = '2s';
SET LOCAL statement_timeout = '5s';
SET LOCAL idle_in_transaction_session_timeout = '5s'";

/// An action on the triggers of the existing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AttachAction {
    /// Add the triggers.
    Attach,
    /// Remove the triggers.
    Detach,
}

/// Runs `action` in one transaction.
///
/// # Errors
/// [`StoreError::Unusable`]: the message lists all problems that keep the table from being attached, or says that a
/// right is missing. [`StoreError::Schema`]: our own tables are missing, or of another release. Or the database failed.
/// Nothing was changed.
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
                "{error}: run this as a role with the rights of the owners of {} and of the schema {}, or let each \
                 owner run its part of the output of --print",
                table.table,
                name.as_str()
            )),
            Some("55P03" | "57014") => StoreError::Unusable(format!(
                "timeout: {} was in use for too long, so it could not be altered. Nothing was changed; try again",
                table.table
            )),
            _ => error.into(),
        });
    }
    sqlx::raw_sql(in_schema("SELECT {s}.restore_watch()", name)).execute(&mut *transaction).await?;
    transaction.commit().await?;
    Ok(connection.close().await?)
}

/// The statements of `action` as text, grouped by the roles that have to run them.
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
        return Err(StoreError::Schema(format!(
            "{place} has tables of a newer release: run `trustgate {action}` of that release"
        )));
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
            "store.table: write the table with its schema, such as \"public.trust\". Without it, the triggers could be \
             added to another table than the one that `serve` reads"
                .into(),
        ));
    };
    if let Some(other) = other_attached(connection, name, table).await? {
        return Err(StoreError::Unusable(format!(
            "{other} is attached, and only one table can be attached: set store.table to it and run `trustgate detach` \
             first"
        )));
    }
    let tree = sqlx::query(in_schema(TREE, name)).bind(home).bind(&table.table.name).bind(&[CHANGED, TRUNCATED][..]);
    let tree = tree.fetch_all(&mut *connection).await?;
    let problems = problems(connection, &tree, home, table).await?;
    if !problems.is_empty() {
        return Err(StoreError::Unusable(format!("{} cannot be attached:\n  {}", table.table, problems.join("\n  "))));
    }
    let row = sqlx::query(in_schema(TABLE_OWNER, name)).bind(home).bind(&table.table.name);
    let row = row.fetch_one(&mut *connection).await?;
    let (owner, may_use_schema, has_our_rights): (String, bool, bool) =
        (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);

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
    // A client that fires a trigger needs no right on its function, but the owner of the table needs one to create the
    // trigger: now, and for each new partition, to which PostgreSQL adds the trigger. The right is harmless, because a
    // trigger function cannot be called directly.
    if !has_our_rights {
        first.push(format!("GRANT EXECUTE ON FUNCTION {{s}}.attached_changed() TO {owner}"));
    }
    let mut last = Vec::new();
    if !may_use_schema {
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

/// The attached table, if it is not `table`.
async fn other_attached(
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

/// A query for the owner of the table. Further columns: true if that role may use our schema; true if it has the rights
/// of the owner of our tables.
const TABLE_OWNER: &str =
    "SELECT c.relowner::regrole::text, has_schema_privilege(c.relowner, ours.relnamespace, 'USAGE'),
    pg_has_role(c.relowner, ours.relowner, 'USAGE')
 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 JOIN pg_class ours ON ours.oid = '{s}.meta'::regclass
 WHERE n.nspname = $1 AND c.relname = $2";

/// The names of the two triggers.
const CHANGED: &str = "trustgate_changed";
const TRUNCATED: &str = "trustgate_truncated";

/// A query for the table and all tables that inherit from it or are its partitions, parents first, each with the
/// triggers that have one of our names ($3) but do not call our function.
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
    // One statement takes all locks, so that one timeout limits how long later statements of other clients wait.
    let mut statements = vec![format!("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE", table.table.sql())];
    for row in tree {
        let (relation, is_partition): (String, bool) = (row.try_get(0)?, row.try_get(1)?);
        let when = [
            (CHANGED, format!("INSERT OR UPDATE OR DELETE ON {relation} FOR EACH ROW")),
            (TRUNCATED, format!("TRUNCATE ON {relation}")),
        ];
        for (name, when) in when {
            // A partition gets the row trigger from its parent and needs no truncate trigger
            // (`change_log/postgres.rs`).
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

/// A query for the type of a column of the table, if the column exists. Further columns: true if an index finds rows by
/// it; true if it is a virtual generated column (PostgreSQL 18), whose value no trigger sees.
const COLUMN: &str = "SELECT format_type(a.atttypid, NULL), EXISTS (
        SELECT FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am m ON m.oid = x.relam
        WHERE i.indrelid = a.attrelid AND i.indkey[0] = a.attnum AND i.indisvalid AND m.amname IN ('btree', 'hash')
            AND (i.indpred IS NULL
                OR pg_get_expr(i.indpred, i.indrelid) = format('(%I IS NOT NULL)', a.attname))
    ), a.attgenerated = 'v'
 FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = $1 AND c.relname = $2 AND a.attname = $3 AND a.attnum > 0 AND NOT a.attisdropped";

/// All problems that keep the table from being attached.
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
                "{relation} is a view or a foreign table, where triggers do not see every change: set store.table to \
                 the table behind it, or use freshness.mode = \"ttl\""
            ));
        }
        if hides_rows {
            problems.push(format!(
                "{relation} has row level security, and a policy can show other rows without a change to any row: \
                 disable it for this table"
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
            problems.push(format!("column {} (store.table_{purpose}) not found", column.sql()));
            continue;
        };
        let (of, is_indexed, is_virtual): (String, bool, bool) =
            (found.try_get(0)?, found.try_get(1)?, found.try_get(2)?);
        if is_virtual {
            problems.push(format!(
                "column {} (store.table_{purpose}) is computed when it is read, so no trigger sees its changes: make \
                 it GENERATED ALWAYS AS (...) STORED",
                column.sql()
            ));
        }
        if !expected.contains(&of.as_str()) {
            let expected = expected.join(" or ");
            problems.push(format!("column {} (store.table_{purpose}) has type {of}, not {expected}", column.sql()));
        }
        if ["id", "digest"].contains(&purpose) && !is_indexed {
            problems.push(format!(
                "no index of all rows begins with column {0} (store.table_{purpose}), so every read would scan the \
                 whole table: run CREATE INDEX CONCURRENTLY ON {1} ({0})",
                column.sql(),
                table.table.sql()
            ));
        }
    }
    Ok(problems)
}

/// A query for the triggers that call our function, on any table: for each owner, the tables and the statements that
/// drop the triggers.
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
    if let Some(other) = other_attached(connection, name, table).await? {
        return Err(StoreError::Unusable(format!(
            "{other} is attached, and not {}: set store.table to the attached table",
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
    let cleared = "attached_schema = NULL, attached_table = NULL, attached_digest = NULL, attached_identity = NULL";
    let statements = vec![
        format!("UPDATE {{s}}.meta SET {cleared} WHERE attached_identity IS NOT NULL"),
        "DROP FUNCTION IF EXISTS {s}.attached_changed()".to_owned(),
    ];
    parts.push(Part { what: format!("the schema {}", name.as_str()), owner: ours, statements });
    Ok(Script(parts))
}
