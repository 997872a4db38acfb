//! Names and literals in SQL statements: every name that comes from the configuration is checked and quoted here.

use crate::base::settings::{RawValue, Setting};

/// The name of a PostgreSQL schema that needs no quotes: `[a-z_][a-z0-9_]*`, at most 63 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaName(String);

impl SchemaName {
    /// The name, safe to stand in a statement as it is.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Setting for SchemaName {
    const EXPECTED: &'static str = "a schema name of small letters, digits and _";
    fn read(written: &RawValue) -> Option<Self> {
        let name = String::read(written)?;
        let fits = name.len() <= 63
            && name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        fits.then_some(Self(name))
    }
}

/// The name of a column. Taken as it stands in the catalog: capital letters count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColumnName(String);

/// The name of a table, with its schema or, found by the role's `search_path`, without. Taken as it stands in the
/// catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableName {
    pub(crate) schema: Option<String>,
    pub(crate) name: String,
}

/// The longest identifier of PostgreSQL, in bytes.
const IDENTIFIER_BYTES_MAX: usize = 63;

/// What can be a name here. Not one in which our own statements have places to fill, or with which they quote.
fn is_identifier(name: &str) -> bool {
    let is_plain = !name.contains(['{', '}']) && !name.contains("$body$") && !name.chars().any(char::is_control);
    !name.is_empty() && name.len() <= IDENTIFIER_BYTES_MAX && is_plain
}

/// `name` as an identifier that means just this name.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `text` as a literal of SQL.
pub(crate) fn literal(text: &str) -> String {
    // Whatever `standard_conforming_strings` says, a backslash in an E-string is doubled to mean itself.
    format!("E'{}'", text.replace('\\', r"\\").replace('\'', "''"))
}

/// Bytes, given as hexadecimal digits, as a literal of SQL for a `bytea`.
pub(crate) fn bytes_literal(hex: &str) -> String {
    // An E-string, as in `literal`.
    format!(r"E'\\x{hex}'")
}

impl ColumnName {
    /// The name in a statement.
    pub(crate) fn sql(&self) -> String {
        quoted(&self.0)
    }

    /// The name as it stands in the catalog.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl TableName {
    /// The name in a statement.
    pub(crate) fn sql(&self) -> String {
        let name = quoted(&self.name);
        self.schema.as_deref().map_or_else(|| name.clone(), |schema| format!("{}.{name}", quoted(schema)))
    }
}

impl std::fmt::Display for TableName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(schema) = &self.schema {
            write!(f, "{schema}.")?;
        }
        f.write_str(&self.name)
    }
}

impl Setting for ColumnName {
    const EXPECTED: &'static str = "the name of a column";
    fn read(written: &RawValue) -> Option<Self> {
        String::read(written).filter(|name| is_identifier(name)).map(Self)
    }
}

impl Setting for TableName {
    const EXPECTED: &'static str = "a table, such as \"public.trust\"";
    fn read(written: &RawValue) -> Option<Self> {
        let text = String::read(written)?;
        let (schema, name) = match text.split_once('.') {
            Some((schema, name)) => (Some(schema.to_owned()), name.to_owned()),
            None => (None, text),
        };
        let fits = is_identifier(&name) && !name.contains('.') && schema.as_deref().is_none_or(is_identifier);
        fits.then_some(Self { schema, name })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(text: &str) -> RawValue {
        RawValue::One(text.to_owned())
    }

    #[test]
    fn names_are_quoted_so_that_they_mean_nothing_else() {
        let table = |text| TableName::read(&written(text)).map(|table| table.sql());
        assert_eq!(table("trust").as_deref(), Some("\"trust\""));
        assert_eq!(table("public.Trust").as_deref(), Some("\"public\".\"Trust\""));
        assert_eq!(table("a\"b.c; --").as_deref(), Some("\"a\"\"b\".\"c; --\""));
        for bad in ["", ".", "a.", ".b", "a.b.c", "a\nb", "a{s}", "$body$", &"x".repeat(64)] {
            assert_eq!(table(bad), None, "{bad:?}");
        }
        assert_eq!(ColumnName::read(&written("a.b")).map(|column| column.sql()).as_deref(), Some("\"a.b\""));
        assert_eq!(ColumnName::read(&written("")), None);
        assert_eq!(literal(r"a'b\c"), r"E'a''b\\c'");
    }
}
