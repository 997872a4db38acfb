//! The rights that the roles of `serve` and of management need on the tables. `migrate --print-grants` prints this
//! list, and `doctor` checks it on the server.
//!
//! The list contains only the rights that are needed. This module creates the statements but does not run them.

use crate::store::{
    existing_table::ExistingTable,
    names::{SchemaName, quoted},
};

/// The kinds of objects on which rights are granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum On {
    Schema,
    Table,
    Function,
}

/// Privileges on objects of one kind.
struct Right {
    privileges: &'static [&'static str],
    on: On,
    objects: &'static [&'static str],
}

const fn right(privileges: &'static [&'static str], on: On, objects: &'static [&'static str]) -> Right {
    Right { privileges, on, objects }
}

/// The rights that one role needs.
pub(crate) struct Needs(&'static [Right]);

/// The rights of the role that `serve` connects as.
pub(crate) const SERVE: Needs = Needs(&[
    right(&["USAGE"], On::Schema, &[""]),
    right(
        &["SELECT"],
        On::Table,
        &["schema", "meta", "version", "tx", "change", "setting", "trust", "api_key", "replica"],
    ),
    right(&["INSERT", "UPDATE", "DELETE"], On::Table, &["replica"]),
    right(
        &["EXECUTE"],
        On::Function,
        &[
            "find(bytea[], uuid)", // earlier releases call this function, and an operator may roll back to one
            "find_key(bytea[], uuid)",
            "poll(bigint, bigint)",
            "fingerprint()",
            "restore_watch()",
            "renew_incarnation(uuid)",
            "prune()",
            "record_peppers(uuid[], bytea[], bytea)",
        ],
    ),
]);

/// The rights of the role that the commands `trust`, `key`, `pepper` and `cache` connect as.
pub(crate) const MANAGE: Needs = Needs(&[
    right(&["USAGE"], On::Schema, &[""]),
    right(&["SELECT"], On::Table, &["schema", "version", "trust", "api_key", "replica"]),
    right(&["INSERT", "UPDATE", "DELETE"], On::Table, &["trust", "api_key"]),
    right(&["INSERT"], On::Table, &["audit"]),
    right(&["EXECUTE"], On::Function, &["everything()", "hold_pepper(bytea)", "use_pepper(bytea)"]),
]);

/// Returns the GRANT statements for the roles `serve` and `manage`, for the owner of the tables to run.
#[must_use]
pub(crate) fn grants(schema: &SchemaName, existing: Option<&ExistingTable>, serve: &str, manage: &str) -> String {
    let ours = format!(
        "-- For the role that `trustgate serve` connects as:\n{}\
         -- For the role that `trustgate trust`, `key`, `pepper` and `cache` connect as (store.management_url):\n{}\
         -- Any other role that changes trusts and keys needs rights on the tables trust and api_key, and on no \
         other table.\n",
        SERVE.statements(schema, serve),
        MANAGE.statements(schema, manage),
    );
    match existing {
        None => ours,
        Some(table) if table.attached => ours + &on_existing_table(table, serve),
        Some(table) => on_existing_table(table, serve),
    }
}

/// Returns the GRANT statements for the role `serve` on an existing table.
fn on_existing_table(ExistingTable { table, .. }: &ExistingTable, serve: &str) -> String {
    let serve = quoted(serve);
    let home = table.schema.as_deref();
    let home = home.map_or_else(String::new, |home| format!("GRANT USAGE ON SCHEMA {} TO {serve};\n", quoted(home)));
    format!("-- On your table, for the role of `serve`:\n{home}GRANT SELECT ON {} TO {serve};\n", table.sql())
}

impl Needs {
    fn statements(&self, schema: &SchemaName, role: &str) -> String {
        let lines = self.0.iter().map(|Right { privileges, on, objects }| {
            let objects: Vec<_> = objects.iter().map(|object| on.name(schema, object)).collect();
            let (privileges, objects) = (privileges.join(", "), objects.join(", "));
            format!("GRANT {privileges} ON {}{objects} TO {};\n", on.word(), quoted(role))
        });
        lines.collect()
    }

    /// Returns all pairs of one privilege and one object.
    fn each(&self) -> impl Iterator<Item = Need> {
        self.0.iter().flat_map(|Right { privileges, on, objects }| {
            let pairs = objects.iter().flat_map(move |object| privileges.iter().map(move |of| (*object, *of)));
            pairs.map(move |(object, privilege)| Need { privilege, on: *on, object })
        })
    }

    /// Returns the query for the rights that the connected role lacks. The query returns the positions of these rights,
    /// for [`Self::at`]. It uses object ids (oid), because a role without USAGE on a schema may not refer to the
    /// objects in it by name.
    pub(crate) fn question(&self, schema: &SchemaName) -> String {
        let wanted = self.each().enumerate().map(|(at, Need { privilege, on, object })| {
            let kind = match on {
                On::Schema => "schema",
                On::Table => "table",
                On::Function => "function",
            };
            format!("({at}, '{kind}', '{privilege}', '{object}')")
        });
        QUESTION.replace("{wanted}", &wanted.collect::<Vec<_>>().join(", ")).replace("{s}", schema.as_str())
    }

    /// Returns the statement that grants `role` the right at `position`.
    pub(crate) fn at(&self, position: usize, schema: &SchemaName, role: &str) -> Option<String> {
        let Need { privilege, on, object } = self.each().nth(position)?;
        Some(format!("GRANT {privilege} ON {}{} TO {};", on.word(), on.name(schema, object), quoted(role)))
    }

    pub(crate) fn count(&self) -> usize {
        self.each().count()
    }
}

/// One privilege on one object.
struct Need {
    privilege: &'static str,
    on: On,
    object: &'static str,
}

impl On {
    /// Returns the keyword that precedes the names of such objects in a GRANT statement, with a space at its end.
    const fn word(self) -> &'static str {
        match self {
            Self::Schema => "SCHEMA ",
            Self::Table => "",
            Self::Function => "FUNCTION ",
        }
    }

    fn name(self, schema: &SchemaName, object: &str) -> String {
        match self {
            Self::Schema => schema.as_str().to_owned(),
            Self::Table | Self::Function => format!("{}.{object}", schema.as_str()),
        }
    }
}

/// The query that counts how many of the tables `trust` and `api_key` the connected role may change.
pub(crate) const WRITES: &str = "
SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = '{s}' AND c.relname IN ('trust', 'api_key')
    AND has_table_privilege(c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE')";

const QUESTION: &str = "
SELECT w.number::bigint
FROM (VALUES {wanted}) AS w (number, kind, privilege, object)
LEFT JOIN pg_namespace n ON n.nspname = '{s}'
LEFT JOIN pg_class c ON w.kind = 'table' AND c.relnamespace = n.oid AND c.relname = w.object
LEFT JOIN pg_proc p ON w.kind = 'function' AND p.pronamespace = n.oid
    AND format('%s(%s)', p.proname, oidvectortypes(p.proargtypes)) = w.object
WHERE (CASE w.kind
    WHEN 'schema' THEN has_schema_privilege(n.oid, w.privilege)
    WHEN 'table' THEN has_table_privilege(c.oid, w.privilege)
    ELSE has_function_privilege(p.oid, w.privilege)
END) IS NOT TRUE
ORDER BY w.number";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::settings::{RawValue, Setting as _};

    #[test]
    fn printed_grants_cover_each_right_that_doctor_checks() {
        let schema = SchemaName::read(&RawValue::One("gate".into())).unwrap();
        let printed = grants(&schema, None, "a \"role\"", "other");
        assert!(printed.contains("GRANT USAGE ON SCHEMA gate TO \"a \"\"role\"\"\";\n"), "{printed}");
        for (needs, role) in [(SERVE, "a \"role\""), (MANAGE, "other")] {
            assert!(needs.at(needs.count(), &schema, role).is_none());
            for position in 0..needs.count() {
                let statement = needs.at(position, &schema, role).unwrap();
                let (given, to) = statement.split_once(" TO ").unwrap();
                let (privilege, object) = given.strip_prefix("GRANT ").unwrap().split_once(" ON ").unwrap();
                let object = object.trim_start_matches("FUNCTION ");
                let is_granted = |line: &str| line.contains(privilege) && line.contains(object) && line.ends_with(to);
                assert!(printed.lines().any(is_granted), "{statement} is not in\n{printed}");
            }
        }
        let asked = SERVE.question(&schema);
        assert!(asked.contains("'function', 'EXECUTE', 'find(bytea[], uuid)'") && !asked.contains('{'), "{asked}");
    }
}
