//! Files mapped into guest RAM instead of being read into it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::{Error, GuestMemory, MemorySize};

const PAGE_SIZE: u64 = 4096;

/// Maps `size` bytes of a file, from `offset` on, over guest RAM at `address`: the guest sees them
/// there, and what it writes is its own and does not reach the file. Nothing is read or copied
/// before it is touched, and machines with the same file share the host's pages of it.
///
/// Says whether it did: it does not where the RAM is not plain anonymous memory of base pages, or
/// where address, offset and size are not whole pages in one region of it. The caller reads the
/// file then.
///
/// The file must stay as it is as long as the memory lives. Where somebody writes to it the guest
/// may see that; where it is cut short the process gets SIGBUS at a page that is no longer there.
/// Files that are replaced by renaming, as package managers and careful programs do, are safe.
///
/// # Errors
///
/// [`Error::MapFile`] where the host refuses, as for a file on a file system that cannot map. The
/// RAM there is then all zeros.
///
/// ```
/// use kiln_memory::{MemoryOptions, allocate, map_file};
/// use std::io::Write;
/// use vm_memory::{Bytes, GuestAddress};
///
/// let memory = allocate(&[(GuestAddress(0), 0x4000)], &MemoryOptions::default())?;
/// let mut file = tempfile::tempfile()?;
/// file.write_all(&[7; 0x2000])?;
/// assert!(map_file(&memory, GuestAddress(0x1000), &file, 0x1000, 0x1000)?);
/// assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1fff))?, 7);
/// assert_eq!(memory.read_obj::<u8>(GuestAddress(0x2000))?, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn map_file(
    memory: &GuestMemory,
    address: GuestAddress,
    file: &File,
    offset: u64,
    size: u64,
) -> Result<bool, Error> {
    let whole = [address.0, offset, size]
        .iter()
        .all(|number| number.is_multiple_of(PAGE_SIZE));
    let Some(region) = memory.find_region(address).filter(|_| whole && size > 0) else {
        return Ok(false);
    };
    let at = address.unchecked_offset_from(region.start_addr());
    let (Some(left), Ok(length)) = (region.len().checked_sub(at), usize::try_from(size)) else {
        return Ok(false);
    };
    let is_plain = region.flags() & libc::MAP_ANONYMOUS != 0 && region.is_hugetlbfs() != Some(true);
    let Ok(file_offset) = libc::off_t::try_from(offset) else {
        return Ok(false);
    };
    if !is_plain || size > left {
        return Ok(false);
    }
    let start = region.as_ptr().wrapping_add(at as usize);
    // SAFETY: the range is whole pages of a mapping that `memory` owns, and becomes another mapping
    // of the same protection, which that one's end unmaps too. Guest RAM is only ever accessed by
    // volatile accesses, for which its content may change at any time.
    let mapped = unsafe {
        libc::mmap(
            start.cast(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            file_offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        let source = io::Error::last_os_error();
        put_back(start.cast(), length);
        return Err(Error::MapFile {
            size: MemorySize::bytes(size),
            source,
        });
    }
    // SAFETY: the range is the mapping just made, and the advice changes nothing in it.
    unsafe { libc::madvise(start.cast(), length, libc::MADV_DONTDUMP) };
    Ok(true)
}

/// Takes pages of the host for the whole pages in a range of guest RAM, each with what is there now,
/// as if the guest had written to them: what it then does there takes no fault of the host's, and
/// where a file is mapped ([`map_file`]) the guest has its own copy. It can be done while the guest
/// runs, and costs a fraction of the faults that it saves. What is not RAM is left out.
///
/// ```
/// use kiln_memory::{MemoryOptions, allocate, populate, resident};
/// use vm_memory::GuestAddress;
///
/// let memory = allocate(&[(GuestAddress(0), 0x8000)], &MemoryOptions::default())?;
/// populate(&memory, GuestAddress(0x1000), 0x3000)?;
/// assert_eq!(resident(&memory)?.as_bytes(), 0x3000);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// [`Error::Advise`] where the host cannot (before Linux 5.14), has no memory, or a mapped file was
/// cut short. The memory is what it was, and is good to use.
pub fn populate(memory: &GuestMemory, start: GuestAddress, len: u64) -> Result<(), Error> {
    let end = start.0.saturating_add(len) / PAGE_SIZE * PAGE_SIZE;
    let start = start.0.checked_next_multiple_of(PAGE_SIZE);
    for region in memory.iter() {
        let first = region.start_addr().0;
        // Below the region's length, which is that of a mapping.
        let offset = |address: u64| address.saturating_sub(first).min(region.len()) as usize;
        let (from, to) = (offset(start.unwrap_or(u64::MAX)), offset(end));
        if from < to {
            populate_in(region.as_ptr().wrapping_add(from), to - from)?;
        }
    }
    Ok(())
}

fn populate_in(start: *mut u8, len: usize) -> Result<(), Error> {
    // SAFETY: the range is whole pages of a mapping of guest RAM, which the caller holds, and the
    // advice changes nothing of what is read there.
    if unsafe { libc::madvise(start.cast(), len, libc::MADV_POPULATE_WRITE) } == 0 {
        return Ok(());
    }
    Err(Error::Advise {
        size: MemorySize::bytes(len as u64),
        advice: "to take it at once",
        source: io::Error::last_os_error(),
    })
}

/// Puts empty memory where a file could not be mapped: the host may have unmapped what was there
/// before it asked the file.
fn put_back(start: *mut libc::c_void, length: usize) {
    // SAFETY: the range is that of guest RAM, which is still `memory`'s to be accessed and, at its
    // end, to be unmapped, and holds nothing yet that could be lost.
    // Where this fails too, whatever reads into the range says so.
    unsafe {
        libc::mmap(
            start,
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use vm_memory::Bytes;

    use super::*;
    use crate::{Backing, MemoryOptions, allocate};

    fn file(pages: u8) -> File {
        let mut file = tempfile::tempfile().unwrap();
        for page in 0..pages {
            file.write_all(&[page + 1; 0x1000]).unwrap();
        }
        file
    }

    fn memory(options: &MemoryOptions) -> GuestMemory {
        let regions = [(GuestAddress(0), 0x8000), (GuestAddress(0x10_0000), 0x2000)];
        allocate(&regions, options).unwrap()
    }

    #[test]
    fn a_write_of_the_guest_does_not_reach_the_file() {
        let memory = memory(&MemoryOptions::default());
        let mut file = file(2);
        assert!(map_file(&memory, GuestAddress(0x10_0000), &file, 0, 0x2000).unwrap());
        memory.write_obj(0xeeu8, GuestAddress(0x10_1000)).unwrap();
        let value: u8 = memory.read_obj(GuestAddress(0x10_1000)).unwrap();
        assert_eq!(value, 0xee);
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes[0x1000], 2);
    }

    #[test]
    fn pages_that_were_taken_have_the_files_content_and_are_the_guests_own() {
        let memory = memory(&MemoryOptions::default());
        let file = file(2);
        assert!(map_file(&memory, GuestAddress(0x10_0000), &file, 0, 0x2000).unwrap());
        // Across both regions, with what is no RAM between them.
        populate(&memory, GuestAddress(0x7001), 0xf_a000).unwrap();
        assert_eq!(crate::resident(&memory).unwrap().as_bytes(), 0x2000);
        std::os::unix::fs::FileExt::write_all_at(&file, &[9; 0x2000], 0).unwrap();
        for (address, value) in [(0x10_0000, 1), (0x10_1000, 9)] {
            let byte: u8 = memory.read_obj(GuestAddress(address)).unwrap();
            assert_eq!(byte, value, "{address:#x}");
        }
        populate(&memory, GuestAddress(0x1234), 0x100).unwrap();
        populate(&memory, GuestAddress(u64::MAX), u64::MAX).unwrap();
    }

    #[test]
    fn pages_of_a_file_that_was_cut_short_are_refused() {
        let memory = memory(&MemoryOptions::default());
        let file = file(2);
        assert!(map_file(&memory, GuestAddress(0x10_0000), &file, 0, 0x2000).unwrap());
        file.set_len(0x1000).unwrap();
        let error = populate(&memory, GuestAddress(0x10_0000), 0x2000).unwrap_err();
        assert!(matches!(error, Error::Advise { .. }), "{error}");
    }

    #[test]
    fn what_is_not_whole_pages_of_one_region_is_left_alone() {
        let memory = memory(&MemoryOptions::default());
        let file = file(4);
        for (address, offset, size) in [
            (0x1001, 0, 0x1000),
            (0x1000, 1, 0x1000),
            (0x1000, 0, 0x1001),
            (0x1000, 0, 0),
            (0x7000, 0, 0x2000),
            (0x8000, 0, 0x1000),
            (0x10_1000, 0, 0x2000),
            (0x1000, 0, !0xfff),
            (0x1000, !0xfff, 0x1000),
        ] {
            let mapped = map_file(&memory, GuestAddress(address), &file, offset, size).unwrap();
            assert!(!mapped, "{address:#x} {offset:#x} {size:#x}");
        }
        let value: u8 = memory.read_obj(GuestAddress(0x1000)).unwrap();
        assert_eq!(value, 0);
    }

    #[test]
    fn memory_that_others_can_reach_is_left_alone() {
        let memory = memory(&MemoryOptions {
            backing: Backing::Memfd,
            ..MemoryOptions::default()
        });
        assert!(!map_file(&memory, GuestAddress(0), &file(1), 0, 0x1000).unwrap());
    }

    #[test]
    fn a_file_that_cannot_be_mapped_is_an_error() {
        let memory = memory(&MemoryOptions::default());
        let folder = File::open("/proc/self").unwrap();
        let error = map_file(&memory, GuestAddress(0), &folder, 0, 0x1000).unwrap_err();
        assert_eq!(error.to_string(), "map 4K of a file into guest memory");
        let value: u8 = memory.read_obj(GuestAddress(0)).unwrap();
        assert_eq!(value, 0);
    }
}
