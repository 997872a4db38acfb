//! The examinations of the database and of Redis for `trustgate doctor`, and the types of their results.

pub(crate) mod database;
pub(crate) mod diagnosis;
pub(crate) mod postgres;
pub(crate) mod redis;
pub(crate) mod session;
pub(crate) mod sqlite;
