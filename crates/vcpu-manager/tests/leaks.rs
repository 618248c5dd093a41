//! Nothing is left behind: alone in its process, for it counts what the whole process has.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test stops where it can't go on"
)]

use std::fs;

use kiln_vcpu_manager::MachineEnd;

#[allow(dead_code, reason = "shared with the other tests")]
#[path = "it/support.rs"]
mod support;

use support::{Guest, POWER_OFF, TICKET, eventually, kvm};

fn count(directory: &str) -> usize {
    fs::read_dir(directory).unwrap().count()
}

/// Mappings of vCPUs, which would hold their machines.
fn vcpu_mappings() -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .filter(|line| line.contains("kvm-vcpu"))
        .count()
}

#[test]
fn a_hundred_machines_leave_no_thread_descriptor_or_mapping() {
    let Some(kvm) = kvm() else { return };
    let storm = [0x66, 0xed, 0xeb, 0xfc];
    let before = (
        count("/proc/self/task"),
        count("/proc/self/fd"),
        vcpu_mappings(),
    );
    for round in 0..100 {
        let code = if round % 2 == 0 {
            &storm[..]
        } else {
            &POWER_OFF
        };
        let guest = Guest::with_vcpus(&kvm, code, true, 2).regs(|regs| regs.rdx = TICKET.into());
        let started = guest.start();
        match round % 6 {
            0 => eventually("it runs", || started.bus.tickets() > 0),
            2 => started.manager.pause().unwrap(),
            4 => {}
            _ => assert_ne!(started.end(), MachineEnd::Stopped),
        }
        assert!(vcpu_mappings() > before.2);
        if round % 4 < 2 {
            started.manager.stop();
        }
    }
    let after = (
        count("/proc/self/task"),
        count("/proc/self/fd"),
        vcpu_mappings(),
    );
    assert_eq!(after, before);
}
