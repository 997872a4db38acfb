//! Keeps cached data current: the poll task reads the change log, and the lease limits how long cache entries may be
//! used. Also contains the deny list, the heartbeats and the pepper comparison.

pub(crate) mod deny_list;
mod heartbeat;
pub(crate) mod history;
pub(crate) mod lease;
mod metrics;
pub(crate) mod mode;
pub(crate) mod pepper;
pub(crate) mod poll;
pub(crate) mod replica_state;
pub(crate) mod revoked;

use std::{path::PathBuf, time::Duration};

use self::lease::LeaseLimits;
pub(crate) use self::{
    mode::Freshness,
    replica_state::{Epoch, ReplicaState, ReplicaView},
};

crate::settings! {
    /// The maximum age of cached data, and how the server learns of changes in the database. See `docs/revocation.md`.
    pub struct FreshnessSettings in "freshness" {
        /// How the server keeps cached data current. `lease`: the server uses cache entries while its last successful
        /// poll is at most `lease` old, so with the default settings it refuses a revoked key after about one second at
        /// most. If the database stops answering, the server continues to grant known-good keys for another
        /// `stale_if_unconfirmed`. `strict`: like `lease`, but without that additional time. `live`: for each request,
        /// the server reads the key's row from the database. `ttl`: the server uses a cached record until it is `ttl`
        /// old. The context extension `trustgate.freshness` overrides this setting for one route. Unset: `lease`, or
        /// `ttl` for an existing table that is not attached, because such a table has no change log.
        mode: Option<Freshness> = "",
        /// The maximum time for which cache entries may be used after the server sent its last successful poll (L).
        /// While the server reaches the database, it refuses a revoked key in checks that start more than this time
        /// after the revocation.
        lease: Duration = "1s",
        /// The additional time for which the server grants known-good keys while the database answers no poll at all
        /// (S). `0s` turns this off. While the database is down for every client, no key can be revoked. So this time
        /// is a risk only if the server is cut off from a database that other clients still reach.
        stale_if_unconfirmed: Duration = "120s",
        /// The interval at which this replica polls the database for changes.
        poll_interval: Duration = "100ms",
        /// Timeout of one poll. The server opens a new connection in the background, which may take up to
        /// `store.connect_timeout`.
        poll_timeout: Duration = "250ms",
        /// If true, PostgreSQL (`NOTIFY`) and Redis notify the server of changes, and the server then polls immediately
        /// instead of waiting for `poll_interval`. Notifications only make revocations faster; the revocation bound
        /// does not depend on them.
        notifications: bool = "true",
        /// In mode `ttl`: the maximum age of a cached record. The age counts from the database read, so it includes the
        /// time that the record spent in Redis.
        ttl: Duration = "60s",
        /// In mode `ttl`: the maximum age of a negative entry ("not found"). If a client presents a key before the key
        /// is issued, the server may still refuse the key for this long after it is issued.
        negative_ttl: Duration = "5s",
        /// A file that lists keys, trusts and digests to deny. The file takes effect even while the database is down.
        /// Each line is `key UUID`, `trust UUID`, or `digest` and 64 hexadecimal digits. To let an entry expire, append
        /// ` until 2026-01-31T12:00:00Z`. `#` starts a comment. The server applies changes to the file within a second.
        /// Unset: no file.
        deny_file: Option<PathBuf> = "",
        /// The interval at which the server compares one cached record with its row in the database, to detect changes
        /// that are missing from the change log. At least 10 ms; `0s` turns this off. If the record and the row differ
        /// and no change in the change log explains the difference, the server logs and counts the difference, and
        /// loads the record again.
        sample_interval: Duration = "0s",
    }
}

impl FreshnessSettings {
    /// Returns the lease limits: the settings `lease` and `stale_if_unconfirmed`.
    #[must_use]
    pub const fn limits(&self) -> LeaseLimits {
        LeaseLimits { lease: self.lease, stale: self.stale_if_unconfirmed }
    }

    /// Returns the revocation bound in `mode`: a check that starts more than this time after a revocation was committed
    /// refuses the key. The bound does not include the duration of the check. `is_unanswered` is true while polls get
    /// no answer at all.
    #[must_use]
    pub fn bound(&self, mode: Freshness, is_unanswered: bool) -> Duration {
        match mode {
            Freshness::Lease if is_unanswered => self.lease + self.stale_if_unconfirmed,
            Freshness::Lease | Freshness::Strict => self.lease,
            Freshness::Live => Duration::ZERO,
            Freshness::Ttl => self.ttl,
        }
    }
}
