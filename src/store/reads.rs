//! The database reads that checks and the poll task make: the [`lookup::Lookup`] trait, a connection pool, and one
//! dialect for each kind of database.

pub(crate) mod lookup;
pub(crate) mod pool;
pub(crate) mod postgres;
pub(crate) mod reader;
pub(crate) mod sqlite;
