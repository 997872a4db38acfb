//! What most of these tests begin with: PostgreSQL, Redis, the settings that name them, and a few trusts.

use std::time::Duration;

use crate::support::{eventually, load::KeyCase, postgres::Postgres, redis::Redis, server::TestConfig};

/// Time for Redis that a busy machine cannot use up. A record is written to Redis once, as best effort: where that write takes longer than
/// `redis.timeout`, it is not repeated while the record is in L1, and a test that waits for it in Redis would wait for ever.
pub const PATIENT_REDIS: [(&str, &str); 4] = [
    ("store.read_timeout", "60s"),
    ("redis.timeout", "5s"),
    ("decision.deadline", "70s"),
    ("decision.envoy_timeout", "80s"),
];

/// Servers of this test's own, which it may harm, and settings that name them.
pub struct Fixture {
    pub postgres: Postgres,
    pub redis: Redis,
    pub test_config: TestConfig,
    /// The name of the database in PostgreSQL.
    pub database: String,
    /// Names and ids.
    pub trusts: Vec<(String, String)>,
}

impl Fixture {
    /// Everything up, the tables made, nothing served yet.
    pub async fn new(settings: &[(&str, &str)]) -> Self {
        Self::of(TestConfig::new(), settings).await
    }

    /// The same with the default deadlines, for tests of the promised times.
    pub async fn with_default_deadlines(settings: &[(&str, &str)]) -> Self {
        Self::of(TestConfig::new().with_default_deadlines(), settings).await
    }

    async fn of(test_config: TestConfig, settings: &[(&str, &str)]) -> Self {
        let (postgres, redis) = (Postgres::start().await, Redis::start().await);
        let database = postgres.database().await;
        let mut test_config =
            test_config.with("store.url", postgres.url("admin", &database)).with("redis.url", redis.url());
        for (setting, value) in settings {
            test_config.set(setting, *value);
        }
        test_config.migrate().await;
        let mut trusts = Vec::new();
        for name in ["acme", "globex", "initech"] {
            trusts.push((name.to_owned(), test_config.trust(name).await));
        }
        Self { postgres, redis, test_config, database, trusts }
    }

    /// `count` keys, those of each trust among those of the others.
    pub async fn keys(&self, count: usize) -> Vec<KeyCase> {
        let mut cases = Vec::new();
        for (name, id) in &self.trusts {
            let keys = self.test_config.import(name, count.div_ceil(self.trusts.len())).await;
            cases.push(keys.into_iter().map(|key| KeyCase { key, owner: Some(id.clone()) }));
        }
        let mut mixed = Vec::new();
        while mixed.len() < count {
            mixed.extend(cases.iter_mut().filter_map(Iterator::next));
        }
        mixed.truncate(count);
        mixed
    }

    /// A key that was revoked before anybody asked for it.
    pub async fn revoked_key(&self) -> KeyCase {
        let issued = self.test_config.issue(&self.trusts[0].0, &[]).await;
        self.test_config.revoke(&issued).await;
        KeyCase { key: issued.key, owner: None }
    }
    /// Waits until Redis holds this many values.
    pub async fn until_shared(&self, count: u64) {
        eventually("values are in Redis", Duration::from_secs(30), || async {
            let size = redis::cmd("DBSIZE").query_async::<u64>(&mut self.redis.connection().await).await;
            size.expect("Redis answers") == count
        })
        .await;
    }
}
