//! Guest RAM that is given back to the host, and how much of it the host holds.

use std::io;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use crate::{DirtyBitmap, Error, GuestMemory, GuestSlice, MemorySize};

/// The host's base page.
const PAGE_SIZE: usize = 4096;
/// How many pages are looked at by one system call.
const PAGES_AT_ONCE: usize = 16384;

/// Gives the pages of a range of guest RAM back to the host, and returns how many bytes that were.
/// They read as zeros from then on, and the host takes a page for each again when it is next
/// touched: for all who have the memory, the guest among them, this is as if it had been zeroed.
///
/// - Only whole pages are given back; a part of a page at either end of the range stays as it is.
/// - What is not RAM is left out: any range may be given.
/// - Memory behind a memfd is given back for all processes that have the file.
/// - Where a file is mapped into the memory ([`map_file`](crate::map_file)), its contents are there
///   again afterwards, instead of zeros.
/// - Pages of a reserved pool ([`HugePages::Size2M`](crate::HugePages::Size2M) and larger) stay,
///   and are not counted: they were reserved so that the guest can never be without them, and the
///   pool does not promise to give a page a second time.
/// - Where the host has put a transparent huge page, giving back a part of it splits it, and the
///   part is free for others only when all of the page is, or the host is short of memory.
/// - The VMM's log of dirty pages, where there is one, takes the range as written.
///
/// ```
/// use kiln_memory::{MemoryOptions, allocate, discard};
/// use vm_memory::{Bytes, GuestAddress};
///
/// let memory = allocate(&[(GuestAddress(0), 0x4000)], &MemoryOptions::default())?;
/// memory.write_slice(&[0xa5; 0x4000], GuestAddress(0))?;
/// assert_eq!(discard(&memory, GuestAddress(0x1000), 0x10_0000)?, 0x3000);
/// assert_eq!(memory.read_obj::<u8>(GuestAddress(0xfff))?, 0xa5);
/// assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1000))?, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// [`Error::Discard`] where the host refuses, as it does for memory that is locked (`mlock`).
/// What came before in the range has been given back.
pub fn discard(memory: &GuestMemory, start: GuestAddress, len: u64) -> Result<u64, Error> {
    let end = start.0.saturating_add(len);
    let mut given = 0;
    for region in memory.iter() {
        let first = region.start_addr().0;
        // Below the region's length, which is that of a mapping.
        let offset = |address: u64| address.saturating_sub(first).min(region.len()) as usize;
        given += discard_in(region, offset(start.0), offset(end))?;
    }
    Ok(given)
}

/// [`discard`] for a piece of guest RAM.
///
/// # Errors
///
/// As [`discard`].
pub fn discard_slice(memory: &GuestMemory, slice: &GuestSlice<'_>) -> Result<u64, Error> {
    let start = slice.ptr_guard().as_ptr() as usize;
    let end = start.saturating_add(slice.len());
    // A slice says nothing of the mapping that it is a piece of.
    let mut given = 0;
    for region in memory.iter() {
        let first = region.as_ptr() as usize;
        let offset = |address: usize| address.saturating_sub(first).min(region.size());
        given += discard_in(region, offset(start), offset(end))?;
    }
    Ok(given)
}

/// Gives back the whole pages between two offsets, which are in the region or at its end.
fn discard_in(region: &GuestRegionMmap<DirtyBitmap>, from: usize, to: usize) -> Result<u64, Error> {
    let from = from.next_multiple_of(PAGE_SIZE);
    let len = (to / PAGE_SIZE * PAGE_SIZE).saturating_sub(from);
    if len == 0 || region.is_hugetlbfs() == Some(true) {
        return Ok(0);
    }
    advise(region, from, len).map_err(|source| Error::Discard {
        address: region.start_addr().0 + from as u64,
        size: MemorySize::bytes(len as u64),
        source,
    })?;
    region.bitmap().mark_dirty(from, len);
    Ok(len as u64)
}

fn advise(mapping: &MmapRegion<DirtyBitmap>, offset: usize, len: usize) -> io::Result<()> {
    let start = range(mapping, offset, len)?;
    // A page of a shared file stays in the file when a mapping lets it go.
    let advice = if mapping.flags() & libc::MAP_SHARED == 0 {
        libc::MADV_DONTNEED
    } else {
        libc::MADV_REMOVE
    };
    // SAFETY: the range is whole pages within a mapping that `mapping` keeps alive, and nothing
    // but guest RAM is in it. That is only ever reached as memory which others change at any time,
    // so nobody holds a reference into it, and pages that become zeros are such a change.
    match unsafe { libc::madvise(start, len, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The address of a range, after a check that it lies within the mapping.
fn range(
    mapping: &MmapRegion<DirtyBitmap>,
    offset: usize,
    len: usize,
) -> io::Result<*mut libc::c_void> {
    let inside = offset
        .checked_add(len)
        .is_some_and(|end| end <= mapping.size());
    if !inside {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(mapping.as_ptr().wrapping_add(offset).cast())
}

/// How much of the guest's RAM the host holds in memory: what was touched, and neither given back
/// nor swapped out. Where a file is mapped into it, the host's pages of the file count, whoever
/// touched them. It costs a system call for each 64 MiB.
///
/// # Errors
///
/// [`Error::Resident`] where the host does not tell.
pub fn resident(memory: &GuestMemory) -> Result<MemorySize, Error> {
    let mut pages = 0;
    let mut map = vec![0; PAGES_AT_ONCE];
    for region in memory.iter() {
        for offset in (0..region.size()).step_by(PAGES_AT_ONCE * PAGE_SIZE) {
            let len = (region.size() - offset).min(PAGES_AT_ONCE * PAGE_SIZE);
            let fail = |source| Error::Resident { source };
            let start = range(region, offset, len).map_err(fail)?;
            // SAFETY: the call reads nothing of the range, which lies in a mapping that `region`
            // keeps alive, and writes a byte a page to `map`, which has one for each.
            if unsafe { libc::mincore(start, len, map.as_mut_ptr()) } != 0 {
                return Err(fail(io::Error::last_os_error()));
            }
            let held = map[..len.div_ceil(PAGE_SIZE)].iter();
            // The other bits of a byte are not defined.
            pages += held.filter(|page| **page & 1 != 0).count() as u64;
        }
    }
    Ok(MemorySize::bytes(pages * PAGE_SIZE as u64))
}

#[cfg(test)]
mod tests;
