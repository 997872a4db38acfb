//! SQLite ledger
