//! Tests of the real server with real Envoy, PostgreSQL, Redis and Prometheus: one binary, one module per subject.

// Tests may panic and print their measurements. Items are `pub` only for the other modules of this binary.
#![allow(clippy::unwrap_used, clippy::print_stdout, unreachable_pub)]

#[path = "../support/mod.rs"]
mod support;

mod canary;
mod database_load;
mod database_replaced;
mod drain;
mod fixture;
mod herd;
mod http_callers;
mod listeners;
mod messages;
mod migrating;
mod modes;
mod network_partition;
mod outage;
mod peppers;
mod pgbouncer;
mod postgres_connect;
mod prometheus;
mod redis_refusals;
mod redis_tls;
mod released_snippets;
mod resource_limits;
mod revocation;
mod route_demands;
mod sampler;
mod sqlite_files;
mod stale_fills;
mod stale_window;
mod table;
mod upgrade;
