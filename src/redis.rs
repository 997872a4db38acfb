//! Redis: a cache in front of the database that replicas share. No fault of it changes an answer.
//!
//! Never the system of record: whatever it holds was read from the database and carries that read's date.

use std::{path::PathBuf, time::Duration};

use crate::secret::Secret;

crate::settings! {
    /// Redis or Valkey, as a cache that replicas share. Optional.
    pub struct RedisSettings in "redis" {
        /// Where Redis is: `redis://user@host:6379/0`, or `rediss://...` for TLS. Unset: no Redis.
        url: Option<Secret> = "",
        /// A file that holds the URL; read again at every connect.
        url_file: Option<PathBuf> = "",
        /// The password, where the URL holds none.
        password: Option<Secret> = "",
        /// A file that holds the password; read again at every connect.
        password_file: Option<PathBuf> = "",
        /// A file that holds the key with which values in Redis are signed. Unset: the key that the first migration
        /// put into the database.
        mac_key_file: Option<PathBuf> = "",
        /// Certificates (PEM) that the server's certificate is checked against. Unset: those of the system.
        ca_file: Option<PathBuf> = "",
        /// How long one read may take before the database is asked instead.
        timeout: Duration = "20ms",
        /// Failed calls in a row after which Redis is given a pause.
        breaker_failures: u32 = "5",
        /// How long that pause is.
        breaker_open: Duration = "500ms",
    }
}
