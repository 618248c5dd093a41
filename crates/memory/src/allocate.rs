//! Regions to mappings.

use std::fs::File;
use std::io;
use std::mem;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::null_mut;

use libc::c_int;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use crate::error::HugePageSize;
use crate::{Backing, DirtyBitmap, Error, GuestMemory, HugePages, MemoryOptions, MemorySize};

/// The host's base page, which is also the unit of the log of dirty pages.
const PAGE_SIZE: usize = 4096;
/// What a transparent huge page is aligned to.
const THP_SIZE: usize = 1 << 21;
/// How often an alignment is tried.
const ALIGN_ATTEMPTS: usize = 8;

/// Maps guest RAM: one mapping for each region, given as guest physical address and size in
/// bytes, sorted by address.
///
/// Nothing is written to the mappings and no host page is taken, unless
/// [`MemoryOptions::prefault`] asks for it. They are left out of core dumps: what is in a guest is
/// not the VMM's to write to a disk.
///
/// # Errors
///
/// [`Error`] says which region or which size the host refused and what would help. Nothing stays
/// mapped or open then.
pub fn allocate(
    regions: &[(GuestAddress, usize)],
    options: &MemoryOptions,
) -> Result<GuestMemory, Error> {
    let total = check(regions, options.huge_pages)?;
    let memfd = match options.backing {
        Backing::Anonymous => None,
        Backing::Memfd => Some(FileOffset::new(memfd(total, options.huge_pages)?, 0)),
    };
    let mut offset = 0;
    let mut mapped = Vec::with_capacity(regions.len());
    for &(address, size) in regions {
        let file = memfd
            .as_ref()
            .map(|file| FileOffset::from_arc(file.arc().clone(), offset));
        let region = map(size, file, options)?;
        advise(&region, options)?;
        mapped.push(
            GuestRegionMmap::new(region, address).ok_or_else(|| bad_layout((address, size)))?,
        );
        offset += size as u64;
    }
    // The layout was checked above, so only an empty one could still be refused.
    GuestMemory::from_regions(mapped).map_err(|_| Error::NoRegions)
}

/// Checks the layout before anything is asked of the host, and gives the total size in bytes.
fn check(regions: &[(GuestAddress, usize)], huge_pages: HugePages) -> Result<u64, Error> {
    let unit = pool(huge_pages).map_or(PAGE_SIZE as u64, HugePageSize::as_bytes);
    let mut end = 0;
    let mut total = 0_u64;
    for &region in regions {
        let (address, size) = (region.0.0, region.1 as u64);
        if size == 0 || !size.is_multiple_of(unit) || !address.is_multiple_of(PAGE_SIZE as u64) {
            let (size, unit) = (MemorySize::bytes(size), MemorySize::bytes(unit));
            return Err(Error::NotWholePages {
                address,
                size,
                unit,
            });
        }
        if address < end {
            return Err(bad_layout(region));
        }
        end = address
            .checked_add(size)
            .ok_or_else(|| bad_layout(region))?;
        total = total.checked_add(size).ok_or_else(|| bad_layout(region))?;
    }
    if regions.is_empty() {
        return Err(Error::NoRegions);
    }
    Ok(total)
}

fn bad_layout((address, size): (GuestAddress, usize)) -> Error {
    Error::BadLayout {
        address: address.0,
        size: MemorySize::bytes(size as u64),
    }
}

/// The pool that the pages come from, where they are from one.
fn pool(huge_pages: HugePages) -> Option<HugePageSize> {
    match huge_pages {
        HugePages::None | HugePages::Transparent => None,
        HugePages::Size2M => Some(HugePageSize::Size2M),
        HugePages::Size1G => Some(HugePageSize::Size1G),
    }
}

/// One file for all regions, of `size` bytes and sealed at that size.
fn memfd(size: u64, huge_pages: HugePages) -> Result<File, Error> {
    let fail = |action| Error::Memfd {
        size: MemorySize::bytes(size),
        action,
        source: io::Error::last_os_error(),
    };
    let flags = libc::MFD_CLOEXEC
        | libc::MFD_ALLOW_SEALING
        | match pool(huge_pages) {
            None => 0,
            Some(HugePageSize::Size2M) => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
            Some(HugePageSize::Size1G) => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
        };
    // SAFETY: the name is a valid C string, and the call touches no memory of ours.
    let fd = unsafe { libc::memfd_create(c"kiln-guest-memory".as_ptr(), flags) };
    if fd < 0 {
        return Err(fail("create it"));
    }
    // SAFETY: the call above made this descriptor, so nothing else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size).map_err(|source| Error::Memfd {
        size: MemorySize::bytes(size),
        action: "give it its size",
        source,
    })?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: the call changes the file's seals and touches no memory.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(fail("seal it"));
    }
    Ok(file)
}

/// Maps one region.
fn map(
    size: usize,
    file: Option<FileOffset>,
    options: &MemoryOptions,
) -> Result<MmapRegion<DirtyBitmap>, Error> {
    if options.dirty_log {
        // The bitmap of a size that cannot be mapped would be large too: learn of it first.
        drop(Reservation::new(size).map_err(|source| map_error(size, options, source))?);
    }
    let pool = pool(options.huge_pages);
    // Pages from a pool are reserved at once: a guest that finds the pool empty would get SIGBUS.
    let reserve = if pool.is_some() {
        0
    } else {
        libc::MAP_NORESERVE
    };
    let kind = match (&file, pool) {
        (Some(_), _) => libc::MAP_SHARED,
        (None, pool) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | huge_flags(pool),
    };
    let build = |file: Option<FileOffset>| {
        let mut builder = MmapRegionBuilder::new_with_bitmap(size, bitmap(size, options))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(kind | reserve)
            .with_hugetlbfs(pool.is_some());
        if let Some(file) = file {
            builder = builder.with_file_offset(file);
        }
        builder
            .build()
            .map_err(|error| map_error(size, options, io_error(error)))
    };
    let first = build(file.clone())?;
    if options.huge_pages == HugePages::Transparent {
        return Ok(aligned(first, || build(file.clone())));
    }
    Ok(first)
}

/// Maps a region again where the host did not align it, until it is aligned.
///
/// An address cannot be asked for, so an aligned hole is made that fits exactly: the host most
/// likely puts the next mapping there. Another thread may be faster, or another gap may fit, too:
/// what was misplaced is kept until the end, so that it fills that gap. A region that is not
/// aligned serves as well, with fewer huge pages, so this gives up at some point.
fn aligned(
    mut region: MmapRegion<DirtyBitmap>,
    build: impl Fn() -> Result<MmapRegion<DirtyBitmap>, Error>,
) -> MmapRegion<DirtyBitmap> {
    let size = region.size();
    let mut misplaced = Vec::new();
    for _ in 0..ALIGN_ATTEMPTS {
        if is_aligned(&region) {
            break;
        }
        let hole = Reservation::new(size.saturating_add(THP_SIZE)).and_then(|it| it.hole(size));
        let Ok(next) = build() else { break };
        drop(hole);
        misplaced.push(mem::replace(&mut region, next));
    }
    region
}

fn huge_flags(pool: Option<HugePageSize>) -> c_int {
    match pool {
        None => 0,
        Some(HugePageSize::Size2M) => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
        Some(HugePageSize::Size1G) => libc::MAP_HUGETLB | libc::MAP_HUGE_1GB,
    }
}

fn is_aligned(region: &MmapRegion<DirtyBitmap>) -> bool {
    (region.as_ptr() as usize).is_multiple_of(THP_SIZE)
}

fn bitmap(size: usize, options: &MemoryOptions) -> DirtyBitmap {
    let page = NonZeroUsize::new(PAGE_SIZE)?;
    options.dirty_log.then(|| AtomicBitmap::new(size, page))
}

fn io_error(error: MmapRegionError) -> io::Error {
    match error {
        MmapRegionError::Mmap(source) => source,
        other => io::Error::other(other),
    }
}

fn map_error(size: usize, options: &MemoryOptions, source: io::Error) -> Error {
    let bytes = MemorySize::bytes(size as u64);
    match pool(options.huge_pages) {
        None => Error::Map {
            size: bytes,
            source,
        },
        Some(page) => {
            let count = bytes.as_bytes().div_ceil(page.as_bytes());
            Error::HugePages {
                size: bytes,
                page,
                count,
                source,
            }
        }
    }
}

/// Tells the host what is to be known of a mapping.
fn advise(region: &MmapRegion<DirtyBitmap>, options: &MemoryOptions) -> Result<(), Error> {
    advise_one(region, libc::MADV_DONTDUMP, "to leave it out of core dumps")?;
    if options.huge_pages == HugePages::Transparent {
        advise_one(region, libc::MADV_HUGEPAGE, "to use transparent huge pages")?;
    }
    if options.prefault {
        advise_one(
            region,
            libc::MADV_POPULATE_WRITE,
            "to take all of it at once",
        )?;
    }
    Ok(())
}

fn advise_one(
    region: &MmapRegion<DirtyBitmap>,
    advice: c_int,
    name: &'static str,
) -> Result<(), Error> {
    // SAFETY: the range is a whole mapping that `region` owns, and none of the advices above
    // changes what is in it.
    if unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) } == 0 {
        return Ok(());
    }
    Err(Error::Advise {
        size: MemorySize::bytes(region.size() as u64),
        advice: name,
        source: io::Error::last_os_error(),
    })
}

/// A range of the host's address space that is kept free of other mappings.
struct Reservation {
    start: usize,
    size: usize,
}

impl Reservation {
    fn new(size: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: without MAP_FIXED a new mapping replaces none, and this one cannot be accessed.
        let start = unsafe { libc::mmap(null_mut(), size, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            start: start as usize,
            size,
        })
    }

    /// Frees an aligned `size` bytes of the range, which must be `THP_SIZE` longer, and gives what
    /// is before and behind them, still kept.
    fn hole(self, size: usize) -> io::Result<(Self, Self)> {
        let (start, end) = (self.start, self.start + self.size);
        let hole = start.next_multiple_of(THP_SIZE);
        mem::forget(self);
        drop(Self { start: hole, size });
        Ok((
            Self {
                start,
                size: hole - start,
            },
            Self {
                start: hole + size,
                size: end - hole - size,
            },
        ))
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.size > 0 {
            // SAFETY: the range is ours, is whole pages, and nothing ever pointed into it.
            unsafe { libc::munmap(self.start as *mut libc::c_void, self.size) };
        }
    }
}

#[cfg(test)]
mod tests;
