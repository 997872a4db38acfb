//! How fresh a route demands its data to be.

crate::setting_enum! {
    /// How fresh a record must be.
    pub enum Freshness ("\"lease\", \"strict\", \"live\" or \"ttl\"") {
        /// As the newest change that a poll confirmed within `freshness.lease`; for `freshness.stale_if_unconfirmed`
        /// longer while the database does not answer.
        Lease = "lease",
        /// As `lease`, but not a moment longer: then the database is asked for each request.
        Strict = "strict",
        /// As old as `freshness.ttl`, counted from the database read, whatever tiers it passed through.
        Ttl = "ttl",
        /// As the database holds it now: one read by primary key for each request.
        Live = "live",
    }
}
