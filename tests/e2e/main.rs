//! Whole servers, asked as Envoy asks and by Envoy itself, in one binary.

// All of it is tests: what fails here should fail loudly, nobody else uses it, and it says how much it looked at.
#![allow(clippy::unwrap_used, clippy::print_stdout, unreachable_pub)]

mod messages;
mod table;
