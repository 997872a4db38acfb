//! The database and Redis examinations for `trustgate doctor`, and their result types.

pub(crate) mod database;
pub(crate) mod diagnosis;
pub(crate) mod postgres;
pub(crate) mod redis;
pub(crate) mod session;
pub(crate) mod sqlite;
