//! Denying at once, with the database or without: entries of the list that replicas read in Redis.
//!
//! Never changes a key or a trust: an entry ends by itself, a revocation does not.

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

/// The longest life of an entry: a year. What is to be denied for longer is to be revoked.
const LIFE_MAX: Duration = Duration::from_hours(366 * 24);
/// How long a connection to Redis is waited for: somewhat longer than one attempt may take.
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// How often it is looked whether there is one.
const CONNECT_POLL: Duration = Duration::from_millis(20);
/// How long a command may take. Nobody's request waits for it, so it may be longer than `redis.timeout`.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(2);

/// Why nothing was denied or listed.
#[derive(Debug, thiserror::Error)]
pub enum DenyError {
    /// What was given cannot be used.
    #[error("{what} must be {expected}")]
    Invalid {
        /// What was given, as a name of the thing.
        what: &'static str,
        /// What it must be.
        expected: &'static str,
    },
    /// There is no list that all replicas read.
    #[error("{}", without_redis(.0))]
    NoRedis(Vec<Denied>),
    /// The file with the key of the MAC cannot be used.
    #[error("redis.mac_key_file: cannot read {path}: {source}")]
    MacKeyFile {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        source: io::Error,
    },
    /// The database holds no key of the MAC: its tables are not ours.
    #[error("these tables hold no key to authenticate entries with: set redis.mac_key_file, here and for `serve`")]
    NoMacKey,
    /// The key of the MAC is in the database, which failed.
    #[error(
        "the key that authenticates entries is in the database: {0}\n  redis.mac_key_file, here and for `serve`, makes this independent of the database"
    )]
    Store(#[from] StoreError),
    /// Redis failed.
    #[error("{}", of_redis(.0))]
    Redis(#[from] SharedError),
    /// Something of the program itself failed.
    #[error("cannot start: {0}")]
    Start(#[from] prometheus::Error),
}

fn without_redis(denied: &[Denied]) -> String {
    let place = "redis.url is not set, so there is no list that every replica reads; what is denied stands in the file \
                 that freshness.deny_file names, on each of them";
    if denied.is_empty() {
        return place.to_owned();
    }
    let lines: Vec<_> = denied.iter().map(|denied| format!("  {}", denied.line())).collect();
    format!(
        "{place}. For this entry add\n\n{}\n\nto that file; ` until 2026-01-31T12:00:00Z` after it gives it an end",
        lines.join("\n")
    )
}

fn of_redis(error: &SharedError) -> String {
    match error {
        SharedError::Down(QueryError::Failed(fault)) => format!("the deny list in Redis: {fault}"),
        SharedError::Down(QueryError::Paused) => "no connection to Redis".to_owned(),
        SharedError::Down(QueryError::WrongType | QueryError::NoScript) => {
            "what stands in Redis under the name of the deny list is none".to_owned()
        }
        other => format!("the deny list in Redis: {other}"),
    }
}

/// An entry as people see it. Its times are by Redis's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it denies.
    pub denied: Denied,
    /// When it was set.
    pub set_at: DatabaseTime,
    /// When it ends.
    pub until: DatabaseTime,
}

impl Entry {
    const fn new(denied: Denied, term: Term) -> Self {
        let at = DatabaseTime::from_micros;
        Self { denied, set_at: at(term.set_at), until: at(term.end) }
    }
}

/// What the list holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Entries that deny, in the order of their ends.
    pub entries: Vec<Entry>,
    /// Entries that are not genuine, or of another release: no replica of this one heeds them.
    pub refused: usize,
}

/// The key of the MAC: from its file, else from the database.
///
/// # Errors
/// Neither has it.
pub async fn mac_key(redis: &RedisSettings, store: &StoreSettings, env: Env<'_>) -> Result<[u8; 32], DenyError> {
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

/// The list in Redis, for those who change it.
pub struct Denials(SharedList);

impl Denials {
    /// Lets `work` use the list in the Redis that `settings` name, over a connection that lasts as long.
    ///
    /// # Errors
    /// Those of `work`.
    pub async fn with<T>(
        settings: RedisSettings,
        mac_key: [u8; 32],
        work: impl AsyncFnOnce(&Self) -> Result<T, DenyError>,
    ) -> Result<T, DenyError> {
        // Whoever waits at a terminal waits for a connection, so a failed command is no reason for a pause.
        let settings = RedisSettings { timeout: COMMAND_TIMEOUT, breaker_failures: u32::MAX, ..settings };
        let metrics = RedisMetrics::register(&Registry::new(), IntGauge::new("breaker", "Shown to nobody.")?)?;
        let stop = CancellationToken::new();
        let (redis, keeper) = Redis::new(&settings.clone(), settings, Arc::new(SystemClock), metrics, stop);
        let denials = Self(SharedList::new(redis, Arc::new(OnceLock::from(mac_key))));
        tokio::select! {
            done = work(&denials) => done,
            () = keeper => unreachable!("the connection is kept until it is told to stop"),
        }
    }

    /// Denies each of `denied` for `life` from now on.
    ///
    /// # Errors
    /// A life of nothing or longer than a year, or Redis failed.
    pub async fn add(&self, denied: &[Denied], life: Duration) -> Result<Vec<Entry>, DenyError> {
        if life.is_zero() || life > LIFE_MAX {
            return Err(DenyError::Invalid {
                what: "the life of an entry",
                expected: "longer than nothing and at most a year",
            });
        }
        self.set(denied, life).await
    }

    /// Ends the entries for `denied` now, whether Redis still holds them or not.
    ///
    /// # Errors
    /// Redis failed.
    pub async fn remove(&self, denied: &[Denied]) -> Result<Vec<Entry>, DenyError> {
        self.set(denied, Duration::ZERO).await
    }

    /// Everything on the list.
    ///
    /// # Errors
    /// Redis failed.
    pub async fn list(&self) -> Result<Listed, DenyError> {
        let found = self.connected(async || self.0.read().await).await?;
        let in_force = found.entries.into_iter().filter(|(_, term)| found.now < term.end);
        let mut entries: Vec<_> = in_force.map(|(denied, term)| Entry::new(denied, term)).collect();
        entries.sort_by_cached_key(|entry| (entry.until, entry.denied.line()));
        Ok(Listed { entries, refused: found.refused + found.foreign })
    }

    async fn set(&self, denied: &[Denied], life: Duration) -> Result<Vec<Entry>, DenyError> {
        let terms = self.connected(async || self.0.set(denied, life).await).await?;
        Ok(terms.into_iter().map(|(denied, term)| Entry::new(denied, term)).collect())
    }

    /// Does `work` once there is a connection.
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
    fn without_redis_the_line_for_the_file_is_told() {
        let id = Uuid::from_u128(7);
        let told = DenyError::NoRedis(vec![Denied::Key(KeyId(id))]).to_string();
        assert!(told.starts_with("redis.url is not set") && told.contains("freshness.deny_file"), "{told}");
        assert!(told.contains(&format!("\n  key {id}\n")), "{told}");
        assert!(!DenyError::NoRedis(Vec::new()).to_string().contains("add"));
    }
}
