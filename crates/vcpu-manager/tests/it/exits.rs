//! Every kind of exit reaches the bus as the guest meant it.

use kiln_vcpu_manager::{Crash, CrashCause, MachineEnd};
use kvm_bindings::{KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_INVAL, kvm_enable_cap};
use kvm_bindings::{KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_UNKNOWN};

use crate::support::*;

#[test]
fn port_writes_arrive_in_their_width() {
    let Some(kvm) = kvm() else { return };
    let code = [
        0xee, // out %al, %dx
        0xef, // out %ax, %dx
        0x66, 0xef, // out %eax, %dx
    ];
    let code = [&code[..], &POWER_OFF].concat();
    let guest = Guest::new(&kvm, &code, false).regs(|regs| {
        regs.rdx = RECORD.into();
        regs.rax = 0x4433_2211;
    });
    let started = guest.start();
    assert_eq!(started.end(), powered_off());
    let out = |bytes: &[u8]| Access::Out(RECORD, bytes.to_vec());
    assert_eq!(
        started.bus.accesses(),
        [
            out(&[0x11]),
            out(&[0x11, 0x22]),
            out(&[0x11, 0x22, 0x33, 0x44])
        ]
    );
    let counts = started.manager.exit_counts();
    assert_eq!(counts.len(), 1);
    // The power-off is a port write too.
    assert_eq!(
        (counts[0].pio_out, counts[0].pio_in, counts[0].other),
        (4, 0, 0)
    );
}

#[test]
fn port_reads_are_answered_in_their_width() {
    let Some(kvm) = kvm() else { return };
    let code = [
        0xec, // in %dx, %al
        0xa2, 0x00, 0x80, // mov %al, DATA
        0xed, // in %dx, %ax
        0xa3, 0x02, 0x80, // mov %ax, DATA + 2
        0x66, 0xed, // in %dx, %eax
        0x66, 0xa3, 0x04, 0x80, // mov %eax, DATA + 4
    ];
    let code = [&code[..], &POWER_OFF].concat();
    let guest = Guest::new(&kvm, &code, false).regs(|regs| regs.rdx = PATTERN.into());
    let started = guest.start();
    assert_eq!(started.end(), powered_off());
    assert_eq!(
        started.memory.read(DATA),
        [0x11, 0x00, 0x11, 0x22, 0x11, 0x22, 0x33, 0x44]
    );
    let read = |width| Access::In(PATTERN, width);
    assert_eq!(started.bus.accesses(), [read(1), read(2), read(4)]);
    assert_eq!(started.manager.exit_counts()[0].pio_in, 3);
}

#[test]
fn a_port_that_nobody_answers_reads_as_ones() {
    let Some(kvm) = kvm() else { return };
    // in %dx, %eax; mov %eax, DATA
    let code = [&[0x66, 0xed, 0x66, 0xa3, 0x00, 0x80][..], &POWER_OFF].concat();
    let started = Guest::new(&kvm, &code, false)
        .regs(|regs| regs.rdx = 0x3333)
        .start();
    assert_eq!(started.end(), powered_off());
    assert_eq!(started.memory.read(DATA), [0xff; 4]);
}

#[test]
fn mmio_writes_arrive_in_their_width() {
    let Some(kvm) = kvm() else { return };
    let code = [
        0x8e, 0xc1, // mov %cx, %es
        0x0f, 0x6f, 0x06, 0x00, 0x80, // movq DATA, %mm0
        0x26, 0xa2, 0x10, 0x00, // mov %al, %es:0x10
        0x26, 0xa3, 0x20, 0x00, // mov %ax, %es:0x20
        0x26, 0x66, 0xa3, 0x31, 0x00, // mov %eax, %es:0x31
        0x26, 0x0f, 0x7f, 0x06, 0x40, 0x00, // movq %mm0, %es:0x40
    ];
    let code = [&code[..], &POWER_OFF].concat();
    let guest = Guest::new(&kvm, &code, false)
        .data(&[1, 2, 3, 4, 5, 6, 7, 8])
        .regs(|regs| {
            regs.rcx = MMIO >> 4;
            regs.rax = 0x4433_2211;
        });
    let started = guest.start();
    assert_eq!(started.end(), powered_off());
    let write = |offset, bytes: &[u8]| Access::MmioWrite(MMIO + offset, bytes.to_vec());
    assert_eq!(
        started.bus.accesses(),
        [
            write(0x10, &[0x11]),
            write(0x20, &[0x11, 0x22]),
            write(0x31, &[0x11, 0x22, 0x33, 0x44]),
            write(0x40, &[1, 2, 3, 4, 5, 6, 7, 8]),
        ]
    );
    assert_eq!(started.manager.exit_counts()[0].mmio_write, 4);
}

#[test]
fn mmio_reads_are_answered_in_their_width() {
    let Some(kvm) = kvm() else { return };
    let code = [
        0x8e, 0xc1, // mov %cx, %es
        0x26, 0xa0, 0x10, 0x00, // mov %es:0x10, %al
        0xa2, 0x00, 0x80, // mov %al, DATA
        0x26, 0xa1, 0x20, 0x00, // mov %es:0x20, %ax
        0xa3, 0x02, 0x80, // mov %ax, DATA + 2
        0x26, 0x66, 0xa1, 0x31, 0x00, // mov %es:0x31, %eax
        0x66, 0xa3, 0x04, 0x80, // mov %eax, DATA + 4
        0x26, 0x0f, 0x6f, 0x06, 0x40, 0x00, // movq %es:0x40, %mm0
        0x0f, 0x7f, 0x06, 0x08, 0x80, // movq %mm0, DATA + 8
        0x26, 0xa1, 0x00, 0xf0, // mov %es:0xf000, %ax
        0xa3, 0x10, 0x80, // mov %ax, DATA + 16
    ];
    let code = [&code[..], &POWER_OFF].concat();
    let started = Guest::new(&kvm, &code, false)
        .regs(|regs| regs.rcx = MMIO >> 4)
        .start();
    assert_eq!(started.end(), powered_off());
    assert_eq!(
        started.memory.read(DATA),
        [
            0xa0, 0x00, 0xa0, 0xa1, 0xa0, 0xa1, 0xa2, 0xa3, 0xa0, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5,
            0xa6, 0xa7, // and what nobody answers:
            0xff, 0xff
        ]
    );
    assert_eq!(started.manager.exit_counts()[0].mmio_read, 5);
}

#[test]
fn string_writes_arrive_element_by_element() {
    let Some(kvm) = kvm() else { return };
    let code = [
        0xf3, 0x6e, // rep outsb
        0xb9, 0x02, 0x00, // mov $2, %cx
        0xf3, 0x6f, // rep outsw
        0xb9, 0x02, 0x00, // mov $2, %cx
        0x66, 0xf3, 0x6f, // rep outsl
    ];
    let code = [&code[..], &POWER_OFF].concat();
    let guest = Guest::new(&kvm, &code, false)
        .data(b"abcDDEEFFFFGGGG")
        .regs(|regs| {
            regs.rdx = RECORD.into();
            regs.rsi = DATA as u64;
            regs.rcx = 3;
        });
    let started = guest.start();
    assert_eq!(started.end(), powered_off());
    let out = |bytes: &[u8]| Access::Out(RECORD, bytes.to_vec());
    assert_eq!(
        started.bus.accesses(),
        [
            out(b"a"),
            out(b"b"),
            out(b"c"),
            out(b"DD"),
            out(b"EE"),
            out(b"FFFF"),
            out(b"GGGG")
        ]
    );
}

#[test]
fn string_reads_are_answered_element_by_element() {
    let Some(kvm) = kvm() else { return };
    // rep insw; then one byte more
    let code = [&[0xf3, 0x6d, 0x6c][..], &POWER_OFF].concat();
    let guest = Guest::new(&kvm, &code, false).regs(|regs| {
        regs.rdx = TICKET.into();
        regs.rdi = DATA as u64;
        regs.rcx = 300;
    });
    let started = guest.start();
    assert_eq!(started.end(), powered_off());
    assert_eq!(started.bus.tickets(), 301);
    let mut expected: Vec<u8> = (0..300u16).flat_map(u16::to_le_bytes).collect();
    expected.push(300u16.to_le_bytes()[0]);
    assert_eq!(started.memory.read::<601>(DATA).as_slice(), expected);
}

#[test]
fn an_msr_left_to_user_space_is_refused_as_one_that_does_not_exist() {
    let Some(kvm) = kvm() else { return };
    let code = [
        0x66, 0xb9, 0x34, 0x12, 0x00, 0x60, // mov $0x60001234, %ecx
        0x0f, 0x32, // rdmsr
        0xf4, // hlt: not reached
    ];
    let guest = Guest::new(&kvm, &code, true);
    let cap = kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [
            (KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER)
                .into(),
            0,
            0,
            0,
        ],
        ..Default::default()
    };
    if let Err(error) = guest.vm.enable_cap(&cap) {
        return println!("skipped: KVM_CAP_X86_USER_SPACE_MSR: {error}");
    }
    // The handler of #GP, vector 13, powers off.
    guest.memory.write(13 * 4, &[0x00, 0x20, 0x00, 0x00]);
    guest.memory.write(0x2000, &POWER_OFF);
    let started = guest.start();
    assert_eq!(started.end(), powered_off());
    assert_eq!(started.manager.exit_counts()[0].other, 1);
}

#[test]
fn halting_where_nothing_can_wake_ends_the_machine() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&kvm, &[0x90, 0xf4], false);
    let started = guest.start();
    match started.end() {
        MachineEnd::Crash(Crash {
            vcpu: 0,
            rip: Some(rip),
            cause: CrashCause::Halted,
            ..
        }) => {
            assert_eq!(rip, CODE as u64 + 2);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn one_halted_vcpu_leaves_the_others_running() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::with_vcpus(&kvm, &[0xf4], false, 2);
    // Without a local APIC in the kernel the second vCPU runs at once: it counts tickets.
    guest.memory.write(0x2000, &[0x66, 0xed, 0xeb, 0xfc]);
    let mut regs = guest.vcpus[1].get_regs().unwrap();
    regs.rip = 0x2000;
    regs.rdx = TICKET.into();
    guest.vcpus[1].set_regs(&regs).unwrap();
    let started = guest.start();
    eventually("the first vCPU halts", || {
        started.manager.exit_counts()[0].other == 1
    });
    let before = started.bus.tickets();
    eventually("the second goes on", || started.bus.tickets() > before + 10);
    started.manager.pause().unwrap();
    started.manager.resume().unwrap();
    started.manager.pause().unwrap();
    assert_eq!(started.regs().rip, CODE as u64 + 1);
    started.manager.stop();
    assert_eq!(started.end(), MachineEnd::Stopped);
}
