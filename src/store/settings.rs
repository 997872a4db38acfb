//! The settings of the database.

use std::{path::PathBuf, time::Duration};

use super::names::{ColumnName, SchemaName, TableName};
use crate::base::secret::Secret;

crate::settings! {
    /// The database that holds trusts and keys.
    pub struct StoreSettings in "store" {
        /// Where the database is: `sqlite:///path/to/trustgate.db`, or
        /// `postgres://user@host/database?sslmode=verify-full`. Unset: an embedded SQLite file in `$STATE_DIRECTORY`,
        /// else in `$XDG_STATE_HOME/trustgate`, else in `~/.local/state/trustgate`.
        url: Option<Secret> = "",
        /// A file that holds the URL; read again at every connect.
        url_file: Option<PathBuf> = "",
        /// The password, where the URL holds none: `url`'s, and `management_url`'s too.
        password: Option<Secret> = "",
        /// A file that holds the password; read again at every connect.
        password_file: Option<PathBuf> = "",
        /// What everything that changes the database connects to, where it uses a role of its own: `migrate`, `attach`,
        /// `detach`, `trust`, `key`, `cache`, `store copy` and the canary. Unset: `url`.
        management_url: Option<Secret> = "",
        /// A file that holds the management URL.
        management_url_file: Option<PathBuf> = "",
        /// The PostgreSQL schema that holds the tables.
        schema: SchemaName = "trustgate",
        /// `trust-table`: read an existing table `trust(id uuid, api_key_hash char(64) null)` instead of our own
        /// tables.
        preset: Option<Preset> = "",
        /// Any existing PostgreSQL table to read instead of our own tables, with its schema: `public.tokens`. Its
        /// columns are named by the settings that begin with `table_`. See `docs/migrating.md`.
        table: Option<TableName> = "",
        /// In `table`: the id of the row, a `uuid`; it is the key id.
        table_id: ColumnName = "id",
        /// In `table`: the id of the trust, a `uuid`; may be the same column.
        table_trust: ColumnName = "id",
        /// In `table`: the SHA-256 digest of the key; null where there is none.
        table_digest: ColumnName = "api_key_hash",
        /// How that column holds the digest: `hex` (small letters) or `bytes` (`bytea`).
        table_digest_form: DigestForm = "hex",
        /// In `table`: whether the trust is enabled, a `boolean`; null counts as false. Unset: always.
        table_enabled: Option<ColumnName> = "",
        /// In `table`: the scopes of the key, a `text[]`. Unset: none.
        table_scopes: Option<ColumnName> = "",
        /// In `table`: when the key begins to be valid, a `timestamptz`. Unset, or null: at once.
        table_not_before: Option<ColumnName> = "",
        /// In `table`: when the key expires, a `timestamptz`. Unset, or null: never.
        table_expires_at: Option<ColumnName> = "",
        /// In `table`: when the key was revoked, a `timestamptz`. Unset, or null: it was not.
        table_revoked_at: Option<ColumnName> = "",
        /// Whether `trustgate attach` has been run on `table`, so that the table names its changes: then what was read
        /// is relied on under the lease, as with our own tables.
        attached: bool = "false",
        /// Connections to the database for reads of checks, at most; one more is used to watch it, and with PostgreSQL and
        /// `freshness.hints` another to listen. With SQLite no more than two for each processor.
        connections_max: u32 = "8",
        /// Reads of checks that may wait or run at one time. A quarter is kept for keys that were good before.
        reads_max: u32 = "64",
        /// How long one read may take. Must leave room inside `decision.deadline`.
        read_timeout: Duration = "100ms",
        /// How long connecting may take.
        connect_timeout: Duration = "2s",
        /// Failed reads in a row after which the database is given a pause; reads that failed together failed once.
        breaker_failures: u32 = "5",
        /// How long that pause is.
        breaker_open: Duration = "250ms",
    }
}

impl StoreSettings {
    /// Whether keys are read from somebody else's table.
    #[must_use]
    pub const fn reads_existing(&self) -> bool {
        self.preset.is_some() || self.table.is_some()
    }

    /// Whether changes of what is read are named, as a lease needs it.
    #[must_use]
    pub const fn tracks_changes(&self) -> bool {
        !self.reads_existing() || self.attached
    }
}

crate::setting_enum! {
    /// Somebody else's tables, read as they are.
    pub enum Preset ("\"trust-table\"") {
        /// `trust(id uuid, api_key_hash char(64) null)`: one SHA-256 digest in hexadecimal per trust.
        TrustTable = "trust-table",
    }
}

crate::setting_enum! {
    /// How an existing table holds the SHA-256 digest of a key.
    pub enum DigestForm ("\"hex\" or \"bytes\"") {
        /// 64 hexadecimal digits in small letters: `char(64)`, `varchar` or `text`.
        Hex = "hex",
        /// 32 bytes: `bytea`.
        Bytes = "bytes",
    }
}
