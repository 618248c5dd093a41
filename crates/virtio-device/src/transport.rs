//! What all transports have in common.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::DeviceCounters;
use crate::core::VirtioCore;

/// Told why a device gave up on its driver.
pub type NeedsResetHook = Box<dyn Fn(&str) + Send + Sync>;

/// A device behind a transport, as its machine sees it, whichever transport that is.
pub trait VirtioTransport: Send + Sync {
    /// The virtio device type (virtio 1.3, section 5).
    fn device_type(&self) -> u32;

    /// One eventfd for each queue, in the order of their indices, to be written by a notification.
    fn kicks(&self) -> Vec<Arc<EventFd>>;

    /// What the device does, to be looked at while it works.
    fn counters(&self) -> Arc<DeviceCounters>;

    /// Has `tell` called with the reason when the device gives up on its driver
    /// (`DEVICE_NEEDS_RESET`): the first time only, as a guest can bring it about as often as it
    /// likes. It is called on any thread, and must not call the transport. The first call of this
    /// counts.
    fn on_needs_reset(&self, tell: NeedsResetHook);

    /// Stops the device's work and keeps its queues. To be called when no vCPU runs, so that
    /// nothing is half done when the state is taken.
    fn pause(&self);

    /// Lets a paused device go on.
    fn resume(&self);

    /// Stops the device and puts it back to its state after power-on.
    fn reset(&self);
}

/// The part of every transport that is the same: the core behind its lock, and what of it can be
/// had without that.
pub(crate) struct SharedCore {
    core: Mutex<VirtioCore>,
    device_type: u32,
    kicks: Vec<Arc<EventFd>>,
    counters: Arc<DeviceCounters>,
}

impl SharedCore {
    pub(crate) fn new(core: VirtioCore) -> Self {
        Self {
            device_type: core.device_type(),
            kicks: core.kicks(),
            counters: core.counters(),
            core: Mutex::new(core),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, VirtioCore> {
        // A device that panicked ended its machine; its registers may still be looked at.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn device_type(&self) -> u32 {
        self.device_type
    }

    pub(crate) fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    pub(crate) fn counters(&self) -> Arc<DeviceCounters> {
        Arc::clone(&self.counters)
    }

    /// A notification that no ioeventfd took; one for a queue that does not exist is dropped.
    pub(crate) fn notify(&self, queue: u64) {
        let kick = usize::try_from(queue)
            .ok()
            .and_then(|queue| self.kicks.get(queue));
        if let Some(kick) = kick {
            // It fails only where the counter is full, and then a notification is pending.
            let _ = kick.write(1);
        }
    }
}
