//! trustgate is an external authorization server for Envoy: it identifies the caller of each request, and decides
//! whether the request may pass.
//!
//! `docs/architecture.md` describes how a request passes through the modules, and which rules each module follows. The
//! list below contains every module in the order of layers, lowest first. A module imports only from itself and from
//! modules above it in the list. If two names in the list match a module, the longer name applies.
//! `tests/integration/layers.rs` compares every import with this list, and checks that no module contains an import
//! cycle.
//!
//! Foundations:
//!
//! - [`base`], building blocks: time, text, secrets, units, settings, metrics, circuit breaker, faults and logging
//! - [`record`], a key's record, and the database version at which a value was read
//! - [`doctor::diagnosis`], the result of one examination by `trustgate doctor`
//!
//! Loading a record:
//!
//! - [`store`], the database: reads, changes, tables and their change log
//! - [`redis`], the connection to Redis, and the notifications that replicas send each other
//! - [`freshness`], the replica state, and the poll that updates this state from the change log
//! - [`cache`], loads a value through L1, single flight, L2 and the store
//!
//! Checks and management:
//!
//! - [`ext_authz`], the processing of a check, from the request message to the reply
//! - [`manage`], the only module that changes trusts and keys
//! - [`grpc`], listeners, and the connections that Envoy opens
//! - [`api`], the settings of the management API, which this release does not have
//!
//! The program:
//!
//! - [`server::lifecycle`], the phases of the server
//! - [`server::admin`], the listener for metrics and probes
//! - [`canary`], issues a key, revokes it and checks that the revocation takes effect on running replicas
//! - [`config`], reads settings from the file and the environment, and reports all errors at once
//! - [`doctor`], examines the database and Redis for `trustgate doctor`
//! - [`server`], creates and connects the parts of the server, starts it and shuts it down
//! - [`cli`], the command line
//! - [`testing`], exports the items that tests and benchmarks use
//! - `main`, passes the process's arguments to [`cli`]

#[cfg(not(target_os = "linux"))]
compile_error!(
    "trustgate needs Linux: leases are measured with CLOCK_BOOTTIME, which advances while the machine is suspended, \
     and threads that load records get a lower priority than other threads. On other systems, run trustgate in a \
     container."
);

mod api;
mod base;
mod cache;
mod canary;
pub mod cli;
mod config;
mod doctor;
mod ext_authz;
mod freshness;
mod grpc;
mod manage;
mod record;
mod redis;
mod server;
mod store;

#[doc(hidden)]
pub mod testing;
