//! The VM fd: memory slots, the interrupt controller, ioeventfds and irqfds.

use std::io;
use std::sync::Arc;

use kiln_arch::layout;
use kiln_memory::{GuestMemory, MemorySize};
use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::BuildError;

/// A KVM virtual machine and the memory it maps, which has to outlive it.
pub(crate) struct KvmVm {
    // Declared before `memory`: dropped before it.
    fd: Arc<VmFd>,
    memory: Arc<GuestMemory>,
}

/// Gives a new virtual machine the split irqchip and what else comes before its first vCPU.
pub(crate) fn set_up_irqchip(fd: &VmFd) -> Result<(), BuildError> {
    fd.set_identity_map_address(layout::KVM_IDENTITY_MAP_START)
        .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
    fd.set_tss_address(layout::KVM_TSS_START as usize)
        .map_err(failed("KVM_SET_TSS_ADDR"))?;
    let mut split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    split.args[0] = u64::from(layout::IOAPIC_PINS);
    fd.enable_cap(&split)
        .map_err(failed("KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)"))
}

pub(crate) fn create_vcpu(fd: &VmFd, id: u32) -> Result<VcpuFd, BuildError> {
    fd.create_vcpu(u64::from(id))
        .map_err(failed("KVM_CREATE_VCPU"))
}

impl KvmVm {
    /// Gives a virtual machine its RAM. With the split irqchip KVM waits a tenth of a millisecond for
    /// a grace period of the kernel here, and no longer where the irqchip is there already.
    pub(crate) fn new(fd: Arc<VmFd>, memory: Arc<GuestMemory>) -> Result<Self, BuildError> {
        let vm = Self { fd, memory };
        vm.set_memory_slots()?;
        Ok(vm)
    }

    fn set_memory_slots(&self) -> Result<(), BuildError> {
        for (slot, region) in (0..).zip(self.memory.iter()) {
            let start = region.start_addr();
            let userspace_addr =
                self.memory
                    .get_host_address(start)
                    .map_err(|e| BuildError::Kvm {
                        request: "the host's address of guest RAM",
                        source: io::Error::other(e),
                    })?;
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: start.0,
                memory_size: region.len(),
                userspace_addr: userspace_addr as u64,
            };
            // SAFETY: the region's mapping is that of `self.memory`, which is dropped after the VM
            // fd; a head start that holds the fd a moment longer runs no vCPU. The guest is the only one to be told of these pages as memory; all accesses of
            // ours go through vm-memory's volatile accessors.
            unsafe { self.fd.set_user_memory_region(region) }.map_err(|error| {
                BuildError::MemorySlot {
                    size: MemorySize::bytes(region.memory_size),
                    source: error.into(),
                }
            })?;
        }
        Ok(())
    }

    /// How many interrupts KVM can route in the machine.
    pub(crate) fn interrupt_routes(&self) -> usize {
        let routes = self.fd.check_extension_int(Cap::IrqRouting);
        usize::try_from(routes).unwrap_or(0)
    }

    /// The VM fd.
    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// The guest's RAM.
    pub(crate) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// An eventfd that KVM turns into the interrupt of a pin of the IOAPIC.
    pub(crate) fn interrupt_line(&self, gsi: u32) -> Result<Arc<EventFd>, BuildError> {
        let line = event_fd()?;
        self.fd
            .register_irqfd(&line, gsi)
            .map_err(failed("KVM_IRQFD"))?;
        Ok(Arc::new(line))
    }

    /// Has KVM write to `kick` when the guest writes anything, of any width, to `address`.
    pub(crate) fn notify_on_any_write(
        &self,
        kick: &EventFd,
        address: u64,
    ) -> Result<(), kvm_ioctls::Error> {
        self.fd
            .register_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)
    }

    /// The reverse of [`notify_on_any_write`](Self::notify_on_any_write).
    pub(crate) fn stop_notifying(
        &self,
        kick: &EventFd,
        address: u64,
    ) -> Result<(), kvm_ioctls::Error> {
        self.fd
            .unregister_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)
    }

    /// Has KVM write to `kick` when the guest writes the 32-bit `value` to `address`.
    pub(crate) fn notify_on_write(
        &self,
        kick: &EventFd,
        address: u64,
        value: u32,
    ) -> Result<(), BuildError> {
        self.fd
            .register_ioevent(kick, &IoEventAddress::Mmio(address), value)
            .map_err(failed("KVM_IOEVENTFD"))
    }
}

pub(crate) fn event_fd() -> Result<EventFd, BuildError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| BuildError::Kvm {
        request: "eventfd",
        source,
    })
}

pub(crate) fn failed(request: &'static str) -> impl Fn(kvm_ioctls::Error) -> BuildError {
    move |error| BuildError::Kvm {
        request,
        source: error.into(),
    }
}
