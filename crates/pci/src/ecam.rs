//! The enhanced configuration access mechanism (PCIe 5.0, section 7.2.2): configuration space in
//! memory.

use std::ops::ControlFlow;
use std::sync::Arc;

use kiln_device_api::{BusDevice, ExitRequest};

use crate::{PciAddress, PciBus};

/// The configuration space of each function, 4 KiB for each, in a window of memory.
///
/// Accesses of any width and alignment are taken; see [`PciBus::config_read`] for those that are
/// not within a double word.
#[derive(Debug)]
pub struct Ecam(Arc<PciBus>);

impl Ecam {
    /// The bytes of the window, which is of bus 0 only.
    pub const SIZE: u64 = 1 << 20;
    /// The bytes of each function in it.
    const FUNCTION_SIZE: u64 = 1 << 12;

    /// The window to a bus.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self(bus)
    }

    fn place(offset: u64) -> Option<(PciAddress, u16)> {
        let devfn = u8::try_from(offset / Self::FUNCTION_SIZE).ok()?;
        let register = offset % Self::FUNCTION_SIZE;
        Some((PciAddress::from_devfn(devfn), register as u16))
    }

    /// How many of `len` bytes from `offset` on are of the same function.
    fn part(offset: u64, len: usize) -> usize {
        let left = Self::FUNCTION_SIZE - offset % Self::FUNCTION_SIZE;
        len.min(left as usize)
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let Some((address, register)) = Self::place(at) else {
                return;
            };
            let (part, behind) = rest.split_at_mut(Self::part(at, rest.len()));
            self.0.config_read(address, register, part);
            at += part.len() as u64;
            rest = behind;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let Some((address, register)) = Self::place(at) else {
                break;
            };
            let (part, behind) = rest.split_at(Self::part(at, rest.len()));
            self.0.config_write(address, register, part)?;
            at += part.len() as u64;
            rest = behind;
        }
        ControlFlow::Continue(())
    }
}
