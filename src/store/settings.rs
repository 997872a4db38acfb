//! The settings of the section `store`: the database, and how checks read it.

use std::{path::PathBuf, time::Duration};

use super::names::{ColumnName, SchemaName, TableName};
use crate::base::secret::Secret;

crate::settings! {
    /// The database that contains trusts and keys.
    pub struct StoreSettings in "store" {
        /// Database URL: `sqlite:///path/to/trustgate.db`, or `postgres://user@host/database?sslmode=verify-full`.
        /// Unset: an embedded SQLite file in `$STATE_DIRECTORY`, else in `$XDG_STATE_HOME/trustgate`, else in
        /// `~/.local/state/trustgate`.
        url: Option<Secret> = "",
        /// File that contains the URL. Replaces `url`. The file is read again for each new connection.
        url_file: Option<PathBuf> = "",
        /// Password for the database, used with `url` and with `management_url` if they contain none.
        password: Option<Secret> = "",
        /// File that contains the password. Replaces `password`. The file is read again for each new connection.
        password_file: Option<PathBuf> = "",
        /// Database URL with a separate role, for everything that changes it: `migrate`, `attach`, `detach`, `trust`,
        /// `key`, `pepper`, `cache`, `store copy` and `canary`. Unset: `url`.
        management_url: Option<Secret> = "",
        /// File that contains the management URL. Replaces `management_url`. The file is read again for each new
        /// connection.
        management_url_file: Option<PathBuf> = "",
        /// PostgreSQL schema for trustgate's tables.
        schema: SchemaName = "trustgate",
        /// Set to `trust-table` to read the keys from an existing table `trust(id uuid, api_key_hash char(64) null)`
        /// instead of trustgate's own tables.
        preset: Option<Preset> = "",
        /// Existing PostgreSQL table to read the keys from instead of trustgate's own tables, with its schema:
        /// `public.tokens`. The settings that begin with `table_` name its columns. See `docs/migrating.md`.
        table: Option<TableName> = "",
        /// Column of `table` with the row's id, a `uuid`. It is the key id.
        table_id: ColumnName = "id",
        /// Column of `table` with the id of the trust, a `uuid`. It may be the same column as `table_id`.
        table_trust: ColumnName = "id",
        /// Column of `table` with the SHA-256 digest of the key. Null: the row has no key.
        table_digest: ColumnName = "api_key_hash",
        /// Format of the column `table_digest`: `hex` (lower-case hexadecimal digits) or `bytes` (`bytea`).
        table_digest_form: DigestForm = "hex",
        /// Column of `table` that is true if the trust is enabled, a `boolean`. Null counts as false. Unset: all trusts
        /// are enabled.
        table_enabled: Option<ColumnName> = "",
        /// Column of `table` with the scopes of the key, a `text[]`. Unset: keys have no scopes.
        table_scopes: Option<ColumnName> = "",
        /// Column of `table` with the time from which the key is valid, a `timestamptz`. Unset or null: the key is
        /// valid at once.
        table_not_before: Option<ColumnName> = "",
        /// Column of `table` with the time at which the key expires, a `timestamptz`. Unset or null: the key does not
        /// expire.
        table_expires_at: Option<ColumnName> = "",
        /// Column of `table` with the time at which the key was revoked, a `timestamptz`. Unset or null: the key is not
        /// revoked.
        table_revoked_at: Option<ColumnName> = "",
        /// Set to `true` before `trustgate migrate` and `trustgate attach`, and leave it set: the triggers on `table`
        /// then record its changes, and cached keys are used under the lease, as with trustgate's own tables.
        attached: bool = "false",
        /// Maximum number of connections for the reads that checks make. The server opens one more for polls, and
        /// another for notifications with PostgreSQL and `freshness.notifications`. With SQLite it opens at most two
        /// for each processor.
        connections_max: u32 = "8",
        /// Maximum number of reads by checks that may wait or run at the same time. A quarter of them is reserved for
        /// keys that are cached as valid, so that a flood of unknown keys cannot use all of them.
        reads_max: u32 = "64",
        /// Timeout of one read. Together with `redis.timeout` it must fit into `decision.deadline`.
        read_timeout: Duration = "100ms",
        /// Timeout for connecting to the database.
        connect_timeout: Duration = "2s",
        /// Consecutive failed reads after which the database circuit breaker opens. Concurrent failures count as one.
        breaker_failures: u32 = "5",
        /// The time that the circuit breaker stays open. After that, one read tries the database again.
        breaker_open: Duration = "250ms",
    }
}

impl StoreSettings {
    /// Returns true if keys are read from an existing table.
    #[must_use]
    pub const fn reads_existing(&self) -> bool {
        self.preset.is_some() || self.table.is_some()
    }

    /// Returns true if changes to trusts and keys are tracked in the change log, which the lease needs.
    #[must_use]
    pub const fn tracks_changes(&self) -> bool {
        !self.reads_existing() || self.attached
    }
}

crate::setting_enum! {
    /// Existing tables with a known layout.
    pub enum Preset ("\"trust-table\"") {
        /// `trust(id uuid, api_key_hash char(64) null)`: one SHA-256 digest in hexadecimal per trust.
        TrustTable = "trust-table",
    }
}

crate::setting_enum! {
    /// The format of the SHA-256 digests in an existing table.
    pub enum DigestForm ("\"hex\" or \"bytes\"") {
        /// 64 lower-case hexadecimal digits: `char(64)`, `varchar` or `text`.
        Hex = "hex",
        /// 32 bytes: `bytea`.
        Bytes = "bytes",
    }
}
