//! The `trustgate deny` commands: they add, remove and list entries in the deny list in Redis. Replicas read this list
//! even while the database is unavailable.
//!
//! These commands do not change keys or trusts. A deny list entry expires, whereas a revocation is permanent.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    base::{
        clock::{Clock as _, DatabaseTime, SystemClock},
        metrics::{IntGauge, Registry},
    },
    freshness::deny_list::{
        entries::Denied,
        redis::{SharedError, SharedList, Term},
    },
    redis::{QueryError, Redis, RedisMetrics, RedisSettings, read_mac_key},
    store::{self, Env, Missing, StoreError, StoreSettings},
};

/// The maximum duration of an entry: a year. To deny a key for longer, revoke it.
const LIFE_MAX: Duration = Duration::from_hours(366 * 24);
/// The maximum time to wait for a connection to Redis: slightly longer than one connection attempt may take.
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// The interval between attempts to run a command while there is no connection.
const CONNECT_POLL: Duration = Duration::from_millis(20);
/// The timeout of a Redis command. No check waits for these commands, so the timeout can be longer than
/// `redis.timeout`.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a `trustgate deny` command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DenyError {
    #[error("{what} must be {expected}")]
    Invalid { what: &'static str, expected: &'static str },
    /// Redis is not configured. The value contains the entries that the command was asked to add. It is empty for other
    /// commands.
    #[error("{}", without_redis(.0))]
    NoRedis(Vec<Denied>),
    #[error("redis.mac_key_file: cannot read {path}: {source}")]
    MacKeyFile { path: PathBuf, source: io::Error },
    /// The database has no MAC key, because it contains the operator's existing table and not our own tables.
    #[error(
        "deny list MAC key not found: a database with an existing table has none. Set redis.mac_key_file for this \
         command and for `serve`"
    )]
    NoMacKey,
    /// The MAC key cannot be read from the database.
    #[error(
        "deny list MAC key not read from the database: {0}\n  \
         To deny without the database, set redis.mac_key_file for this command and for `serve`"
    )]
    Store(#[from] StoreError),
    #[error("{}", of_redis(.0))]
    Redis(#[from] SharedError),
    /// The metrics that the connection to Redis needs could not be created.
    #[error("deny command cannot start: {0}")]
    Start(#[from] prometheus::Error),
}

fn without_redis(denied: &[Denied]) -> String {
    let problem = "redis.url is not set: without Redis, each replica reads the deny list only from its own file, \
                   which freshness.deny_file names";
    if denied.is_empty() {
        return problem.to_owned();
    }
    let lines: Vec<_> = denied.iter().map(|denied| format!("  {}", denied.line())).collect();
    format!(
        "{problem}. On each replica, add\n\n{}\n\nto that file. To let the entry expire, append \
         ` until 2026-01-31T12:00:00Z` to the line",
        lines.join("\n")
    )
}

fn of_redis(error: &SharedError) -> String {
    match error {
        SharedError::Down(QueryError::Failed(fault)) => format!("deny list request to Redis failed: {fault}"),
        SharedError::Down(QueryError::Paused) => "no connection to Redis".to_owned(),
        SharedError::Down(QueryError::WrongType | QueryError::NoScript) => {
            "deny list in Redis is unusable: `trustgate:deny` is not a hash. Delete it in Redis, then add the entries \
             again"
                .to_owned()
        }
        other => other.to_string(),
    }
}

/// A deny list entry, as the commands show it. The times are by Redis's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DenyEntry {
    /// The key, trust or digest that the entry denies.
    pub denied: Denied,
    /// When the entry was set.
    pub set_at: DatabaseTime,
    /// When the entry expires.
    pub until: DatabaseTime,
}

impl DenyEntry {
    const fn new(denied: Denied, term: Term) -> Self {
        let at = DatabaseTime::from_micros;
        Self { denied, set_at: at(term.set_at), until: at(term.end) }
    }
}

/// The content of the deny list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    /// The entries that have not expired, ordered by expiry.
    pub entries: Vec<DenyEntry>,
    /// The number of entries that replicas running this release ignore, because the MAC is wrong or a different release
    /// wrote them.
    pub refused: usize,
}

/// Reads the MAC key from `redis.mac_key_file` if that is set, else from the database.
///
/// # Errors
/// The file or the database cannot be read, or the database has no MAC key.
pub(crate) async fn mac_key(redis: &RedisSettings, store: &StoreSettings, env: Env<'_>) -> Result<[u8; 32], DenyError> {
    if let Some(path) = &redis.mac_key_file {
        return read_mac_key(path).map_err(|source| DenyError::MacKeyFile { path: path.clone(), source });
    }
    let source = store::open_lookup(store, env, Arc::new(SystemClock))?;
    let limit = store.connect_timeout;
    let reading = async {
        source.prepare(Missing::Refuse).await?;
        Ok(source.redis_mac_key().await?)
    };
    let key = timeout(2 * limit, reading).await;
    source.close().await;
    let late = || StoreError::Unusable(format!("no answer within {:?}", 2 * limit));
    key.unwrap_or_else(|_| Err(late()))?.ok_or(DenyError::NoMacKey)
}

/// Reads and changes the deny list in Redis.
pub(crate) struct Denials(SharedList);

impl Denials {
    /// Connects to the Redis server in `settings`, runs `work` on the deny list there, and closes the connection when
    /// `work` ends.
    ///
    /// # Errors
    /// The error of `work`, or [`DenyError::Start`].
    pub(crate) async fn with<T>(
        settings: RedisSettings,
        mac_key: [u8; 32],
        work: impl AsyncFnOnce(&Self) -> Result<T, DenyError>,
    ) -> Result<T, DenyError> {
        // `connected` repeats a command until there is a connection, so the circuit breaker must not open after
        // failures.
        let settings = RedisSettings { timeout: COMMAND_TIMEOUT, breaker_failures: u32::MAX, ..settings };
        let metrics = RedisMetrics::register(&Registry::new(), IntGauge::new("breaker", "Not exported.")?)?;
        let stop = CancellationToken::new();
        let (redis, keeper) = Redis::new(&settings.clone(), settings, Arc::new(SystemClock), metrics, stop);
        let denials = Self(SharedList::new(redis, Arc::new(OnceLock::from(mac_key))));
        tokio::select! {
            done = work(&denials) => done,
            () = keeper => unreachable!("the connection task runs until `stop` is cancelled, and nothing cancels it"),
        }
    }

    /// Adds an entry for each item of `denied`. The entries expire after `life`.
    ///
    /// # Errors
    /// `life` is zero or longer than a year, or Redis failed.
    pub(crate) async fn add(&self, denied: &[Denied], life: Duration) -> Result<Vec<DenyEntry>, DenyError> {
        if life.is_zero() || life > LIFE_MAX {
            return Err(DenyError::Invalid {
                what: "the duration of an entry",
                expected: "longer than zero and at most a year",
            });
        }
        self.set(denied, life).await
    }

    /// Makes the entries for `denied` expire now, including entries that Redis has lost but replicas still remember.
    ///
    /// # Errors
    /// Redis failed.
    pub(crate) async fn remove(&self, denied: &[Denied]) -> Result<Vec<DenyEntry>, DenyError> {
        self.set(denied, Duration::ZERO).await
    }

    /// Reads the deny list.
    ///
    /// # Errors
    /// Redis failed.
    pub(crate) async fn list(&self) -> Result<Listed, DenyError> {
        let found = self.connected(async || self.0.read().await).await?;
        let active = found.entries.into_iter().filter(|(_, term)| found.now < term.end);
        let mut entries: Vec<_> = active.map(|(denied, term)| DenyEntry::new(denied, term)).collect();
        entries.sort_by_cached_key(|entry| (entry.until, entry.denied.line()));
        Ok(Listed { entries, refused: found.refused + found.foreign })
    }

    async fn set(&self, denied: &[Denied], life: Duration) -> Result<Vec<DenyEntry>, DenyError> {
        let terms = self.connected(async || self.0.set(denied, life).await).await?;
        Ok(terms.into_iter().map(|(denied, term)| DenyEntry::new(denied, term)).collect())
    }

    /// Repeats `work` for up to [`CONNECT_MAX`] until there is a connection.
    async fn connected<T>(&self, work: impl AsyncFn() -> Result<T, SharedError>) -> Result<T, DenyError> {
        let start = SystemClock.now();
        loop {
            match work().await {
                Err(SharedError::Down(QueryError::Paused)) if SystemClock.now().since(start) < CONNECT_MAX => {
                    sleep(CONNECT_POLL).await;
                }
                done => return Ok(done?),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::record::KeyId;

    #[test]
    fn error_without_redis_shows_the_line_for_the_deny_file() {
        let id = Uuid::from_u128(7);
        let message = DenyError::NoRedis(vec![Denied::Key(KeyId(id))]).to_string();
        assert!(message.starts_with("redis.url is not set") && message.contains("freshness.deny_file"), "{message}");
        assert!(message.contains(&format!("\n  key {id}\n")), "{message}");
        assert!(!DenyError::NoRedis(Vec::new()).to_string().contains("add"));
    }
}
