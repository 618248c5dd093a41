//! What a disk's queues, its configuration and those who control it have in common.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_memory::GuestSlice;
use kiln_virtio_device::{InterruptEvent, VirtioInterrupt};

use super::config::Config;
use super::limits::Limiters;
use super::request::{ID_BYTES, Request};
use super::{
    BlockBackend, BlockCounters, BlockError, BlockRateLimits, CacheMode, RawFile, SECTOR_SIZE,
};

/// The way to what is behind the disk. Each queue has a clone.
#[derive(Clone)]
pub(super) enum Source {
    /// Takes requests of several threads at once.
    Raw(RawFile),
    /// Takes one at a time.
    Other(Arc<Mutex<Box<dyn BlockBackend>>>),
}

impl Source {
    pub(super) fn new(backend: Box<dyn BlockBackend>) -> Self {
        match backend.as_raw_file() {
            Some(file) => Self::Raw(file),
            None => Self::Other(Arc::new(Mutex::new(backend))),
        }
    }

    /// Does a request, with this data where it has some.
    pub(super) fn serve(&self, request: &Request, data: &[GuestSlice<'_>]) -> io::Result<()> {
        match self {
            Self::Raw(file) => match request {
                Request::Read { offset } => file.read(*offset, data),
                Request::Write { offset } => file.write(*offset, data),
                Request::Flush => file.sync(),
                Request::GetId => Ok(()),
                Request::Discard(ranges) => ranges
                    .iter()
                    .try_for_each(|range| file.forget(range.offset, range.len)),
                Request::WriteZeroes(ranges) => ranges
                    .iter()
                    .try_for_each(|range| file.zero(range.offset, range.len, range.unmap)),
            },
            Self::Other(backend) => {
                let mut backend = lock(backend)?;
                match request {
                    Request::Read { offset } => backend.read_at(*offset, data),
                    Request::Write { offset } => backend.write_at(*offset, data),
                    Request::Flush => backend.flush(),
                    Request::GetId => Ok(()),
                    Request::Discard(ranges) => ranges
                        .iter()
                        .try_for_each(|range| backend.discard(range.offset, range.len)),
                    Request::WriteZeroes(ranges) => ranges.iter().try_for_each(|range| {
                        backend.write_zeroes(range.offset, range.len, range.unmap)
                    }),
                }
            }
        }
    }

    /// Makes what was written last.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.serve(&Request::Flush, &[])
    }

    fn refresh_size(&self) -> io::Result<u64> {
        match self {
            Self::Raw(file) => file.look_at_size(),
            Self::Other(backend) => lock(backend)?.refresh_size(),
        }
    }
}

/// A backend that panicked may be in any state.
fn lock<T>(backend: &Mutex<T>) -> io::Result<MutexGuard<'_, T>> {
    backend
        .lock()
        .map_err(|_| io::Error::other("what is behind the disk has panicked"))
}

/// The state of a disk that is seen from several threads.
pub(super) struct Shared {
    pub(super) source: Source,
    pub(super) counters: Arc<BlockCounters>,
    pub(super) read_only: bool,
    pub(super) id: [u8; ID_BYTES],
    pub(super) rate_limits: Limiters,
    /// The configuration without what changes.
    config: Config,
    sectors: AtomicU64,
    /// Whether completed writes may be lost until the next flush.
    writeback: AtomicBool,
    /// The mode that a driver which begins anew finds.
    default_cache: CacheMode,
    driver: Mutex<Driver>,
}

/// The driver that listens, if there is one.
#[derive(Default)]
struct Driver {
    interrupt: Option<Arc<dyn VirtioInterrupt>>,
    /// The size changed while none listened.
    missed: bool,
}

impl Shared {
    pub(super) fn new(
        source: Source,
        read_only: bool,
        id: [u8; ID_BYTES],
        config: Config,
        size: u64,
        cache: CacheMode,
        rate_limits: BlockRateLimits,
    ) -> Self {
        Self {
            source,
            counters: Arc::default(),
            read_only,
            id,
            rate_limits: Limiters::new(rate_limits),
            config,
            sectors: AtomicU64::new(size / SECTOR_SIZE),
            writeback: AtomicBool::new(cache == CacheMode::Writeback),
            default_cache: cache,
            driver: Mutex::default(),
        }
    }

    pub(super) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    pub(super) fn config(&self) -> [u8; Config::BYTES] {
        self.config.bytes(self.sectors(), self.is_writeback())
    }

    pub(super) fn limits(&self) -> &Config {
        &self.config
    }

    pub(super) fn is_writeback(&self) -> bool {
        self.writeback.load(Ordering::Acquire)
    }

    pub(super) fn set_writeback(&self, writeback: bool) {
        self.writeback.store(writeback, Ordering::Release);
    }

    /// The driver chooses whether writes last at once. From then on it does not flush what it wrote
    /// before, so that is done here.
    pub(super) fn driver_sets_writeback(&self, writeback: bool) {
        let before = self.writeback.swap(writeback, Ordering::AcqRel);
        if before && !writeback && !self.read_only {
            let flushed = self.counters.flush_latency.time(|| self.source.flush());
            if let Err(error) = flushed {
                // A driver that was told so could do no more; a guest cannot repeat this for free.
                tracing::debug!("flush a disk whose cache is turned off: {error}");
            }
        }
    }

    /// A driver that begins anew finds the cache as it was at first.
    pub(super) fn reset(&self) {
        self.set_writeback(self.default_cache == CacheMode::Writeback);
        self.driver().missed = false;
    }

    /// A driver listens from now on.
    pub(super) fn connect(&self, interrupt: Arc<dyn VirtioInterrupt>) {
        let mut driver = self.driver();
        if std::mem::take(&mut driver.missed) {
            interrupt.trigger(InterruptEvent::Config);
        }
        driver.interrupt = Some(interrupt);
    }

    /// No driver listens from now on.
    pub(super) fn disconnect(&self) {
        self.driver().interrupt = None;
    }

    fn driver(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refresh_size(&self) -> io::Result<u64> {
        // One at a time, and so that no interrupt comes behind a reset of the device.
        let mut driver = self.driver();
        let size = self.source.refresh_size()?;
        let sectors = size / SECTOR_SIZE;
        if self.sectors.swap(sectors, Ordering::AcqRel) != sectors {
            match &driver.interrupt {
                Some(interrupt) => interrupt.trigger(InterruptEvent::Config),
                None => driver.missed = true,
            }
        }
        Ok(size)
    }
}

/// The host's side of a disk. It can be cloned and used on any thread, at any time.
#[derive(Clone)]
pub struct BlockControl {
    shared: Arc<Shared>,
}

impl BlockControl {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The size in bytes that the driver sees.
    pub fn size(&self) -> u64 {
        self.shared.sectors() * SECTOR_SIZE
    }

    /// Looks how large the image or the backend is now, and tells the driver where that has
    /// changed, or as soon as there is one. Gives the size in bytes: of a raw file, as many whole
    /// blocks as it has.
    ///
    /// What is behind the end of a disk that became smaller is lost to the guest, and requests for
    /// it fail. It waits for the backend, and so is not for devices of the machine.
    ///
    /// # Errors
    ///
    /// [`BlockError::Refresh`] where the size cannot be had, or is not that of a disk. The disk is
    /// as it was then.
    pub fn refresh_size(&self) -> Result<u64, BlockError> {
        self.shared.refresh_size().map_err(BlockError::Refresh)
    }

    /// Whether the guest has to flush what is to last, which its driver may have changed.
    pub fn cache(&self) -> CacheMode {
        if self.shared.is_writeback() {
            CacheMode::Writeback
        } else {
            CacheMode::Writethrough
        }
    }

    /// How much the driver may ask of the disk in a time.
    pub fn rate_limits(&self) -> BlockRateLimits {
        self.shared.rate_limits.get()
    }

    /// Changes how much the driver may ask of the disk in a time, from now on. What it asked for
    /// before counts on where there was a limit already.
    ///
    /// # Errors
    ///
    /// [`BlockError::RateLimits`] where they cannot be together. The limits are as they were then.
    pub fn set_rate_limits(&self, limits: BlockRateLimits) -> Result<(), BlockError> {
        limits.check()?;
        self.shared.rate_limits.set(limits);
        Ok(())
    }

    /// What the disk has done.
    pub fn counters(&self) -> Arc<BlockCounters> {
        Arc::clone(&self.shared.counters)
    }
}

impl fmt::Debug for BlockControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockControl")
            .field("size", &self.size())
            .field("cache", &self.cache())
            .finish_non_exhaustive()
    }
}
