//! The registers of one queue, as the driver sees them whoever owns the queue.

use std::sync::Arc;

use kiln_memory::GuestMemory;
use virtio_queue::Queue;
use vm_memory::{GuestAddress, GuestMemory as _, Permissions};
use vmm_sys_util::eventfd::EventFd;

use crate::QueueState;

/// Which of the three areas of a queue an address register belongs to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum QueueArea {
    /// The descriptor table.
    Descriptors,
    /// The available ring, which the driver writes.
    Driver,
    /// The used ring, which the device writes.
    Device,
}

/// Which half of a 64-bit register a 32-bit access meets.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Half {
    /// Bits 0 to 31.
    Low,
    /// Bits 32 to 63.
    High,
}

impl Half {
    /// `register` with this half of it replaced.
    pub(crate) fn replace(self, register: u64, value: u32) -> u64 {
        match self {
            Self::Low => (register & !0xffff_ffff) | u64::from(value),
            Self::High => (register & 0xffff_ffff) | (u64::from(value) << 32),
        }
    }

    /// This half of `register`.
    pub(crate) fn of(self, register: u64) -> u32 {
        match self {
            Self::Low => register as u32,
            Self::High => (register >> 32) as u32,
        }
    }
}

/// A queue of the device: what does not change, and the registers.
pub(crate) struct QueueSlot {
    pub(crate) max_size: u16,
    pub(crate) kick: Arc<EventFd>,
    pub(crate) registers: QueueState,
}

impl QueueSlot {
    /// What the registers hold after a reset.
    pub(crate) fn reset_registers(max_size: u16) -> QueueState {
        QueueState {
            size: max_size,
            ..QueueState::default()
        }
    }

    /// Takes the size that the driver chose, if a queue can have it.
    pub(crate) fn set_size(&mut self, size: u32) {
        if let Ok(size) = u16::try_from(size)
            && size.is_power_of_two()
            && size <= self.max_size
        {
            self.registers.size = size;
        }
    }

    /// Puts everything back to the state after power-on.
    pub(crate) fn reset(&mut self) {
        self.registers = Self::reset_registers(self.max_size);
        // A notification that was meant for the queue before is not one for it after.
        let _ = self.kick.read();
    }

    pub(crate) fn address(&self, area: QueueArea) -> u64 {
        match area {
            QueueArea::Descriptors => self.registers.desc_table,
            QueueArea::Driver => self.registers.avail_ring,
            QueueArea::Device => self.registers.used_ring,
        }
    }

    pub(crate) fn address_mut(&mut self, area: QueueArea) -> &mut u64 {
        match area {
            QueueArea::Descriptors => &mut self.registers.desc_table,
            QueueArea::Driver => &mut self.registers.avail_ring,
            QueueArea::Device => &mut self.registers.used_ring,
        }
    }

    /// Makes the queue that the registers describe, or says what is wrong with them.
    pub(crate) fn build(&self, memory: &GuestMemory, event_idx: bool) -> Result<Queue, String> {
        let registers = &self.registers;
        let size = usize::from(registers.size);
        // The sizes are those of virtio 1.3, section 2.7.
        for (name, address, bytes, permissions) in [
            (
                "descriptor table",
                registers.desc_table,
                16 * size,
                Permissions::Read,
            ),
            (
                "available ring",
                registers.avail_ring,
                6 + 2 * size,
                Permissions::Read,
            ),
            (
                "used ring",
                registers.used_ring,
                6 + 8 * size,
                Permissions::ReadWrite,
            ),
        ] {
            if !memory.check_range(GuestAddress(address), bytes, permissions) {
                return Err(format!("the {name} at {address:#x} is not in RAM"));
            }
        }
        if registers.avail_ring == 0 {
            return Err("the available ring has no address".to_owned());
        }
        Queue::try_from(virtio_queue::QueueState {
            max_size: self.max_size,
            next_avail: registers.next_avail,
            next_used: registers.next_used,
            event_idx_enabled: event_idx,
            size: registers.size,
            ready: registers.ready,
            desc_table: registers.desc_table,
            avail_ring: registers.avail_ring,
            used_ring: registers.used_ring,
        })
        .map_err(|error| error.to_string())
    }
}
