//! What a disk can do, whatever is behind it.

use std::io;

use kiln_memory::GuestSlice;

use super::RawFile;

/// The unit that a driver counts a disk in, in bytes (virtio 1.3, section 5.2.4).
pub const SECTOR_SIZE: u64 = 512;

/// What a disk can do besides reading and writing, and the sizes that suit it. It does not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockProperties {
    /// The size of its blocks in bytes, of which requests are to be multiples: 512 or 4096. Where
    /// it is 512 the device's options can make it more.
    pub logical_block_size: u32,
    /// What it can write without reading before, in bytes: a power of two, and not less than the
    /// logical block size.
    pub physical_block_size: u32,
    /// The size in bytes of requests that suit it best; 0 where that does not matter.
    pub optimal_io_size: u32,
    /// Whether it has [`discard`](BlockBackend::discard).
    pub discard: bool,
    /// What a discard is to be a multiple of to have an effect, in bytes; 0 for any block.
    pub discard_alignment: u32,
    /// Whether it has [`write_zeroes`](BlockBackend::write_zeroes).
    pub write_zeroes: bool,
}

/// Blocks of 512 bytes in pages of 4096, and nothing besides reading and writing.
impl Default for BlockProperties {
    fn default() -> Self {
        Self {
            logical_block_size: 512,
            physical_block_size: 4096,
            optimal_io_size: 0,
            discard: false,
            discard_alignment: 0,
            write_zeroes: false,
        }
    }
}

/// A disk: bytes that are read and written straight from and to guest RAM.
///
/// A request never passes [`size`](Self::size), and begins and ends at a sector. Errors reach the
/// driver as an I/O error of that request; the device goes on.
///
/// The guest may change what is written while it is being written.
///
/// One request is made at a time, on whatever I/O thread the queue that it came by is worked on.
pub trait BlockBackend: Send + 'static {
    /// The size in bytes, which changes at [`refresh_size`](Self::refresh_size) only.
    fn size(&self) -> u64;

    /// Whether the disk cannot be written, which does not change. Such a disk is never asked to. By
    /// default it can.
    fn is_read_only(&self) -> bool {
        false
    }

    /// Fills `buffers`, in their order, from `offset` bytes on.
    ///
    /// # Errors
    ///
    /// Any error. The buffers may have been written in part.
    fn read_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()>;

    /// Writes `buffers`, in their order, from `offset` bytes on.
    ///
    /// # Errors
    ///
    /// Any error. The disk may have been written in part.
    fn write_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()>;

    /// Makes everything that was written survive a loss of power.
    ///
    /// # Errors
    ///
    /// Any error: then nothing is known of what was written since the last flush.
    fn flush(&mut self) -> io::Result<()>;

    /// A name for the disk, where the configuration gives none: the driver sees the first 20
    /// bytes of it.
    fn default_id(&self) -> String {
        String::new()
    }

    /// What the disk can do besides, and the sizes that suit it. By default it can do nothing
    /// besides.
    fn properties(&self) -> BlockProperties {
        BlockProperties::default()
    }

    /// Forgets `len` bytes from `offset` on, if the [properties](BlockProperties) say that the
    /// disk can: nothing is known of their content then, and they need no room any more.
    ///
    /// # Errors
    ///
    /// Any error.
    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let _ = (offset, len);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Writes `len` bytes of zeros from `offset` on, if the [properties](BlockProperties) say that
    /// the disk can. They need no room any more where the disk knows how to do that and `unmap` says
    /// that it may; where that is not set, later writes there must not fail for lack of room.
    ///
    /// # Errors
    ///
    /// Any error. The disk may have been written in part.
    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let _ = (offset, len, unmap);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Looks how large the disk is now, and gives what [`size`](Self::size) gives from then on. By
    /// default it has not changed.
    ///
    /// # Errors
    ///
    /// Any error. The size is as it was then.
    fn refresh_size(&mut self) -> io::Result<u64> {
        Ok(self.size())
    }

    /// The raw file that this is and nothing else, so that the device need not call it for each
    /// request. It is for [`RawFile`]; by default there is none.
    fn as_raw_file(&self) -> Option<RawFile> {
        None
    }
}

impl<T: BlockBackend + ?Sized> BlockBackend for Box<T> {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn is_read_only(&self) -> bool {
        (**self).is_read_only()
    }

    fn read_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        (**self).read_at(offset, buffers)
    }

    fn write_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        (**self).write_at(offset, buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        (**self).flush()
    }

    fn default_id(&self) -> String {
        (**self).default_id()
    }

    fn properties(&self) -> BlockProperties {
        (**self).properties()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        (**self).discard(offset, len)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        (**self).write_zeroes(offset, len, unmap)
    }

    fn refresh_size(&mut self) -> io::Result<u64> {
        (**self).refresh_size()
    }

    fn as_raw_file(&self) -> Option<RawFile> {
        (**self).as_raw_file()
    }
}
