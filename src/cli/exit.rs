//! The exit codes of the program.

/// The command succeeded.
pub(crate) const DONE: u8 = 0;
/// The command failed.
pub(crate) const FAILED: u8 = 1;
/// The arguments or their values are invalid.
pub(crate) const USAGE: u8 = 2;
/// The key is denied. Only `trustgate check` exits with this code.
pub(crate) const DENIED: u8 = 3;
