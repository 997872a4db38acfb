//! Names and literals for SQL statements. Names that come from the configuration are checked and quoted here.

use crate::base::settings::{RawValue, Setting};

/// The name of a PostgreSQL schema that needs no quotes: `[a-z_][a-z0-9_]*`, at most 63 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaName(String);

impl SchemaName {
    /// Returns the name, which needs no quotes in a statement.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Setting for SchemaName {
    const EXPECTED: &'static str = "a schema name of lower-case letters, digits and _";
    fn read(written: &RawValue) -> Option<Self> {
        let name = String::read(written)?;
        let fits = name.len() <= 63
            && name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        fits.then_some(Self(name))
    }
}

/// The name of a column, spelt exactly as in the database catalog: capital letters matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColumnName(String);

/// The name of a table, spelt exactly as in the database catalog. If it has no schema, PostgreSQL looks the table up in
/// the role's `search_path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableName {
    pub(crate) schema: Option<String>,
    pub(crate) name: String,
}

/// The maximum length of a PostgreSQL identifier, in bytes.
const IDENTIFIER_BYTES_MAX: usize = 63;

/// Returns true if `name` can be the name of a table or column. Braces and `$body$` are refused, because the templates
/// of our statements use them as placeholders and as quotes.
fn is_identifier(name: &str) -> bool {
    let is_plain = !name.contains(['{', '}']) && !name.contains("$body$") && !name.chars().any(char::is_control);
    !name.is_empty() && name.len() <= IDENTIFIER_BYTES_MAX && is_plain
}

/// Formats `name` as a quoted SQL identifier.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Formats `text` as an SQL string literal.
pub(crate) fn literal(text: &str) -> String {
    // In an E-string, two backslashes always mean one backslash. In a plain string, their meaning depends on
    // `standard_conforming_strings`.
    format!("E'{}'", text.replace('\\', r"\\").replace('\'', "''"))
}

/// Formats a `bytea` as an SQL literal, from the hexadecimal digits of its bytes.
pub(crate) fn bytes_literal(hex: &str) -> String {
    // Use an E-string for the same reason as in `literal`.
    format!(r"E'\\x{hex}'")
}

impl ColumnName {
    /// Returns the quoted name, for a statement.
    pub(crate) fn sql(&self) -> String {
        quoted(&self.0)
    }

    /// Returns the name without quotes, as in the catalog.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl TableName {
    /// Returns the quoted name, for a statement.
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
    fn names_are_quoted_and_malformed_names_are_refused() {
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
