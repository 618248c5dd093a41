//! The MMIO transport (virtio 1.3, section 4.2).

#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kiln_device_api::{BusDevice, ExitRequest, InterruptLine};
use kiln_io_thread::IoThreadSet;
use kiln_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use crate::core::{Half, QueueArea, VirtioCore};
use crate::status::SharedStatus;
use crate::transport::{NeedsResetHook, SharedCore};
use crate::{
    DeviceCounters, InterruptEvent, MmioState, TransportError, VirtioDevice, VirtioInterrupt,
    VirtioTransport,
};

/// The registers (virtio 1.3, section 4.2.2). Each is 32 bits wide.
mod register {
    pub(super) const MAGIC_VALUE: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x034;
    pub(super) const QUEUE_SIZE: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub(super) const SHM_LEN_LOW: u64 = 0x0b0;
    pub(super) const SHM_LEN_HIGH: u64 = 0x0b4;
    pub(super) const SHM_BASE_LOW: u64 = 0x0b8;
    pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
    pub(super) const QUEUE_RESET: u64 = 0x0c0;
    pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
    /// The device-specific configuration begins here and goes on to the window's end.
    pub(super) const CONFIG: u64 = 0x100;
}

/// "virt" in little endian.
const MAGIC: u32 = 0x7472_6976;
/// A device of virtio 1.0 or later.
const VERSION: u32 = 2;
/// "KILN" in little endian.
const VENDOR: u32 = 0x4e4c_494b;
/// `InterruptStatus`: a queue has used buffers.
const INTERRUPT_USED: u32 = 1 << 0;
/// `InterruptStatus`: the configuration or `DEVICE_NEEDS_RESET` has changed.
const INTERRUPT_CONFIG: u32 = 1 << 1;
/// The length of a shared memory region that does not exist.
const NO_SHARED_MEMORY: u32 = u32::MAX;

/// A virtio device behind a window of memory-mapped registers and one interrupt.
///
/// Register accesses come from vCPUs through [`BusDevice`]. The control registers answer accesses
/// of 32 aligned bits only: other reads stay `0xff` and other writes are dropped. The
/// configuration space answers accesses of every width.
pub struct MmioTransport {
    core: SharedCore,
    interrupt: Arc<MmioInterrupt>,
}

impl MmioTransport {
    /// The bytes of address space that the transport takes.
    pub const SIZE: u64 = 0x1000;

    /// The offset of the `QueueNotify` register. A 32-bit write of a queue's index here notifies
    /// that queue: the VMM makes it an ioeventfd for each of its
    /// [kicks](VirtioTransport::kicks), matched by the index, so that no such write leaves the
    /// kernel.
    pub const NOTIFY_OFFSET: u64 = register::QUEUE_NOTIFY;

    /// Puts `device` behind a transport, in the state after power-on.
    ///
    /// # Errors
    ///
    /// [`TransportError`] where the device's queues cannot be, or the eventfds cannot be had.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        io: impl Into<IoThreadSet>,
        line: Arc<dyn InterruptLine>,
    ) -> Result<Self, TransportError> {
        let core = VirtioCore::reset_state(device.as_ref());
        let state = MmioState {
            core,
            interrupt_status: 0,
        };
        Self::restore(device, memory, io, line, &state)
    }

    /// Puts `device` behind a transport, in a state that was taken with [`state`](Self::state).
    /// A device that was active then is paused: [`resume`](VirtioTransport::resume) makes it go on.
    ///
    /// # Errors
    ///
    /// [`TransportError`] where the state does not fit the device or the guest's RAM, where the
    /// device's queues cannot be, or the eventfds cannot be had.
    pub fn restore(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        io: impl Into<IoThreadSet>,
        line: Arc<dyn InterruptLine>,
        state: &MmioState,
    ) -> Result<Self, TransportError> {
        let device_type = device.device_type();
        let generation = state.core.config_generation;
        let shared = Arc::new(SharedStatus::new(
            device_type,
            state.core.status,
            generation,
        ));
        let interrupt = Arc::new(MmioInterrupt {
            pending: AtomicU32::new(state.interrupt_status),
            line,
            shared: Arc::clone(&shared),
        });
        let for_device = Arc::clone(&interrupt) as Arc<dyn VirtioInterrupt>;
        let core =
            VirtioCore::from_state(device, memory, io.into(), for_device, shared, &state.core)?;
        Ok(Self {
            core: SharedCore::new(core),
            interrupt,
        })
    }

    /// The state of the registers and the queues.
    ///
    /// # Errors
    ///
    /// [`TransportError::NotPaused`] while the device works on its queues.
    pub fn state(&self) -> Result<MmioState, TransportError> {
        let core = self.core.lock().state()?;
        Ok(MmioState {
            core,
            interrupt_status: self.interrupt.pending.load(Ordering::Acquire),
        })
    }

    /// What a register reads as; those that are only written read as 0.
    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.core.device_type(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => self.core.lock().device_features(),
            register::QUEUE_SIZE_MAX => u32::from(self.core.lock().queue_max_size()),
            register::QUEUE_READY => u32::from(self.core.lock().queue_ready()),
            register::INTERRUPT_STATUS => self.interrupt.pending.load(Ordering::Acquire),
            register::STATUS => u32::from(self.interrupt.shared.status()),
            register::SHM_LEN_LOW
            | register::SHM_LEN_HIGH
            | register::SHM_BASE_LOW
            | register::SHM_BASE_HIGH => NO_SHARED_MEMORY,
            register::CONFIG_GENERATION => self.interrupt.shared.generation(),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        use Half::{High, Low};
        use QueueArea::{Descriptors, Device, Driver};
        match offset {
            register::DEVICE_FEATURES_SEL => self.core.lock().select_device_features(value),
            register::DRIVER_FEATURES_SEL => self.core.lock().select_driver_features(value),
            register::DRIVER_FEATURES => self.core.lock().set_driver_features(value),
            register::QUEUE_SEL => self.core.lock().select_queue(value),
            register::QUEUE_SIZE => self.core.lock().set_queue_size(value),
            register::QUEUE_READY => self.core.lock().set_queue_ready(value == 1),
            register::QUEUE_NOTIFY => self.core.notify(value.into()),
            register::INTERRUPT_ACK => {
                self.interrupt.pending.fetch_and(!value, Ordering::AcqRel);
            }
            register::STATUS if value == 0 => self.reset(),
            register::STATUS => self.core.lock().write_status(value),
            // The queue is reset when this returns, so the register always reads as 0.
            register::QUEUE_RESET if value == 1 => {
                self.core.lock().reset_queue();
            }
            register::QUEUE_DESC_LOW => self.core.lock().set_queue_address(Descriptors, Low, value),
            register::QUEUE_DESC_HIGH => {
                self.core.lock().set_queue_address(Descriptors, High, value)
            }
            register::QUEUE_DRIVER_LOW => self.core.lock().set_queue_address(Driver, Low, value),
            register::QUEUE_DRIVER_HIGH => self.core.lock().set_queue_address(Driver, High, value),
            register::QUEUE_DEVICE_LOW => self.core.lock().set_queue_address(Device, Low, value),
            register::QUEUE_DEVICE_HIGH => self.core.lock().set_queue_address(Device, High, value),
            _ => {}
        }
    }
}

impl VirtioTransport for MmioTransport {
    fn device_type(&self) -> u32 {
        self.core.device_type()
    }

    fn kicks(&self) -> Vec<Arc<EventFd>> {
        self.core.kicks().to_vec()
    }

    fn counters(&self) -> Arc<DeviceCounters> {
        self.core.counters()
    }

    fn on_needs_reset(&self, tell: NeedsResetHook) {
        self.core.lock().on_needs_reset(tell);
    }

    fn pause(&self) {
        self.core.lock().pause();
    }

    fn resume(&self) {
        // An interrupt that the driver has not acknowledged may not have reached it.
        let untold = self.interrupt.pending.load(Ordering::Acquire) != 0;
        self.core.lock().resume();
        if untold {
            self.interrupt.line.trigger();
        }
    }

    fn reset(&self) {
        let mut core = self.core.lock();
        core.reset();
        self.interrupt.pending.store(0, Ordering::Release);
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            self.core.lock().read_config(offset, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            self.core.lock().write_config(offset, data);
        } else if let Ok(data) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes(data));
        }
        ControlFlow::Continue(())
    }
}

impl fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioTransport")
            .field("device_type", &self.core.device_type())
            .field("queues", &self.core.kicks().len())
            .finish_non_exhaustive()
    }
}

/// The way of the workers to the driver, without the transport's lock.
struct MmioInterrupt {
    pending: AtomicU32,
    line: Arc<dyn InterruptLine>,
    shared: Arc<SharedStatus>,
}

impl MmioInterrupt {
    fn raise(&self, cause: u32) {
        self.pending.fetch_or(cause, Ordering::AcqRel);
        self.line.trigger();
    }
}

impl VirtioInterrupt for MmioInterrupt {
    fn trigger(&self, event: InterruptEvent) {
        match event {
            InterruptEvent::Config => {
                self.shared.configuration_changed();
                self.raise(INTERRUPT_CONFIG);
            }
            InterruptEvent::Queue(_) => self.raise(INTERRUPT_USED),
        }
    }

    fn needs_reset(&self, reason: &dyn fmt::Display) {
        if self.shared.set_needs_reset(reason) {
            self.raise(INTERRUPT_CONFIG);
        }
    }
}
