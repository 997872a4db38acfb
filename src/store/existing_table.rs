//! The operator's existing table: its columns, as the settings describe them, and its identity.
//!
//! This module does no I/O. It puts names of tables and columns into SQL statements only as quoted identifiers.

pub(crate) mod attach;
pub(crate) mod reads;

use sha2::{Digest, Sha256};

use super::{
    names::{ColumnName, TableName},
    settings::{DigestForm, Preset, StoreSettings},
};
use crate::record::hex;

/// An existing table and the meaning of its columns.
#[derive(Clone, Debug)]
pub(crate) struct ExistingTable {
    pub(crate) table: TableName,
    /// The column with the row's id, which is the key id.
    pub(crate) id: ColumnName,
    pub(crate) trust: ColumnName,
    pub(crate) digest: ColumnName,
    pub(crate) digest_form: DigestForm,
    pub(crate) enabled: Option<ColumnName>,
    pub(crate) scopes: Option<ColumnName>,
    pub(crate) not_before: Option<ColumnName>,
    pub(crate) expires_at: Option<ColumnName>,
    pub(crate) revoked_at: Option<ColumnName>,
    /// The setting `store.attached`: true if triggers, which `trustgate attach` adds, record changes to the table.
    pub(crate) attached: bool,
}

impl ExistingTable {
    /// Returns the existing table that `settings` describe; `None` if trustgate uses its own tables.
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

    /// Returns the columns that decisions read, each with its purpose. A column can appear twice, with different
    /// purposes.
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

    /// Returns a hash of [`Self::identity`] and `place`, in hexadecimal, which identifies the table in one database.
    pub(crate) fn identity_at(&self, place: &str) -> String {
        hex(&Sha256::digest(format!("{} {place}", self.identity())))
    }

    /// Returns a hash of the table name, the format of the digests and the purpose of each column, in hexadecimal.
    /// `trustgate attach` records this hash. A server that reads the table compares the recorded hash with the hash of
    /// its own settings, to make sure that the triggers track the columns that it reads.
    pub(crate) fn identity(&self) -> String {
        let columns = self.columns().map(|(purpose, column)| format!("{purpose}={}", column.sql()));
        let all: Vec<_> = [self.table.sql(), self.digest_form.as_str().to_owned()].into_iter().chain(columns).collect();
        hex(&Sha256::digest(all.join(" ")))
    }
}

/// Returns the identity of the existing table in `settings`, in the database at `place`, in hexadecimal; `None` if
/// trustgate uses its own tables. A different table, or a table whose columns have different purposes, has a different
/// identity. Cached values include this identity because a table that is not attached has no lineage.
#[must_use]
pub(crate) fn identity_of(settings: &StoreSettings, place: &str) -> Option<String> {
    ExistingTable::of(settings).map(|table| table.identity_at(place))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::settings::{RawValue, Setting as _};

    #[test]
    fn identity_depends_on_the_table_the_digest_form_and_the_use_of_each_column() {
        let settings = StoreSettings { preset: Some(Preset::TrustTable), ..StoreSettings::default() };
        let table = ExistingTable::of(&settings).unwrap();
        let column = || ColumnName::read(&RawValue::One("gone_at".to_owned())).unwrap();
        let others = [
            ExistingTable { revoked_at: Some(column()), ..table.clone() },
            ExistingTable { expires_at: Some(column()), ..table.clone() },
            ExistingTable { trust: column(), ..table.clone() },
            ExistingTable { digest_form: DigestForm::Bytes, ..table.clone() },
            ExistingTable {
                table: TableName::read(&RawValue::One("public.trust".to_owned())).unwrap(),
                ..table.clone()
            },
        ];
        let mut identities: Vec<_> = others.iter().chain([&table]).map(ExistingTable::identity).collect();
        identities.sort_unstable();
        identities.dedup();
        assert_eq!(identities.len(), 6);
        assert_eq!(table.identity(), ExistingTable { attached: true, ..table.clone() }.identity());
        assert_ne!(table.identity_at("here"), table.identity_at("there"));
    }
}
