//! The freshness modes that the configuration or a route can select.

crate::setting_enum! {
    /// How current a record must be for a decision.
    pub enum Freshness ("\"lease\", \"strict\", \"live\" or \"ttl\"") {
        /// Use a cached record while a poll sent within the last `freshness.lease` has confirmed that the record has
        /// not changed. If the database stops answering, grant known-good keys for another
        /// `freshness.stale_if_unconfirmed`.
        Lease = "lease",
        /// Like `lease`, but without `freshness.stale_if_unconfirmed`: while the lease is not fresh, each request reads
        /// the database.
        Strict = "strict",
        /// Use a cached record until it is `freshness.ttl` old. The age counts from the database read, even if the
        /// record came from Redis.
        Ttl = "ttl",
        /// Read the database for each request.
        Live = "live",
    }
}
