//! A file or a block device of the host as a disk, byte for byte.

mod direct;
mod holes;
mod properties;

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use kiln_memory::GuestSlice;
use rustix::fs::{FlockOperation, flock};

use super::request::Range;
use super::ring::Operation;
use super::{BlockBackend, BlockProperties, SECTOR_SIZE};
use crate::virtio::iovec::{read_exact_at, read_now, write_all_at, write_now};
use direct::DirectIo;
use holes::Holes;

/// Why a disk image could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RawFileError {
    /// The system did not open it.
    #[error("open disk image `{path}`")]
    Open {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is something that cannot be a disk.
    #[error("open disk image `{path}`: it is {kind}, not a file or a block device")]
    Kind {
        /// The image.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Another machine or program uses it, or this machine uses it twice.
    #[error(
        "open disk image `{path}`: it is in use (an image can be open once for writing, or any \
         number of times for reading)"
    )]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// Its size is not that of a disk.
    #[error(
        "open disk image `{path}`: its size of {size} bytes is not a multiple of {SECTOR_SIZE} \
         above 0"
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// It cannot be used past the host's page cache.
    #[error("use disk image `{path}` without the host's page cache (O_DIRECT)")]
    Direct {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A raw disk image: a regular file, or a block device of the host.
///
/// It is locked (with `flock`) for as long as it is open: shared where it is opened for reading,
/// exclusive where it is opened for writing. The file's size never changes because of the guest.
///
/// A clone is the same open file.
#[derive(Clone, Debug)]
pub struct RawFile {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: File,
    size: AtomicU64,
    read_only: bool,
    id: String,
    properties: BlockProperties,
    holes: Holes,
    /// Set where the host's page cache is not used.
    direct: OnceLock<DirectIo>,
    /// Reading and writing it never waits for a device.
    in_memory: bool,
    /// The file system does not know to write only what does not have to wait.
    no_write_now: AtomicBool,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The lock belongs to the open file, of which a ring that goes away may still be a user.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

/// What was done of a request at once.
pub(super) enum Now {
    /// All that there is to do, or it failed.
    All(io::Result<()>),
    /// So many bytes; the rest has to wait for a device.
    Part(usize),
}

const PAGE: u64 = 4096;
/// The most bytes that are given to the page cache of a file system that cannot say whether it
/// would have to wait.
const WRITE_AT_ONCE: usize = 1 << 20;

fn now(result: io::Result<usize>, buffers: &[GuestSlice<'_>]) -> Now {
    let len: usize = buffers.iter().map(|buffer| buffer.len()).sum();
    match result {
        Ok(count) if count == len => Now::All(Ok(())),
        Ok(count) => Now::Part(count),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EOPNOTSUPP) => Now::Part(0),
            _ => Now::All(Err(error)),
        },
    }
}

impl RawFile {
    /// Opens an image, for reading and writing unless `read_only`.
    ///
    /// # Errors
    ///
    /// [`RawFileError`], which says for each case what is wrong with the image.
    pub fn open(path: impl AsRef<Path>, read_only: bool) -> Result<Self, RawFileError> {
        let path = path.as_ref();
        let Opened {
            file,
            size,
            metadata,
        } = open_locked(path, read_only)?;
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
            return Err(RawFileError::Size {
                path: path.to_owned(),
                size,
            });
        }
        let holes = Holes::probe(&file, &metadata, size, read_only);
        Ok(Self {
            inner: Arc::new(Inner {
                path: path.to_owned(),
                size: AtomicU64::new(size),
                read_only,
                id: file_id(&metadata),
                properties: properties::of(&file, &metadata, &holes),
                holes,
                direct: OnceLock::new(),
                in_memory: properties::is_in_memory(&file),
                no_write_now: AtomicBool::new(false),
                file,
            }),
        })
    }

    /// Does without the host's page cache from now on (`O_DIRECT`). What the guest has in memory
    /// where the host's device cannot reach it is copied.
    ///
    /// # Errors
    ///
    /// [`RawFileError::Direct`] where the file system does not have that.
    pub fn set_direct(&self) -> Result<(), RawFileError> {
        let inner = &self.inner;
        let direct = DirectIo::start(&inner.file).map_err(|source| RawFileError::Direct {
            path: inner.path.clone(),
            source,
        })?;
        inner.direct.get_or_init(|| direct);
        Ok(())
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.inner.file.as_fd()
    }

    pub(super) fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Whether reading and writing it never waits for a device.
    pub(super) fn is_in_memory(&self) -> bool {
        self.inner.in_memory
    }

    fn is_direct(&self) -> bool {
        self.inner.direct.get().is_some()
    }

    /// Whether a request for these buffers has to go through memory of our own.
    pub(super) fn needs_copy(&self, buffers: &[GuestSlice<'_>]) -> bool {
        let direct = self.inner.direct.get();
        direct.is_some_and(|direct| !direct.reaches(buffers))
    }

    pub(super) fn read(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        match self.inner.direct.get() {
            Some(direct) if !direct.reaches(buffers) => direct.read(self.fd(), offset, buffers),
            _ => read_exact_at(self.fd(), buffers, offset),
        }
    }

    pub(super) fn write(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        match self.inner.direct.get() {
            Some(direct) if !direct.reaches(buffers) => direct.write(self.fd(), offset, buffers),
            _ => write_all_at(self.fd(), buffers, offset),
        }
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.inner.file.sync_data()
    }

    pub(super) fn forget(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.holes.discard(self.fd(), offset, len)
    }

    pub(super) fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.inner.holes.write_zeroes(self.fd(), offset, len, unmap)
    }

    /// Whether parts of it are forgotten or made zero by operations that a ring knows.
    pub(super) fn is_file(&self) -> bool {
        !self.inner.holes.is_device()
    }

    pub(super) fn discard_operation(&self, range: Range) -> Operation {
        Operation::Allocate {
            mode: holes::PUNCH.bits() as i32,
            offset: range.offset,
            len: range.len,
        }
    }

    /// How a range is made zero, where the kernel does so by itself.
    pub(super) fn zero_operation(&self, range: Range) -> Option<Operation> {
        let flags = self.inner.holes.zeroing(range.unmap)?;
        Some(Operation::Allocate {
            mode: flags.bits() as i32,
            offset: range.offset,
            len: range.len,
        })
    }

    /// What can be done at once of a read, without waiting for a device.
    pub(super) fn read_now(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Now {
        if self.needs_copy(buffers) {
            return Now::All(self.read(offset, buffers));
        }
        if self.is_direct() {
            return Now::Part(0);
        }
        now(read_now(self.fd(), buffers, offset), buffers)
    }

    /// What can be done at once of a write, without waiting for a device.
    pub(super) fn write_now(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Now {
        if self.needs_copy(buffers) {
            return Now::All(self.write(offset, buffers));
        }
        if self.is_direct() {
            return Now::Part(0);
        }
        let no_write_now = &self.inner.no_write_now;
        if !no_write_now.load(Ordering::Relaxed) {
            match write_now(self.fd(), buffers, offset) {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    no_write_now.store(true, Ordering::Relaxed);
                }
                result => return now(result, buffers),
            }
        }
        // Whole pages go to the page cache, where nothing has to be read for them before.
        let len: usize = buffers.iter().map(|buffer| buffer.len()).sum();
        let pages = (offset | len as u64).is_multiple_of(PAGE);
        if pages && len <= WRITE_AT_ONCE {
            return Now::All(self.write(offset, buffers));
        }
        Now::Part(0)
    }

    pub(super) fn look_at_size(&self) -> io::Result<u64> {
        let size = (&self.inner.file).seek(SeekFrom::End(0))?;
        let block = u64::from(self.properties().logical_block_size);
        let size = size - size % block;
        if size == 0 {
            let reason = "the disk image has not even one block left";
            return Err(io::Error::other(reason));
        }
        self.inner.size.store(size, Ordering::Release);
        Ok(size)
    }
}

/// A file or a block device of the host that is open and locked.
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) size: u64,
    pub(super) metadata: Metadata,
}

/// Opens what can hold a disk, and locks it: shared for reading, else exclusive.
pub(super) fn open_locked(path: &Path, read_only: bool) -> Result<Opened, RawFileError> {
    let open_error = |source| RawFileError::Open {
        path: path.to_owned(),
        source,
    };
    // Looked at before it is opened, because opening a FIFO waits, and opening some devices
    // does something.
    check_kind(path, &std::fs::metadata(path).map_err(open_error)?)?;
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(open_error)?;
    lock_open(path, file, read_only)
}

/// Locks what is open already.
pub(super) fn lock_open(
    path: &Path,
    mut file: File,
    read_only: bool,
) -> Result<Opened, RawFileError> {
    let open_error = |source| RawFileError::Open {
        path: path.to_owned(),
        source,
    };
    let metadata = file.metadata().map_err(open_error)?;
    check_kind(path, &metadata)?;
    lock(&file, read_only).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => RawFileError::InUse {
            path: path.to_owned(),
        },
        _ => open_error(error),
    })?;
    // A block device's metadata does not have its size.
    let size = file.seek(SeekFrom::End(0)).map_err(open_error)?;
    Ok(Opened {
        file,
        size,
        metadata,
    })
}

/// The id of a disk that has no other: what identifies its file on the host.
pub(super) fn file_id(metadata: &Metadata) -> String {
    format!("{:x}-{:x}", metadata.dev(), metadata.ino())
}

fn check_kind(path: &Path, metadata: &Metadata) -> Result<(), RawFileError> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let kind = if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a FIFO"
    } else {
        "a socket"
    };
    Err(RawFileError::Kind {
        path: path.to_owned(),
        kind,
    })
}

/// How long an image may be in use before it is refused, and the time between two looks.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

fn lock(file: &File, read_only: bool) -> io::Result<()> {
    let operation = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    // The kernel takes an io_uring apart some time after the end of a program that was killed, and
    // holds the lock until then.
    let since = Instant::now();
    let mut result = flock(file, operation);
    while result == Err(rustix::io::Errno::WOULDBLOCK) && since.elapsed() < LOCK_PATIENCE {
        thread::sleep(LOCK_PAUSE);
        result = flock(file, operation);
    }
    match result {
        // Some network file systems have no locks; the image is usable there nevertheless.
        Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::NOLCK | rustix::io::Errno::NOSYS) => {
            tracing::warn!("the file system of a disk image has no locks");
            Ok(())
        }
        result => Ok(result?),
    }
}

impl BlockBackend for RawFile {
    fn size(&self) -> u64 {
        self.inner.size.load(Ordering::Acquire)
    }

    fn is_read_only(&self) -> bool {
        self.inner.read_only
    }

    fn read_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        self.read(offset, buffers)
    }

    fn write_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        self.write(offset, buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sync()
    }

    fn default_id(&self) -> String {
        self.inner.id.clone()
    }

    fn properties(&self) -> BlockProperties {
        let mut properties = self.inner.properties;
        if let Some(direct) = self.inner.direct.get() {
            let block = properties.logical_block_size.max(direct.block_size());
            properties.logical_block_size = block;
            properties.physical_block_size = properties.physical_block_size.max(block);
        }
        properties
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.forget(offset, len)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.zero(offset, len, unmap)
    }

    fn refresh_size(&mut self) -> io::Result<u64> {
        self.look_at_size()
    }

    fn as_raw_file(&self) -> Option<RawFile> {
        Some(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;

    fn image(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    fn message(path: impl AsRef<Path>, read_only: bool) -> String {
        RawFile::open(path, read_only).unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_a_disk_is_refused_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().display();
        for read_only in [false, true] {
            assert_eq!(
                message(dir.path(), read_only),
                format!(
                    "open disk image `{path}`: it is a directory, not a file or a block device"
                )
            );
            assert!(message("/dev/null", read_only).contains("it is a character device"));
        }
        let missing = dir.path().join("missing");
        match RawFile::open(&missing, false).unwrap_err() {
            RawFileError::Open { path, source } => {
                assert_eq!(path, missing);
                assert_eq!(source.kind(), io::ErrorKind::NotFound);
            }
            other => panic!("{other}"),
        }
        assert!(!missing.exists(), "a missing image must not be created");
        let fifo = dir.path().join("fifo");
        let name = CString::new(fifo.to_str().unwrap()).unwrap();
        // SAFETY: a call with a string that ends in NUL.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        assert!(message(&fifo, false).contains("it is a FIFO"));
    }

    #[test]
    fn a_size_that_no_disk_has_is_refused() {
        for size in [0, 1, 511, 513, 1000] {
            let image = image(size);
            let text = message(image.path(), false);
            assert!(
                text.contains(&format!("its size of {size} bytes")),
                "{text}"
            );
        }
        let image = image(512);
        assert_eq!(RawFile::open(image.path(), false).unwrap().size(), 512);
    }

    #[test]
    fn an_image_is_open_once_for_writing_or_often_for_reading() {
        let image = image(4096);
        let in_use = |read_only| {
            matches!(
                RawFile::open(image.path(), read_only),
                Err(RawFileError::InUse { .. })
            )
        };
        let writer = RawFile::open(image.path(), false).unwrap();
        assert!(in_use(false) && in_use(true));
        drop(writer);
        let reader = RawFile::open(image.path(), true).unwrap();
        let second = RawFile::open(image.path(), true).unwrap();
        assert!(in_use(false));
        drop((reader, second));
        RawFile::open(image.path(), false).unwrap();
        // By whatever name.
        let link = image.path().with_extension("link");
        std::os::unix::fs::symlink(image.path(), &link).unwrap();
        let _writer = RawFile::open(&link, false).unwrap();
        assert!(in_use(false));
        std::fs::remove_file(link).unwrap();
    }

    #[test]
    fn an_image_that_may_only_be_read_can_be_opened_for_reading() {
        let image = image(512);
        let mut permissions = image.as_file().metadata().unwrap().permissions();
        permissions.set_readonly(true);
        image.as_file().set_permissions(permissions).unwrap();
        let disk = RawFile::open(image.path(), true).unwrap();
        assert!(disk.is_read_only());
        assert!(!disk.default_id().is_empty());
    }
}
