//! The reads of checks, and the heartbeats of replicas.

pub mod lookup;
pub mod pool;
pub(crate) mod postgres;
pub(crate) mod reader;
pub(crate) mod sqlite;
