//! The examinations of the database and of Redis for `trustgate doctor`, and their results as data.

pub mod database;
pub mod diagnosis;
pub(crate) mod postgres;
pub mod redis;
pub mod session;
pub(crate) mod sqlite;
