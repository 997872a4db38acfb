//! Everything that needs the real program or real servers, in one binary.

// All of it is tests: what fails here should fail loudly, nobody else uses it, and it says what it measured.
#![allow(clippy::unwrap_used, clippy::print_stdout, unreachable_pub)]

#[path = "../support/mod.rs"]
mod support;

mod agreement;
mod attach;
mod cli;
mod config;
mod copy;
mod deny;
mod doctor;
mod layers;
mod program;
mod redis;
mod sqlite_file;
mod store_contract;
mod store_pool;
mod versions_postgres;
mod versions_sqlite;
mod watch_postgres;
