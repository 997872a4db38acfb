//! What was read before, and reading it again once for everybody who waits: L1, L2 and single flight.
//!
//! Never decides whether a key is good: it holds what the database said, and when.

use std::time::Duration;

use crate::units::ByteSize;

crate::settings! {
    /// The cache in this process.
    pub struct CacheSettings in "cache" {
        /// Memory for keys that exist: about 250 000 of them at 512 bytes each.
        size: ByteSize = "128MiB",
        /// Memory for keys that do not exist; apart, so that guessing keys cannot push out good ones.
        absences_size: ByteSize = "8MiB",
        /// How old a value may get before it is read again, whatever else holds; 20 % more or less, so that values do
        /// not age in step.
        value_age_max: Duration = "15m",
    }
}
