//! An interrupt, seen from the device that raises it.

use vmm_sys_util::eventfd::EventFd;

/// An edge-triggered interrupt line, or a message: what a device pulls to get the guest's
/// attention.
///
/// In production there is an eventfd behind it that KVM turns into an interrupt (irqfd); a test
/// puts a recorder there.
pub trait InterruptLine: Send + Sync {
    /// Raises the interrupt once. Raising it again before the guest took it may merge with it.
    fn trigger(&self);
}

impl InterruptLine for EventFd {
    fn trigger(&self) {
        // It fails only where the counter is full, and then an interrupt is already on its way.
        let _ = self.write(1);
    }
}
