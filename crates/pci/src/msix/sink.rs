//! Where MSI-X messages go.

use kiln_device_api::MsiMessage;
use vmm_sys_util::eventfd::EventFd;

/// The way of a function's messages to the guest's interrupt controller.
///
/// Calls come with the lock of the function's vectors held, one at a time and in the order of the
/// changes: a sink must not call the [`Msix`] it belongs to. A sink that can't do what it is asked
/// has no one to tell; it logs that once, and may mark its device as broken.
///
/// # How masking is honoured, and nothing lost
///
/// A vector is *open* while MSI-X is enabled, the function is not masked and the vector is not
/// masked; else it is *closed*. The sink is told of each change, and there are two ways for an
/// event to become a message:
///
/// 1. [`Msix::trigger`]: an open vector is [signalled](Self::signal); a closed one has its pending
///    bit set, and is signalled when it opens. Both happen under one lock, which the guest's
///    accesses take as well, so there is no moment at which an event is neither sent nor kept.
/// 2. A [notifier](Self::notifier): an eventfd that a device thread, vhost or another process
///    writes without asking anybody. While the vector is open the kernel makes a message of each
///    write (irqfd). The rule for closed vectors is:
///
///    - **Closing detaches the eventfd from the interrupt controller** (`KVM_IRQFD` with
///      `KVM_IRQFD_FLAG_DEASSIGN`), before the guest's write that closed the vector returns. It
///      does not just take the route of the GSI away: KVM would go on consuming the eventfd, and
///      drop interrupts that have no route.
///    - **While the vector is closed, the eventfd's counter is its pending bit.** Whoever wants to
///      know it - the guest that reads the pending bits, a snapshot, a reset, the vector that
///      opens - [takes](Self::take) the counter and moves what was there into the pending bit of
///      the table.
///    - **Opening sets the route first, then attaches the eventfd** (`KVM_IRQFD`). What is written
///      between the take and the attachment is not lost: KVM looks at the counter when an eventfd
///      is attached, and delivers what it finds (without consuming it, so that it may come a
///      second time when the vector opens again). The pending bit is signalled last, so it
///      finds the eventfd attached.
///
/// An event that is signalled twice is harmless, since a driver must expect that; one that is lost
/// would hang the guest. In doubt a sink errs on the side of the former.
///
/// [`Msix`]: crate::Msix
/// [`Msix::trigger`]: crate::Msix::trigger
pub trait MsixSink: Send + Sync {
    /// The vector is open with this message from now on, or is open already and has another
    /// message now: sets the route, then attaches the notifier, so that what was written to it
    /// since the last [`take`](Self::take) reaches the guest.
    ///
    /// The message is what the guest wrote, and may be nonsense.
    fn connect(&self, vector: u16, message: MsiMessage);

    /// The vector is closed from now on: when this returns, nothing that is written to the notifier
    /// reaches the guest, and it is kept for [`take`](Self::take).
    fn disconnect(&self, vector: u16);

    /// Consumes what was written to the notifier while the vector was closed, and returns whether
    /// there was anything. Only called while it is closed. A sink without notifiers has nothing.
    fn take(&self, vector: u16) -> bool {
        let _ = vector;
        false
    }

    /// Sends the message of an open vector to the guest.
    fn signal(&self, vector: u16, message: MsiMessage);

    /// The eventfd behind the vector, where there is one. It does not block.
    fn notifier(&self, vector: u16) -> Option<EventFd> {
        let _ = vector;
        None
    }
}
