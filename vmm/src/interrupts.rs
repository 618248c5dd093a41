//! The routes of interrupts through KVM: the pins of the IOAPIC, and the MSI-X vectors of PCI
//! devices, in one table.

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_arch::layout;
use kiln_device_api::MsiMessage;
use kiln_devices::legacy::{MsiRoute, MsiRouter};
use kiln_pci::MsixSink;
use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_msi};
use vmm_sys_util::eventfd::EventFd;

use crate::BuildError;
use crate::kvm::{KvmVm, event_fd};

/// The first global system interrupt that is an MSI-X vector; those below are the IOAPIC's pins.
const FIRST_VECTOR_GSI: u32 = layout::IOAPIC_PINS;

/// The table of all routes, which KVM takes as a whole.
///
/// A guest decides when a route changes. That costs its vCPU the time of a system call, and this
/// process nothing that stays: the table has one place for each interrupt.
pub(crate) struct InterruptRoutes {
    vm: Arc<KvmVm>,
    table: Mutex<Table>,
    /// Whether a failure of KVM was logged: a guest must not be able to repeat it.
    complained: AtomicBool,
}

#[derive(Default)]
struct Table {
    /// The IOAPIC's routes, as it told them.
    pins: Vec<MsiRoute>,
    /// The message of each MSI-X vector. One that is closed keeps its route, which nothing uses
    /// while no eventfd is attached: mostly it opens with the same one again.
    vectors: Vec<Option<MsiMessage>>,
    /// Whether KVM was told of a route yet.
    routed: bool,
}

impl InterruptRoutes {
    pub(crate) fn new(vm: Arc<KvmVm>) -> Arc<Self> {
        Arc::new(Self {
            vm,
            table: Mutex::default(),
            complained: AtomicBool::new(false),
        })
    }

    /// So many MSI-X vectors more, for the device of this name.
    pub(crate) fn vectors(
        self: &Arc<Self>,
        name: &str,
        count: u16,
    ) -> Result<Arc<MsixVectors>, BuildError> {
        let limit = self.vm.interrupt_routes();
        let mut table = self.lock();
        let used = FIRST_VECTOR_GSI as usize + table.vectors.len();
        let after = used + usize::from(count);
        let (Ok(first), true) = (u32::try_from(used), after <= limit) else {
            return Err(BuildError::InterruptRoutes {
                name: name.to_owned(),
                count,
                left: limit.saturating_sub(used),
            });
        };
        let vector = |_| {
            Ok(Vector {
                event: event_fd()?,
                is_attached: AtomicBool::new(false),
            })
        };
        let vectors = (0..count).map(vector).collect::<Result<_, BuildError>>()?;
        table
            .vectors
            .resize(after - FIRST_VECTOR_GSI as usize, None);
        Ok(Arc::new(MsixVectors {
            routes: Arc::clone(self),
            first,
            vectors,
        }))
    }

    /// Routes an MSI-X vector; returns whether KVM does so.
    fn set_message(&self, gsi: u32, message: MsiMessage) -> bool {
        let mut table = self.lock();
        let index = (gsi - FIRST_VECTOR_GSI) as usize;
        let Some(route) = table.vectors.get_mut(index) else {
            return false;
        };
        if *route == Some(message) {
            return true;
        }
        *route = Some(message);
        if self.apply(&mut table) {
            return true;
        }
        // Nonsense of one vector shall not keep KVM from taking the table with the others.
        if let Some(route) = table.vectors.get_mut(index) {
            *route = None;
        }
        false
    }

    /// Gives KVM the table; returns whether it takes it. Under the lock, so that KVM hears of the
    /// changes of several vCPUs in their order.
    fn apply(&self, table: &mut Table) -> bool {
        let vectors = (FIRST_VECTOR_GSI..).zip(&table.vectors);
        let vectors = vectors.filter_map(|(gsi, message)| Some((gsi, (*message)?)));
        let pins = table.pins.iter().map(|route| (route.gsi, route.message));
        let entries: Vec<_> = pins.chain(vectors).map(msi_entry).collect();
        // What KVM has at the start is no route at all; to say so again takes milliseconds.
        if entries.is_empty() && !table.routed {
            return true;
        }
        table.routed = true;
        let result = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
            .and_then(|routing| self.vm.fd().set_gsi_routing(&routing));
        self.succeeded("KVM_SET_GSI_ROUTING", result)
    }

    fn succeeded(&self, request: &str, result: Result<(), kvm_ioctls::Error>) -> bool {
        if let Err(error) = &result
            && !self.complained.swap(true, Ordering::Relaxed)
        {
            tracing::error!("{request}: {error}: interrupts of the guest may be lost");
        }
        result.is_ok()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MsiRouter for InterruptRoutes {
    fn set_routes(&self, routes: &[MsiRoute]) {
        let mut table = self.lock();
        table.pins = routes.to_vec();
        self.apply(&mut table);
    }

    fn send(&self, message: MsiMessage) -> bool {
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        match self.vm.fd().signal_msi(msi) {
            Ok(processors) => processors > 0,
            // The guest's nonsense: there is no such processor.
            Err(error) if error.errno() == libc::EPERM => false,
            Err(error) => self.succeeded("KVM_SIGNAL_MSI", Err(error)),
        }
    }
}

fn msi_entry((gsi, message): (u32, MsiMessage)) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

/// The MSI-X vectors of a device. Each has an eventfd, which KVM turns into the vector's message
/// while the vector is open (irqfd).
pub(crate) struct MsixVectors {
    routes: Arc<InterruptRoutes>,
    /// The interrupt of the first vector; those of the others follow.
    first: u32,
    vectors: Vec<Vector>,
}

struct Vector {
    event: EventFd,
    /// Whether KVM listens to the eventfd. Changed under the lock of the device's vectors.
    is_attached: AtomicBool,
}

impl MsixVectors {
    fn get(&self, vector: u16) -> Option<(u32, &Vector)> {
        let found = self.vectors.get(usize::from(vector))?;
        Some((self.first + u32::from(vector), found))
    }
}

impl MsixSink for MsixVectors {
    fn connect(&self, vector: u16, message: MsiMessage) {
        let Some((gsi, found)) = self.get(vector) else {
            return;
        };
        if !self.routes.set_message(gsi, message) {
            // What was its message before is none of its any more.
            self.disconnect(vector);
        } else if !found.is_attached.load(Ordering::Relaxed) {
            let result = self.routes.vm.fd().register_irqfd(&found.event, gsi);
            let is_attached = self.routes.succeeded("KVM_IRQFD", result);
            found.is_attached.store(is_attached, Ordering::Relaxed);
        }
    }

    fn disconnect(&self, vector: u16) {
        if let Some((gsi, found)) = self.get(vector)
            && found.is_attached.swap(false, Ordering::Relaxed)
        {
            let result = self.routes.vm.fd().unregister_irqfd(&found.event, gsi);
            self.routes.succeeded("KVM_IRQFD (deassign)", result);
        }
    }

    fn take(&self, vector: u16) -> bool {
        self.get(vector)
            .is_some_and(|(_, found)| found.event.read().is_ok())
    }

    fn signal(&self, vector: u16, _message: MsiMessage) {
        if let Some((_, found)) = self.get(vector) {
            // It fails only where the counter is full, and then an interrupt is already on its way.
            let _ = found.event.write(1);
        }
    }

    fn notifier(&self, vector: u16) -> Option<EventFd> {
        self.get(vector)?.1.event.try_clone().ok()
    }
}
