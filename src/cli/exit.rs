//! The exit codes of the program.

/// Everything went well.
pub(crate) const DONE: u8 = 0;
/// What was wanted could not be done.
pub(crate) const FAILED: u8 = 1;
/// What was wanted makes no sense.
pub(crate) const USAGE: u8 = 2;
/// The key that was checked is denied.
pub(crate) const DENIED: u8 = 3;
