//! Gives freed memory back to the operating system. A crate of its own because it calls C, which the main crate never does.

/// Lets the C library return the pages that hold no live allocation (`malloc_trim(3)` of glibc). glibc keeps them otherwise, for later
/// allocations. Holds each arena's lock for as long as it looks through its free chunks. Does nothing with other C libraries.
pub fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `malloc_trim` has no preconditions and is MT-Safe.
    unsafe {
        libc::malloc_trim(0);
    }
}
