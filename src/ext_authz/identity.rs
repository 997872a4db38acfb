//! The identity headers: the request headers that identify the caller to the upstream. Only trustgate may set them.
//!
//! The code that sets and removes identity headers uses [`HEADERS`]. `tests/integration/docs_match_code.rs` compares
//! this list with the configurations in `envoy/` and in the documentation.

/// The header that contains the trust id.
pub const TRUST_ID: &str = "x-trust-id";
/// The header that contains the key id.
pub(crate) const KEY_ID: &str = "x-trust-key-id";
/// The header that contains the key's scopes, separated by spaces. Not set for a key without scopes.
pub(crate) const SCOPES: &str = "x-trust-scopes";

/// All identity headers. On a request that passes, trustgate either overwrites or removes each of them.
pub const HEADERS: [&str; 3] = [TRUST_ID, KEY_ID, SCOPES];
