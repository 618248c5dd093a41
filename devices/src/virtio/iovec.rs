//! Vectored I/O between file descriptors and guest RAM, with no copy in between.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use kiln_memory::GuestSlice;
use libc::{c_int, iovec, off_t};
use vm_memory::bitmap::Bitmap;

/// The most pieces that one system call takes (`UIO_MAXIOV`).
pub(crate) const MAX_PIECES: usize = 1024;

/// Fills `slices` from `fd` at `offset` bytes, in as many calls as it takes.
///
/// # Errors
///
/// What the system says; `UnexpectedEof` where the file ends before.
pub(crate) fn read_exact_at(
    fd: BorrowedFd<'_>,
    slices: &[GuestSlice<'_>],
    offset: u64,
) -> io::Result<()> {
    let mut done = 0;
    while let Some(pieces) = Pieces::behind(slices, done) {
        let at = file_offset(offset, done)?;
        // SAFETY: the pieces are valid memory for as long as `slices` is borrowed. It is guest RAM,
        // to which nothing in this process has a reference, so the kernel may write it.
        let result = unsafe { libc::preadv(fd.as_raw_fd(), pieces.as_ptr(), pieces.count(), at) };
        match transferred(result)? {
            Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Some(count) => {
                mark_written(slices, done, count);
                done += count;
            }
            None => {}
        }
    }
    Ok(())
}

/// Fills `slices` from `fd` at `offset` bytes as far as the file goes; gives the bytes.
///
/// # Errors
///
/// What the system says.
#[cfg(feature = "qcow2")]
pub(crate) fn read_at_most(
    fd: BorrowedFd<'_>,
    slices: &[GuestSlice<'_>],
    offset: u64,
) -> io::Result<usize> {
    let mut done = 0;
    while let Some(pieces) = Pieces::behind(slices, done) {
        let at = file_offset(offset, done)?;
        // SAFETY: as in `read_exact_at`.
        let result = unsafe { libc::preadv(fd.as_raw_fd(), pieces.as_ptr(), pieces.count(), at) };
        match transferred(result)? {
            Some(0) => break,
            Some(count) => {
                mark_written(slices, done, count);
                done += count;
            }
            None => {}
        }
    }
    Ok(done)
}

/// Writes `slices` to `fd` at `offset` bytes, in as many calls as it takes.
///
/// # Errors
///
/// What the system says; `WriteZero` where nothing more can be written.
pub(crate) fn write_all_at(
    fd: BorrowedFd<'_>,
    slices: &[GuestSlice<'_>],
    offset: u64,
) -> io::Result<()> {
    let mut done = 0;
    while let Some(pieces) = Pieces::behind(slices, done) {
        let at = file_offset(offset, done)?;
        // SAFETY: the pieces are valid memory for as long as `slices` is borrowed, and the kernel
        // only reads it.
        let result = unsafe { libc::pwritev(fd.as_raw_fd(), pieces.as_ptr(), pieces.count(), at) };
        match transferred(result)? {
            Some(0) => return Err(io::ErrorKind::WriteZero.into()),
            Some(count) => done += count,
            None => {}
        }
    }
    Ok(())
}

/// Fills as much of `slices` from `fd` at `offset` bytes as is there without waiting for a device,
/// with one call; gives the bytes, of which there are none at the end of the file.
///
/// # Errors
///
/// What the system says; `WouldBlock` where nothing is there now, `Unsupported` where it does not
/// know.
pub(crate) fn read_now(
    fd: BorrowedFd<'_>,
    slices: &[GuestSlice<'_>],
    offset: u64,
) -> io::Result<usize> {
    let pieces = Pieces::behind(slices, 0).ok_or(io::ErrorKind::InvalidInput)?;
    let (at, count) = (file_offset(offset, 0)?, pieces.count());
    // SAFETY: as in `read_exact_at`.
    let result =
        unsafe { libc::preadv2(fd.as_raw_fd(), pieces.as_ptr(), count, at, libc::RWF_NOWAIT) };
    let count = transferred(result)?.unwrap_or(0);
    mark_written(slices, 0, count);
    Ok(count)
}

/// Writes as much of `slices` to `fd` at `offset` bytes as can be without waiting for a device,
/// with one call; gives the bytes.
///
/// # Errors
///
/// As for [`read_now`].
pub(crate) fn write_now(
    fd: BorrowedFd<'_>,
    slices: &[GuestSlice<'_>],
    offset: u64,
) -> io::Result<usize> {
    let pieces = Pieces::behind(slices, 0).ok_or(io::ErrorKind::InvalidInput)?;
    let (at, count) = (file_offset(offset, 0)?, pieces.count());
    // SAFETY: as in `write_all_at`.
    let result =
        unsafe { libc::pwritev2(fd.as_raw_fd(), pieces.as_ptr(), count, at, libc::RWF_NOWAIT) };
    Ok(transferred(result)?.unwrap_or(0))
}

/// Reads one packet from `fd` into `slices`; gives its bytes. What does not fit is lost.
///
/// # Errors
///
/// What the system says; `WouldBlock` where there is no packet.
pub(crate) fn read_packet(fd: BorrowedFd<'_>, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
    let pieces = packet_pieces(slices)?;
    loop {
        // SAFETY: as in `read_exact_at`.
        let result = unsafe { libc::readv(fd.as_raw_fd(), pieces.as_ptr(), pieces.count()) };
        if let Some(count) = transferred(result)? {
            mark_written(slices, 0, count);
            return Ok(count);
        }
    }
}

/// Writes `slices` to `fd` as one packet.
///
/// # Errors
///
/// What the system says; `WouldBlock` where there is no room for a packet, `InvalidInput` where it
/// is in too many pieces.
pub(crate) fn write_packet(fd: BorrowedFd<'_>, slices: &[GuestSlice<'_>]) -> io::Result<()> {
    let pieces = packet_pieces(slices)?;
    loop {
        // SAFETY: as in `write_all_at`.
        let result = unsafe { libc::writev(fd.as_raw_fd(), pieces.as_ptr(), pieces.count()) };
        if transferred(result)?.is_some() {
            return Ok(());
        }
    }
}

/// Reads what a stream has from `fd` into `slices`, with one call; gives its bytes, of which there
/// are none at the end of the stream.
///
/// # Errors
///
/// What the system says; `WouldBlock` where there is nothing now, `InvalidInput` where there is no
/// room.
pub(crate) fn read_some(fd: BorrowedFd<'_>, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
    let pieces = Pieces::behind(slices, 0).ok_or(io::ErrorKind::InvalidInput)?;
    loop {
        // SAFETY: as in `read_exact_at`.
        let result = unsafe { libc::readv(fd.as_raw_fd(), pieces.as_ptr(), pieces.count()) };
        if let Some(count) = transferred(result)? {
            mark_written(slices, 0, count);
            return Ok(count);
        }
    }
}

/// Sends as much of `slices` as the stream socket `fd` takes now, with one call and never with a
/// signal; gives the bytes.
///
/// # Errors
///
/// What the system says; `WouldBlock` where it takes nothing now.
pub(crate) fn send_some(fd: BorrowedFd<'_>, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
    match Pieces::behind(slices, 0) {
        Some(pieces) => send_pieces(fd, pieces),
        None => Ok(0),
    }
}

/// Sends `head` and what of `slices` lies behind their first `skip` bytes, as far as the stream
/// socket `fd` takes it now, with one call and never with a signal; gives the bytes.
///
/// # Errors
///
/// As [`send_some`].
pub(crate) fn send_behind(
    fd: BorrowedFd<'_>,
    head: &[u8],
    slices: &[GuestSlice<'_>],
    skip: usize,
) -> io::Result<usize> {
    let mut pieces = vec![iovec {
        // The kernel only reads it.
        iov_base: head.as_ptr().cast_mut().cast(),
        iov_len: head.len(),
    }];
    each_piece(slices, skip, |piece| pieces.push(piece));
    pieces.truncate(MAX_PIECES);
    send_pieces(fd, Pieces::from(pieces))
}

/// Sends the pieces, which are memory that lives until this returns.
fn send_pieces(fd: BorrowedFd<'_>, mut pieces: Pieces) -> io::Result<usize> {
    // SAFETY: zeros are a valid `msghdr`: a message without address, data and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.count;
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    loop {
        // SAFETY: as in `write_all_at`; `message` points to `pieces`, which live until the end.
        let result = unsafe { libc::sendmsg(fd.as_raw_fd(), &message, flags) };
        if let Some(count) = transferred(result)? {
            return Ok(count);
        }
    }
}

/// The parts of `slices` behind their first `skip` bytes.
pub(crate) fn behind<'a, 'm>(
    slices: &'a [GuestSlice<'m>],
    mut skip: usize,
) -> impl Iterator<Item = GuestSlice<'m>> + use<'a, 'm> {
    slices.iter().filter_map(move |slice| {
        let skipped = skip.min(slice.len());
        skip -= skipped;
        slice.offset(skipped).ok().filter(|rest| !rest.is_empty())
    })
}

/// A packet goes with one call.
fn packet_pieces(slices: &[GuestSlice<'_>]) -> io::Result<Pieces> {
    let pieces = if slices.len() > MAX_PIECES {
        None
    } else {
        Pieces::behind(slices, 0)
    };
    pieces.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// The memory of slices, as the kernel takes it.
struct Pieces {
    /// All of them where they are few, without an allocation.
    few: [iovec; FEW],
    many: Vec<iovec>,
    count: usize,
}

/// The pieces that need no allocation.
const FEW: usize = 8;
const EMPTY: iovec = iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

impl From<Vec<iovec>> for Pieces {
    fn from(many: Vec<iovec>) -> Self {
        Self {
            few: [EMPTY; FEW],
            count: many.len(),
            many,
        }
    }
}

impl Pieces {
    /// What of `slices` lies behind the first `skip` bytes, as much as one call takes; `None`
    /// where nothing does.
    fn behind(slices: &[GuestSlice<'_>], skip: usize) -> Option<Self> {
        let mut pieces = Self {
            few: [EMPTY; FEW],
            many: Vec::new(),
            count: 0,
        };
        if slices.len() > FEW {
            pieces.many.reserve_exact(slices.len().min(MAX_PIECES));
            each_piece(slices, skip, |piece| pieces.many.push(piece));
            pieces.count = pieces.many.len();
        } else {
            each_piece(slices, skip, |piece| {
                if let Some(place) = pieces.few.get_mut(pieces.count) {
                    *place = piece;
                    pieces.count += 1;
                }
            });
        }
        (pieces.count > 0).then_some(pieces)
    }

    fn as_ptr(&self) -> *const iovec {
        if self.many.is_empty() {
            self.few.as_ptr()
        } else {
            self.many.as_ptr()
        }
    }

    fn as_mut_ptr(&mut self) -> *mut iovec {
        if self.many.is_empty() {
            self.few.as_mut_ptr()
        } else {
            self.many.as_mut_ptr()
        }
    }

    fn count(&self) -> c_int {
        // At most `MAX_PIECES`.
        self.count as c_int
    }
}

/// Fills `pieces` with what of `slices` lies behind the first `skip` bytes, as much as one call
/// takes.
pub(crate) fn fill_pieces(pieces: &mut Vec<iovec>, slices: &[GuestSlice<'_>], skip: usize) {
    pieces.clear();
    each_piece(slices, skip, |piece| pieces.push(piece));
}

fn each_piece(slices: &[GuestSlice<'_>], mut skip: usize, mut f: impl FnMut(iovec)) {
    let mut count = 0;
    for slice in slices {
        if count == MAX_PIECES {
            break;
        }
        match slice.offset(skip) {
            Ok(rest) if !rest.is_empty() => {
                f(iovec {
                    iov_base: rest.ptr_guard_mut().as_ptr().cast(),
                    iov_len: rest.len(),
                });
                count += 1;
                skip = 0;
            }
            _ => skip -= slice.len().min(skip),
        }
    }
}

/// The bytes that a call transferred; `None` where a signal came first and it is to be called
/// again.
fn transferred(result: isize) -> io::Result<Option<usize>> {
    match usize::try_from(result) {
        Ok(count) => Ok(Some(count)),
        Err(_) => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            error => Err(error),
        },
    }
}

fn file_offset(offset: u64, done: usize) -> io::Result<off_t> {
    offset
        .checked_add(done as u64)
        .and_then(|offset| off_t::try_from(offset).ok())
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Marks `count` bytes behind the first `skip` as written in the log of dirty pages, which the
/// kernel knows nothing of.
pub(crate) fn mark_written(slices: &[GuestSlice<'_>], mut skip: usize, mut count: usize) {
    for slice in slices {
        let start = skip.min(slice.len());
        let len = count.min(slice.len() - start);
        slice.bitmap().mark_dirty(start, len);
        skip -= start;
        count -= len;
        if count == 0 {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_memory::{GuestMemory, MemoryOptions, allocate};
    use std::io::Write;
    use std::os::fd::AsFd;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    fn memory() -> GuestMemory {
        allocate(&[(GuestAddress(0), 1 << 20)], &MemoryOptions::default()).unwrap()
    }

    /// Slices of `len` bytes each, every second one of a descending order, so that order matters.
    fn slices(memory: &GuestMemory, count: usize, len: usize) -> Vec<GuestSlice<'_>> {
        (0..count)
            .map(|at| {
                let place = if at % 2 == 0 { at } else { 2 * count - at };
                memory
                    .get_slice(GuestAddress((place * len) as u64), len)
                    .unwrap()
            })
            .collect()
    }

    #[test]
    fn more_pieces_than_one_call_takes_arrive_in_order() {
        let memory = memory();
        let count = 2 * MAX_PIECES + 3;
        let data: Vec<u8> = (0..count * 7).map(|at| ((at * 31) >> 3) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0xee; 10]).unwrap();
        file.write_all(&data).unwrap();
        let slices = slices(&memory, count, 7);
        read_exact_at(file.as_fd(), &slices, 10).unwrap();
        let mut found = Vec::new();
        for slice in &slices {
            let mut bytes = [0; 7];
            slice.copy_to(&mut bytes);
            found.extend(bytes);
        }
        assert!(found == data);

        let copy = tempfile::tempfile().unwrap();
        write_all_at(copy.as_fd(), &slices, 3).unwrap();
        let mut written = vec![0; data.len() + 3];
        std::os::unix::fs::FileExt::read_exact_at(&copy, &mut written, 0).unwrap();
        assert!(written[3..] == data);
        assert_eq!(copy.metadata().unwrap().len(), data.len() as u64 + 3);
    }

    #[test]
    fn a_file_that_ends_too_early_is_an_error() {
        let memory = memory();
        let file = tempfile::tempfile().unwrap();
        file.set_len(10).unwrap();
        let slices = slices(&memory, 2, 8);
        let error = read_exact_at(file.as_fd(), &slices, 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let error = read_exact_at(file.as_fd(), &slices, u64::MAX - 3).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let read_only = std::fs::File::open("/proc/self/exe").unwrap();
        let error = write_all_at(read_only.as_fd(), &slices, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn what_the_kernel_wrote_is_in_the_log_of_dirty_pages() {
        let options = MemoryOptions {
            dirty_log: true,
            ..Default::default()
        };
        let memory = allocate(&[(GuestAddress(0), 1 << 20)], &options).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 0x3000]).unwrap();
        let slices = [
            memory.get_slice(GuestAddress(0x2000), 0x1000).unwrap(),
            memory.get_slice(GuestAddress(0x8800), 0x1000).unwrap(),
        ];
        read_exact_at(file.as_fd(), &slices, 0).unwrap();
        let dirty: Vec<_> = (0..16)
            .filter(|page| {
                let slice = memory
                    .get_slice(GuestAddress(page * 0x1000), 0x1000)
                    .unwrap();
                slice.bitmap().dirty_at(0)
            })
            .collect();
        assert_eq!(dirty, [2, 8, 9]);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x2fff)).unwrap(), 1);
    }
}
