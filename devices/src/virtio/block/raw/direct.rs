//! Reading and writing past the host's page cache.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use kiln_memory::{GuestSlice, gather_into, scatter};
use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, ioctl_blksszget, statx};

/// The alignment of memory that every system takes.
const PAGE: usize = 4096;
/// The most bytes that go through memory of our own at once.
const COPY_BYTES: usize = 256 << 10;

/// What a file wants of requests that go past the page cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct DirectIo {
    /// What addresses and lengths of memory are to be a multiple of.
    memory: usize,
    /// What offsets and lengths of the file are to be a multiple of.
    block: u32,
}

impl DirectIo {
    /// Takes a file off the page cache.
    pub(super) fn start(file: &File) -> io::Result<Self> {
        let flags = fcntl_getfl(file)?;
        fcntl_setfl(file, flags | OFlags::DIRECT)?;
        Ok(Self::of(file))
    }

    fn of(file: &File) -> Self {
        let from_statx = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
        let alignments = from_statx.and_then(|found| {
            let memory = found.stx_dio_mem_align;
            let block = found.stx_dio_offset_align;
            let possible = memory.is_power_of_two() && block.is_power_of_two();
            possible.then_some((memory as usize, block))
        });
        let (memory, block) = alignments.unwrap_or_else(|| match ioctl_blksszget(file) {
            Ok(size) => (size as usize, size),
            // No host's file needs more than a page.
            Err(_) => (PAGE, PAGE as u32),
        });
        Self {
            memory: memory.clamp(1, PAGE),
            block: block.clamp(512, PAGE as u32),
        }
    }

    /// The size of blocks in bytes that the driver is to keep to.
    pub(super) fn block_size(self) -> u32 {
        if self.block > 512 { PAGE as u32 } else { 512 }
    }

    /// Whether the host's device can reach these buffers where they are.
    pub(super) fn reaches(self, buffers: &[GuestSlice<'_>]) -> bool {
        let mask = self.memory - 1;
        buffers.iter().all(|buffer| {
            let address = buffer.ptr_guard().as_ptr() as usize;
            (address | buffer.len()) & mask == 0
        })
    }

    /// Reads through memory of our own.
    pub(super) fn read(
        self,
        fd: BorrowedFd<'_>,
        offset: u64,
        buffers: &[GuestSlice<'_>],
    ) -> io::Result<()> {
        self.in_pieces(offset, buffers, |pieces, bytes, at| {
            transfer(bytes.len(), |done| {
                rustix::io::pread(fd, &mut bytes[done..], at + done as u64)
            })
            .map_err(|error| match error.kind() {
                io::ErrorKind::WriteZero => io::ErrorKind::UnexpectedEof.into(),
                _ => error,
            })?;
            scatter(bytes, pieces);
            Ok(())
        })
    }

    /// Writes through memory of our own.
    pub(super) fn write(
        self,
        fd: BorrowedFd<'_>,
        offset: u64,
        buffers: &[GuestSlice<'_>],
    ) -> io::Result<()> {
        self.in_pieces(offset, buffers, |pieces, bytes, at| {
            gather_into(bytes, pieces);
            transfer(bytes.len(), |done| {
                rustix::io::pwrite(fd, &bytes[done..], at + done as u64)
            })
        })
    }

    /// Calls `f` with a part of the buffers, as many bytes of aligned memory, and where in the file
    /// that is, until all of them had their turn.
    fn in_pieces(
        self,
        mut offset: u64,
        buffers: &[GuestSlice<'_>],
        mut f: impl FnMut(&[GuestSlice<'_>], &mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut memory = Aligned::new(COPY_BYTES)?;
        let mut pieces = Vec::new();
        let mut filled = 0;
        for buffer in buffers {
            let mut taken = 0;
            while taken < buffer.len() {
                let len = (buffer.len() - taken).min(COPY_BYTES - filled);
                let piece = buffer.subslice(taken, len).map_err(io::Error::other)?;
                pieces.push(piece);
                taken += len;
                filled += len;
                if filled == COPY_BYTES {
                    f(&pieces, memory.bytes(filled), offset)?;
                    offset += filled as u64;
                    pieces.clear();
                    filled = 0;
                }
            }
        }
        if filled > 0 {
            f(&pieces, memory.bytes(filled), offset)?;
        }
        Ok(())
    }
}

/// Calls `f` with what is done until `len` bytes are.
fn transfer(
    len: usize,
    mut f: impl FnMut(usize) -> Result<usize, rustix::io::Errno>,
) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        match f(done) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Memory that begins at a page.
struct Aligned {
    start: NonNull<u8>,
    layout: Layout,
}

impl Aligned {
    fn new(len: usize) -> io::Result<Self> {
        let layout = Layout::from_size_align(len.max(1), PAGE).map_err(io::Error::other)?;
        // SAFETY: the layout has a size above 0.
        let start = unsafe { alloc_zeroed(layout) };
        match NonNull::new(start) {
            Some(start) => Ok(Self { start, layout }),
            None => Err(io::ErrorKind::OutOfMemory.into()),
        }
    }

    /// The first `len` bytes, or all where there are less.
    fn bytes(&mut self, len: usize) -> &mut [u8] {
        let len = len.min(self.layout.size());
        // SAFETY: it is ours alone, initialized, and at least that long.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), len) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_memory::{MemoryOptions, allocate};
    use std::os::fd::{AsFd, AsRawFd};
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    #[test]
    fn memory_that_no_device_reaches_is_copied_in_order() {
        let file = tempfile::tempfile_in("/tmp").unwrap();
        let len = 2 * COPY_BYTES + 4096;
        let content: Vec<u8> = (0..len).map(|at| (at * 7 + at / 512) as u8).collect();
        file.write_all_at(&content, 0).unwrap();
        let direct = DirectIo::start(&file).unwrap();
        assert!(direct.memory <= PAGE && direct.block_size() <= 4096);
        let memory = allocate(&[(GuestAddress(0), 4 << 20)], &MemoryOptions::default()).unwrap();
        // Pieces of odd lengths at odd addresses.
        let mut pieces = Vec::new();
        let (mut address, mut left) = (1_u64, len);
        while left > 0 {
            let piece = left.min(1 + pieces.len() * 977);
            pieces.push(memory.get_slice(GuestAddress(address), piece).unwrap());
            address += piece as u64 + 3;
            left -= piece;
        }
        assert!(!direct.reaches(&pieces));
        direct.read(file.as_fd(), 0, &pieces).unwrap();
        assert!(kiln_memory::gather(&pieces) == content);
        for piece in &pieces {
            piece.copy_from(&vec![0x5a_u8; piece.len()]);
        }
        direct.write(file.as_fd(), 4096, &pieces).unwrap();
        let read = std::fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        assert!(read[..4096] == content[..4096]);
        assert!(read[4096..].iter().all(|byte| *byte == 0x5a));
        assert_eq!(read.len(), len + 4096);
        let error = direct.read(file.as_fd(), 4096 + len as u64, &pieces);
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        memory.write_obj(0_u8, GuestAddress(0)).unwrap();
    }

    #[test]
    fn what_is_aligned_is_reached() {
        let direct = DirectIo {
            memory: 512,
            block: 512,
        };
        let memory = allocate(&[(GuestAddress(0), 1 << 20)], &MemoryOptions::default()).unwrap();
        for (address, len, expected) in [
            (0x1000, 4096, true),
            (0x1200, 512, true),
            (0x1201, 512, false),
            (0x1200, 511, false),
        ] {
            let slice = memory.get_slice(GuestAddress(address), len).unwrap();
            assert_eq!(direct.reaches(&[slice]), expected, "{address:#x} {len}");
        }
    }
}
