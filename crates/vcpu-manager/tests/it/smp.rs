//! More than one vCPU, with the local APIC in the kernel.

use std::fs;

use kiln_vcpu_manager::MachineEnd;
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_enable_cap,
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::{Kvm, VmFd};

use crate::support::*;

/// Where the local APIC is.
const APIC: u64 = 0xfee0_0000;
/// Where a start-up interrupt with vector 2 lets a processor begin.
const SECOND: usize = 0x2000;

/// `movl $value, %es:offset`.
fn apic_write(offset: u16, value: u32) -> Vec<u8> {
    let mut code = vec![0x26, 0x66, 0xc7, 0x06];
    code.extend(offset.to_le_bytes());
    code.extend(value.to_le_bytes());
    code
}

/// The first vCPU enables its APIC and sends INIT and SIPI to the others, then loops.
fn start_all() -> Vec<u8> {
    let mut code = apic_write(0xf0, 0x1ff);
    code.extend(apic_write(0x300, 0x000c_4500)); // INIT to all but itself
    code.extend(apic_write(0x300, 0x000c_4602)); // SIPI, vector 2
    code.extend([0xeb, 0xfe]);
    code
}

/// Lets the first vCPU reach its APIC by `%es`, as real mode alone could not.
fn reach_apic(guest: &Guest) {
    let mut sregs = guest.vcpus[0].get_sregs().unwrap();
    sregs.es.base = APIC;
    guest.vcpus[0].set_sregs(&sregs).unwrap();
}

fn split_irqchip(vm: &VmFd) {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    cap.args[0] = 24;
    vm.enable_cap(&cap).unwrap();
}

fn full_irqchip(vm: &VmFd) {
    vm.create_irq_chip().unwrap();
}

fn smp(kvm: &Kvm, irqchip: fn(&VmFd)) -> Guest {
    let guest = Guest::with_irqchip(kvm, &start_all(), 3, irqchip);
    reach_apic(&guest);
    let second = [
        0xba,
        RECORD as u8,
        0x00, // mov $RECORD, %dx
        0x8c,
        0xc8, // mov %cs, %ax
        0xef, // out %ax, %dx
        0xfa,
        0xf4, // cli; hlt
    ];
    guest.memory.write(SECOND, &second);
    guest
}

fn others_start(irqchip: fn(&VmFd)) {
    let Some(kvm) = kvm() else { return };
    let started = smp(&kvm, irqchip).paused().start();
    assert_eq!(started.bus.accesses(), []);
    // Pauses before, amid and after the start lose nothing.
    started.manager.resume().unwrap();
    for _ in 0..10 {
        started.manager.pause().unwrap();
        started.manager.resume().unwrap();
    }
    eventually("both others write", || started.bus.accesses().len() == 2);
    let said = Access::Out(RECORD, vec![0x00, 0x02]);
    assert_eq!(started.bus.accesses(), [said.clone(), said]);
    started.manager.pause().unwrap();
    for vcpu in 1..3 {
        let rip = started
            .manager
            .with_vcpu(vcpu, |fd| fd.get_regs().unwrap().rip)
            .unwrap();
        assert!(rip >= 6, "vCPU {vcpu} is behind its write, at {rip:#x}");
    }
    started.manager.stop();
    assert_eq!(started.end(), MachineEnd::Stopped);
}

#[test]
fn init_and_sipi_start_the_other_vcpus() {
    others_start(full_irqchip);
}

#[test]
fn init_and_sipi_start_the_other_vcpus_with_the_ioapic_in_user_space() {
    others_start(split_irqchip);
}

/// The processor time that the threads of this name have used, in clock ticks.
fn ticks_of(name: &str) -> (usize, u64) {
    let mut used = (0, 0);
    for task in fs::read_dir("/proc/self/task").unwrap() {
        // A thread of another test can end at any step here.
        let Ok(stat) = fs::read_to_string(task.unwrap().path().join("stat")) else {
            continue;
        };
        let (head, tail) = stat.rsplit_once(") ").unwrap();
        if head
            .split_once('(')
            .is_some_and(|(_, comm)| comm.starts_with(name))
        {
            let fields: Vec<&str> = tail.split(' ').collect();
            used.0 += 1;
            used.1 += fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        }
    }
    used
}

#[test]
fn vcpus_that_wait_use_no_processor() {
    let Some(kvm) = kvm() else { return };
    // The first halts for good, the others are never started.
    let mut guest = Guest::with_vcpus(&kvm, &[0xfa, 0xf4], true, 4);
    guest.options.thread_name = "waits".to_owned();
    let started = guest.start();
    for _ in 0..3 {
        std::thread::sleep(std::time::Duration::from_millis(100));
        // A kick wakes them for a moment.
        started.manager.pause().unwrap();
        started.manager.resume().unwrap();
    }
    let (threads, ticks) = ticks_of("waits");
    assert_eq!(threads, 4);
    // 100 ticks are a second: spinning, the four would have used far more than 15.
    assert!(ticks < 15, "{ticks} ticks");
    started.manager.stop();
    assert_eq!(started.end(), MachineEnd::Stopped);
}

#[test]
fn the_end_of_a_level_triggered_interrupt_reaches_the_bus() {
    const VECTOR: u8 = 0x30;
    let Some(kvm) = kvm() else { return };
    // Enables the APIC, says so, and loops with interrupts on.
    let mut code = apic_write(0xf0, 0x1ff);
    code.extend([0xee, 0xfb, 0xeb, 0xfe]);
    let guest = Guest::with_irqchip(&kvm, &code, 1, split_irqchip);
    reach_apic(&guest);
    let guest = guest.regs(|regs| regs.rdx = COUNTED.into());
    guest
        .memory
        .write(usize::from(VECTOR) * 4, &[0x00, 0x20, 0x00, 0x00]);
    let handler = [apic_write(0xb0, 0), vec![0xeb, 0xfe]].concat();
    guest.memory.write(0x2000, &handler);

    let message = kvm_msi {
        address_lo: u32::try_from(APIC).unwrap(),
        data: u32::from(VECTOR) | 0xc000, // level-triggered, asserted
        ..Default::default()
    };
    let route = kvm_irq_routing_entry {
        gsi: 4,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: message.address_lo,
                data: message.data,
                ..Default::default()
            },
        },
        ..Default::default()
    };
    guest
        .vm
        .set_gsi_routing(&KvmIrqRouting::from_entries(&[route]).unwrap())
        .unwrap();
    let started = guest.start();
    eventually("the APIC is enabled", || started.bus.bytes() == 1);
    started.vm.signal_msi(message).unwrap();
    eventually("the interrupt is ended", || {
        !started.bus.ended_interrupts().is_empty()
    });
    started.manager.stop();
    assert_eq!(started.bus.ended_interrupts(), [VECTOR]);
    assert_eq!(started.manager.exit_counts()[0].end_of_interrupt, 1);
}
