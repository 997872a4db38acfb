//! The setup that most tests of this binary use: PostgreSQL, Redis, a configuration that points to them, and three
//! trusts.

use std::time::Duration;

use crate::support::{eventually, load::KeyCase, postgres::Postgres, redis::Redis, server::TestConfig};

/// Private PostgreSQL and Redis servers, which the test may stop, and a configuration that points to them.
pub struct Fixture {
    pub postgres: Postgres,
    pub redis: Redis,
    pub test_config: TestConfig,
    /// The name of the database in PostgreSQL.
    pub database: String,
    /// The name and the id of each trust.
    pub trusts: Vec<(String, String)>,
}

impl Fixture {
    /// Starts PostgreSQL and Redis, and creates the tables and the trusts. Does not start a trustgate server.
    pub async fn new(settings: &[(&str, &str)]) -> Self {
        Self::of(TestConfig::new(), settings).await
    }

    /// Like [`Self::new`], but with the default deadlines, for tests that check documented times.
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

    /// Imports keys for each trust. Returns `count` of the keys, taken from the trusts in turn.
    pub async fn keys(&self, count: usize) -> Vec<KeyCase> {
        let mut cases = Vec::new();
        for (name, id) in &self.trusts {
            let keys = self.test_config.import(name, count.div_ceil(self.trusts.len())).await;
            cases.push(keys.into_iter().map(|key| KeyCase { key, trust_id: Some(id.clone()) }));
        }
        let mut mixed = Vec::new();
        while mixed.len() < count {
            mixed.extend(cases.iter_mut().filter_map(Iterator::next));
        }
        mixed.truncate(count);
        mixed
    }

    /// Issues a key and revokes the key before any check uses it.
    pub async fn revoked_key(&self) -> KeyCase {
        let issued = self.test_config.issue(&self.trusts[0].0, &[]).await;
        self.test_config.revoke(&issued).await;
        KeyCase { key: issued.key, trust_id: None }
    }

    /// Waits until Redis has exactly `count` entries.
    pub async fn until_shared(&self, count: u64) {
        eventually("the values are in Redis", Duration::from_secs(30), || async {
            let size = redis::cmd("DBSIZE").query_async::<u64>(&mut self.redis.connection().await).await;
            size.expect("Redis answers") == count
        })
        .await;
    }
}
