//! Whole servers, asked as Envoy asks and by Envoy itself, in one binary.

// All of it is tests: what fails here should fail loudly, and nobody else uses it.
#![allow(clippy::unwrap_used, unreachable_pub)]

mod messages;
mod table;
