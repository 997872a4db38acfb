//! The change log on PostgreSQL: triggers give each committed change a version, no matter which client makes it. A
//! fingerprint of the triggers and their functions shows whether they have been altered.
//!
//! Inside a writer's transaction, the trigger functions only insert rows. A read would take the predicate locks by
//! which PostgreSQL detects conflicts between SERIALIZABLE transactions, and an update could itself conflict, so either
//! could make a writer's transaction fail. The correctness of the functions does not depend on session settings,
//! because any client can change those.

use sha2::{Digest, Sha256};
use sqlx::{AssertSqlSafe, PgConnection};

use super::problem::{ATTACH, TrackingProblem};
use crate::{
    record::{Fingerprint, hex},
    store::{
        names::{SchemaName, bytes_literal},
        postgres::in_schema,
        reads::postgres,
        sql::{BODY, body, without_newline},
    },
};

/// Blocks new writers and waits for running writers. Take this lock before any other lock: a migration that waits for
/// writers while it already holds a stronger lock would block readers during that time.
pub(crate) const HOLD_WRITERS: &str = "LOCK TABLE {s}.trust, {s}.api_key IN SHARE ROW EXCLUSIVE MODE";

/// Repairs the change log: creates or replaces functions that are missing or differ from this release, and triggers
/// that are missing, disabled or different. Then records the fingerprint. Changes nothing if everything is intact.
pub(crate) async fn mend(connection: &mut PgConnection, name: &SchemaName) -> Result<(), sqlx::Error> {
    for function in FUNCTIONS {
        if !function.is_current(connection, name).await? {
            let grants = function.inherited_rights(connection, name).await?;
            let sql = function.definition(name) + &grants;
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *connection).await?;
        }
    }
    sqlx::raw_sql(in_schema(MEND_TRIGGERS, name)).execute(&mut *connection).await?;
    sqlx::raw_sql(in_schema(FORGET_UNSTAMPED, name)).execute(&mut *connection).await?;
    let left: Vec<String> =
        sqlx::query_scalar(in_schema("SELECT problem FROM {s}.gaps()", name)).fetch_all(&mut *connection).await?;
    let left: Vec<_> = left.into_iter().map(TrackingProblem::of_gaps).collect();
    if !left.is_empty() && left.iter().all(TrackingProblem::needs_attach) {
        // Only the owner of the attached table can repair its triggers. That must not block the repair of our own
        // tables.
        tracing::warn!(
            problems = left.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
            "attached table is not tracked: replicas cannot renew their leases until its owner repairs the problems"
        );
        return Ok(());
    }
    sqlx::raw_sql(in_schema("SELECT {s}.restore_watch()", name)).execute(connection).await?;
    Ok(())
}

/// Creates or enables the triggers on our own tables that the function `gaps` reports as missing or disabled.
const MEND_TRIGGERS: &str = include_str!("postgres/mend_triggers.sql");

/// Deletes rows that were written while the trigger `trustgate_stamp` was missing. They have no version, and pruning
/// selects rows by version, so pruning would not delete them.
const FORGET_UNSTAMPED: &str = include_str!("postgres/forget_unstamped.sql");

/// A function in our schema.
struct Function {
    /// The name, with the types of the arguments.
    signature: &'static str,
    /// The statement that creates the function. [`Function::filled`] fills in its placeholders.
    sql: &'static str,
    /// The signature of an older function whose callers also need this one. When a migration adds this function, each
    /// role that may call the older one gets the right to call this one, so an upgrade needs no new grants.
    rights_of: Option<&'static str>,
}

impl Function {
    const fn new(signature: &'static str, sql: &'static str) -> Self {
        Self { signature, sql, rights_of: None }
    }

    const fn with_rights_of(self, older: &'static str) -> Self {
        Self { rights_of: Some(older), ..self }
    }

    /// Returns true if the database has this function as this release defines it.
    async fn is_current(&self, connection: &mut PgConnection, name: &SchemaName) -> Result<bool, sqlx::Error> {
        // The catalog stores the body as text, but the attributes only in parsed form. So compare the body as text, and
        // compare only the two attributes that matter for security.
        let sql = "SELECT FROM pg_proc
             WHERE oid = to_regprocedure($1) AND prosrc = $2 AND proconfig @> ARRAY['search_path=pg_catalog, pg_temp']
                AND prosecdef = $3";
        let found = sqlx::query(sql)
            .bind(self.qualified(name))
            .bind(self.body(name))
            .bind(self.head().contains("SECURITY DEFINER"))
            .fetch_optional(connection)
            .await?;
        Ok(found.is_some())
    }

    /// Returns the signature, qualified with the schema.
    fn qualified(&self, schema: &SchemaName) -> String {
        format!("{}.{}", schema.as_str(), self.signature)
    }

    fn name(&self) -> &'static str {
        self.signature.split('(').next().unwrap_or(self.signature)
    }

    /// Returns GRANT statements that give a new function the rights of [`Self::rights_of`], or an empty string if the
    /// function already exists.
    async fn inherited_rights(
        &self,
        connection: &mut PgConnection,
        schema: &SchemaName,
    ) -> Result<String, sqlx::Error> {
        let Some(model) = self.rights_of else { return Ok(String::new()) };
        let sql = "SELECT format('; GRANT EXECUTE ON FUNCTION %s TO %s', $1, acl.grantee::regrole)
             FROM pg_proc p CROSS JOIN LATERAL aclexplode(p.proacl) acl
             WHERE p.oid = to_regprocedure($2) AND to_regprocedure($1) IS NULL
                AND acl.privilege_type = 'EXECUTE' AND acl.grantee NOT IN (0, p.proowner)";
        let grants: Vec<String> = sqlx::query_scalar(sql)
            .bind(self.qualified(schema))
            .bind(format!("{}.{model}", schema.as_str()))
            .fetch_all(connection)
            .await?;
        Ok(grants.concat())
    }

    /// Returns the statements that create or replace the function and revoke the right of PUBLIC to call it.
    fn definition(&self, schema: &SchemaName) -> String {
        format!("{}REVOKE ALL ON FUNCTION {} FROM PUBLIC", self.filled(schema), self.qualified(schema))
    }

    /// Returns the part of the statement before the body, without the comment above it.
    fn head(&self) -> &'static str {
        let statement = self.sql.find("CREATE OR REPLACE FUNCTION").map_or(self.sql, |start| &self.sql[start..]);
        statement.split(BODY).next().unwrap_or(statement)
    }

    /// Returns the string that the catalog stores as the function's body.
    fn body(&self, schema: &SchemaName) -> String {
        body(&self.filled(schema)).to_owned()
    }

    fn filled(&self, schema: &SchemaName) -> String {
        let time = |column| postgres::micros(&format!("k.{column}"));
        let sql = self.sql.replace("{gaps}", GAPS).replace("{not_before}", &time("not_before"));
        filled(&sql.replace("{expires_at}", &time("expires_at")).replace("{revoked_at}", &time("revoked_at")), schema)
    }
}

/// Fills in the placeholders in `text`: the schema, some constants, and the digests of the functions that record
/// changes.
fn filled(text: &str, schema: &SchemaName) -> String {
    let no_pepper = format!("{}::bytea", bytes_literal(&Fingerprint::NO_PEPPER.to_string()));
    let text = text.replace("{s}", schema.as_str()).replace("{attach}", ATTACH).replace("{no_pepper}", &no_pepper);
    if !text.contains("{functions}") {
        return text;
    }
    let recording = FUNCTIONS.iter().filter(|function| RECORDING.contains(&function.name()));
    let digests =
        recording.map(|function| format!("('{}', '{}')", function.name(), hex(&Sha256::digest(function.body(schema)))));
    text.replace("{functions}", &digests.collect::<Vec<_>>().join(", "))
}

/// Returns a query for the problems that keep changes from being recorded, as messages for
/// [`TrackingProblem::of_gaps`]. It is the query inside the function `gaps`, for roles that may not call that function.
/// It reads only the catalog and `meta`.
pub(crate) fn problems(schema: &SchemaName) -> String {
    let gaps = filled(GAPS, schema);
    format!("SELECT g.problem FROM ({gaps}) AS g (relation, name, disabled, creation, problem)")
}

/// The functions that record changes. The function `fingerprint` repeats this list.
const RECORDING: &[&str] = &["note", "api_key_changed", "trust_changed", "truncated", "stamp"];

/// A query for the triggers and functions that are missing, disabled or different, in the columns of the function
/// `gaps`. The bits of `pg_trigger.tgtype`: 1 FOR EACH ROW, 4 INSERT, 8 DELETE, 16 UPDATE, 32 TRUNCATE.
const GAPS: &str = without_newline(include_str!("postgres/gaps.sql"));

/// The functions of this release, in the order in which [`mend`] creates them. Each file contains one statement, below
/// the comments about the function. If the text between the quotes `$body$` changes, the next migration replaces the
/// function in each database. An older release that still uses such a database expects its own version of the text,
/// because `gaps` compares the functions that record changes with digests of their bodies.
const FUNCTIONS: &[Function] = &[
    Function::new("note(text, text)", include_str!("postgres/functions/note.sql")),
    Function::new("api_key_changed()", include_str!("postgres/functions/api_key_changed.sql")),
    Function::new("trust_changed()", include_str!("postgres/functions/trust_changed.sql")),
    Function::new("truncated()", include_str!("postgres/functions/truncated.sql")),
    Function::new("everything()", include_str!("postgres/functions/everything.sql")),
    Function::new("stamp()", include_str!("postgres/functions/stamp.sql")),
    Function::new("fingerprint()", include_str!("postgres/functions/fingerprint.sql")),
    Function::new("gaps()", include_str!("postgres/functions/gaps.sql")),
    Function::new("restore_watch()", include_str!("postgres/functions/restore_watch.sql")),
    Function::new("renew_incarnation(uuid)", include_str!("postgres/functions/renew_incarnation.sql")),
    Function::new("prune()", include_str!("postgres/functions/prune.sql")),
    Function::new("find(bytea[], uuid)", include_str!("postgres/functions/find.sql")),
    Function::new("find_key(bytea[], uuid)", include_str!("postgres/functions/find_key.sql"))
        .with_rights_of("find(bytea[], uuid)"),
    Function::new("hold_pepper(bytea)", include_str!("postgres/functions/hold_pepper.sql"))
        .with_rights_of("everything()"),
    Function::new("use_pepper(bytea)", include_str!("postgres/functions/use_pepper.sql"))
        .with_rights_of("everything()"),
    Function::new("record_peppers(uuid[], bytea[], bytea)", include_str!("postgres/functions/record_peppers.sql"))
        .with_rights_of("prune()"),
    Function::new("poll(bigint, bigint)", include_str!("postgres/functions/poll.sql")),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_function_has_a_body_and_restricts_its_search_path() {
        for function in FUNCTIONS {
            let (head, name) = (function.head(), function.name());
            assert!(head.starts_with(&format!("CREATE OR REPLACE FUNCTION {{s}}.{name}(")), "{name}: {head}");
            assert!(head.ends_with("SET search_path = pg_catalog, pg_temp AS "), "{name}: {head}");
            assert_eq!(function.sql.matches(BODY).count(), 2, "{name}");
        }
    }
}
