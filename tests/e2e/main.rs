//! The real server among real ones: Envoy, PostgreSQL, Redis and Prometheus. One binary, one module for each subject.

// All of it is tests: what fails here should fail loudly, nobody else uses it, and it says what it measured.
#![allow(clippy::unwrap_used, clippy::print_stdout, unreachable_pub)]

#[path = "../support/mod.rs"]
mod support;

mod canary;
mod cut_off;
mod drain;
mod fill;
mod fixture;
mod herd;
mod history;
mod http_callers;
mod listeners;
mod messages;
mod migrating;
mod modes;
mod outage;
mod peppers;
mod pgbouncer;
mod postgres_connect;
mod prometheus;
mod quiet;
mod redis_refusals;
mod redis_tls;
mod released_snippets;
mod resource_limits;
mod revocation;
mod route_demands;
mod sampler;
mod sqlite_files;
mod stale_window;
mod table;
mod upgrade;
