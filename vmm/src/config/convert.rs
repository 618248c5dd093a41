//! From a description to a builder.

use super::{
    BalloonConfig, DiskConfig, RateLimitConfig, RateLimitsConfig, RngConfig, VmConfig, VsockConfig,
    console,
};
use crate::{
    BackingFiles, Balloon, BlockRateLimits, BuildError, Disk, DiskFormat, Kernel, RateLimit,
    RateLimits, Rng, VmBuilder, Vsock,
};

impl VmConfig {
    /// Opens what the description names, and gives a builder of that machine, to which devices of
    /// your own can be added. What needs the host is checked by the builder's `build`. Without a
    /// kernel, the builder has none yet either.
    ///
    /// # Errors
    ///
    /// Where the kernel, a disk, a tap interface or a console's file cannot be used.
    pub fn builder(self) -> Result<VmBuilder, BuildError> {
        console::check(&self)?;
        let mut builder = VmBuilder::new()
            .cmdline(self.cmdline)
            .vcpus(self.vcpus)
            .memory(self.memory)
            .memory_options(self.memory_options)
            .transport(self.transport)
            .io_threads(self.io_threads)
            .kernel_decompressor(self.kernel_decompressor);
        if let Some(cpus) = self.io_affinity {
            builder = builder.io_affinity(cpus);
        }
        if let Some(name) = self.name {
            builder = builder.name(name);
        }
        if let Some(path) = self.kernel {
            let mut kernel = Kernel::open(path)?;
            if let Some(protocol) = self.boot_protocol.chosen() {
                kernel = kernel.with_protocol(protocol)?;
            }
            builder = builder.kernel(kernel);
        }
        if let Some(initrd) = self.initrd {
            builder = builder.initrd(initrd);
        }
        for disk in self.disks {
            builder = builder.disk(disk.open()?);
        }
        for net in self.nets {
            builder = builder.net(net.open()?);
        }
        if let Some(vsock) = self.vsock {
            builder = builder.vsock(vsock.into());
        }
        if let Some(rng) = self.rng {
            builder = builder.rng(rng.into());
        }
        if let Some(balloon) = self.balloon {
            builder = builder.balloon(balloon.into());
        }
        // Last, because a file that was there is emptied.
        if let Some(console) = self.console {
            builder = builder.console(console.open()?);
        }
        if let Some(serial) = self.serial {
            builder = builder.serial(serial.open("the serial port")?);
        }
        Ok(builder)
    }
}

impl DiskConfig {
    fn open(self) -> Result<Disk, BuildError> {
        let format = self.format.unwrap_or(DiskFormat::of_path(&self.path));
        let backing = match (self.any_backing, self.backing) {
            (true, _) => BackingFiles::Allow,
            (false, paths) if paths.is_empty() => BackingFiles::Refuse,
            (false, paths) => BackingFiles::Only(paths),
        };
        let limits = BlockRateLimits {
            total: self.rate_limit.into(),
            read: self.read_rate_limit.into(),
            write: self.write_rate_limit.into(),
        };
        let disk = Disk::open_as(&self.path, format, self.readonly, &backing)?;
        let disk = disk
            .cache(self.cache)
            .direct(self.direct)
            .engine(self.engine);
        let mut disk = disk.rate_limits(limits);
        if let Some(id) = self.id {
            disk = disk.id(id);
        }
        if let Some(queues) = self.queues {
            disk = disk.queues(queues);
        }
        if let Some(size) = self.logical_block_size {
            disk = disk.logical_block_size(size);
        }
        if let Some(threads) = self.io_threads {
            disk = disk.io_threads(threads);
        }
        if let Some(cpus) = self.io_affinity {
            disk = disk.io_affinity(cpus);
        }
        Ok(match self.transport {
            Some(transport) => disk.transport(transport),
            None => disk,
        })
    }
}

impl From<VsockConfig> for Vsock {
    fn from(config: VsockConfig) -> Self {
        let vsock = Self::new(config.cid, config.socket);
        match config.transport {
            Some(transport) => vsock.transport(transport),
            None => vsock,
        }
    }
}

impl From<RngConfig> for Rng {
    fn from(config: RngConfig) -> Self {
        let rng = match config.rate_limit {
            Some(limit) => Self::new().rate_limit(limit.into()),
            None => Self::new(),
        };
        match config.transport {
            Some(transport) => rng.transport(transport),
            None => rng,
        }
    }
}

impl From<RateLimitConfig> for RateLimit {
    fn from(config: RateLimitConfig) -> Self {
        let limit = Self::per_second(config.per_second);
        limit.with_burst(config.burst.unwrap_or(config.per_second))
    }
}

impl From<RateLimitsConfig> for RateLimits {
    fn from(config: RateLimitsConfig) -> Self {
        Self {
            bandwidth: config.bandwidth.map(RateLimit::from),
            ops: config.ops.map(RateLimit::from),
        }
    }
}

impl From<BalloonConfig> for Balloon {
    fn from(config: BalloonConfig) -> Self {
        let balloon = Self::new()
            .target(config.target)
            .deflate_on_oom(config.deflate_on_oom)
            .free_page_reporting(config.free_page_reporting);
        match config.transport {
            Some(transport) => balloon.transport(transport),
            None => balloon,
        }
    }
}
