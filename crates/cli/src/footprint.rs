//! What only the start of a machine needed, given back.
//!
//! The host maps pages of the program around each one that is used, so that after a start most of it
//! is resident, of which a machine that runs needs a fifth. The pages are let go once the machine has
//! run for a while: those that are needed come back from the host's copy of the file, and what was
//! freed of the heap goes back too.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::slice;
use std::time::Duration;

/// When a machine is taken to be past its start, also that of its guest on most hosts.
pub(crate) const SETTLED: Duration = Duration::from_millis(500);

const PAGE: usize = 4096;

/// Gives memory back to the host.
pub(crate) fn shrink() {
    // SAFETY: it gives free memory of the allocator's back, and takes the allocator's locks itself.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
    // SAFETY: the function keeps to what is asked of it: it reads only what it is given, and no
    // panic leaves it.
    unsafe { libc::dl_iterate_phdr(Some(let_go), ptr::null_mut()) };
}

/// Lets go of the code and the constants of one program or library, and ends the walk: the first one
/// is the program itself.
unsafe extern "C" fn let_go(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: the C library gives a valid description of something loaded, with its headers, for as
    // long as the call lasts.
    let (base, headers) = unsafe {
        let info = &*info;
        let count = usize::from(info.dlpi_phnum);
        (
            info.dlpi_addr as usize,
            slice::from_raw_parts(info.dlpi_phdr, count),
        )
    };
    let is_constant = |header: &&libc::Elf64_Phdr| {
        header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0
    };
    for header in headers.iter().filter(is_constant) {
        let start = base.wrapping_add(header.p_vaddr as usize);
        let end = start.wrapping_add(header.p_memsz as usize) / PAGE * PAGE;
        let start = start.next_multiple_of(PAGE);
        // SAFETY: the pages are the program's file, mapped and never written to, for the segment
        // cannot be: a page that is used again is read from the file again.
        unsafe {
            libc::madvise(
                start as *mut c_void,
                end.saturating_sub(start),
                libc::MADV_DONTNEED,
            )
        };
    }
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resident pages, by the kernel's own count.
    fn resident() -> usize {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap();
        text.split(' ').nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn a_program_that_has_let_go_of_itself_runs_on_in_less() {
        // Much of it is used before.
        let before = format!("{:?} {}", std::env::vars_os(), resident());
        let pages = resident();
        shrink();
        assert!(resident() < pages, "{pages}");
        assert!(!before.is_empty());
        assert!(std::panic::catch_unwind(|| panic!("on purpose")).is_err());
        shrink();
    }
}
