//! trustgate: whose request is this, and may it pass?
//!
//! The way of a request and what never happens where are in `docs/architecture.md`. Here is every module in the order
//! of layers, lowest first. A module imports from modules above it in this list and from itself, so there are no
//! cycles; where two names fit, the longer one counts. `tests/it/layers.rs` reads the list and every import.
//!
//! Knows nothing of checks:
//!
//! - [`clock`], time here and in the database, passed in as a value
//! - [`text`], text from outside, cleaned in one place
//! - [`secret`], texts that never print themselves
//! - [`units`], durations and sizes that carry their unit
//! - [`mod@settings`], what a setting is; each module declares its own section
//! - [`metrics`], the registry; each module declares its own metrics
//! - [`breaker`], whether a tier is worth asking
//! - [`log_limit`], how often one kind of event is logged
//! - [`fault`], why we cannot decide; never the caller's doing
//! - [`finding`], what an examination of the surroundings came to
//!
//! The request, the answer and the rules, without I/O:
//!
//! - [`wire`], Envoy's messages, bytes in and bytes out; nothing else knows them
//! - [`wire::grpc`], the frame around a message
//! - [`wire::identity`], the one list of headers that say who somebody is
//! - [`wire::view`], a borrowed view over a request
//! - [`record`], what the store knows of a key, and how a value is dated
//! - [`credential`], the one key in a request, its form and its digest
//! - [`demand`], what a route asks of a request
//! - [`decision`], record, demands and time to a grant or a denial
//! - [`wire::response`], decision to answer: the only place that picks codes and headers
//! - [`wire::client`], the other end: for a server that asks itself
//!
//! Finding a record:
//!
//! - [`store`], the database, to read (`Lookup`) and to change (`Ledger`)
//! - [`redis`], the one connection to Redis
//! - [`freshness`], what this replica knows of the store's history; state without I/O
//! - [`cache`], L1, one flight for everybody, L2, store
//! - [`freshness::poll`], asks the store for its newest version and tells the view
//!
//! Answering and managing:
//!
//! - [`check`], a check from message to reply, whatever the transport
//! - [`manage`], the one place where trusts and keys change
//! - [`canary`], a key of its own: revokes it and asks for it
//! - [`net`], listeners and connections that Envoy opens
//! - [`admin`], metrics and probes
//! - [`api`], the management API; not in this release
//!
//! The program:
//!
//! - [`telemetry`], logs
//! - [`config`], file and environment to settings, all mistakes at once
//! - [`app`], wiring, start and orderly end
//! - [`cli`], the command line
//! - `main`, hands the process's arguments to [`cli`]

pub mod admin;
pub mod api;
pub mod app;
pub mod breaker;
pub mod cache;
pub mod canary;
pub mod check;
pub mod cli;
pub mod clock;
pub mod config;
pub mod credential;
pub mod decision;
pub mod demand;
pub mod fault;
pub mod finding;
pub mod freshness;
pub mod log_limit;
pub mod manage;
pub mod metrics;
pub mod net;
pub mod record;
pub mod redis;
pub mod secret;
pub mod settings;
pub mod store;
pub mod telemetry;
pub mod text;
pub mod units;
pub mod wire;
