//! Somebody else's table, by its columns: what the settings say of it, in the forms that statements need.
//!
//! Never talks to a database. Names go into statements as quoted identifiers, and only through here.

pub(crate) mod postgres;

use sha2::{Digest, Sha256};

use super::{Preset, StoreSettings};
use crate::{
    base::settings::{Setting, RawValue},
    record::hex,
};

crate::setting_enum! {
    /// How an existing table holds the SHA-256 digest of a key.
    pub enum DigestForm ("\"hex\" or \"bytes\"") {
        /// 64 hexadecimal digits in small letters: `char(64)`, `varchar` or `text`.
        Hex = "hex",
        /// 32 bytes: `bytea`.
        Bytes = "bytes",
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

/// An existing table and what its columns mean.
#[derive(Clone, Debug)]
pub(crate) struct ExistingTable {
    pub(crate) table: TableName,
    /// The row's own id: the key id.
    pub(crate) id: ColumnName,
    pub(crate) trust: ColumnName,
    pub(crate) digest: ColumnName,
    pub(crate) digest_form: DigestForm,
    pub(crate) enabled: Option<ColumnName>,
    pub(crate) scopes: Option<ColumnName>,
    pub(crate) not_before: Option<ColumnName>,
    pub(crate) expires_at: Option<ColumnName>,
    pub(crate) revoked_at: Option<ColumnName>,
    /// Whether its changes are named.
    pub(crate) attached: bool,
}

impl ExistingTable {
    /// The table that `settings` name; `None`: our own are used.
    pub(crate) fn of(settings: &StoreSettings) -> Option<Self> {
        let preset = settings.preset.map(|Preset::TrustTable| TableName { schema: None, name: "trust".to_owned() });
        Some(Self {
            table: settings.table.clone().or(preset)?,
            id: settings.table_id.clone(),
            trust: settings.table_trust.clone(),
            digest: settings.table_digest.clone(),
            digest_form: settings.table_digest_form,
            enabled: settings.table_enabled.clone(),
            scopes: settings.table_scopes.clone(),
            not_before: settings.table_not_before.clone(),
            expires_at: settings.table_expires_at.clone(),
            revoked_at: settings.table_revoked_at.clone(),
            attached: settings.attached,
        })
    }

    /// Every column that a decision reads, with what it is for; one may have two uses.
    pub(crate) fn columns(&self) -> impl Iterator<Item = (&'static str, &ColumnName)> {
        let always = [("id", &self.id), ("trust", &self.trust), ("digest", &self.digest)].into_iter();
        let others = [
            ("enabled", &self.enabled),
            ("scopes", &self.scopes),
            ("not_before", &self.not_before),
            ("expires_at", &self.expires_at),
            ("revoked_at", &self.revoked_at),
        ];
        always.chain(others.into_iter().filter_map(|(purpose, column)| Some((purpose, column.as_ref()?))))
    }

    /// What tells this table in the database at `place` from every other, in hexadecimal.
    pub(crate) fn identity_at(&self, place: &str) -> String {
        hex(&Sha256::digest(format!("{} {place}", self.identity())))
    }

    /// What tells this table and the use of its columns from every other, in hexadecimal: who reads a table that is
    /// attached makes sure by it that the same columns are watched.
    pub(crate) fn identity(&self) -> String {
        let columns = self.columns().map(|(purpose, column)| format!("{purpose}={}", column.sql()));
        let all: Vec<_> = [self.table.sql(), self.digest_form.as_str().to_owned()].into_iter().chain(columns).collect();
        hex(&Sha256::digest(all.join(" ")))
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

    #[test]
    fn another_use_of_a_column_is_another_identity() {
        let settings = StoreSettings { preset: Some(Preset::TrustTable), ..StoreSettings::default() };
        let table = ExistingTable::of(&settings).unwrap();
        let column = || ColumnName("gone_at".to_owned());
        let others = [
            ExistingTable { revoked_at: Some(column()), ..table.clone() },
            ExistingTable { expires_at: Some(column()), ..table.clone() },
            ExistingTable { trust: column(), ..table.clone() },
            ExistingTable { digest_form: DigestForm::Bytes, ..table.clone() },
            ExistingTable { table: TableName { schema: Some("public".into()), name: "trust".into() }, ..table.clone() },
        ];
        let mut identities: Vec<_> = others.iter().chain([&table]).map(ExistingTable::identity).collect();
        identities.sort_unstable();
        identities.dedup();
        assert_eq!(identities.len(), 6);
        assert_eq!(table.identity(), ExistingTable { attached: true, ..table.clone() }.identity());
        assert_ne!(table.identity_at("here"), table.identity_at("there"));
    }
}
