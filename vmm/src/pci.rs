//! The PCI bus of a machine: what is on it, where it is, and what follows its BARs.

use std::sync::{Arc, Mutex, PoisonError};

use kiln_arch::acpi::{PciInterrupt, PciRoot};
use kiln_arch::layout;
use kiln_device_manager::DeviceManager;
use kiln_devices::legacy::IoApic;
use kiln_pci::{
    AddressSpace, BarObserver, ConfigPorts, Ecam, FunctionDescription, IntxLine, LevelInterrupt,
    PciBus, PciBusBuilder, PciFunction,
};
use kiln_virtio_device::PciTransport;
use vmm_sys_util::eventfd::EventFd;

use crate::BuildError;
use crate::kvm::KvmVm;

/// The functions of a bus, in the order in which the guest finds them.
pub(crate) type Functions = Vec<(FunctionDescription, Arc<dyn PciFunction>)>;

/// Makes the bus of these functions, whose INTx pins lead to the IOAPIC.
pub(crate) fn build_bus(
    functions: Functions,
    ioapic: &Arc<IoApic>,
) -> Result<Arc<PciBus>, BuildError> {
    let mut builder = PciBusBuilder::new();
    let memory = layout::PCI_MEMORY_START..layout::PCI_MEMORY_START + layout::PCI_MEMORY_SIZE;
    builder.add_window(AddressSpace::Memory, memory)?;
    builder.set_intx_lines(layout::PCI_INTX_GSIS.map(|gsi| IntxLine {
        gsi,
        level: Arc::new(IoApicPin {
            ioapic: Arc::clone(ioapic),
            gsi,
        }),
    }));
    for (description, function) in functions {
        builder.add(description, function)?;
    }
    Ok(builder.build()?)
}

/// Places what leads to a bus on the machine's buses.
pub(crate) fn place_bus(bus: &Arc<PciBus>, devices: &mut DeviceManager) -> Result<(), BuildError> {
    devices.add_mmio(
        "PCI configuration space",
        layout::PCI_CONFIG_START,
        layout::PCI_CONFIG_SIZE,
        Arc::new(Ecam::new(Arc::clone(bus))),
    )?;
    devices.add_pio(
        "PCI configuration ports",
        layout::PCI_CONFIG_PORT,
        layout::PCI_CONFIG_PORT_COUNT,
        Arc::new(ConfigPorts::new(Arc::clone(bus))),
    )?;
    for window in bus.windows() {
        let size = window.range.end - window.range.start;
        devices.add_mmio("PCI devices", window.range.start, size, window.device)?;
    }
    Ok(())
}

/// What the guest has to be told of a bus: the interrupts of all pins of the slots in use.
pub(crate) fn describe_bus(bus: &PciBus) -> PciRoot {
    let mut slots: Vec<_> = bus.functions().map(|found| found.address.slot()).collect();
    slots.dedup();
    let pins = slots
        .into_iter()
        .flat_map(|slot| (0..4).map(move |pin| (slot, pin)));
    let interrupts = pins.filter_map(|(slot, pin)| {
        let gsi = bus.intx_gsi(slot, pin)?;
        Some(PciInterrupt { slot, pin, gsi })
    });
    PciRoot {
        interrupts: interrupts.collect(),
    }
}

/// A pin of the IOAPIC that takes a level.
struct IoApicPin {
    ioapic: Arc<IoApic>,
    gsi: u32,
}

impl LevelInterrupt for IoApicPin {
    fn set_level(&self, asserted: bool) {
        self.ioapic.set_level(self.gsi, asserted);
    }
}

/// Has KVM write to the eventfds of a device's queues when the guest notifies them, wherever it
/// puts the BAR for that.
///
/// What KVM does not take, because the guest has used up its room for that or put BARs on top of
/// each other, comes to the transport as a write to the BAR: it costs time, and nothing is lost.
pub(crate) struct Notifications {
    vm: Arc<KvmVm>,
    kicks: Vec<Arc<EventFd>>,
    /// Where the BAR is.
    place: Mutex<Option<u64>>,
}

impl Notifications {
    pub(crate) fn new(vm: Arc<KvmVm>, kicks: Vec<Arc<EventFd>>) -> Self {
        Self {
            vm,
            kicks,
            place: Mutex::new(None),
        }
    }

    fn each(&self, bar: u64, f: impl Fn(&EventFd, u64)) {
        for (queue, kick) in (0..).zip(&self.kicks) {
            f(kick, bar + PciTransport::notify_offset(queue));
        }
    }
}

impl BarObserver for Notifications {
    fn bar_moved(&self, bar: usize, address: Option<u64>) {
        if bar != PciTransport::NOTIFY_BAR {
            return;
        }
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        // The new place first: there is no moment at which KVM listens nowhere.
        if let Some(new) = address {
            self.each(new, |kick, at| {
                let _ = self.vm.notify_on_any_write(kick, at);
            });
        }
        if let Some(old) = place.take() {
            self.each(old, |kick, at| {
                let _ = self.vm.stop_notifying(kick, at);
            });
        }
        *place = address;
    }
}
