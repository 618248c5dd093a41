//! How a device reaches its driver.

use std::fmt;

use vmm_sys_util::eventfd::EventFd;

/// Why the driver is to be interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InterruptEvent {
    /// The configuration space has changed (virtio 1.3, section 2.3).
    Config,
    /// Buffers of the queue with this index have been used.
    Queue(u16),
}

/// The way to the driver, implemented by the transport; a recorder in tests.
///
/// It is called from I/O threads, also while a vCPU thread waits for them with its transport
/// locked: it takes no lock that anybody holds while waiting for such a thread.
pub trait VirtioInterrupt: Send + Sync {
    /// Interrupts the driver. Interrupts that it has not taken yet may merge with this one.
    fn trigger(&self, event: InterruptEvent);

    /// An eventfd that has the effect of [`trigger`](Self::trigger) for this event when it is
    /// written, for workers outside the process or in the kernel; `None` where the transport has
    /// to be told of each event. It is for the time until the device is deactivated: drivers route
    /// events to interrupts before they let a device start.
    fn notifier(&self, event: InterruptEvent) -> Option<EventFd> {
        let _ = event;
        None
    }

    /// The device can't go on until the driver resets it: sets `DEVICE_NEEDS_RESET` and tells the
    /// driver (virtio 1.3, section 2.1.2). The `reason` is for the log, where one is written the
    /// first time it happens to a device and not again: a guest may do this as often as it likes.
    fn needs_reset(&self, reason: &dyn fmt::Display);
}
