//! The identity headers: the one list of the request headers that identify the caller and that only trustgate may set.
//!
//! The code that sets and removes identity headers uses this list. `tests/integration/docs_match_code.rs` compares the
//! list with the configurations in `envoy/` and in the documentation.

/// The trust's id.
pub const TRUST_ID: &str = "x-trust-id";
/// The key's id.
pub(crate) const KEY_ID: &str = "x-trust-key-id";
/// The key's scopes, separated by spaces; not sent for a key without scopes.
pub(crate) const SCOPES: &str = "x-trust-scopes";

/// All identity headers. On a request that passes, trustgate either overwrites or removes each of them.
pub const HEADERS: [&str; 3] = [TRUST_ID, KEY_ID, SCOPES];
