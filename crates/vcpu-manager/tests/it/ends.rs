//! How machines end.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use kiln_device_api::ExitRequest;
use kiln_vcpu_manager::{Crash, CrashCause, EndHooks, Error, MachineEnd, VcpuManager, VcpuOptions};
use kvm_bindings::{KVM_EXIT_DEBUG, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, kvm_guest_debug};

use crate::support::*;

fn crash(started: &Started) -> Crash {
    match started.end() {
        MachineEnd::Crash(crash) => crash,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_request_ends_the_machine_at_that_very_instruction() {
    let Some(kvm) = kvm() else { return };
    let code = [&POWER_OFF[..], &[0xba, RECORD as u8, 0x00, 0xee]].concat();
    let ends = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&ends);
    let guest = Guest::new(&kvm, &code, true);
    let started = guest
        .try_start(move |end| seen.lock().unwrap().push(end.clone()))
        .unwrap();
    assert_eq!(started.end(), powered_off());
    started.manager.stop();
    assert_eq!(started.end(), powered_off(), "the first end stays");
    assert_eq!(started.manager.try_wait(), Some(powered_off()));
    assert_eq!(*ends.lock().unwrap(), [powered_off()]);
    assert_eq!(started.bus.accesses(), []);
}

#[test]
fn a_request_within_a_string_write_drops_the_elements_after_it() {
    let Some(kvm) = kvm() else { return };
    // rep outsl to a port at which the third element is out of sequence
    let data: Vec<u8> = [1u32, 2, 9, 10]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    let guest = Guest::new(&kvm, &[0x66, 0xf3, 0x6f], true)
        .data(&data)
        .regs(|regs| {
            regs.rdx = SEQUENCE.into();
            regs.rsi = DATA as u64;
            regs.rcx = 4;
        });
    let started = guest.start();
    let reset = MachineEnd::Requested {
        vcpu: 0,
        request: ExitRequest::Reset,
    };
    assert_eq!(started.end(), reset);
    assert_eq!(started.bus.sequence(), 9);
}

#[test]
fn a_triple_fault_is_an_end() {
    let Some(kvm) = kvm() else { return };
    // ud2 in protected mode, with an interrupt table of no entry.
    let guest = Guest::new(&kvm, &[0x0f, 0x0b], true);
    let mut sregs = guest.vcpus[0].get_sregs().unwrap();
    sregs.cr0 |= 1; // PE
    for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        segment.base = 0;
        segment.limit = 0xffff_ffff;
        segment.db = 1;
        segment.g = 1;
    }
    sregs.cs.selector = 8;
    sregs.idt.base = DATA as u64;
    sregs.idt.limit = 0;
    guest.vcpus[0].set_sregs(&sregs).unwrap();
    let crash = crash(&guest.start());
    assert_eq!(crash.cause, CrashCause::TripleFault);
    assert!(
        crash.to_string().starts_with("vCPU 0: triple fault"),
        "{crash}"
    );
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_named() {
    let Some(kvm) = kvm() else { return };
    // addps %xmm1, %xmm0; where it runs, or raises #UD (vector 6), the machine powers off.
    let code = [&[0x90, 0x0f, 0x58, 0xc1][..], &POWER_OFF].concat();
    let mut guest = Guest::new(&kvm, &code, true);
    guest
        .memory
        .write(6 * 4, &[0x04, CODE.to_le_bytes()[1], 0x00, 0x00]);
    guest.options.read_memory = Some(guest.read_memory());
    let started = guest.start();
    let crash = match started.end() {
        MachineEnd::Crash(crash) => crash,
        end => {
            assert_eq!(end, powered_off());
            return println!("skipped: this host's KVM runs the instruction");
        }
    };
    assert_eq!(crash.cause, CrashCause::EmulationFailure);
    assert_eq!(crash.rip, Some(CODE as u64 + 1));
    assert_eq!(&crash.instruction.as_slice()[..3], [0x0f, 0x58, 0xc1]);
    let text = crash.to_string();
    assert!(
        text.starts_with(
            "vCPU 0: KVM can't emulate an instruction, at rip 0x1001, instruction bytes 0f 58 c1"
        ),
        "{text}"
    );
}

/// Lets the machine end behind its first instruction: the exit of a debugger that is not there.
fn single_step(guest: &Guest) {
    let debug = kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
        ..Default::default()
    };
    guest.vcpus[0].set_guest_debug(&debug).unwrap();
}

#[test]
fn an_exit_that_nobody_asked_for_is_an_end() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&kvm, &[0x90, 0x90, 0xeb, 0xfc], true);
    single_step(&guest);
    let crash = crash(&guest.start());
    assert_eq!(crash.cause, CrashCause::UnexpectedExit(KVM_EXIT_DEBUG));
    assert_eq!(crash.rip, Some(CODE as u64 + 1));
    assert_eq!(
        crash.to_string(),
        "vCPU 0: unexpected KVM exit 4 (DEBUG), at rip 0x1001"
    );
}

#[test]
fn a_crash_shows_the_instruction_as_far_as_memory_goes() {
    let Some(kvm) = kvm() else { return };
    let last = MEMORY - 4;
    let mut guest = Guest::new(&kvm, &[], true).regs(|regs| regs.rip = last as u64);
    guest.memory.write(last, &[0x90, 0x01, 0x02, 0x03]);
    guest.options.read_memory = Some(guest.read_memory());
    single_step(&guest);
    let crash = crash(&guest.start());
    assert_eq!(crash.rip, Some(last as u64 + 1));
    // Three bytes to the end of the page, and no memory in the next.
    assert_eq!(crash.instruction.as_slice(), [0x01, 0x02, 0x03]);
}

#[test]
fn a_crash_shows_an_instruction_over_two_pages() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, &[], true).regs(|regs| regs.rip = 0x2ffa);
    guest.memory.write(0x2ffa, &[0x90]);
    let instruction: [u8; 15] = std::array::from_fn(|at| at as u8 + 1);
    guest.memory.write(0x2ffb, &instruction);
    guest.options.read_memory = Some(guest.read_memory());
    single_step(&guest);
    assert_eq!(crash(&guest.start()).instruction.as_slice(), instruction);
}

#[test]
fn a_panic_while_the_instruction_is_read_does_not_hide_the_crash() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, &[0x90, 0x90], true);
    guest.options.read_memory = Some(Arc::new(|_, _| panic!("on purpose")));
    single_step(&guest);
    let crash = crash(&guest.start());
    assert_eq!(crash.cause, CrashCause::UnexpectedExit(KVM_EXIT_DEBUG));
    assert_eq!(
        (crash.rip, crash.instruction.as_slice()),
        (Some(CODE as u64 + 1), &[][..])
    );
}

#[test]
fn a_device_that_panics_ends_its_own_machine_only() {
    let Some(kvm) = kvm() else { return };
    let storm = [0x66, 0xed, 0xeb, 0xfc];
    let other = Guest::new(&kvm, &storm, true)
        .regs(|regs| regs.rdx = TICKET.into())
        .start();
    let broken = Guest::new(&kvm, &[0xee], true)
        .regs(|regs| regs.rdx = PANIC.into())
        .start();
    let crash = crash(&broken);
    let message = "the device at 0xdd is broken".to_owned();
    assert_eq!(crash.cause, CrashCause::DevicePanic(message));
    assert!(crash.rip.is_some());
    let before = other.bus.tickets();
    eventually("the other machine goes on", || {
        other.bus.tickets() > before + 10
    });
    other.manager.stop();
    assert_eq!(other.end(), MachineEnd::Stopped);
}

#[test]
fn the_first_end_wins_over_all_vcpus() {
    let Some(kvm) = kvm() else { return };
    let calls = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&calls);
    // Without a local APIC both run the same code at once.
    let guest = Guest::with_vcpus(&kvm, &POWER_OFF, false, 2);
    let started = guest
        .try_start(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
        })
        .unwrap();
    let MachineEnd::Requested {
        vcpu,
        request: ExitRequest::Shutdown,
    } = started.end()
    else {
        panic!("{:?}", started.end());
    };
    assert!(vcpu < 2);
    started.manager.stop();
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

#[test]
fn a_panic_in_the_function_called_at_the_end_is_contained() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&kvm, &POWER_OFF, true);
    let started = guest.try_start(|_| panic!("on purpose")).unwrap();
    assert_eq!(started.end(), powered_off());
}

#[test]
fn an_ended_machine_can_be_looked_at_but_not_resumed() {
    let Some(kvm) = kvm() else { return };
    let started = Guest::new(&kvm, &POWER_OFF, true).start();
    assert_eq!(started.end(), powered_off());
    assert_eq!(started.regs().rdx, OFF.into());
    assert!(matches!(started.manager.pause(), Err(Error::Ended)));
    assert!(matches!(started.manager.resume(), Err(Error::Ended)));
    assert!(matches!(
        started.manager.with_vcpu(1, |_| ()),
        Err(Error::NoSuchVcpu { vcpu: 1, count: 1 })
    ));
}

#[test]
fn a_machine_of_no_vcpu_is_refused() {
    let bus = Arc::new(Recorder::default());
    let result = VcpuManager::start(Vec::new(), bus, VcpuOptions::default(), EndHooks::default());
    assert!(matches!(result, Err(Error::NoVcpus)));
}
