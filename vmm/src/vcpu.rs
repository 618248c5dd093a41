//! vCPUs, from their creation to the state they start in.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use kiln_arch::cpuid::{self, Topology};
use kiln_arch::{boot::EntryPoint, lapic, msr, regs};
use kiln_device_api::VcpuBus;
use kiln_vcpu_manager::{
    AfterFirstExit, EndHooks, KickSignal, SpareThread, VcpuManager, VcpuOptions, recv_soon,
};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::head_start::Source;
use crate::kvm::{KvmVm, create_vcpu, failed};
use crate::machine::Machine;
use crate::{BuildError, HandleError, Host};

/// The vCPUs of a machine that has not started.
pub(crate) struct Vcpus {
    fds: Vec<VcpuFd>,
    /// For the first of them.
    thread: Option<SpareThread>,
    kick_signal: KickSignal,
    thread_name: String,
    /// See [`crate::warm_up`].
    pub(crate) after_first_exit: Option<AfterFirstExit>,
}

/// vCPUs that are being created.
pub(crate) struct ComingVcpus {
    fds: Receiver<Result<Vec<VcpuFd>, BuildError>>,
    thread: Option<SpareThread>,
}

impl ComingVcpus {
    /// Creates the vCPUs, on the thread of the head start if there was one: they need not be waited
    /// for while the guest's memory is filled.
    pub(crate) fn begin(source: Source, vm: &Arc<KvmVm>, topology: &Topology) -> Self {
        let (sender, fds) = sync_channel(1);
        let (vm, topology) = (Arc::clone(vm), *topology);
        let thread = source.create_vcpus(move |given| {
            let created = given.and_then(|(host, first)| create(&host, &vm, &topology, first));
            drop(sender.send(created));
        });
        Self { fds, thread }
    }

    /// The vCPUs. The first one starts at `entry`; the others wait for the guest to start them.
    pub(crate) fn enter_at(
        self,
        entry: EntryPoint,
        kick_signal: KickSignal,
        thread_name: String,
    ) -> Result<Vcpus, BuildError> {
        let gone = |_| {
            Err(BuildError::Kvm {
                request: "KVM_CREATE_VCPU",
                source: io::Error::other("the thread that creates them has ended"),
            })
        };
        let fds = recv_soon(&self.fds).unwrap_or_else(gone)?;
        if let Some(first) = fds.first() {
            set_entry(first, entry)?;
        }
        Ok(Vcpus {
            fds,
            thread: self.thread,
            kick_signal,
            thread_name,
            after_first_exit: None,
        })
    }
}

/// Creates the vCPUs but for the first, where that is there, and puts them into the state after a
/// reset, but for what firmware would have set up.
fn create(
    host: &Host,
    vm: &KvmVm,
    topology: &Topology,
    mut first: Option<VcpuFd>,
) -> Result<Vec<VcpuFd>, BuildError> {
    let mut fds = Vec::new();
    let msrs = msr::boot_msrs(host.msrs());
    let memory_type = msr::default_memory_type();
    for (index, apic_id) in (0..).zip(topology.apic_ids()) {
        let fd = match first.take() {
            Some(first) => first,
            None => create_vcpu(vm.fd(), apic_id)?,
        };
        let cpuid = cpuid::for_vcpu(host.supported_cpuid(), topology, index)?;
        fd.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        set_msrs(&fd, &msrs)?;
        if !host.msrs().contains(&memory_type.index) {
            // A KVM that does not list it takes it all the same; Linux does without it.
            let _ = set_msrs(&fd, &[memory_type]);
        }
        let mut apic = fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
        lapic::set_local_pins(&mut apic);
        fd.set_lapic(&apic).map_err(failed("KVM_SET_LAPIC"))?;
        fds.push(fd);
    }
    Ok(fds)
}

impl Vcpus {
    pub(crate) fn fds(&self) -> &[VcpuFd] {
        &self.fds
    }

    /// Starts the vCPUs on threads of their own.
    pub(crate) fn start(
        self,
        machine: &Machine,
        hooks: EndHooks,
    ) -> Result<VcpuManager, HandleError> {
        let memory = Arc::clone(machine.memory());
        let options = VcpuOptions {
            kick_signal: self.kick_signal,
            thread_name: self.thread_name,
            read_memory: Some(Arc::new(move |address, data| {
                memory.read_slice(data, GuestAddress(address)).is_ok()
            })),
            after_first_exit: self.after_first_exit,
            ..VcpuOptions::default()
        };
        let bus: Arc<dyn VcpuBus> = machine.buses();
        Ok(VcpuManager::start_on(
            self.thread,
            self.fds,
            bus,
            options,
            hooks,
        )?)
    }
}

fn set_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), BuildError> {
    let msrs = Msrs::from_entries(entries).map_err(|_| BuildError::Msr { index: 0 })?;
    let done = fd.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
    // KVM stops at the first one that it refuses.
    match entries.get(done) {
        None => Ok(()),
        Some(refused) => Err(BuildError::Msr {
            index: refused.index,
        }),
    }
}

fn set_entry(fd: &VcpuFd, entry: EntryPoint) -> Result<(), BuildError> {
    let mut sregs = fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    entry.set_sregs(&mut sregs);
    fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    fd.set_regs(&entry.regs()).map_err(failed("KVM_SET_REGS"))?;
    fd.set_fpu(&regs::fpu()).map_err(failed("KVM_SET_FPU"))
}
