//! Everything that needs the real program or real servers, in one binary.

// All of it is tests: what fails here should fail loudly, and nobody else uses it.
#![allow(clippy::unwrap_used, unreachable_pub)]

#[path = "../support/mod.rs"]
mod support;

mod agreement;
mod cli;
mod config;
mod deny;
mod layers;
mod program;
mod sqlite_file;
mod store_contract;
mod store_pool;
mod versions_postgres;
mod watch_postgres;
