//! The allocator's settings.

/// Keeps all threads to one heap. The C library would give each a heap of its own, for which it
/// reserves and returns 128 MiB of addresses: that takes longer than the thread itself, and what
/// the threads of a machine allocate is little.
pub(crate) fn share_one_heap() {
    // SAFETY: it sets a number of the allocator's, and is called before there is a second thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
