//! The examinations of `trustgate doctor`: what the database and Redis answer, and what to do about it.

pub mod database;
pub mod diagnosis;
pub(crate) mod postgres;
pub mod redis;
pub mod session;
pub(crate) mod sqlite;
