//! Attaches the operator's existing table on PostgreSQL: adds triggers that record its changes.
//!
//! Attaching adds two triggers to the table and changes nothing else in it; detaching removes them. The triggers run
//! with the rights of the owner of our tables, so clients that write to the existing table need no rights on our
//! tables.

use sha2::{Digest, Sha256};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row, postgres::PgRow};

use super::ExistingTable;
use crate::{
    record::hex,
    store::{
        error::StoreError,
        names::{SchemaName, TableName, literal},
        postgres::{code, connect_within, describe, in_schema},
        schema,
        settings::DigestForm,
        sql::{body, without_newline},
        url::StoreUrl,
    },
};

impl ExistingTable {
    /// Returns the statement that creates the function that both triggers call. Like the trigger functions of our own
    /// tables (`change_log/postgres/functions/`), this function only inserts rows, and it ignores changes to columns
    /// that no decision reads.
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

/// The template of the trigger function. It reads the columns in a nested block. If a column was renamed, dropped or
/// given a different type, the block fails, and the function records that everything changed, so that the application's
/// statement still succeeds. The block writes nothing, so it uses no transaction number. The function does not record a
/// value that does not have the form of a digest, because no request can look up such a value.
const FUNCTION: &str = without_newline(include_str!("attach/attached_changed.sql"));

/// The statements that one role must run.
struct Part {
    /// The object that the role must own.
    what: String,
    /// The role that owns it.
    owner: String,
    statements: Vec<String>,
}

/// The statements for all roles, in the order in which they must run.
struct AttachScript(Vec<Part>);

impl AttachScript {
    /// Returns the script as a string, for operators who run it with other tools.
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

/// Limits how long the script waits for locks. A statement that waits for a table lock blocks all later statements on
/// that table, and a session whose client has crashed can keep a lock for hours. So the script gives up early, and the
/// operator can run it again.
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
/// [`StoreError::Unusable`]: the message lists all problems that keep the table from being attached.
/// [`StoreError::NotOwner`]: a right is missing. [`StoreError::Schema`]: our own tables are missing, or belong to a
/// different release. Any other error means that the database failed. After an error, nothing has changed.
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
            Some("42501") => StoreError::NotOwner(format!(
                "{error}: run this command as a role with the rights of the owners of {} and of the schema {}",
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

/// Returns the statements for `action` as a string, grouped by the roles that must run them.
///
/// # Errors
/// See [`run`].
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
) -> Result<AttachScript, StoreError> {
    let place = describe(address, name);
    let tables = schema::postgres::tables(connection, name).await?;
    schema::check(tables, &place)?;
    if tables.is_some_and(|tables| tables.version > schema::VERSION) {
        return Err(StoreError::Schema(format!(
            "{place} has tables from a newer release: run `trustgate {action}` from that release"
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
) -> Result<AttachScript, StoreError> {
    let Some(home) = &table.table.schema else {
        return Err(StoreError::Unusable(
            "store.table: add the schema to the name of the table, as in \"public.trust\". Without the schema, the \
             triggers could be added to a different table from the one that `serve` reads"
                .into(),
        ));
    };
    if let Some(other) = other_attached(connection, name, table).await? {
        return Err(StoreError::Unusable(format!(
            "{other} is attached, and only one table can be attached: set store.table to that table and run `trustgate \
             detach` first"
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

    let function = table.function().replace("{s}", name.as_str());
    let digest = hex(&Sha256::digest(body(&function)));
    let mut first = vec![
        function,
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
    // A client whose statement fires a trigger needs no right on the trigger function, but the table owner needs one to
    // create the trigger: now, and for each new partition, because PostgreSQL then creates the trigger on the
    // partition. The right is harmless, because a trigger function cannot be called directly.
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
    Ok(AttachScript(vec![
        Part { what: schema.clone(), owner: ours.clone(), statements: first },
        Part { what: format!("the table {}", table.table), owner, statements: triggers },
        Part { what: schema, owner: ours, statements: last },
    ]))
}

/// Returns the attached table if it is not `table`.
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

/// A query for the table owner. Further columns: true if that role may use our schema; true if it has the rights of the
/// owner of our tables.
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
const TREE: &str = include_str!("attach/tree.sql");

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
            // (`change_log/postgres/gaps.sql`).
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

/// A query for the type of a column in the table, if the column exists. Further columns: true if an index can find rows
/// by this column; true if the column is a virtual generated column (PostgreSQL 18), whose value triggers cannot see.
const COLUMN: &str = include_str!("attach/column.sql");

/// Returns all problems that keep the table from being attached.
async fn problems(
    connection: &mut PgConnection,
    tree: &[PgRow],
    home: &str,
    table: &ExistingTable,
) -> Result<Vec<String>, sqlx::Error> {
    if tree.is_empty() {
        return Ok(vec!["there is no such table, or this role cannot see it".to_owned()]);
    }
    let mut problems = Vec::new();
    for row in tree {
        let (relation, kind, hides_rows): (String, String, bool) = (row.try_get(0)?, row.try_get(2)?, row.try_get(3)?);
        for trigger in row.try_get::<Vec<String>, _>(4)? {
            problems.push(format!("{relation} already has a different trigger named {trigger}"));
        }
        if !["r", "p"].contains(&kind.as_str()) {
            problems.push(format!(
                "{relation} is a view or a foreign table, where triggers do not see every change: set store.table to \
                 the table behind it, or use freshness.mode = \"ttl\""
            ));
        }
        if hides_rows {
            problems.push(format!(
                "{relation} has row level security, so a policy can reveal or hide rows without a change to any row: \
                 disable row level security for this table"
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
const TRIGGERS: &str = include_str!("attach/triggers.sql");

async fn detach(
    connection: &mut PgConnection,
    name: &SchemaName,
    table: &ExistingTable,
    ours: String,
) -> Result<AttachScript, StoreError> {
    if let Some(other) = other_attached(connection, name, table).await? {
        return Err(StoreError::Unusable(format!(
            "{other} is attached, not {}: set store.table to the attached table",
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
    Ok(AttachScript(parts))
}
