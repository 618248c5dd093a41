//! A disk of the machine.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use kiln_devices::virtio::block::{
    BackingFiles, Block, BlockBackend, BlockOptions, BlockRateLimits, CacheMode, IoEngine, RawFile,
};

use crate::io_threads::DeviceIo;
use crate::{BuildError, CpuList, DiskFormat, IoThreads, Transport};

/// The most queues that a disk has where it is not said how many.
const DEFAULT_QUEUES: u16 = 16;

/// A disk: what is behind it, and how the guest sees it.
pub struct Disk {
    backend: Box<dyn BlockBackend>,
    options: BlockOptions,
    direct: bool,
    pub(crate) transport: Option<Transport>,
    pub(crate) io: DeviceIo,
}

impl Disk {
    /// An image, or a block device of the host, to be read and written. It is locked: no other
    /// machine can have it at the same time. Where its name ends in `.qcow2` it is in that format,
    /// and may have no backing file; else it is raw.
    ///
    /// # Errors
    ///
    /// [`BuildError::DiskImage`] and, for qcow2, `BuildError::Qcow2`, where it cannot be opened, is
    /// in use, or cannot be a disk.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, BuildError> {
        let format = DiskFormat::of_path(path.as_ref());
        Self::open_as(path, format, false, &BackingFiles::Refuse)
    }

    /// The same, to be read only. Any number of machines can have it so at the same time.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open).
    pub fn open_read_only(path: impl AsRef<Path>) -> Result<Self, BuildError> {
        let format = DiskFormat::of_path(path.as_ref());
        Self::open_as(path, format, true, &BackingFiles::Refuse)
    }

    /// An image in this format whatever its name, with the backing files that it may have. A raw
    /// image has none.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open).
    pub fn open_as(
        path: impl AsRef<Path>,
        format: DiskFormat,
        read_only: bool,
        backing: &BackingFiles,
    ) -> Result<Self, BuildError> {
        let path = path.as_ref();
        match format {
            DiskFormat::Raw => {
                let file = RawFile::open(path, read_only)?;
                hint_at_qcow2(path);
                Ok(Self::new(file))
            }
            DiskFormat::Qcow2 => Self::open_qcow2(path, read_only, backing),
        }
    }

    #[cfg(feature = "qcow2")]
    fn open_qcow2(
        path: &Path,
        read_only: bool,
        backing: &BackingFiles,
    ) -> Result<Self, BuildError> {
        let file = kiln_devices::virtio::block::Qcow2File::open(path, read_only, backing)?;
        Ok(Self::new(file))
    }

    #[cfg(not(feature = "qcow2"))]
    fn open_qcow2(path: &Path, _: bool, _: &BackingFiles) -> Result<Self, BuildError> {
        Err(BuildError::NoQcow2 {
            path: path.to_owned(),
        })
    }

    /// A disk with a backend of your own.
    pub fn new(backend: impl BlockBackend) -> Self {
        Self {
            backend: Box::new(backend),
            options: BlockOptions::default(),
            direct: false,
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

    /// How many queues it has, from 1 to 256. By default it is one for each vCPU, but no more than
    /// 16, so that vCPUs do not wait for each other.
    pub fn queues(mut self, count: u16) -> Self {
        self.options.queues = Some(count);
        self
    }

    /// When what the guest has written lasts: when it flushes it, as is the default, or when each
    /// write is completed. The guest can change it.
    pub fn cache(mut self, mode: CacheMode) -> Self {
        self.options.cache = mode;
        self
    }

    /// The size of blocks in bytes that the guest sees: 512 or 4096. By default it is that of what
    /// is behind the disk, which is also the least; for a file it is 512.
    pub fn logical_block_size(mut self, bytes: u32) -> Self {
        self.options.logical_block_size = Some(bytes);
        self
    }

    /// How much the guest may ask of it in a time: by default any amount. The limits of a running
    /// machine are changed by [`VmHandle::disk`](crate::VmHandle::disk).
    ///
    /// ```
    /// use kiln_vmm::{BlockRateLimits, RateLimit, RateLimits};
    /// use std::num::NonZeroU64;
    ///
    /// let per_second = |count| NonZeroU64::new(count).map(RateLimit::per_second);
    /// let limits = BlockRateLimits {
    ///     total: RateLimits {
    ///         bandwidth: per_second(10 << 20),
    ///         ops: per_second(1000),
    ///     },
    ///     ..BlockRateLimits::default()
    /// };
    /// # let disk = |disk: kiln_vmm::Disk| disk.rate_limits(limits);
    /// ```
    pub fn rate_limits(mut self, limits: BlockRateLimits) -> Self {
        self.options.rate_limits = limits;
        self
    }

    /// How an image or a block device is read and written. By default it is by io_uring where a
    /// request would have to wait for a device, and where the host has io_uring.
    pub fn engine(mut self, engine: IoEngine) -> Self {
        self.options.engine = engine;
        self
    }

    /// Whether an image is read and written without the host's page cache (`O_DIRECT`). By default
    /// it is not; a backend of your own cannot be.
    pub fn direct(mut self, direct: bool) -> Self {
        self.direct = direct;
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

    /// The device, of a machine with this many vCPUs.
    pub(crate) fn into_device(mut self, vcpus: u32) -> Result<Block, BuildError> {
        if self.direct {
            let file = self.backend.as_raw_file();
            file.ok_or(BuildError::DirectBackend)?.set_direct()?;
        }
        let queues = || u16::try_from(vcpus).unwrap_or(DEFAULT_QUEUES);
        let queues = self
            .options
            .queues
            .unwrap_or_else(|| queues().clamp(1, DEFAULT_QUEUES));
        self.options.queues = Some(queues);
        Ok(Block::new(self.backend, self.options)?)
    }
}

/// Says that a raw image looks like one in another format. The guest may have made it so, and it
/// stays raw.
fn hint_at_qcow2(path: &Path) {
    let mut start = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut start));
    if read.is_ok() && start == *b"QFI\xfb" {
        tracing::warn!(
            "disk image `{}` begins like a qcow2 image, and is used as a raw one: where it is no \
             guest's work, say format=qcow2",
            path.display()
        );
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("bytes", &self.backend.size())
            .field("read_only", &self.backend.is_read_only())
            .field("options", &self.options)
            .field("direct", &self.direct)
            .finish()
    }
}
