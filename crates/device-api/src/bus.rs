//! What a bus asks of a device, and what a vCPU asks of the buses.

use std::ops::ControlFlow;
use std::sync::{Mutex, PoisonError};

use crate::ExitRequest;

/// A device that answers reads and writes of bytes at an offset into its own range, and does not
/// know where on a bus it sits.
///
/// The accesses of several vCPUs can come at once. A device that would rather have `&mut self`
/// implements [`BusDeviceMut`] and is put in a [`Mutex`].
///
/// The length of an access is what the guest's instruction used: 1, 2, 4 or 8 bytes on x86 (8 on
/// MMIO only), at any alignment. An access that crosses the end of the range never arrives.
pub trait BusDevice: Send + Sync {
    /// Answers a read of `data.len()` bytes at `offset` bytes into the device's range.
    ///
    /// `data` comes filled with `0xff`: a device leaves alone what it has no answer for.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes a write of `data` at `offset` bytes into the device's range.
    ///
    /// `Break` ends the machine at this very instruction.
    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest>;
}

/// The twin of [`BusDevice`] for a device with plain mutable state: `Mutex<T>` is then a
/// [`BusDevice`].
pub trait BusDeviceMut: Send {
    /// See [`BusDevice::read`].
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// See [`BusDevice::write`].
    fn write(&mut self, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest>;
}

impl<T: BusDeviceMut> BusDevice for Mutex<T> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // A device that panicked ended its machine; what is left of it may still be looked at.
        let mut device = self.lock().unwrap_or_else(PoisonError::into_inner);
        device.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        let mut device = self.lock().unwrap_or_else(PoisonError::into_inner);
        device.write(offset, data)
    }
}

/// What a vCPU asks of the machine around it, an access at a time.
///
/// Reads come filled with `0xff`; what no device answers stays so.
pub trait VcpuBus: Send + Sync {
    /// A port read (`IN`) of 1, 2 or 4 bytes.
    fn pio_read(&self, port: u16, data: &mut [u8]);

    /// A port write (`OUT`) of 1, 2 or 4 bytes.
    fn pio_write(&self, port: u16, data: &[u8]) -> ControlFlow<ExitRequest>;

    /// A read of 1 to 8 bytes of guest physical address space where no RAM is.
    fn mmio_read(&self, address: u64, data: &mut [u8]);

    /// A write of 1 to 8 bytes to guest physical address space where no RAM is.
    fn mmio_write(&self, address: u64, data: &[u8]) -> ControlFlow<ExitRequest>;

    /// The guest ended a level-triggered interrupt with this vector (`KVM_EXIT_IOAPIC_EOI`).
    fn end_of_interrupt(&self, vector: u8) {
        let _ = vector;
    }
}
