//! Somebody else's table, by its columns: what the settings say of it, in the forms that statements need.
//!
//! Never talks to a database. Names go into statements as quoted identifiers, and only through here.

pub(crate) mod postgres;

use sha2::{Digest, Sha256};

use super::{
    names::{ColumnName, TableName},
    settings::{DigestForm, Preset, StoreSettings},
};
use crate::record::hex;

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

/// The identity of the existing table that `settings` name, in the database at `place`, in hexadecimal: it differs for
/// another table and for another use of its columns. `None`: the tables are our own. A table that is not attached has no
/// history that could identify it.
#[must_use]
pub fn identity_of(settings: &StoreSettings, place: &str) -> Option<String> {
    ExistingTable::of(settings).map(|table| table.identity_at(place))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::settings::{RawValue, Setting as _};

    #[test]
    fn another_use_of_a_column_is_another_identity() {
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
