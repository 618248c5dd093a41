//! The configuration space of one function: registers, and which of their bits can be written.

use serde::{Deserialize, Serialize};

use crate::registers::*;
use crate::{Bar, Capability, Error, ExtendedCapability, Identity};

#[cfg(test)]
mod tests;

/// The registers of a function, saved: from the first to the last that is not zero.
///
/// The BARs, the command register and the control register of MSI-X are among them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    registers: Vec<u8>,
}

/// Where a capability is, and whether the device hears of accesses to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CapabilityPlace {
    pub(crate) start: usize,
    pub(crate) len: usize,
    hooked: bool,
}

/// The type 0 configuration space of a function.
///
/// It is only registers: what a change of them means is for the bus to see to.
#[derive(Clone, Debug)]
pub(crate) struct ConfigSpace {
    registers: Box<[u8]>,
    /// The bits that the guest writes.
    writable: Box<[u8]>,
    /// The bits that the guest clears by writing ones. None of them is in `writable`.
    clearable: Box<[u8]>,
    bars: [Option<Bar>; BAR_COUNT],
    /// The BAR registers that are taken.
    bar_registers: usize,
    /// In the order of their addresses, one behind the other.
    capabilities: Vec<CapabilityPlace>,
    next_capability: usize,
    next_extended: usize,
    last_extended: Option<usize>,
    msix_control: Option<usize>,
}

impl ConfigSpace {
    pub(crate) fn new(identity: &Identity) -> Self {
        let zeros = || vec![0; EXTENDED_SIZE].into_boxed_slice();
        let mut space = Self {
            registers: zeros(),
            writable: zeros(),
            clearable: zeros(),
            bars: [None; BAR_COUNT],
            bar_registers: 0,
            capabilities: Vec::new(),
            next_capability: FIRST_CAPABILITY,
            next_extended: CONVENTIONAL_SIZE,
            last_extended: None,
            msix_control: None,
        };
        space.set(VENDOR_ID, &identity.vendor_id.to_le_bytes());
        space.set(DEVICE_ID, &identity.device_id.to_le_bytes());
        space.set(REVISION_ID, &[identity.revision]);
        space.set(CLASS_CODE, &identity.class.to_le_bytes()[..3]);
        space.set(
            SUBSYSTEM_VENDOR_ID,
            &identity.subsystem_vendor_id.to_le_bytes(),
        );
        space.set(SUBSYSTEM_ID, &identity.subsystem_id.to_le_bytes());
        // The bits for address spaces become writable with the first BAR in them.
        let command = COMMAND_BUS_MASTER | COMMAND_PARITY_ERROR | COMMAND_SERR;
        space.allow(COMMAND, &(command | COMMAND_INTX_DISABLE).to_le_bytes());
        space.allow(CACHE_LINE_SIZE, &[0xff]);
        space.allow(LATENCY_TIMER, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        or_into(&mut space.clearable, STATUS, &STATUS_ERRORS.to_le_bytes());
        space
    }

    /// Adds a BAR behind those that are there, and returns its number: that of its (first)
    /// register.
    pub(crate) fn add_bar(&mut self, name: &str, bar: Bar) -> Result<usize, Error> {
        let (min, max) = bar.size_limits();
        if !bar.size().is_power_of_two() || !(min..=max).contains(&bar.size()) {
            return Err(Error::BarSize {
                name: name.to_owned(),
                size: bar.size(),
                min,
                max,
            });
        }
        let index = self.bar_registers;
        let taken = index + if bar.is_64bit() { 2 } else { 1 };
        if taken > BAR_COUNT {
            return Err(Error::TooManyBars {
                name: name.to_owned(),
            });
        }
        self.bar_registers = taken;
        self.bars[index] = Some(bar);
        let at = BAR0 + 4 * index;
        let width = 4 * (taken - index);
        self.set(at, &bar.type_bits().to_le_bytes());
        self.allow(at, &bar.address_mask().to_le_bytes()[..width]);
        self.allow(COMMAND, &decode_bit(&bar).to_le_bytes());
        Ok(index)
    }

    /// Appends a capability to the list, and returns its offset.
    pub(crate) fn add_capability(
        &mut self,
        name: &str,
        capability: &Capability,
    ) -> Result<usize, Error> {
        let len = 2 + capability.body.len();
        let start = self.next_capability;
        let left = CONVENTIONAL_SIZE - start;
        if len > left {
            return Err(Error::CapabilityRoom {
                name: name.to_owned(),
                id: capability.id.into(),
                size: len,
                left,
            });
        }
        let mask = capability.writable.as_deref().unwrap_or(&[]);
        if capability.writable.is_some() && mask.len() != capability.body.len() {
            return Err(Error::CapabilityMask {
                name: name.to_owned(),
                id: capability.id.into(),
                body: capability.body.len(),
                mask: mask.len(),
            });
        }
        let pointer = self
            .capabilities
            .last()
            .map_or(CAPABILITIES_POINTER, |last| last.start + 1);
        self.set(pointer, &[start as u8]);
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.set(start, &[capability.id]);
        self.set(start + 2, &capability.body);
        self.allow(start + 2, mask);
        self.capabilities.push(CapabilityPlace {
            start,
            len,
            hooked: capability.hooked,
        });
        self.next_capability = (start + len).next_multiple_of(4);
        Ok(start)
    }

    /// Appends an extended capability to their list, and returns its offset.
    pub(crate) fn add_extended_capability(
        &mut self,
        name: &str,
        capability: &ExtendedCapability,
    ) -> Result<usize, Error> {
        let len = 4 + capability.body.len();
        let start = self.next_extended;
        let left = EXTENDED_SIZE - start;
        if len > left {
            return Err(Error::CapabilityRoom {
                name: name.to_owned(),
                id: capability.id,
                size: len,
                left,
            });
        }
        if let Some(last) = self.last_extended {
            // The upper twelve bits of the header point to the next one.
            let next = (start as u32) << 20;
            or_into(&mut self.registers, last, &next.to_le_bytes());
        }
        let header = u32::from(capability.id) | u32::from(capability.version & 0xf) << 16;
        self.set(start, &header.to_le_bytes());
        self.set(start + 4, &capability.body);
        self.last_extended = Some(start);
        self.next_extended = (start + len).next_multiple_of(4);
        Ok(start)
    }

    /// Says where the MSI-X capability is.
    pub(crate) fn set_msix_capability(&mut self, start: usize) {
        self.msix_control = Some(start + MSIX_CONTROL);
    }

    pub(crate) fn set_interrupt(&mut self, pin_register: u8, line: u8) {
        self.set(INTERRUPT_PIN, &[pin_register]);
        self.set(INTERRUPT_LINE, &[line]);
    }

    pub(crate) fn set_multi_function(&mut self) {
        self.set(HEADER_TYPE, &[HEADER_MULTI_FUNCTION]);
    }

    /// Puts a BAR at an address, as firmware does.
    pub(crate) fn set_bar_address(&mut self, index: usize, address: u64) {
        if let Some(bar) = self.bars.get(index).copied().flatten() {
            let value = address & bar.address_mask() | u64::from(bar.type_bits());
            let width = if bar.is_64bit() { 8 } else { 4 };
            self.registers[BAR0 + 4 * index..][..width]
                .copy_from_slice(&value.to_le_bytes()[..width]);
        }
    }

    /// Notes errors in the status register.
    pub(crate) fn set_status_errors(&mut self, errors: u16) {
        self.set(STATUS, &(errors & STATUS_ERRORS).to_le_bytes());
    }

    /// The bits of a register that is made up: they are zero before.
    fn set(&mut self, at: usize, value: &[u8]) {
        or_into(&mut self.registers, at, value);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        or_into(&mut self.writable, at, mask);
    }

    /// Reads registers. What lies beyond them stays as it is in `data`.
    pub(crate) fn read(&self, offset: usize, data: &mut [u8]) {
        for (byte, register) in data.iter_mut().zip(self.registers.iter().skip(offset)) {
            *byte = *register;
        }
    }

    /// Writes the bits that can be written.
    pub(crate) fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..EXTENDED_SIZE).zip(data) {
            let writable = self.writable[at];
            let kept = self.registers[at] & !writable & !(byte & self.clearable[at]);
            self.registers[at] = kept | byte & writable;
        }
    }

    pub(crate) fn command(&self) -> u16 {
        self.word(COMMAND)
    }

    /// Whether the INTx pin is kept from its line: by the command register, or because MSI-X is
    /// enabled, and a function uses one or the other (PCI 3.0, section 6.8.2).
    pub(crate) fn intx_disabled(&self) -> bool {
        self.command() & COMMAND_INTX_DISABLE != 0 || self.msix_control() & MSIX_CONTROL_ENABLE != 0
    }

    /// The control register of MSI-X, zero where there is none.
    pub(crate) fn msix_control(&self) -> u16 {
        self.msix_control.map_or(0, |at| self.word(at))
    }

    /// The BARs, each at the number of its (first) register.
    pub(crate) fn bars(&self) -> &[Option<Bar>; BAR_COUNT] {
        &self.bars
    }

    /// Where each BAR that the command register lets answer is.
    pub(crate) fn decoded(&self) -> [Option<u64>; BAR_COUNT] {
        let command = self.command();
        std::array::from_fn(|index| {
            let bar = self.bars[index]?;
            (command & decode_bit(&bar) != 0).then(|| self.bar_address(index, &bar))
        })
    }

    fn bar_address(&self, index: usize, bar: &Bar) -> u64 {
        let at = BAR0 + 4 * index;
        let low = u64::from(self.word(at)) | u64::from(self.word(at + 2)) << 16;
        let high = if bar.is_64bit() {
            u64::from(self.word(at + 4)) | u64::from(self.word(at + 6)) << 16
        } else {
            0
        };
        (low | high << 32) & bar.address_mask()
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.registers[at], self.registers[at + 1]])
    }

    /// The registers of the capability that an access at `offset` is to, where the device hears of
    /// it: where it starts, and what is in it.
    pub(crate) fn hooked_capability(&self, offset: usize) -> Option<(CapabilityPlace, &[u8])> {
        let place = self.capabilities.iter().find(|place| {
            place.hooked && (place.start..place.start + place.len).contains(&offset)
        })?;
        let registers = self.registers.get(place.start..place.start + place.len)?;
        Some((*place, registers))
    }

    pub(crate) fn state(&self) -> ConfigState {
        let len = self.registers.iter().rposition(|byte| *byte != 0);
        ConfigState {
            registers: self.registers[..len.map_or(0, |last| last + 1)].to_vec(),
        }
    }

    /// Whether a state can be that of this function: it differs from it only where registers
    /// change. Otherwise the error says where it differs.
    pub(crate) fn check(&self, state: &ConfigState) -> Result<(), String> {
        if state.registers.len() > EXTENDED_SIZE {
            return Err(format!(
                "the state has {:#x} bytes of registers",
                state.registers.len()
            ));
        }
        for at in 0..EXTENDED_SIZE {
            let saved = state.registers.get(at).copied().unwrap_or(0);
            let changing = self.writable[at] | self.clearable[at];
            if (saved ^ self.registers[at]) & !changing != 0 {
                return Err(format!(
                    "register {at:#x} is {saved:#04x} in the state, which can't be here"
                ));
            }
        }
        Ok(())
    }

    /// Takes over the registers of a state that was [checked](Self::check).
    pub(crate) fn restore(&mut self, state: &ConfigState) {
        for at in 0..EXTENDED_SIZE {
            let saved = state.registers.get(at).copied().unwrap_or(0);
            let changing = self.writable[at] | self.clearable[at];
            self.registers[at] = self.registers[at] & !changing | saved & changing;
        }
    }
}

/// The bit of the command register that lets a BAR answer.
fn decode_bit(bar: &Bar) -> u16 {
    match bar.space() {
        crate::AddressSpace::Io => COMMAND_IO,
        crate::AddressSpace::Memory => COMMAND_MEMORY,
    }
}

fn or_into(registers: &mut [u8], at: usize, value: &[u8]) {
    for (register, byte) in registers.iter_mut().skip(at).zip(value) {
        *register |= byte;
    }
}
