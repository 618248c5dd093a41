//! A file or a block device of the host as a disk, byte for byte.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kiln_memory::GuestSlice;
use rustix::fs::{FlockOperation, flock};

use super::{BlockBackend, SECTOR_SIZE};
use crate::virtio::iovec::{read_exact_at, write_all_at};

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
}

/// A raw disk image: a regular file, or a block device of the host.
///
/// It is locked (with `flock`) for as long as it is open: shared where it is opened for reading,
/// exclusive where it is opened for writing. The file's size never changes.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    size: u64,
    read_only: bool,
    id: String,
}

impl RawFile {
    /// Opens an image, for reading and writing unless `read_only`.
    ///
    /// # Errors
    ///
    /// [`RawFileError`], which says for each case what is wrong with the image.
    pub fn open(path: impl AsRef<Path>, read_only: bool) -> Result<Self, RawFileError> {
        let path = path.as_ref();
        let open_error = |source| RawFileError::Open {
            path: path.to_owned(),
            source,
        };
        // Looked at before it is opened, because opening a FIFO waits, and opening some devices
        // does something.
        check_kind(path, &std::fs::metadata(path).map_err(open_error)?)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(open_error)?;
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
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
            return Err(RawFileError::Size {
                path: path.to_owned(),
                size,
            });
        }
        let id = format!("{:x}-{:x}", metadata.dev(), metadata.ino());
        Ok(Self {
            file,
            size,
            read_only,
            id,
        })
    }
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

fn lock(file: &File, read_only: bool) -> io::Result<()> {
    let operation = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match flock(file, operation) {
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
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        read_exact_at(self.file.as_fd(), buffers, offset)
    }

    fn write_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        write_all_at(self.file.as_fd(), buffers, offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn default_id(&self) -> String {
        self.id.clone()
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
