//! The identity headers: the one list of request headers that say who somebody is, and that only trustgate may set.
//!
//! What strips, overwrites or permits them anywhere (here, in `envoy/`, in the documentation) is made from this list or
//! compared with it by a test.

/// The trust's id.
pub const TRUST_ID: &str = "x-trust-id";
/// The key's id.
pub const KEY_ID: &str = "x-trust-key-id";
/// The key's scopes, separated by spaces; not sent for a key without scopes.
pub const SCOPES: &str = "x-trust-scopes";

/// Every identity header. On each request that passes, each of them is either overwritten or removed.
pub const HEADERS: [&str; 3] = [TRUST_ID, KEY_ID, SCOPES];
