//! The change log of the database: triggers that record changes, and notifications about them.

pub(crate) mod listen;
pub(crate) mod postgres;
pub(crate) mod sqlite;
