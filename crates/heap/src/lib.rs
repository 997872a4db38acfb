//! Returns freed memory to the operating system. A separate crate because it calls C, and the main crate denies unsafe
//! code.

/// Makes glibc return pages without live allocations to the operating system (`malloc_trim(3)`). Otherwise glibc keeps
/// them for later allocations. Locks each arena while it searches the arena's free chunks. Does nothing with other C
/// libraries.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` has no preconditions and is MT-Safe.
    unsafe {
        libc::malloc_trim(0);
    }
}
