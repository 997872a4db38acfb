//! The connection to Redis or Valkey: to a single server, to the master that Sentinels name, or to a Cluster. A
//! background task reconnects when the connection breaks, and a circuit breaker skips Redis after repeated failures.
//! Replicas also notify each other through Redis.
//!
//! Redis is an optimisation: callers do not wait for a connection, and the server starts without a connection.

pub(crate) mod client;
pub(crate) mod connection;
pub(crate) mod notifications;
pub(crate) mod reconnect;
pub(crate) mod sealed;
pub(crate) mod settings;

pub(crate) use self::{
    client::{LuaScript, QueryError, Redis, RedisMetrics},
    connection::{Link, RedisConnection},
    notifications::listen,
    sealed::MacKey,
    settings::{RedisSettings, read_mac_key},
};
