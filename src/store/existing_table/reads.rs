//! The queries that read an existing table on PostgreSQL.

use super::ExistingTable;
use crate::{
    record::{Digests, KeyId},
    store::{
        names::{ColumnName, bytes_literal},
        reads::postgres::{CLOCK, TIMELINE, micros},
        settings::DigestForm,
    },
};

impl ExistingTable {
    /// Returns the SQL condition that row `t` stores one of `digests`.
    pub(crate) fn has_digest(&self, digests: &Digests) -> String {
        let form = |hex: String| match self.digest_form {
            DigestForm::Hex => format!("'{hex}'"),
            DigestForm::Bytes => bytes_literal(&hex),
        };
        let list: Vec<_> = digests.all().map(|digest| form(digest.to_hex())).collect();
        format!("t.{} IN ({})", self.digest.sql(), list.join(", "))
    }

    /// Returns the SQL condition that row `t` has the id `key`.
    pub(crate) fn has_id(&self, key: KeyId) -> String {
        format!("t.{} = '{key}'", self.id.sql())
    }

    /// Returns a query for the rows that satisfy `condition`, with the columns of the function `find_key`. A table that
    /// is not attached has no versions, so all its values get version 0.
    pub(crate) fn find(&self, condition: &str) -> String {
        let (system, timeline, clock) = ("c.system_identifier", TIMELINE, CLOCK);
        let (date, from) = if self.attached {
            (
                format!("v.version, encode(v.nonce, 'hex'), m.incarnation::text, {system}, {timeline}, {clock}"),
                "(SELECT version, nonce FROM {s}.version ORDER BY version DESC LIMIT 1) v
                 CROSS JOIN {s}.meta m CROSS JOIN pg_control_system() c",
            )
        } else {
            // The query reads the timeline only because that fails on a standby. It does not use the value.
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
                |column| micros(&format!("nullif(t.{}, '{endless}')", column.sql())),
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
}
