//! Returns freed memory to the operating system. This is a separate crate because it calls C, and the main crate denies
//! unsafe code.

/// Makes glibc return pages without live allocations to the operating system (`malloc_trim(3)`). Otherwise, glibc keeps
/// such pages for later allocations. glibc locks each arena while it searches the arena for free chunks. With other C
/// libraries, this function does nothing.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` has no preconditions and is MT-Safe.
    unsafe {
        libc::malloc_trim(0);
    }
}
