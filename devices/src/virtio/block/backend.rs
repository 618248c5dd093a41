//! What a disk can do, whatever is behind it.

use std::io;

use kiln_memory::GuestSlice;

/// The unit that a driver counts a disk in, in bytes (virtio 1.3, section 5.2.4).
pub const SECTOR_SIZE: u64 = 512;

/// A disk: bytes that are read and written straight from and to guest RAM.
///
/// A request never passes [`size`](Self::size), and begins and ends at a sector. Errors reach the
/// driver as an I/O error of that request; the device goes on.
///
/// The guest may change what is written while it is being written.
pub trait BlockBackend: Send + 'static {
    /// The size in bytes, which does not change.
    fn size(&self) -> u64;

    /// Whether the disk cannot be written, which does not change either. Such a disk is never
    /// asked to. By default it can.
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
}
