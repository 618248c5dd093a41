//! Configuration mechanism #1 (PCI 3.0, section 3.2.2.3.2): an address port and a data port.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use kiln_device_api::{BusDevice, ExitRequest};
use serde::{Deserialize, Serialize};

use crate::{PciAddress, PciBus};

/// Offsets from the first port.
const ADDRESS: u64 = 0;
const RESET_CONTROL: u64 = 1;
const DATA: u64 = 4;
const DATA_LEN: u64 = 4;

/// The bit of the address that lets accesses to the data port be configuration accesses.
const ADDRESS_ENABLE: u32 = 1 << 31;
/// The bits of the address that are kept: bus, device, function and double word.
const ADDRESS_BITS: u32 = ADDRESS_ENABLE | 0x00ff_fffc;

/// The reset control register of PC chipsets: setting this bit resets the machine.
const RESET_CPU: u8 = 1 << 2;
/// The bits of it that say how thorough a reset is, and are kept: there is only one reset here.
const RESET_KIND: u8 = 1 << 1 | 1 << 3;

/// The ports by which a guest reaches the first 256 bytes of each function's configuration space.
///
/// | port | what |
/// |---|---|
/// | 0xcf8 | the address, in accesses of 32 bits; others go to what PC chipsets have below |
/// | 0xcf9 | as a byte: the reset control register, which ends the machine in a reset |
/// | 0xcfc to 0xcff | the data at that address, in accesses of any width |
///
/// Anything else reads as ones and is dropped when written: an access from the address to the data
/// port, a bus other than 0.
#[derive(Debug)]
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    address: AtomicU32,
    reset_control: AtomicU8,
}

/// The configuration ports, saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigPortsState {
    /// What the address port has.
    pub address: u32,
    /// What the reset control register has.
    pub reset_control: u8,
}

impl ConfigPorts {
    /// The first port.
    pub const FIRST_PORT: u16 = 0xcf8;
    /// The number of ports.
    pub const PORT_COUNT: u16 = 8;

    /// The ports to a bus.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self {
            bus,
            address: AtomicU32::new(0),
            reset_control: AtomicU8::new(0),
        }
    }

    /// Everything that the guest can have changed.
    pub fn state(&self) -> ConfigPortsState {
        ConfigPortsState {
            address: self.address.load(Ordering::Acquire),
            reset_control: self.reset_control.load(Ordering::Acquire),
        }
    }

    /// Takes over a state. Bits that can't be in it are left out.
    pub fn restore(&self, state: &ConfigPortsState) {
        self.set_address(state.address);
        let kind = state.reset_control & RESET_KIND;
        self.reset_control.store(kind, Ordering::Release);
    }

    fn set_address(&self, address: u32) {
        self.address
            .store(address & ADDRESS_BITS, Ordering::Release);
    }

    /// The function and the register that an access to the data port is to.
    fn place(&self, offset: u64, len: usize) -> Option<(PciAddress, u16)> {
        let within = offset.checked_sub(DATA)?;
        if within > DATA_LEN.checked_sub(len as u64)? {
            return None;
        }
        let address = self.address.load(Ordering::Acquire);
        let [register, devfn, bus, _] = address.to_le_bytes();
        if address & ADDRESS_ENABLE == 0 || bus != 0 {
            return None;
        }
        let register = u16::from(register) + within as u16;
        Some((PciAddress::from_devfn(devfn), register))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, &mut *data) {
            (ADDRESS, [_, _, _, _]) => {
                data.copy_from_slice(&self.address.load(Ordering::Acquire).to_le_bytes());
            }
            (RESET_CONTROL, [byte]) => *byte = self.reset_control.load(Ordering::Acquire),
            _ => {
                if let Some((address, register)) = self.place(offset, data.len()) {
                    self.bus.config_read(address, register, data);
                }
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        match (offset, data) {
            (ADDRESS, &[a, b, c, d]) => self.set_address(u32::from_le_bytes([a, b, c, d])),
            (RESET_CONTROL, &[value]) => {
                self.reset_control
                    .store(value & RESET_KIND, Ordering::Release);
                if value & RESET_CPU != 0 {
                    return ControlFlow::Break(ExitRequest::Reset);
                }
            }
            _ => {
                if let Some((address, register)) = self.place(offset, data.len()) {
                    return self.bus.config_write(address, register, data);
                }
            }
        }
        ControlFlow::Continue(())
    }
}
