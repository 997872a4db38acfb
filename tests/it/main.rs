//! Everything that needs real servers or whole parts together: one binary, one module for each subject.

#[path = "../support/mod.rs"]
mod support;

mod sqlite_file;
mod store_contract;
mod store_pool;
