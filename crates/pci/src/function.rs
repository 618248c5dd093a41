//! What a device on the bus is, and who is told where its BARs are.

use std::ops::ControlFlow;

use kiln_device_api::ExitRequest;

/// A function of a PCI device: what answers in its BARs.
///
/// It does not know where on the bus it is, nor where its BARs are. The bus keeps its
/// configuration space, its MSI-X table and its INTx pin, and calls it only for what is the
/// device's own. Calls come from vCPU threads, several at once, and the bus holds no lock
/// meanwhile: a function may access the bus from within them.
pub trait PciFunction: Send + Sync {
    /// Answers a read of `data.len()` bytes at `offset` into BAR `bar`.
    ///
    /// `data` comes filled with `0xff`. The access is wholly within the BAR, and not to the MSI-X
    /// table or pending bits. An access that was on its way while the BAR moved may still arrive.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// Takes a write of `data` at `offset` into BAR `bar`.
    ///
    /// What a [`BarObserver`] arranges to be written elsewhere, such as an ioeventfd, must work
    /// here as well: between a move of the BAR and the observer's call writes arrive here.
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest>;

    /// The guest reads from a [hooked](crate::Capability::hooked) capability. `data` comes filled
    /// with what the registers have, and may be changed.
    fn config_read(&self, access: &CapabilityAccess<'_>, data: &mut [u8]) {
        let _ = (access, data);
    }

    /// The guest has written `data` to a [hooked](crate::Capability::hooked) capability. The bits
    /// of it that can be written are in the registers already.
    fn config_write(&self, access: &CapabilityAccess<'_>, data: &[u8]) -> ControlFlow<ExitRequest> {
        let _ = (access, data);
        ControlFlow::Continue(())
    }

    /// The bus is reset: go back to the state after power-on, and raise no more interrupts for
    /// what was before. The bus resets the registers that it keeps itself, right after.
    fn reset(&self);
}

/// An access to a capability that a device wants to hear of: one to four bytes, within an aligned
/// double word. A wider one comes in several parts.
#[derive(Clone, Copy, Debug)]
pub struct CapabilityAccess<'a> {
    /// Where the capability is in the configuration space, as it was given when it was added.
    pub capability: u8,
    /// The offset of the access into the capability, from its id on.
    pub offset: usize,
    /// What is in the capability's registers, from its id on; for a write, after it.
    pub registers: &'a [u8],
}

/// Told where the BARs of a function are, so that what has to follow them can: ioeventfds, or
/// memory that is mapped into the guest.
///
/// It is called in the order of the changes, from within the guest's access that made them, with
/// the bus's configuration lock held: it must not access configuration space. Accesses to BARs go
/// on meanwhile, and already go to the new place.
pub trait BarObserver: Send + Sync {
    /// BAR `bar` is at `address` now; `None` where it answers nowhere: the guest has not enabled
    /// it, put it outside of the bus's windows, or on top of another BAR, which then has precedence.
    fn bar_moved(&self, bar: usize, address: Option<u64>);
}
