//! Tests that need the real program or real servers, in one test binary.

// This crate contains only tests, which may panic and print measurements. No other crate uses its items.
#![allow(clippy::unwrap_used, clippy::print_stdout, unreachable_pub)]

#[path = "../support/mod.rs"]
mod support;

mod attach;
mod cli;
mod config;
mod copy;
mod deny;
mod disturbed_samples;
mod docs_match_code;
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
