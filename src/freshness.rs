//! Whether a cached value may still be used: how a revocation becomes effective.
//!
//! Never reads anything itself and never touches L1.

use std::time::Duration;

crate::settings! {
    /// How soon a revocation is effective.
    pub struct FreshnessSettings in "freshness" {
        /// `ttl`: a value is used until it is `ttl` old, counted from the database read. `live`: every request reads the
        /// key's row.
        mode: Mode = "ttl",
        /// How long after its read a key may be granted without asking again. A revocation is effective within it.
        ttl: Duration = "60s",
        /// The same for keys that do not exist: how long a new key may be denied because it was tried too early.
        absence_ttl: Duration = "5s",
        /// How often the database is asked whether it is there and whether caches were cleared.
        poll_interval: Duration = "100ms",
    }
}

crate::words! {
    /// How a cached value is known to be good still.
    pub enum Mode ("\"ttl\" or \"live\"") {
        /// By its age.
        Ttl = "ttl",
        /// By reading the row again, for every request.
        Live = "live",
    }
}
