//! A user who has no room for signals in the queue: alone in its process, for it sets that limit.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test stops where it can't go on"
)]

use std::mem::MaybeUninit;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use kiln_device_api::ExitRequest;
use kiln_vcpu_manager::MachineEnd;

#[allow(dead_code, reason = "shared with the other tests")]
#[path = "it/support.rs"]
mod support;

use support::{COUNTED, Guest, OFF, PATIENCE, Started, eventually, kvm};

/// The limit is the process's: one test at a time.
static LIMIT: Mutex<()> = Mutex::new(());

/// Bounds the signals that may be queued; returns the bound that was there.
fn bound_signals(count: u64) -> u64 {
    let mut limit = MaybeUninit::<libc::rlimit>::uninit();
    // SAFETY: getrlimit fills `limit`, setrlimit only reads it.
    unsafe {
        assert_eq!(
            libc::getrlimit(libc::RLIMIT_SIGPENDING, limit.as_mut_ptr()),
            0
        );
        let mut limit = limit.assume_init();
        let before = limit.rlim_cur;
        limit.rlim_cur = count;
        assert_eq!(
            libc::setrlimit(libc::RLIMIT_SIGPENDING, &raw const limit),
            0
        );
        before
    }
}

/// Does this to the machine while there is no room, and makes room when it has waited a while.
fn late<R: Send + 'static>(
    started: &Arc<Started>,
    call: impl FnOnce(&Started) -> R + Send + 'static,
) -> R {
    let (done, wait) = channel();
    let started = Arc::clone(started);
    let before = bound_signals(0);
    thread::spawn(move || done.send(call(&started)).unwrap());
    let early = wait.recv_timeout(Duration::from_millis(50));
    bound_signals(before);
    assert!(
        early.is_err(),
        "the guest never exits, and yet it came out without a signal"
    );
    wait.recv_timeout(PATIENCE).expect("the kick was lost")
}

#[test]
fn a_kick_that_finds_no_room_is_sent_when_there_is_some() {
    let Some(kvm) = kvm() else { return };
    let _limit = LIMIT.lock().unwrap_or_else(PoisonError::into_inner);
    // Says that it runs, then loops without an exit.
    let code = [0xee, 0xeb, 0xfe];
    let guest = || Guest::new(&kvm, &code, true).regs(|regs| regs.rdx = COUNTED.into());
    let started = Arc::new(guest().start());
    eventually("it loops", || started.bus.bytes() == 1);
    for _ in 0..3 {
        late(&started, |started| started.manager.pause()).unwrap();
        started.manager.resume().unwrap();
        // The kick may have come while the vCPU was parked; it is behind us once the guest runs.
        thread::sleep(Duration::from_millis(20));
    }
    late(&started, |started| started.manager.stop());
    assert_eq!(started.end(), MachineEnd::Stopped);
}

#[test]
fn a_vcpu_that_ends_the_machine_sees_to_the_others_even_if_nobody_waits() {
    let Some(kvm) = kvm() else { return };
    let _limit = LIMIT.lock().unwrap_or_else(PoisonError::into_inner);
    // Both loop; the first ends the machine when it is told to by memory.
    let first = [
        0x80, 0x3e, 0x00, 0x80, 0x00, // cmpb $0, DATA
        0x74, 0xf9, // je to the start
        0xee, // out %al, %dx
    ];
    let guest = Guest::with_vcpus(&kvm, &first, false, 2).regs(|regs| regs.rdx = OFF.into());
    guest.memory.write(0x2000, &[0xee, 0xeb, 0xfe]);
    let mut regs = guest.vcpus[1].get_regs().unwrap();
    (regs.rip, regs.rdx) = (0x2000, COUNTED.into());
    guest.vcpus[1].set_regs(&regs).unwrap();
    let (told, end) = channel();
    let started = guest
        .try_start(move |end| told.send(end.clone()).unwrap())
        .unwrap();
    eventually("the second loops", || started.bus.bytes() == 1);

    let before = bound_signals(0);
    started.memory.write(support::DATA, &[1]);
    let off = MachineEnd::Requested {
        vcpu: 0,
        request: ExitRequest::Shutdown,
    };
    assert_eq!(end.recv_timeout(PATIENCE).unwrap(), off);
    thread::sleep(Duration::from_millis(20));
    bound_signals(before);
    // Nobody waits or kicks here: `try_wait` would, so the threads are counted instead.
    let threads = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let name = |task: std::io::Result<std::fs::DirEntry>| {
            std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default()
        };
        tasks
            .map(name)
            .filter(|name| name.starts_with("vcpu1"))
            .count()
    };
    eventually("the second has ended", || threads() == 0);
    assert_eq!(started.end(), off);
}
