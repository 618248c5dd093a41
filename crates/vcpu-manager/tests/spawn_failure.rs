//! A thread that can't be started: alone in its process, for it takes the process's memory away.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test stops where it can't go on"
)]

use std::fs;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_vcpu_manager::Error;

#[allow(dead_code, reason = "shared with the other tests")]
#[path = "it/support.rs"]
mod support;

use support::{Guest, POWER_OFF, kvm};

/// The address space of the process, in bytes.
fn address_space() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').next().unwrap().parse::<u64>().unwrap() * 4096
}

/// Bounds the address space; returns the bound that was there.
fn bound_address_space(bytes: u64) -> u64 {
    let mut limit = MaybeUninit::<libc::rlimit>::uninit();
    // SAFETY: getrlimit fills `limit`, setrlimit only reads it.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_AS, limit.as_mut_ptr()), 0);
        let mut limit = limit.assume_init();
        let before = limit.rlim_cur;
        limit.rlim_cur = bytes;
        assert_eq!(libc::setrlimit(libc::RLIMIT_AS, &raw const limit), 0);
        before
    }
}

#[test]
fn a_thread_that_cannot_be_started_takes_back_those_before_it() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::with_vcpus(&kvm, &POWER_OFF, false, 16);
    let bus = Arc::clone(&guest.bus);
    let ended = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&ended);
    let threads = fs::read_dir("/proc/self/task").unwrap().count();

    // Room for about five stacks of 256 KiB.
    let before = bound_address_space(address_space() + 5 * 256 * 1024 + 128 * 1024);
    let result = guest.try_start(move |_| flag.store(true, Ordering::SeqCst));
    bound_address_space(before);

    match result.err().expect("there was memory for all 16") {
        Error::Spawn { vcpu, .. } => assert!((1..8).contains(&vcpu), "{vcpu}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(fs::read_dir("/proc/self/task").unwrap().count(), threads);
    assert!(!ended.load(Ordering::SeqCst), "there was no machine to end");
    assert_eq!(bus.accesses(), [], "no vCPU ran");
}
