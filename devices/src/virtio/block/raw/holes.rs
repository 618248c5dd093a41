//! Room that a disk does not need any more, and zeros that nobody has to send.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::properties;

/// `BLKDISCARD` and `BLKZEROOUT` of `linux/fs.h`; each takes two numbers of 64 bits, where and how
/// many bytes.
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKZEROOUT: libc::Ioctl = 0x127f;

/// The zeros that are written at once where they have to be.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A hole in a file, which keeps its length.
pub(super) const PUNCH: FallocateFlags =
    FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
/// Zeros that take their room.
const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

/// How a file or a block device forgets a part of itself.
#[derive(Debug)]
pub(super) struct Holes {
    is_device: bool,
    can_discard: bool,
    can_write_zeroes: bool,
    /// In bytes.
    alignment: u32,
    /// Whether zeros without a hole were refused: the file system does not have them.
    no_zero_range: AtomicBool,
}

impl Holes {
    /// Finds out without changing anything.
    pub(super) fn probe(file: &File, metadata: &Metadata, size: u64, read_only: bool) -> Self {
        let is_device = metadata.file_type().is_block_device();
        let (can_discard, alignment) = if read_only {
            (false, 0)
        } else if is_device {
            let limit = |name| properties::limit(metadata, name).unwrap_or(0);
            (limit("discard_max_bytes") > 0, limit("discard_granularity"))
        } else {
            // Behind the end of the file there is nothing to lose.
            let block = metadata.blksize().max(4096);
            let behind = size.next_multiple_of(block);
            (punch(file, behind, block).is_ok(), block)
        };
        Self {
            is_device,
            can_discard,
            can_write_zeroes: !read_only,
            alignment: u32::try_from(alignment).unwrap_or(0),
            no_zero_range: AtomicBool::new(false),
        }
    }

    pub(super) fn is_device(&self) -> bool {
        self.is_device
    }

    /// How a range of a file is made zero, where the file system can do so.
    pub(super) fn zeroing(&self, unmap: bool) -> Option<FallocateFlags> {
        if self.is_device {
            None
        } else if unmap && self.can_discard {
            Some(PUNCH)
        } else {
            let missing = self.no_zero_range.load(Ordering::Relaxed);
            (!missing).then_some(ZERO)
        }
    }

    pub(super) fn can_discard(&self) -> bool {
        self.can_discard
    }

    pub(super) fn can_write_zeroes(&self) -> bool {
        self.can_write_zeroes
    }

    pub(super) fn alignment(&self) -> u32 {
        self.alignment
    }

    pub(super) fn discard(&self, fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
        if self.is_device {
            block_ioctl(fd, BLKDISCARD, offset, len)
        } else {
            Ok(punch(fd, offset, len)?)
        }
    }

    pub(super) fn write_zeroes(
        &self,
        fd: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        unmap: bool,
    ) -> io::Result<()> {
        if unmap && self.can_discard {
            match punch(fd, offset, len) {
                Err(error) if is_missing(error) => {}
                result => return Ok(result?),
            }
        }
        if self.is_device {
            return block_ioctl(fd, BLKZEROOUT, offset, len);
        }
        if !self.no_zero_range.load(Ordering::Relaxed) {
            match retried(|| fallocate(fd, ZERO, offset, len)) {
                Err(error) if is_missing(error) => {
                    self.no_zero_range.store(true, Ordering::Relaxed)
                }
                result => return Ok(result?),
            }
        }
        write_zeros(fd, offset, len)
    }
}

fn is_missing(error: Errno) -> bool {
    matches!(error, Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL)
}

fn punch(fd: impl std::os::fd::AsFd, offset: u64, len: u64) -> Result<(), Errno> {
    retried(|| fallocate(&fd, PUNCH, offset, len))
}

/// A signal may come first.
fn retried(f: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    rustix::io::retry_on_intr(f)
}

fn block_ioctl(fd: BorrowedFd<'_>, request: libc::Ioctl, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: both requests read two numbers, which live until the call returns.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, range.as_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn write_zeros(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let count = (len - done).min(ZEROS.len() as u64) as usize;
        match rustix::io::pwrite(fd, &ZEROS[..count], offset + done) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => done += written as u64,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    const MIB: u64 = 1 << 20;

    fn file_in(folder: &str) -> File {
        let file = tempfile::tempfile_in(folder).unwrap();
        file.write_all_at(&vec![7; 2 * MIB as usize], 0).unwrap();
        file
    }

    fn holes(file: &File) -> Holes {
        let metadata = file.metadata().unwrap();
        Holes::probe(file, &metadata, metadata.len(), false)
    }

    fn blocks(file: &File) -> u64 {
        file.sync_all().unwrap();
        file.metadata().unwrap().blocks()
    }

    #[test]
    fn a_probe_changes_nothing() {
        for folder in ["/tmp", "/dev/shm"] {
            let file = file_in(folder);
            let before = blocks(&file);
            holes(&file);
            assert_eq!(blocks(&file), before);
            assert_eq!(file.metadata().unwrap().len(), 2 * MIB);
        }
    }

    #[test]
    fn what_is_discarded_needs_no_room() {
        for folder in ["/tmp", "/dev/shm"] {
            let file = file_in(folder);
            let holes = holes(&file);
            assert!(holes.can_discard(), "{folder} has no holes");
            let before = blocks(&file);
            holes.discard(file.as_fd(), 0, MIB).unwrap();
            assert!(before - blocks(&file) >= MIB / 512, "{folder}");
            assert_eq!(file.metadata().unwrap().len(), 2 * MIB);
            let mut rest = [0; 512];
            file.read_exact_at(&mut rest, MIB).unwrap();
            assert_eq!(rest, [7; 512]);
        }
    }

    #[test]
    fn zeros_are_where_they_are_asked_for_and_nowhere_else() {
        for folder in ["/tmp", "/dev/shm"] {
            for unmap in [true, false] {
                let file = file_in(folder);
                let holes = holes(&file);
                let before = blocks(&file);
                let (start, len) = (4096 + 512, MIB + 1024);
                holes.write_zeroes(file.as_fd(), start, len, unmap).unwrap();
                let mut content = vec![1; 2 * MIB as usize];
                file.read_exact_at(&mut content, 0).unwrap();
                for (at, byte) in (0..).zip(content) {
                    let zero = (start..start + len).contains(&at);
                    assert_eq!(byte, if zero { 0 } else { 7 }, "{folder} {at}");
                }
                let after = blocks(&file);
                assert_eq!(
                    after < before,
                    unmap,
                    "{folder}: {before} before, {after} after"
                );
            }
        }
    }
}
