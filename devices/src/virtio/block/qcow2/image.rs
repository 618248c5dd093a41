//! An image file as the driver reads and writes it.
//!
//! What the driver itself writes is of two kinds. *Tables* say where the guest's data is and which
//! clusters are in use, and a crash must leave them so that they contradict each other in harmless
//! ways only (a cluster in use that nothing needs). *Data* that the driver copies into a new cluster
//! has to be there before a table leads to it. The guest's own data has to last only when the guest
//! flushes.
//!
//! The driver keeps refcounts and L2 tables in memory, and writes the one before the other as it
//! should. Here it is made sure that
//!
//! - they get to the disk in that order: before a table is written, what was written is synced;
//! - a cluster that the driver puts a new table into is in use as the file has it, too, before the
//!   entry of the L1 table or of the refcount table that leads there is written. The driver writes
//!   that entry at once, and the refcount some time later.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use kiln_memory::GuestSlice;
use rustix::fs::{FallocateFlags, fallocate};

use super::compressed;
use super::header::{HEADER_V2, Header, L1_TABLE};
use super::refcounts::Layout;
use crate::virtio::iovec::{read_at_most, write_all_at};

/// The bits of an entry that are the place of a cluster.
const POINTER: u64 = 0x00ff_ffff_ffff_fe00;
/// The alignment that the driver's own buffers have in memory: it takes them for arrays of up to
/// 64 bits a number.
const ALIGNMENT: usize = 8;

/// A file that is an image or a backing file of one.
pub(super) struct ImageFile {
    file: File,
    path: PathBuf,
    size: u64,
    /// What has to be known to write it; nothing where it is only read.
    written: Option<Written>,
    /// Whether a table that is written next has to wait for what was written before.
    unsynced: AtomicBool,
    /// Whether nothing is to be written any more.
    frozen: AtomicBool,
    /// All that was written, where a test wants to know.
    #[cfg(test)]
    pub(super) journal: std::sync::Mutex<Vec<Operation>>,
}

/// What has to be known of an image to write it.
struct Written {
    /// Where the guest's data can begin: the header lies before it.
    data_start: u64,
    /// What the file never grows beyond, whatever its tables say.
    limit: u64,
    refcounts: Layout,
    /// Where the L1 table is, by the header in the file.
    l1_table: AtomicU64,
    /// Whether the image is open, and the guest has to do with what the driver writes.
    in_use: AtomicBool,
}

/// What was done to a file.
#[cfg(test)]
#[derive(Clone, Debug)]
pub(super) enum Operation {
    Write(u64, Vec<u8>),
    Sync,
}

impl ImageFile {
    /// A file of `size` bytes that is only read.
    pub(super) fn read_only(path: &Path, file: File, size: u64) -> Arc<Self> {
        Arc::new(Self {
            file,
            path: path.to_owned(),
            size,
            written: None,
            unsynced: AtomicBool::new(false),
            frozen: AtomicBool::new(false),
            #[cfg(test)]
            journal: std::sync::Mutex::default(),
        })
    }

    /// An image of `size` bytes that is written, too, and does not grow beyond `limit`.
    pub(super) fn writable(
        path: &Path,
        file: File,
        size: u64,
        header: &Header,
        limit: u64,
    ) -> Arc<Self> {
        let written = Written {
            data_start: 1 << header.cluster_bits,
            limit,
            refcounts: Layout {
                cluster_bits: header.cluster_bits,
                order: header.refcount_order,
            },
            l1_table: AtomicU64::new(header.l1_table),
            in_use: AtomicBool::new(false),
        };
        Arc::new(Self {
            file,
            path: path.to_owned(),
            size,
            written: Some(written),
            unsynced: AtomicBool::new(false),
            frozen: AtomicBool::new(false),
            #[cfg(test)]
            journal: std::sync::Mutex::default(),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Says that the image is open: nothing but the places of tables changes in its header any more.
    pub(super) fn begin_use(&self) {
        if let Some(written) = &self.written {
            written.in_use.store(true, Ordering::Relaxed);
        }
    }

    /// From now on every write fails.
    pub(super) fn freeze(&self) {
        self.frozen.store(true, Ordering::Relaxed);
    }

    /// Makes everything that was written last.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()?;
        #[cfg(test)]
        self.journal.lock().unwrap().push(Operation::Sync);
        self.unsynced.store(false, Ordering::Relaxed);
        Ok(())
    }

    #[cfg(test)]
    fn note(&self, offset: u64, bytes: Vec<u8>) {
        let operation = Operation::Write(offset, bytes);
        self.journal.lock().unwrap().push(operation);
    }

    /// What has to be known to write the file, if that may be.
    fn written(&self) -> io::Result<&Written> {
        let frozen = self.frozen.load(Ordering::Relaxed);
        let written = self.written.as_ref().filter(|_| !frozen);
        Ok(written.ok_or(io::ErrorKind::ReadOnlyFilesystem)?)
    }

    /// How to write `len` bytes at `offset`, where that may be: not in the header, for one.
    fn writing(&self, offset: u64, len: u64) -> io::Result<&Written> {
        let written = self.written()?;
        let end = offset.checked_add(len).filter(|end| *end <= written.limit);
        match end {
            Some(_) if offset >= written.data_start => Ok(written),
            _ => Err(forbidden()),
        }
    }

    /// How to write `bytes` at `offset` for the driver itself, as the header. A table can be there,
    /// too, where an image's refcounts are wrong: that is not written.
    fn writing_header(&self, offset: u64, bytes: &[u8]) -> io::Result<&Written> {
        let written = self.written()?;
        if !written.in_use.load(Ordering::Relaxed) {
            return Ok(written);
        }
        let mut before = [0; L1_TABLE];
        let read = self.file.read_at(&mut before, 0)?;
        let is_same = read == before.len() && bytes.starts_with(&before);
        match offset == 0 && bytes.len() == HEADER_V2 && is_same {
            true => Ok(written),
            false => Err(forbidden()),
        }
    }

    /// Does what has to be done before `bytes` are written at `offset`.
    fn prepare(&self, content: Content, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let tables = content == Content::Tables;
        let is_header = tables && offset < self.written()?.data_start;
        let written = match is_header {
            true => self.writing_header(offset, bytes)?,
            false => self.writing(offset, bytes.len() as u64)?,
        };
        if tables {
            if is_header {
                self.take_l1_table(written, bytes)?;
            } else if let Ok(entry) = bytes.try_into() {
                // An entry of the L1 table or of the refcount table: all else is longer.
                let cluster = u64::from_be_bytes(entry) & POINTER;
                self.take(written, cluster)?;
            }
            if self.unsynced.load(Ordering::Relaxed) {
                self.sync()?;
            }
        }
        self.unsynced.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Where a header that is to be written has another L1 table than before, its clusters have to
    /// be in use.
    fn take_l1_table(&self, written: &Written, header: &[u8]) -> io::Result<()> {
        let place = header.get(L1_TABLE..L1_TABLE + 12);
        let Some([e0, e1, e2, e3, place @ ..]) = place else {
            return Ok(());
        };
        let place = place.try_into().map_or(0, u64::from_be_bytes);
        if written.l1_table.swap(place, Ordering::Relaxed) == place {
            return Ok(());
        }
        let bytes = u64::from(u32::from_be_bytes([*e0, *e1, *e2, *e3])) * 8;
        let clusters = bytes.div_ceil(written.data_start);
        for number in 0..clusters {
            self.take(written, place + number * written.data_start)?;
        }
        Ok(())
    }

    fn take(&self, written: &Written, cluster: u64) -> io::Result<()> {
        if let Some(change) = written.refcounts.take(&self.file, cluster)? {
            self.writing(change.offset, change.bytes.len() as u64)?;
            self.write_all(&change.bytes, change.offset)?;
            self.unsynced.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Gives the host back what the file has of the guest's data at a place that no table leads to
    /// any more; nothing happens where the file system cannot.
    pub(super) fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.writing(offset, len)?;
        #[cfg(test)]
        self.note(offset, vec![0; len as usize]);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, offset, len) {
            Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            result => Ok(result?),
        }
    }

    fn write_all(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        self.note(offset, bytes.to_vec());
        self.file.write_all_at(bytes, offset)
    }
}

/// A place that is not for what would be written there.
fn forbidden() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the image's tables lead to where no data can be",
    )
}

/// What a file holds for the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// The header and all tables.
    Tables,
    /// The guest's data.
    Data,
}

/// A file in one of its roles.
pub(super) struct Image {
    file: Arc<ImageFile>,
    content: Content,
    helper: CommonStorageHelper,
}

impl Image {
    pub(super) fn new(file: &Arc<ImageFile>, content: Content) -> Self {
        Self {
            file: Arc::clone(file),
            content,
            helper: CommonStorageHelper::default(),
        }
    }

    /// Fills guest RAM from `offset` on, and with zeros behind the file's end.
    pub(super) fn read_guest(&self, slices: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
        let done = read_at_most(self.file.file.as_fd(), slices, offset)?;
        zero(slices, done);
        Ok(())
    }

    /// Writes from guest RAM at `offset`.
    pub(super) fn write_guest(&self, slices: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
        let len = slices.iter().map(|slice| slice.len() as u64).sum();
        self.file.writing(offset, len)?;
        #[cfg(test)]
        self.file.note(offset, kiln_memory::gather(slices));
        write_all_at(self.file.file.as_fd(), slices, offset)
    }
}

/// Fills `slices` with zeros, but for the first `skip` bytes.
pub(super) fn zero(slices: &[GuestSlice<'_>], mut skip: usize) {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    for slice in slices {
        let mut at = skip.min(slice.len());
        skip -= at;
        while let Ok(rest) = slice.offset(at) {
            if rest.is_empty() {
                break;
            }
            let now = rest.len().min(ZEROS.len());
            rest.copy_from(&ZEROS[..now]);
            at += now;
        }
    }
}

// All of these are called by the driver alone, which keeps to what they demand; nothing here relies
// on it.
impl Storage for Image {
    fn mem_align(&self) -> usize {
        ALIGNMENT
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.file.size)
    }

    unsafe fn pure_readv(&self, buffers: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        for mut buffer in buffers.into_inner() {
            let mut done = 0;
            while done < buffer.len() {
                let at = offset.checked_add(done as u64);
                let at = at.ok_or(io::ErrorKind::InvalidInput)?;
                match self.file.file.read_at(&mut buffer[done..], at) {
                    Ok(0) => {
                        buffer[done..].fill(0);
                        break;
                    }
                    Ok(count) => done += count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            offset = offset.saturating_add(buffer.len() as u64);
            if self.content == Content::Data {
                compressed::check(&buffer)?;
            }
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, buffers: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        for buffer in buffers.into_inner() {
            self.file.prepare(self.content, offset, &buffer)?;
            self.file.write_all(&buffer, offset)?;
            offset += buffer.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // It is data: the driver writes no table so.
        self.file.writing(offset, length)?;
        self.file.unsynced.store(true, Ordering::Relaxed);
        #[cfg(test)]
        self.file.note(offset, vec![0; length as usize]);
        // What lies behind the file's end becomes a hole.
        let file = &self.file.file;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file, flags, offset, length)?;
        if file.metadata()?.len() < offset + length && file.metadata()?.is_file() {
            file.set_len(offset + length)?;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, _size: u64, _mode: PreallocateMode) -> io::Result<()> {
        // The file grows with what is written to it.
        Ok(())
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("path", &self.file.path)
            .field("content", &self.content)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.path.display().fmt(f)
    }
}
