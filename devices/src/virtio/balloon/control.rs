//! The host's side of a balloon, at run time.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_memory::MemorySize;
use kiln_virtio_device::{InterruptEvent, VirtioInterrupt};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::pages::PAGE_SIZE;
use super::{BalloonError, BalloonState, BalloonStatistics};

/// What a balloon has done since it was made.
#[derive(Debug, Default)]
pub struct BalloonCounters {
    /// Bytes that the driver put into the balloon, and that were given back to the host.
    pub inflated_bytes: AtomicU64,
    /// Bytes that the driver took out of the balloon.
    pub deflated_bytes: AtomicU64,
    /// Bytes that the driver reported as free, and that were given back to the host.
    pub reported_bytes: AtomicU64,
    /// How often the host did not take memory back.
    pub failures: AtomicU64,
}

/// What the device, its work on the I/O thread and those who control it have in common.
pub(super) struct Shared {
    /// The guest's RAM.
    limit: MemorySize,
    target: AtomicU32,
    actual: AtomicU32,
    /// The way to the driver, while there is one that listens.
    driver: Mutex<Option<Arc<dyn VirtioInterrupt>>>,
    statistics: Mutex<Asked>,
    answered: Condvar,
    /// Written when statistics are asked for.
    pub(super) wake: EventFd,
    pub(super) counters: Arc<BalloonCounters>,
}

/// Statistics, and who waits for them. Requests are counted: an answer to one is good for all
/// before it.
#[derive(Default)]
struct Asked {
    last: u64,
    answered: u64,
    latest: Option<BalloonStatistics>,
}

impl Shared {
    pub(super) fn new(limit: MemorySize, state: &BalloonState) -> io::Result<Self> {
        Ok(Self {
            limit,
            target: AtomicU32::new(state.target_pages),
            actual: AtomicU32::new(state.actual_pages),
            driver: Mutex::default(),
            statistics: Mutex::default(),
            answered: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            counters: Arc::default(),
        })
    }

    pub(super) fn state(&self) -> BalloonState {
        BalloonState {
            target_pages: self.target.load(Ordering::Acquire),
            actual_pages: self.actual.load(Ordering::Acquire),
        }
    }

    pub(super) fn set_actual(&self, pages: u32) {
        self.actual.store(pages, Ordering::Release);
    }

    /// A driver listens from now on. It is told of a target that was set while none did.
    pub(super) fn connect(&self, interrupt: Arc<dyn VirtioInterrupt>) {
        let mut driver = lock(&self.driver);
        let state = self.state();
        if state.target_pages != state.actual_pages {
            interrupt.trigger(InterruptEvent::Config);
        }
        *driver = Some(interrupt);
    }

    /// No driver listens from now on.
    pub(super) fn disconnect(&self) {
        *lock(&self.driver) = None;
    }

    fn set_target(&self, pages: u32) {
        let before = self.target.swap(pages, Ordering::AcqRel);
        // Under the lock, so that no interrupt comes behind a reset of the device.
        if let (Some(interrupt), true) = (&*lock(&self.driver), before != pages) {
            interrupt.trigger(InterruptEvent::Config);
        }
    }

    /// The number of the last request for statistics.
    pub(super) fn statistics_asked(&self) -> u64 {
        lock(&self.statistics).last
    }

    /// Statistics have come, after the driver was asked for those of this request.
    pub(super) fn publish_statistics(&self, request: u64, statistics: BalloonStatistics) {
        let mut asked = lock(&self.statistics);
        asked.latest = Some(statistics);
        asked.answered = request;
        self.answered.notify_all();
    }
}

/// What these locks guard is whole at every step, whoever panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Checks the size of a balloon, and gives it in pages.
pub(super) fn pages(size: MemorySize, limit: MemorySize) -> Result<u32, BalloonError> {
    let bytes = size.as_bytes();
    let pages = u32::try_from(bytes / PAGE_SIZE).ok();
    let possible = size <= limit && bytes.is_multiple_of(PAGE_SIZE);
    pages
        .filter(|_| possible)
        .ok_or(BalloonError::Target { size, limit })
}

pub(super) fn size(pages: u32) -> MemorySize {
    MemorySize::bytes(u64::from(pages) * PAGE_SIZE)
}

/// The host's side of a balloon. It can be cloned and used on any thread, at any time; where there
/// is no driver, or the machine has ended, nothing comes of it.
#[derive(Clone)]
pub struct BalloonControl {
    pub(super) shared: Arc<Shared>,
}

impl BalloonControl {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Sets how much of the guest's RAM is to be in the balloon. The driver is told, or will be
    /// once there is one, and gets there in its own time, or not at all: see
    /// [`actual`](Self::actual).
    ///
    /// # Errors
    ///
    /// [`BalloonError::Target`] where it is more than the guest has, or not whole pages of 4 KiB.
    pub fn set_target(&self, target: MemorySize) -> Result<(), BalloonError> {
        self.shared.set_target(pages(target, self.shared.limit)?);
        Ok(())
    }

    /// How much of the guest's RAM is to be in the balloon.
    pub fn target(&self) -> MemorySize {
        size(self.shared.state().target_pages)
    }

    /// How much of the guest's RAM is in the balloon, as the driver says.
    pub fn actual(&self) -> MemorySize {
        size(self.shared.state().actual_pages)
    }

    /// The last statistics that the guest gave. A driver gives some when it starts, and then when
    /// it is asked.
    pub fn statistics(&self) -> Option<BalloonStatistics> {
        lock(&self.shared.statistics).latest.clone()
    }

    /// Asks the guest for new statistics, and does not wait for them.
    pub fn request_statistics(&self) {
        self.ask();
    }

    /// Asks the guest for new statistics, and waits for them, but no longer than `timeout`; `None`
    /// where none have come. A guest whose driver has no statistics, or that is paused, gives none.
    ///
    /// It is not for devices of the machine, which would wait for the thread that they work on.
    pub fn wait_for_statistics(&self, timeout: Duration) -> Option<BalloonStatistics> {
        let request = self.ask();
        let (asked, result) = self
            .shared
            .answered
            .wait_timeout_while(lock(&self.shared.statistics), timeout, |asked| {
                asked.answered < request
            })
            .unwrap_or_else(PoisonError::into_inner);
        asked.latest.clone().filter(|_| !result.timed_out())
    }

    fn ask(&self) -> u64 {
        let mut asked = lock(&self.shared.statistics);
        asked.last += 1;
        let request = asked.last;
        drop(asked);
        // Where it is full, it is readable, which is all that there is to it.
        let _ = self.shared.wake.write(1);
        request
    }

    /// What the balloon has done.
    pub fn counters(&self) -> Arc<BalloonCounters> {
        Arc::clone(&self.shared.counters)
    }
}

impl fmt::Debug for BalloonControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BalloonControl")
            .field("target", &self.target())
            .field("actual", &self.actual())
            .finish_non_exhaustive()
    }
}
