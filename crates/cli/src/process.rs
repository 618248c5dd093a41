//! How the process begins and ends.
//!
//! The standard library's own beginning takes as long as a tenth of the whole start of a machine:
//! it reads the process's memory map to tell of a stack overflow, and gives each thread a stack for
//! that. Here the C library calls us, and the rest of what the standard library does is done: a
//! standard stream that is closed leads nowhere, and a broken pipe is an error, not a signal.

use std::ffi::c_int;
use std::io::{self, Write as _};
use std::os::fd::IntoRawFd as _;
use std::panic::{UnwindSafe, catch_unwind};

use rustix::fs::{Mode, OFlags};

/// What the standard library ends with after a panic.
const PANICKED: u8 = 101;

/// Sets up the process, runs `program` in it, and gives its exit code.
pub(crate) fn run(program: impl FnOnce() -> u8 + UnwindSafe) -> c_int {
    share_one_heap();
    open_standard_streams();
    // SAFETY: to ignore a signal needs no handler, and there is no other thread yet.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let code = catch_unwind(program).unwrap_or(PANICKED);
    // Nobody is there to be told where it cannot be written.
    let _ = io::stdout().flush();
    c_int::from(code)
}

/// Keeps all threads to one heap. The C library would give each a heap of its own, for which it
/// reserves and returns 128 MiB of addresses: that takes longer than the thread itself, and what
/// the threads of a machine allocate is little.
fn share_one_heap() {
    // SAFETY: it sets a number of the allocator's, and is called before there is a second thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// A standard stream that is closed would be the next file that is opened, and be written to.
fn open_standard_streams() {
    let streams = [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ];
    for stream in streams {
        if rustix::io::fcntl_getfd(stream).is_err() {
            // The lowest number that is free: the stream's.
            let null = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty());
            let _ = null.map(|null| null.into_raw_fd());
        }
    }
}
