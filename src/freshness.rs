//! How long this replica may use cached data: its view of the change log, and the poll that keeps the view current.

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
    /// How current the data behind a decision must be, and how this replica keeps it current. See `docs/revocation.md`.
    pub struct FreshnessSettings in "freshness" {
        /// How current cached data must be. `lease`: cache entries are used while the last successful poll is at most
        /// `lease` old, so with the default settings a revoked key is refused after about one second at most. If the
        /// database stops answering, keys known to be good are granted for another `stale_if_unconfirmed`. `strict`:
        /// like `lease`, but without `stale_if_unconfirmed`. `live`: each request reads the row of its key in the
        /// database. `ttl`: a cached record is used until it is `ttl` old. The context extension `trustgate.freshness`
        /// overrides this setting for one route. Unset: `lease`; for an existing table that is not attached, which has
        /// no change log, `ttl`.
        mode: Option<Freshness> = "",
        /// The maximum time that cache entries may be used after the last successful poll was sent (L). While this
        /// replica reaches the database, a check that starts later than this after a revocation refuses the revoked
        /// key.
        lease: Duration = "1s",
        /// The additional time that keys known to be good are granted while the database answers no poll at all (S).
        /// `0s` turns this off. While the database is down for every client, no key can be revoked in it. The time is a
        /// risk only if this replica is cut off from a database that other clients still reach.
        stale_if_unconfirmed: Duration = "120s",
        /// The interval at which this replica polls the database for changes.
        poll_interval: Duration = "100ms",
        /// The maximum time that one poll may take. A new connection is opened in the background and may take
        /// `store.connect_timeout`.
        poll_timeout: Duration = "250ms",
        /// If true, the database (`NOTIFY` in PostgreSQL) and Redis notify this replica of changes, and it polls at
        /// once instead of after `poll_interval`. Notifications only speed up revocations; the revocation bound does
        /// not depend on them.
        notifications: bool = "true",
        /// In mode `ttl`: the maximum age of a cached record, counted from the read of the database. Time that the
        /// record spent in Redis is included.
        ttl: Duration = "60s",
        /// In mode `ttl`: how long a negative entry ("not found") is used. If a client presents a key before the key is
        /// issued, the key can be refused for this long afterwards.
        negative_ttl: Duration = "5s",
        /// A file of keys, trusts and digests to deny. It also works while the database is down. Each line is
        /// `key UUID`, `trust UUID`, or `digest` and 64 hexadecimal digits. To end an entry at a given time, append
        /// ` until 2026-01-31T12:00:00Z`. `#` starts a comment. The server applies changes to the file within a second.
        /// Unset: no file.
        deny_file: Option<PathBuf> = "",
        /// The interval at which the server compares one cached record with its row in the database, to detect changes
        /// that are missing from the change log. At least 10 ms; `0s` turns this off. If a record differs and the
        /// change log does not explain it, the server counts and logs the record and loads it again.
        sample_interval: Duration = "0s",
    }
}

impl FreshnessSettings {
    /// The limits of the lease, from `lease` and `stale_if_unconfirmed`.
    #[must_use]
    pub const fn limits(&self) -> LeaseLimits {
        LeaseLimits { lease: self.lease, stale: self.stale_if_unconfirmed }
    }

    /// The revocation bound under `mode`: a check that starts later than this after the commit of a revocation refuses
    /// the key. The duration of the check itself is not included. `is_unanswered`: true while polls get no answer at
    /// all.
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
