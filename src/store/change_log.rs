//! The change log: triggers give each committed change to a trust or key a version and record what changed.
//!
//! On PostgreSQL the triggers also send notifications, to which [`listen`] subscribes.

pub(crate) mod listen;
pub(crate) mod postgres;
pub(crate) mod problem;
pub(crate) mod sqlite;
