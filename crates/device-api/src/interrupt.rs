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

/// A message-signalled interrupt: a write of `data` to `address`, which an x86 interrupt controller
/// takes as an interrupt (Intel SDM, volume 3, section 11.11).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// The guest physical address that is written. KVM takes the destination's bits from 8 on in
    /// its upper half.
    pub address: u64,
    /// The value that is written there.
    pub data: u32,
}

impl InterruptLine for EventFd {
    fn trigger(&self) {
        // It fails only where the counter is full, and then an interrupt is already on its way.
        let _ = self.write(1);
    }
}
