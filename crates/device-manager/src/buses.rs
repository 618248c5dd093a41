//! What a vCPU sees of the machine around it.

use std::fmt;
use std::ops::ControlFlow;

use kiln_device_api::{ExitRequest, VcpuBus};

use crate::bus::Bus;

pub(crate) type EndOfInterrupt = Box<dyn Fn(u8) + Send + Sync>;

/// The port bus and the MMIO bus, frozen: made by [`DeviceManager::build`].
///
/// A read that no device answers leaves the data as it came (`0xff` by the contract of
/// [`VcpuBus`]); a write to no device is dropped. An access is delivered whole to one device or not
/// at all: one that begins in a device and ends behind it is treated as if nothing were there.
///
/// [`DeviceManager::build`]: crate::DeviceManager::build
pub struct Buses {
    pub(crate) pio: Bus,
    pub(crate) mmio: Bus,
    pub(crate) end_of_interrupt: Option<EndOfInterrupt>,
}

impl VcpuBus for Buses {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        if let Some((device, offset)) = self.pio.find(port.into(), data.len()) {
            device.read(offset, data);
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) -> ControlFlow<ExitRequest> {
        match self.pio.find(port.into(), data.len()) {
            Some((device, offset)) => device.write(offset, data),
            None => ControlFlow::Continue(()),
        }
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if let Some((device, offset)) = self.mmio.find(address, data.len()) {
            device.read(offset, data);
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        match self.mmio.find(address, data.len()) {
            Some((device, offset)) => device.write(offset, data),
            None => ControlFlow::Continue(()),
        }
    }

    fn end_of_interrupt(&self, vector: u8) {
        if let Some(sink) = &self.end_of_interrupt {
            sink(vector);
        }
    }
}

/// The map of both buses: what is where.
impl fmt::Debug for Buses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut map = f.debug_map();
        for slot in self.pio.slots().iter().chain(self.mmio.slots()) {
            let place = format_args!("{:#x}..={:#x}", slot.first, slot.last).to_string();
            map.entry(&place, &slot.name);
        }
        map.finish()
    }
}
