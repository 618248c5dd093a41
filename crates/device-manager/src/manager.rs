//! Placing devices, and allocating what they need.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use kiln_device_api::BusDevice;
use vm_allocator::{AddressAllocator, AllocPolicy, Error as AllocatorError};

use crate::bus::BusBuilder;
use crate::buses::EndOfInterrupt;
use crate::gsi::GsiAllocator;
use crate::{AddressSpace, Buses, Error};

/// Places devices on the buses of a machine, and allocates addresses and interrupts to them.
///
/// Names are for errors and for debugging; they need not be unique.
pub struct DeviceManager {
    pio: BusBuilder,
    mmio: BusBuilder,
    gsis: GsiAllocator,
    mmio_window: AddressAllocator,
    mmio_used: u64,
    end_of_interrupt: Option<EndOfInterrupt>,
}

impl DeviceManager {
    /// A machine without devices, with global system interrupts 0 to `pins - 1`, whose
    /// [`allocate_mmio`](Self::allocate_mmio) gives addresses in `mmio_window`.
    ///
    /// # Errors
    ///
    /// [`Error::GsiCount`] or [`Error::MmioWindow`] where there is nothing to allocate from.
    pub fn new(pins: u32, mmio_window: Range<u64>) -> Result<Self, Error> {
        let window_error = || Error::MmioWindow {
            start: mmio_window.start,
            end: mmio_window.end,
        };
        let size = mmio_window.end.checked_sub(mmio_window.start);
        let size = size.filter(|size| *size > 0).ok_or_else(window_error)?;
        let window = AddressAllocator::new(mmio_window.start, size).map_err(|_| window_error())?;
        Ok(Self {
            pio: BusBuilder::new(AddressSpace::Pio),
            mmio: BusBuilder::new(AddressSpace::Mmio),
            gsis: GsiAllocator::new(pins)?,
            mmio_window: window,
            mmio_used: 0,
            end_of_interrupt: None,
        })
    }

    /// Places a device at the `size` ports from `base` on. A device may be placed more than once.
    ///
    /// # Errors
    ///
    /// [`Error::Overlap`] where another device is (partly) there, [`Error::Range`] where `size` is
    /// zero or goes beyond port 0xffff.
    pub fn add_pio(
        &mut self,
        name: &str,
        base: u16,
        size: u16,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), Error> {
        self.pio.add(name, base.into(), size.into(), device)
    }

    /// Places a device at the `size` bytes from guest physical address `base` on. A device may be
    /// placed more than once.
    ///
    /// RAM takes precedence: an access that KVM finds RAM for never reaches a bus.
    ///
    /// # Errors
    ///
    /// [`Error::Overlap`] where another device is (partly) there, [`Error::Range`] where `size` is
    /// zero or goes beyond the 64-bit address space.
    pub fn add_mmio(
        &mut self,
        name: &str,
        base: u64,
        size: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), Error> {
        self.mmio.add(name, base, size, device)
    }

    /// Takes `size` bytes of the window for MMIO, aligned to `alignment` bytes (a power of two),
    /// and returns the first address. Nothing is placed there yet.
    ///
    /// # Errors
    ///
    /// [`Error::MmioExhausted`] where no such room is left, [`Error::MmioRequest`] where size or
    /// alignment make no sense.
    pub fn allocate_mmio(&mut self, name: &str, size: u64, alignment: u64) -> Result<u64, Error> {
        let allocated = self
            .mmio_window
            .allocate(size, alignment, AllocPolicy::FirstMatch);
        match allocated {
            Ok(range) => {
                self.mmio_used += size;
                Ok(range.start())
            }
            Err(AllocatorError::InvalidSize(_) | AllocatorError::InvalidAlignment) => {
                Err(Error::MmioRequest {
                    name: name.to_owned(),
                    size,
                    alignment,
                })
            }
            Err(_) => Err(Error::MmioExhausted {
                name: name.to_owned(),
                size,
                used: self.mmio_used,
                total: self.mmio_window.end() - self.mmio_window.base() + 1,
            }),
        }
    }

    /// Takes the global system interrupt `gsi`, for a device that the guest expects there. Do this
    /// before the first [`allocate_gsi`](Self::allocate_gsi).
    ///
    /// # Errors
    ///
    /// [`Error::GsiTaken`] where another device has it, [`Error::GsiRange`] where the machine does
    /// not have it.
    pub fn reserve_gsi(&mut self, name: &str, gsi: u32) -> Result<(), Error> {
        self.gsis.reserve(name, gsi)
    }

    /// Takes the lowest global system interrupt that is free, and returns it.
    ///
    /// # Errors
    ///
    /// [`Error::GsiExhausted`] where none is.
    pub fn allocate_gsi(&mut self, name: &str) -> Result<u32, Error> {
        self.gsis.allocate(name)
    }

    /// Has `sink` called with the vector of each level-triggered interrupt that the guest ends, on
    /// the vCPU's thread. There is one sink, the interrupt controller: a second call replaces it.
    pub fn on_end_of_interrupt(&mut self, sink: impl Fn(u8) + Send + Sync + 'static) {
        self.end_of_interrupt = Some(Box::new(sink));
    }

    /// Freezes the buses, for vCPUs to use.
    pub fn build(self) -> Buses {
        Buses {
            pio: self.pio.freeze(),
            mmio: self.mmio.freeze(),
            end_of_interrupt: self.end_of_interrupt,
        }
    }
}

impl fmt::Debug for DeviceManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceManager")
            .field("gsis", &self.gsis)
            .field("mmio_used", &self.mmio_used)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
