//! A disk of the machine.

use std::fmt;
use std::path::Path;

use kiln_devices::virtio::block::{Block, BlockBackend, BlockOptions, RawFile};

use crate::io_threads::DeviceIo;
use crate::{BuildError, CpuList, IoThreads, Transport};

/// A disk: what is behind it, and the id that the guest sees.
pub struct Disk {
    backend: Box<dyn BlockBackend>,
    options: BlockOptions,
    pub(crate) transport: Option<Transport>,
    pub(crate) io: DeviceIo,
}

impl Disk {
    /// A raw image or a block device of the host, to be read and written. It is locked: no other
    /// machine can have it at the same time.
    ///
    /// # Errors
    ///
    /// [`BuildError::DiskImage`] where it cannot be opened, is in use, or cannot be a disk.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, BuildError> {
        Ok(Self::new(RawFile::open(path, false)?))
    }

    /// A raw image or a block device of the host, to be read only. Any number of machines can have
    /// it so at the same time.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open).
    pub fn open_read_only(path: impl AsRef<Path>) -> Result<Self, BuildError> {
        Ok(Self::new(RawFile::open(path, true)?))
    }

    /// A disk with a backend of your own.
    pub fn new(backend: impl BlockBackend) -> Self {
        Self {
            backend: Box::new(backend),
            options: BlockOptions::default(),
            transport: None,
            io: DeviceIo::default(),
        }
    }

    /// The id that the guest sees, which Linux shows as the disk's serial number: 1 to 20 printable
    /// ASCII characters. By default it is made from what the image is.
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.options.id = Some(id.into());
        self
    }

    /// How the guest reaches it, where that differs from the rest of the machine
    /// ([`VmBuilder::transport`](crate::VmBuilder::transport)).
    pub fn transport(mut self, transport: Transport) -> Self {
        self.transport = Some(transport);
        self
    }

    /// Who works on its queues, where that differs from the rest of the machine
    /// ([`VmBuilder::io_threads`](crate::VmBuilder::io_threads)).
    pub fn io_threads(mut self, threads: IoThreads) -> Self {
        self.io.threads = Some(threads);
        self
    }

    /// The host's CPUs that its I/O threads run on, where they are not those of all I/O threads
    /// ([`VmBuilder::io_affinity`](crate::VmBuilder::io_affinity)). It needs threads of its own.
    pub fn io_affinity(mut self, cpus: CpuList) -> Self {
        self.io.affinity = Some(cpus);
        self
    }

    pub(crate) fn into_device(self) -> Result<Block, BuildError> {
        Ok(Block::new(self.backend, self.options)?)
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("bytes", &self.backend.size())
            .field("read_only", &self.backend.is_read_only())
            .field("options", &self.options)
            .finish()
    }
}
