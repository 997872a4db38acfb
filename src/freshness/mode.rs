//! The freshness that the configuration or a route demands of a record.

crate::setting_enum! {
    /// How fresh a record must be.
    pub enum Freshness ("\"lease\", \"strict\", \"live\" or \"ttl\"") {
        /// Use a record as long as a poll within the last `freshness.lease` confirmed that it has not changed. If the
        /// database stops answering, grant known-good keys for `freshness.stale_if_unconfirmed` longer.
        Lease = "lease",
        /// Like `lease`, but without the longer time: as soon as the lease is stale, each request reads the database.
        Strict = "strict",
        /// Use a record until it is `freshness.ttl` old, counted from the database read, whatever tiers it passed
        /// through.
        Ttl = "ttl",
        /// Read the database for each request.
        Live = "live",
    }
}
