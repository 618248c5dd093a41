//! Which interrupt controller model to build on: what each costs at start, at teardown and per
//! interrupt. The answer is written down in `docs/decisions/0002-split-irqchip.md`.
//!
//! It speaks to KVM directly, so that nothing of Kiln's own is measured: `cargo bench -p kiln-vmm
//! --bench irqchip`. The guest halts; each interrupt wakes it, and its handler writes to a port,
//! which is the sign to send the next one.
#![allow(clippy::unwrap_used, missing_docs)]

use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_MAX_CPUID_ENTRIES,
    kvm_enable_cap, kvm_irq_routing_entry, kvm_irqchip, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

const RUNS: usize = 30;
const INTERRUPTS: u32 = 20_000;
const MEMORY: usize = 128 << 20;
const VECTOR: u8 = 0x40;
const GSI: u32 = 5;
const CODE: u64 = 0x1000;
const HANDLER: u64 = 0x1100;
const X2APIC_ENABLE: u64 = 1 << 10;

#[derive(Clone, Copy, PartialEq)]
enum Model {
    Split,
    Full,
    FullWithPit,
}

impl Model {
    fn name(self) -> &'static str {
        match self {
            Self::Split => "split irqchip, IOAPIC in user space",
            Self::Full => "full irqchip, no PIT",
            Self::FullWithPit => "full irqchip and PIT",
        }
    }
}

fn create_chips(vm: &VmFd, model: Model) {
    if model == Model::Split {
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        cap.args[0] = 24;
        vm.enable_cap(&cap).unwrap();
        return;
    }
    vm.create_irq_chip().unwrap();
    if model == Model::FullWithPit {
        vm.create_pit2(kvm_pit_config::default()).unwrap();
    }
}

/// Sends GSI 5 to vector 0x40 of the one vCPU, edge-triggered and fixed.
fn route(vm: &VmFd, model: Model) {
    if model == Model::Split {
        let mut entry = kvm_irq_routing_entry {
            gsi: GSI,
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        entry.u.msi.address_lo = 0xfee0_0000;
        entry.u.msi.data = u32::from(VECTOR);
        let routing = kvm_bindings::KvmIrqRouting::from_entries(&[entry]).unwrap();
        vm.set_gsi_routing(&routing).unwrap();
        return;
    }
    let mut chip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..Default::default()
    };
    vm.get_irqchip(&mut chip).unwrap();
    // SAFETY: `chip_id` says that the union holds an IOAPIC, whose fields are plain integers.
    unsafe {
        chip.chip.ioapic.redirtbl[GSI as usize].bits = u64::from(VECTOR);
    }
    vm.set_irqchip(&chip).unwrap();
}

/// Real mode, one interrupt vector, a local APIC that is on and in x2APIC mode.
fn set_up_vcpu(vcpu: &VcpuFd, memory: &GuestMemoryMmap<()>) {
    // sti; hlt; jmp back to sti
    let main = [0xfb, 0xf4, 0xeb, 0xfc];
    // out 0x10, al; mov ecx, 0x80b (end of interrupt); xor eax, eax; xor edx, edx; wrmsr; iret
    let handler = [
        0xe6, 0x10, 0x66, 0xb9, 0x0b, 0x08, 0, 0, 0x66, 0x31, 0xc0, 0x66, 0x31, 0xd2, 0x0f, 0x30,
        0xcf,
    ];
    memory.write_slice(&main, GuestAddress(CODE)).unwrap();
    memory.write_slice(&handler, GuestAddress(HANDLER)).unwrap();
    memory
        .write_obj(HANDLER as u32, GuestAddress(u64::from(VECTOR) * 4))
        .unwrap();

    // Spurious-interrupt vector register: APIC software enable.
    let mut lapic = vcpu.get_lapic().unwrap();
    lapic.regs[0xf0] = 0xffu8 as _;
    lapic.regs[0xf1] = 1;
    vcpu.set_lapic(&lapic).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    sregs.apic_base |= X2APIC_ENABLE;
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    regs.rip = CODE;
    regs.rsp = 0x8000;
    regs.rflags = 2;
    vcpu.set_regs(&regs).unwrap();
}

struct Sample {
    start: Duration,
    teardown: Duration,
    per_interrupt: Duration,
}

fn measure(kvm: &Kvm, cpuid: &kvm_bindings::CpuId, model: Model, interrupts: u32) -> Sample {
    let memory: GuestMemoryMmap<()> =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let begin = Instant::now();
    let vm = kvm.create_vm().unwrap();
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
    };
    // SAFETY: `memory` outlives `vm`.
    unsafe { vm.set_user_memory_region(region).unwrap() };
    create_chips(&vm, model);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(cpuid).unwrap();
    set_up_vcpu(&vcpu, &memory);
    let irq = EventFd::new(0).unwrap();
    vm.register_irqfd(&irq, GSI).unwrap();
    route(&vm, model);
    let start = begin.elapsed();

    irq.write(1).unwrap();
    let begin = Instant::now();
    for _ in 0..interrupts {
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(0x10, _) => irq.write(1).unwrap(),
            other => panic!("{other:?}"),
        }
    }
    let per_interrupt = begin.elapsed() / interrupts;

    let begin = Instant::now();
    drop(irq);
    drop(vcpu);
    drop(vm);
    Sample {
        start,
        teardown: begin.elapsed(),
        per_interrupt,
    }
}

fn median(mut values: Vec<Duration>) -> Duration {
    values.sort();
    values[values.len() / 2]
}

fn main() {
    let Ok(kvm) = Kvm::new() else {
        println!("irqchip: no usable /dev/kvm: nothing to measure");
        return;
    };
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    let models = [Model::Split, Model::Full, Model::FullWithPit];
    let mut samples: Vec<Vec<Sample>> = models.iter().map(|_| Vec::new()).collect();
    // In turn, so that a change of the machine's speed meets all of them.
    for _ in 0..RUNS {
        for (model, samples) in models.iter().zip(&mut samples) {
            samples.push(measure(&kvm, &cpuid, *model, INTERRUPTS / RUNS as u32));
        }
    }
    println!("median of {RUNS} runs, microseconds");
    println!(
        "{:<38}{:>10}{:>10}{:>12}",
        "", "start", "teardown", "interrupt"
    );
    for (model, samples) in models.iter().zip(&samples) {
        let micros = |f: fn(&Sample) -> Duration| {
            median(samples.iter().map(f).collect()).as_nanos() as f64 / 1000.0
        };
        println!(
            "{:<38}{:>10.1}{:>10.1}{:>12.2}",
            model.name(),
            micros(|s| s.start),
            micros(|s| s.teardown),
            micros(|s| s.per_interrupt)
        );
    }
}
