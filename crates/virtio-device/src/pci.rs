//! The PCI transport (virtio 1.3, section 4.1), for drivers of virtio 1.0 and later.

mod common;
mod interrupt;
mod layout;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

use kiln_device_api::ExitRequest;
use kiln_io_thread::IoThreadSet;
use kiln_memory::GuestMemory;
use kiln_pci::{CapabilityAccess, FunctionDescription, MAX_VECTORS, Msix, MsixSink, PciFunction};
use vmm_sys_util::eventfd::EventFd;

use crate::core::VirtioCore;
use crate::status::SharedStatus;
use crate::transport::{NeedsResetHook, SharedCore};
use crate::{
    DeviceCounters, InterruptEvent, PciTransportState, TransportError, VirtioDevice,
    VirtioInterrupt, VirtioTransport,
};

use interrupt::{ISR_CONFIG, ISR_QUEUE, NO_VECTOR, PciInterrupt};
use layout::window;

/// A virtio device as a function of a PCI device.
///
/// It comes with a [`FunctionDescription`], and both are for
/// [`PciBusBuilder::add`](kiln_pci::PciBusBuilder::add), which has to know interrupt lines. There
/// is one memory BAR with all structures in it. Its driver interrupts come by MSI-X where the
/// guest has enabled that, a vector for each queue and one for the configuration, and else by the
/// INTx pin.
///
/// The fields of the common configuration answer aligned accesses of their own width only, those
/// of 64 bits also in two halves: other reads stay `0xff`, and other writes are dropped. The
/// device's configuration answers accesses of every width.
///
/// # Example
///
/// ```
/// use std::sync::Arc;
/// use kiln_io_thread::{IoThread, Registrar};
/// use kiln_memory::{MemoryOptions, allocate};
/// use kiln_pci::{
///     AddressSpace, IntxLine, LevelInterrupt, MsiMessage, MsixSink, PciAddress, PciBusBuilder,
/// };
/// use kiln_virtio_device::{PciTransport, QueueError, QueueHandler, SimpleDevice, Turn};
///
/// struct Nothing;
/// impl QueueHandler for Nothing {
///     fn process(&mut self, _: &mut Turn, _: &mut Registrar) -> Result<(), QueueError> {
///         Ok(())
///     }
/// }
///
/// // The machine's: where messages and levels go.
/// struct Nowhere;
/// impl MsixSink for Nowhere {
///     fn connect(&self, _: u16, _: MsiMessage) {}
///     fn disconnect(&self, _: u16) {}
///     fn signal(&self, _: u16, _: MsiMessage) {}
/// }
/// impl LevelInterrupt for Nowhere {
///     fn set_level(&self, _: bool) {}
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let memory = Arc::new(allocate(&[(vm_memory::GuestAddress(0), 1 << 20)], &MemoryOptions::default())?);
/// let io = IoThread::spawn("io", |panic| eprintln!("{panic}"))?;
/// let device = Box::new(SimpleDevice::new(4, [64], Nothing)); // entropy
/// assert_eq!(PciTransport::vectors_for(&*device), 2);
/// let (transport, description) =
///     PciTransport::new(device, memory, io.handle().clone(), "rng", Arc::new(Nowhere))?;
///
/// let mut builder = PciBusBuilder::new();
/// builder.add_window(AddressSpace::Memory, 0xe000_0000..0xe100_0000)?;
/// builder.set_intx_lines([16, 17, 18, 19].map(|gsi| IntxLine { gsi, level: Arc::new(Nowhere) }));
/// builder.add(description, transport)?;
/// let bus = builder.build()?;
///
/// // Vendor and device, as the guest finds them in slot 1.
/// let mut id = [0xff; 4];
/// bus.config_read(PciAddress::new(1, 0).unwrap(), 0, &mut id);
/// assert_eq!(u32::from_le_bytes(id), 0x1044_1af4);
/// # Ok(())
/// # }
/// ```
pub struct PciTransport {
    core: SharedCore,
    interrupt: Arc<PciInterrupt>,
    bar_size: u64,
}

impl PciTransport {
    /// The number of the BAR with the notification registers.
    pub const NOTIFY_BAR: usize = layout::BAR;

    /// The offset into [`NOTIFY_BAR`](Self::NOTIFY_BAR) of a queue's notification register. A write
    /// of 16 or 32 bits there notifies the queue, whatever it writes: the VMM makes it an ioeventfd
    /// for the queue's [kick](VirtioTransport::kicks), wherever a
    /// [`BarObserver`](kiln_pci::BarObserver) sees the BAR go, so that no such write leaves the
    /// kernel. One that does arrives all the same.
    pub const fn notify_offset(queue: u16) -> u64 {
        layout::NOTIFY + layout::NOTIFY_MULTIPLIER * queue as u64
    }

    /// The MSI-X vectors that a device gets: one for each queue and one for its configuration, as
    /// far as a function can have as many. The sink for them has to know them.
    pub fn vectors_for(device: &dyn VirtioDevice) -> u16 {
        let wanted = device.queue_max_sizes().len().saturating_add(1);
        u16::try_from(wanted).map_or(MAX_VECTORS, |wanted| wanted.min(MAX_VECTORS))
    }

    /// Makes `device` a function with this name, in the state after power-on. Messages go to
    /// `sink`, from as many vectors as [`vectors_for`](Self::vectors_for) says.
    ///
    /// # Errors
    ///
    /// [`TransportError`] where PCI has no number for the device's type, its queues cannot be, or
    /// the eventfds cannot be had.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        io: impl Into<IoThreadSet>,
        name: &str,
        sink: Arc<dyn MsixSink>,
    ) -> Result<(Arc<Self>, FunctionDescription), TransportError> {
        let core = VirtioCore::reset_state(device.as_ref());
        let state = PciTransportState {
            isr: 0,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; core.queues.len()],
            core,
        };
        Self::restore(device, memory, io, name, sink, &state)
    }

    /// Makes `device` a function in a state that was taken with [`state`](Self::state). A device
    /// that was active then is paused: [`resume`](VirtioTransport::resume) makes it go on. What the
    /// bus keeps is [restored](kiln_pci::PciBus::restore) there.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and where the state does not fit the device or the guest's RAM.
    pub fn restore(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        io: impl Into<IoThreadSet>,
        name: &str,
        sink: Arc<dyn MsixSink>,
        state: &PciTransportState,
    ) -> Result<(Arc<Self>, FunctionDescription), TransportError> {
        let device_type = device.device_type();
        let refused = |source| TransportError::PciFunction {
            device_type,
            source,
        };
        let identity =
            layout::identity(device_type).ok_or(TransportError::PciDeviceType { device_type })?;
        let mut description = FunctionDescription::new(name, &identity);
        let vectors = Self::vectors_for(device.as_ref());
        let msix = Arc::new(Msix::new(vectors, sink).map_err(refused)?);
        let generation = state.core.config_generation;
        let status = SharedStatus::new(device_type, state.core.status, generation);
        let shared = Arc::new(status);
        let interrupt = Arc::new(PciInterrupt::new(
            Arc::clone(&msix),
            description.add_intx(),
            Arc::clone(&shared),
            state.core.queues.len(),
        ));
        let for_device = Arc::clone(&interrupt) as Arc<dyn VirtioInterrupt>;
        let core =
            VirtioCore::from_state(device, memory, io.into(), for_device, shared, &state.core)?;
        let core = SharedCore::new(core);
        let queues = core.kicks().len();
        layout::describe(&mut description, queues).map_err(refused)?;
        description.add_msix(msix, layout::MSIX).map_err(refused)?;
        let transport = Self {
            core,
            interrupt,
            bar_size: layout::bar_size(queues),
        };
        transport.restore_interrupt(state)?;
        Ok((Arc::new(transport), description))
    }

    fn restore_interrupt(&self, state: &PciTransportState) -> Result<(), TransportError> {
        let refusal = |reason: String| TransportError::State {
            device_type: self.core.device_type(),
            reason,
        };
        let (found, queues) = (state.queue_vectors.len(), self.core.kicks().len());
        if found != queues {
            return Err(refusal(format!("{found} vectors for {queues} queues")));
        }
        let events = (0..).map(InterruptEvent::Queue).zip(&state.queue_vectors);
        for (event, &vector) in events.chain([(InterruptEvent::Config, &state.config_vector)]) {
            if !self.interrupt.accepts(vector) {
                return Err(refusal(format!("there is no vector {vector}")));
            }
            self.interrupt.set_vector(event, vector);
        }
        if state.isr & !(ISR_QUEUE | ISR_CONFIG) != 0 {
            return Err(refusal(format!("the ISR status is {:#x}", state.isr)));
        }
        self.interrupt.restore_isr(state.isr);
        Ok(())
    }

    /// The state of the registers and the queues, without what the bus keeps.
    ///
    /// # Errors
    ///
    /// [`TransportError::NotPaused`] while the device works on its queues.
    pub fn state(&self) -> Result<PciTransportState, TransportError> {
        Ok(PciTransportState {
            core: self.core.lock().state()?,
            isr: self.interrupt.isr(),
            config_vector: self.interrupt.vector(InterruptEvent::Config),
            queue_vectors: self.interrupt.queue_vectors(),
        })
    }

    /// Where the configuration access capability leads to, where all of it is in a BAR.
    fn window(&self, access: &CapabilityAccess<'_>) -> Option<(u64, usize)> {
        if access.offset < window::DATA {
            return None;
        }
        let (bar, offset, len) = window::place(access.registers)?;
        let inside = bar == layout::BAR && offset + len as u64 <= self.bar_size;
        inside.then_some((offset, len))
    }
}

impl VirtioTransport for PciTransport {
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
        // No interrupt is told again: what was pending is in the MSI-X table or on the pin.
        self.core.lock().resume();
    }

    fn reset(&self) {
        let mut core = self.core.lock();
        core.reset();
        self.interrupt.reset();
    }
}

impl PciFunction for PciTransport {
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        if bar != layout::BAR {
            return;
        }
        match offset {
            layout::COMMON..layout::ISR => {
                if let Some(value) = self.read_common(offset, data.len()) {
                    let bytes = value.to_le_bytes();
                    data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
                }
            }
            layout::ISR => {
                if let [isr] = data {
                    *isr = self.interrupt.take_isr();
                }
            }
            layout::DEVICE..layout::DEVICE_END => {
                let core = self.core.lock();
                core.read_config(offset - layout::DEVICE, data);
            }
            _ => {}
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        if bar != layout::BAR {
            return ControlFlow::Continue(());
        }
        match offset {
            layout::COMMON..layout::ISR => {
                let mut bytes = [0; 8];
                if let Some(low) = bytes.get_mut(..data.len()) {
                    low.copy_from_slice(data);
                    self.write_common(offset, data.len(), u64::from_le_bytes(bytes));
                }
            }
            layout::DEVICE..layout::DEVICE_END => {
                let mut core = self.core.lock();
                core.write_config(offset - layout::DEVICE, data);
            }
            layout::NOTIFY.. => {
                let offset = offset - layout::NOTIFY;
                if matches!(data.len(), 2 | 4) && offset.is_multiple_of(layout::NOTIFY_MULTIPLIER) {
                    self.core.notify(offset / layout::NOTIFY_MULTIPLIER);
                }
            }
            _ => {}
        }
        ControlFlow::Continue(())
    }

    fn config_read(&self, access: &CapabilityAccess<'_>, data: &mut [u8]) {
        let Some((offset, len)) = self.window(access) else {
            return;
        };
        let mut bytes = [0xff; 4];
        let value = &mut bytes[..len];
        let msix = self.interrupt.msix();
        if !msix.bar_read(&layout::MSIX, layout::BAR, offset, value) {
            self.bar_read(layout::BAR, offset, value);
        }
        let asked = value.iter().skip(access.offset - window::DATA);
        data.iter_mut()
            .zip(asked)
            .for_each(|(to, from)| *to = *from);
    }

    fn config_write(&self, access: &CapabilityAccess<'_>, _: &[u8]) -> ControlFlow<ExitRequest> {
        let Some((offset, len)) = self.window(access) else {
            return ControlFlow::Continue(());
        };
        let Some(data) = access.registers.get(window::DATA..window::DATA + len) else {
            return ControlFlow::Continue(());
        };
        let msix = self.interrupt.msix();
        if msix.bar_write(&layout::MSIX, layout::BAR, offset, data) {
            return ControlFlow::Continue(());
        }
        self.bar_write(layout::BAR, offset, data)
    }

    fn reset(&self) {
        VirtioTransport::reset(self);
    }
}

impl fmt::Debug for PciTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciTransport")
            .field("device_type", &self.core.device_type())
            .field("queues", &self.core.kicks().len())
            .finish_non_exhaustive()
    }
}
