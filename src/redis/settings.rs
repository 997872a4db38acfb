//! The Redis connection settings, and the file with the MAC key.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    base::{secret::Secret, text},
    record::bytes_from_hex,
};

crate::settings! {
    /// The Redis or Valkey that the replicas share: a single server, the master that Sentinels name, or a Cluster.
    /// Without Redis, each replica loads all records from the database. The Redis user needs the keys `~trustgate:*`,
    /// the channel `&trustgate:hints` and the commands
    /// `+ping +getrange +set +unlink +eval +evalsha +publish +subscribe`. Also grant
    /// `+time +hlen +hkeys +hstrlen +hget` for the deny list, `+hset +hdel` to the user that runs `trustgate deny`,
    /// `+role` for Sentinels, `+cluster|slots +asking` for a Cluster, and `+select` for a database other than 0.
    pub struct RedisSettings in "redis" {
        /// Redis URL: `redis://user@host:6379/0`, or `rediss://` for TLS. Append `?protocol=resp3` to use RESP3 instead
        /// of RESP2. For Sentinels or a Cluster, list the URLs of the Sentinels or of the nodes; it is enough if one of
        /// them answers. Unset: Redis is not used.
        url: Vec<Secret> = "",
        /// File that contains the URL, or several URLs, one per line. Replaces `url`. The server reads the file again
        /// for each new connection.
        url_file: Option<PathBuf> = "",
        /// Password for Redis, if the URL does not contain one.
        password: Option<Secret> = "",
        /// File that contains the password. Replaces `password`. The file is read again for each new connection.
        password_file: Option<PathBuf> = "",
        /// Name of the master in the configuration of the Sentinels. `redis.url` then lists the Sentinels with their
        /// port (usually 26379). The user, password, database and protocol in the first URL apply to the master. TLS
        /// applies to the master and the Sentinels. Unset: no Sentinels.
        sentinel_master: Option<String> = "",
        /// Password for the Sentinels, if they require one.
        sentinel_password: Option<Secret> = "",
        /// File that contains the password for the Sentinels. Replaces `sentinel_password`. The server reads the file
        /// again for each new connection.
        sentinel_password_file: Option<PathBuf> = "",
        /// Set to `true` if the servers in `redis.url` are nodes of a Cluster.
        cluster: bool = "false",
        /// File that contains the MAC key: 32 bytes, or 64 hexadecimal digits. The MAC key authenticates cached values
        /// and the deny list in Redis. All replicas need the same key. The server reads the file once, at startup. To
        /// change the key, save the output of `trustgate deny list`, restart every replica with the new key, and add
        /// the deny list entries again. Unset: the key that the first migration stored in the database.
        mac_key_file: Option<PathBuf> = "",
        /// PEM file with the certificate authorities to trust for TLS. The server certificates must match the host
        /// names or addresses in `redis.url`, and those that Sentinels or Cluster nodes announce. Unset: the
        /// certificate authorities of the operating system.
        ca_file: Option<PathBuf> = "",
        /// Timeout of one command. If a command times out, trustgate reads from the database instead. The sum of
        /// `redis.timeout` and `store.read_timeout` must not exceed `decision.deadline`.
        timeout: Duration = "20ms",
        /// Consecutive failures after which the Redis circuit breaker opens. While it is open, trustgate does not use
        /// Redis. Concurrent failures count as one.
        breaker_failures: u32 = "5",
        /// The time for which the circuit breaker stays open. After that, one command tries Redis again.
        breaker_open: Duration = "500ms",
    }
}

impl RedisSettings {
    /// Returns true if Redis is configured.
    #[must_use]
    pub const fn is_configured(&self) -> bool {
        !self.url.is_empty() || self.url_file.is_some()
    }
}

/// Reads the MAC key from the file at `path`: 32 bytes, or 64 hexadecimal digits.
///
/// # Errors
/// Returns an error if the file cannot be read or has other content.
pub(crate) fn read_mac_key(path: &Path) -> io::Result<[u8; 32]> {
    let bytes = fs::read(path)?;
    let from_hex = || bytes_from_hex(text::decode(&bytes).ok()?.trim());
    <[u8; 32]>::try_from(&*bytes).ok().or_else(from_hex).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "expected a file with 32 bytes or 64 hexadecimal digits")
    })
}
