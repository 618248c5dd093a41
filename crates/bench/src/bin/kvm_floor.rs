//! The floor: what KVM itself takes to run a guest, with nothing of a machine monitor around it.
//!
//! `kvm-floor KERNEL [MIB]` loads the one segment of a small ELF image, enters it as PVH does, and
//! answers two ports: a byte to 0x3f8 goes to standard output, and any to 0x600 ends it. HLT waits
//! for ever, as it does where interrupts never come. It makes no call that a machine monitor could
//! do without, in the order that is the fastest: memory before the irqchip, and no PIT.
#![allow(clippy::unwrap_used)]

use std::io::Write;

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

const PROGRAM_HEADER: usize = 64;

fn main() {
    let mut words = std::env::args().skip(1);
    let image = std::fs::read(words.next().unwrap()).unwrap();
    let mib: usize = words.next().map_or(128, |text| text.parse().unwrap());

    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    let memory = map_memory(&vm, mib << 20);
    let entry = load(&image, memory);
    let mut split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    split.args[0] = 24;
    vm.enable_cap(&split).unwrap();
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    run(&mut create_vcpu(&vm, &cpuid, entry));
}

/// Gives the guest memory, and returns where it is in this process.
fn map_memory(vm: &VmFd, size: usize) -> *mut u8 {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    let region = kvm_userspace_memory_region {
        memory_size: size as u64,
        userspace_addr: at as u64,
        ..Default::default()
    };
    // SAFETY: the mapping is never unmapped, and is this large.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    at.cast()
}

/// Copies the first segment to where it belongs, and returns where it begins: its entry.
fn load(image: &[u8], memory: *mut u8) -> u64 {
    let field = |at: usize| {
        let at = PROGRAM_HEADER + at;
        u64::from_le_bytes(image[at..at + 8].try_into().unwrap()) as usize
    };
    let (offset, address, size) = (field(8), field(24), field(32));
    let segment = &image[offset..offset + size];
    // SAFETY: the images of these benches fit into the memory that they are run with.
    unsafe { std::ptr::copy_nonoverlapping(segment.as_ptr(), memory.add(address), size) };
    address as u64
}

/// A vCPU in 32-bit protected mode without paging, with flat segments.
fn create_vcpu(vm: &VmFd, cpuid: &CpuId, entry: u64) -> VcpuFd {
    let vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(cpuid).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 8,
        type_: 11,
        ..data
    };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rflags) = (entry, 2);
    vcpu.set_regs(&regs).unwrap();
    vcpu
}

fn run(vcpu: &mut VcpuFd) {
    let mut output = std::io::stdout();
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(0x3f8, byte) => {
                output.write_all(byte).unwrap();
                output.flush().unwrap();
            }
            VcpuExit::IoOut(0x600, _) => return,
            VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) => {}
            exit => panic!("{exit:?}"),
        }
    }
}
