//! Pause, resume and stop, whatever the guest is at.

use std::ops::ControlFlow;
use std::sync::mpsc::{SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread;
use std::time::Instant;

use kiln_device_api::{ExitRequest, VcpuBus};
use kiln_vcpu_manager::{EndHooks, Error, MachineEnd, VcpuManager, VcpuOptions};
use kvm_bindings::kvm_regs;
use kvm_ioctls::Kvm;

use crate::support::*;

const START: u64 = CODE as u64;

/// Writes 1, 2, 3, ... to a port.
const COUNT_OUT: [u8; 9] = [
    0x66, 0x41, // inc %ecx
    0x66, 0x89, 0xc8, // mov %ecx, %eax
    0x66, 0xef, // out %eax, %dx
    0xeb, 0xf7, // jmp to the start
];

fn count_out(kvm: &Kvm) -> Guest {
    Guest::new(kvm, &COUNT_OUT, true).regs(|regs| regs.rdx = SEQUENCE.into())
}

/// Pauses `rounds` times, each time after `seen` has gone on, and checks each state.
fn pause_often(
    started: &Started,
    rounds: u32,
    seen: impl Fn() -> u32,
    check: impl Fn(kvm_regs, u32),
) {
    for _ in 0..rounds {
        let before = seen();
        eventually("the guest goes on", || seen() > before);
        started.manager.pause().unwrap();
        let paused_at = seen();
        check(started.regs(), paused_at);
        thread::yield_now();
        assert_eq!(seen(), paused_at, "a paused guest ran");
        started.manager.resume().unwrap();
    }
    assert_eq!(
        started.manager.try_wait(),
        None,
        "the guest saw a wrong number"
    );
}

#[test]
fn no_port_write_is_lost_or_doubled_by_100_pauses() {
    let Some(kvm) = kvm() else { return };
    let started = count_out(&kvm).start();
    pause_often(
        &started,
        100,
        || started.bus.sequence(),
        |regs, seen| {
            let done = match regs.rip - START {
                0 | 7 => regs.rcx,
                2 | 5 => regs.rcx - 1,
                other => panic!("rip {other:#x}"),
            };
            assert_eq!(
                u64::from(seen),
                done,
                "the guest's count, at rip {:#x}",
                regs.rip
            );
        },
    );
}

#[test]
fn no_port_read_is_lost_or_doubled_by_100_pauses() {
    let Some(kvm) = kvm() else { return };
    let code = [
        0x66, 0xed, // in %dx, %eax
        0x66, 0x39, 0xd8, // cmp %ebx, %eax
        0x75, 0x04, // jne to the power-off
        0x66, 0x43, // inc %ebx
        0xeb, 0xf5, // jmp to the start
    ];
    let code = [&code[..], &POWER_OFF].concat();
    let started = Guest::new(&kvm, &code, true)
        .regs(|regs| regs.rdx = TICKET.into())
        .start();
    pause_often(
        &started,
        100,
        || started.bus.tickets(),
        |regs, seen| {
            let done = match regs.rip - START {
                0 | 9 => regs.rbx,
                2 | 5 | 7 => regs.rbx + 1,
                other => panic!("rip {other:#x}"),
            };
            assert_eq!(
                u64::from(seen),
                done,
                "the guest's count, at rip {:#x}",
                regs.rip
            );
        },
    );
}

#[test]
fn no_pause_falls_between_the_read_and_the_write_of_one_mmio_instruction() {
    let Some(kvm) = kvm() else { return };
    // mov %cx, %es; incl %es:0x100; jmp
    let code = [0x8e, 0xc1, 0x26, 0x66, 0xff, 0x06, 0x00, 0x01, 0xeb, 0xf8];
    let started = Guest::new(&kvm, &code, true)
        .regs(|regs| regs.rcx = MMIO >> 4)
        .start();
    pause_often(
        &started,
        100,
        || started.bus.counted_mmio().1,
        |_, writes| {
            assert_eq!(started.bus.counted_mmio(), (writes, writes));
        },
    );
}

/// Runs a string instruction of 0x4000 bytes again and again, and checks at 50 pauses that as many
/// elements are done as the registers say.
fn pause_in_a_string(instruction: u8, port: u16, seen: impl Fn(&Recorder) -> u32) {
    const LENGTH: u64 = 0x4000;
    let Some(kvm) = kvm() else { return };
    let mut code = [
        0xb9, 0x00, 0x40, // mov $0x4000, %cx
        0xf3, 0x00, // rep, and the instruction
        0x66, 0x43, // inc %ebx
        0xbf, 0x00, 0x80, // mov $DATA, %di
        0xeb, 0xf4, // jmp to the start
    ];
    code[4] = instruction;
    let guest = Guest::new(&kvm, &code, true).regs(|regs| {
        regs.rdx = port.into();
        regs.rsi = DATA as u64;
        regs.rdi = DATA as u64;
    });
    let started = guest.start();
    let halfway = Mutex::new(0);
    pause_often(
        &started,
        50,
        || seen(&started.bus),
        |regs, seen| {
            let in_this_round = match regs.rip - START {
                3 | 5 => LENGTH - regs.rcx,
                _ => 0,
            };
            assert_eq!(u64::from(seen), regs.rbx * LENGTH + in_this_round);
            *halfway.lock().unwrap() += u32::from((1..LENGTH).contains(&in_this_round));
        },
    );
    assert_ne!(*halfway.lock().unwrap(), 0, "no pause came in the middle");
}

#[test]
fn a_pause_amid_a_string_write_leaves_no_element_half_done() {
    pause_in_a_string(0x6e, COUNTED, Recorder::bytes); // rep outsb
}

#[test]
fn a_pause_amid_a_string_read_leaves_no_element_half_done() {
    pause_in_a_string(0x6c, TICKET, Recorder::tickets); // rep insb
}

#[test]
fn a_machine_started_paused_runs_nothing_until_it_is_resumed() {
    let Some(kvm) = kvm() else { return };
    let started = Guest::new(&kvm, &POWER_OFF, true).paused().start();
    assert_eq!(started.manager.exit_counts()[0].total(), 0);
    let mut regs = started.regs();
    assert_eq!(regs.rip, START);
    // Skips the `mov`, so the write goes elsewhere.
    started.memory.write(CODE + 4, &POWER_OFF);
    regs.rip = START + 3;
    regs.rdx = RECORD.into();
    started
        .manager
        .with_vcpu(0, |fd| fd.set_regs(&regs).unwrap())
        .unwrap();
    started.manager.pause().unwrap();
    started.manager.resume().unwrap();
    assert_eq!(started.end(), powered_off());
    assert_eq!(started.bus.accesses(), [Access::Out(RECORD, vec![0])]);
}

#[test]
fn a_running_vcpu_is_not_given_out() {
    let Some(kvm) = kvm() else { return };
    let started = count_out(&kvm).start();
    started.manager.resume().unwrap();
    let access = started.manager.with_vcpu(0, |_| ());
    assert!(matches!(access, Err(Error::NotParked { vcpu: 0 })));
}

#[test]
fn no_kick_is_lost_however_fast_they_follow() {
    let Some(kvm) = kvm() else { return };
    // A guest that never exits by itself: a lost kick would leave the pause waiting for ever.
    let started = then(&kvm, &[0xeb, 0xfe]).start();
    eventually("it loops", || started.bus.bytes() == 1);
    for round in 0..5000 {
        started.manager.pause().unwrap();
        started.manager.resume().unwrap();
        // So that the next kick meets the thread at ever another step of its way in.
        for _ in 0..round % 500 {
            std::hint::spin_loop();
        }
    }
    started.manager.pause().unwrap();
    assert_eq!(started.regs().rip, START + 1);
}

/// Starts this guest, lets it get to where it is to be stopped, and stops it.
fn stop(what: &str, guest: Guest, ready: impl Fn(&Started) -> bool) {
    let started = guest.start();
    eventually(what, || ready(&started));
    let start = Instant::now();
    started.manager.stop();
    println!("stopped amid {what} in {:?}", start.elapsed());
    assert_eq!(started.end(), MachineEnd::Stopped);
    started.manager.stop();
    assert_eq!(started.end(), MachineEnd::Stopped);
}

/// `out %al, %dx` to the counted port, to show that the code after it was reached.
fn then(kvm: &Kvm, code: &[u8]) -> Guest {
    let code = [&[0xee][..], code].concat();
    Guest::new(kvm, &code, true).regs(|regs| regs.rdx = COUNTED.into())
}

#[test]
fn a_busy_loop_is_stopped() {
    let Some(kvm) = kvm() else { return };
    let guest = then(&kvm, &[0xeb, 0xfe]);
    stop("a busy loop", guest, |started| started.bus.bytes() == 1);
}

#[test]
fn a_halt_without_interrupts_is_stopped() {
    let Some(kvm) = kvm() else { return };
    let guest = then(&kvm, &[0xfa, 0xf4]);
    stop("a halt", guest, |started| started.bus.bytes() == 1);
}

#[test]
fn a_storm_of_exits_is_stopped() {
    let Some(kvm) = kvm() else { return };
    stop("a storm of exits", count_out(&kvm), |started| {
        started.bus.sequence() > 100
    });
}

#[test]
fn a_storm_of_string_exits_is_stopped() {
    let Some(kvm) = kvm() else { return };
    // mov $DATA, %di; mov $0x4000, %cx; rep insb; jmp
    let guest = then(
        &kvm,
        &[0xbf, 0x00, 0x80, 0xb9, 0x00, 0x40, 0xf3, 0x6c, 0xeb, 0xf6],
    );
    stop("a storm of string exits", guest, |started| {
        started.manager.exit_counts()[0].pio_in > 3
    });
}

#[test]
fn a_paused_machine_is_stopped() {
    let Some(kvm) = kvm() else { return };
    stop("a pause", count_out(&kvm).paused(), |_| true);
}

#[test]
fn a_machine_is_stopped_right_after_its_start() {
    let Some(kvm) = kvm() else { return };
    for _ in 0..20 {
        stop("the start", count_out(&kvm), |_| true);
    }
}

#[test]
fn a_manager_can_be_dropped_at_any_moment() {
    let Some(kvm) = kvm() else { return };
    drop(count_out(&kvm).start());
    drop(count_out(&kvm).paused().start());
    let running = count_out(&kvm).start();
    eventually("it runs", || running.bus.sequence() > 10);
    drop(running);
    let paused = count_out(&kvm).start();
    paused.manager.pause().unwrap();
    drop(paused);
    let ended = Guest::new(&kvm, &POWER_OFF, true).start();
    assert_eq!(ended.end(), powered_off());
    drop(ended);
}

#[test]
fn two_machines_are_paused_and_stopped_apart() {
    let Some(kvm) = kvm() else { return };
    let (one, two) = (count_out(&kvm).start(), count_out(&kvm).start());
    one.manager.pause().unwrap();
    let (stands, goes) = (one.bus.sequence(), two.bus.sequence());
    eventually("the second goes on", || two.bus.sequence() > goes + 10);
    assert_eq!(one.bus.sequence(), stands);
    two.manager.stop();
    one.manager.resume().unwrap();
    eventually("the first goes on", || one.bus.sequence() > stands);
    one.manager.stop();
}

#[test]
fn many_callers_at_once_get_an_answer_each() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::with_vcpus(&kvm, &[0x66, 0xed, 0xeb, 0xfc], false, 3);
    let started = guest.start();
    let manager = &started.manager;
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while manager.pause().is_ok() {
                    match manager.with_vcpu(2, |fd| fd.get_regs().is_ok()) {
                        Ok(read) => assert!(read),
                        // Another caller resumed, or stopped, between the two.
                        Err(error) => assert!(matches!(error, Error::NotParked { vcpu: 2 })),
                    }
                    if manager.resume().is_err() {
                        break;
                    }
                }
                assert_eq!(manager.wait(), MachineEnd::Stopped);
            });
        }
        eventually("they pause and resume", || {
            manager
                .exit_counts()
                .iter()
                .all(|counts| counts.interrupted > 30)
        });
        scope.spawn(|| manager.stop());
        scope.spawn(|| manager.stop());
    });
    assert_eq!(started.end(), MachineEnd::Stopped);
}

#[test]
fn ends_that_come_from_both_sides_at_once_agree() {
    let Some(kvm) = kvm() else { return };
    for _ in 0..50 {
        // Threads end by themselves while they are kicked from outside.
        let guest = Guest::with_vcpus(&kvm, &POWER_OFF, false, 2);
        let started = guest.start();
        thread::scope(|scope| {
            scope.spawn(|| {
                while started.manager.pause().is_ok() && started.manager.resume().is_ok() {}
            });
            thread::yield_now();
            started.manager.stop();
        });
        let end = started.end();
        assert_eq!(started.manager.wait(), end);
        assert!(!matches!(end, MachineEnd::Crash(_)), "{end:?}");
    }
}

/// A bus that calls back into its own manager.
struct CallsBack {
    manager: OnceLock<Weak<VcpuManager>>,
    answers: SyncSender<String>,
}

impl VcpuBus for CallsBack {
    fn pio_read(&self, _port: u16, _data: &mut [u8]) {}

    fn pio_write(&self, _port: u16, _data: &[u8]) -> ControlFlow<ExitRequest> {
        let Some(manager) = self.manager.get().and_then(Weak::upgrade) else {
            return ControlFlow::Continue(());
        };
        let say = |answer: Result<(), Error>| {
            let answer = answer
                .err()
                .map_or("done".to_owned(), |error| error.to_string());
            self.answers.send(answer).unwrap();
        };
        say(manager.pause());
        say(manager.resume());
        say(manager.with_vcpu(0, |_| ()));
        manager.stop();
        say(Ok(()));
        // Where the test has let go of it, the manager is dropped here, on the vCPU's own thread.
        ControlFlow::Continue(())
    }

    fn mmio_read(&self, _address: u64, _data: &mut [u8]) {}

    fn mmio_write(&self, _address: u64, _data: &[u8]) -> ControlFlow<ExitRequest> {
        ControlFlow::Continue(())
    }
}

#[test]
fn a_device_that_calls_back_waits_for_nothing() {
    let Some(kvm) = kvm() else { return };
    let Guest {
        vm: _vm,
        vcpus,
        memory: _memory,
        ..
    } = then(&kvm, &[0xeb, 0xfd]);
    let (answers, receive) = sync_channel(8);
    let bus = Arc::new(CallsBack {
        manager: OnceLock::new(),
        answers,
    });
    let (ended, end) = sync_channel(1);
    let options = VcpuOptions {
        start_paused: true,
        ..VcpuOptions::default()
    };
    let on_end = move |end: &MachineEnd| ended.send(end.clone()).unwrap();
    let hooks = EndHooks {
        on_end: Box::new(on_end),
        ..EndHooks::default()
    };
    let manager = VcpuManager::start(vcpus, Arc::clone(&bus) as _, options, hooks).unwrap();
    let manager = Arc::new(manager);
    bus.manager.set(Arc::downgrade(&manager)).unwrap();
    manager.resume().unwrap();
    let own = "pause or access vCPUs from the thread of vCPU 0, which would wait for itself";
    for expected in [own, own, own, "done"] {
        assert_eq!(receive.recv_timeout(PATIENCE).unwrap(), expected);
    }
    assert_eq!(end.recv_timeout(PATIENCE).unwrap(), MachineEnd::Stopped);
    assert_eq!(manager.wait_timeout(PATIENCE), Some(MachineEnd::Stopped));
}

#[test]
fn the_machine_is_at_rest_when_its_hook_is_called_and_stop_waits_for_the_hook() {
    let Some(kvm) = kvm() else { return };
    let Guest { vcpus, memory, .. } = Guest::new(&kvm, &[0xeb, 0xfe], true);
    let slot: Arc<OnceLock<Weak<VcpuManager>>> = Arc::default();
    let (told, tell) = (Arc::clone(&slot), Arc::new(Mutex::new(None)));
    let seen = Arc::clone(&tell);
    let hooks = EndHooks {
        on_rest: Box::new(move |end| {
            let manager = told.get().and_then(Weak::upgrade);
            let known = manager.and_then(|manager| manager.try_wait());
            thread::sleep(std::time::Duration::from_millis(20));
            *tell.lock().unwrap() = Some((end.clone(), known));
        }),
        ..EndHooks::default()
    };
    let bus = Arc::new(Recorder::default());
    let manager = VcpuManager::start(vcpus, bus, VcpuOptions::default(), hooks).unwrap();
    let manager = Arc::new(manager);
    slot.set(Arc::downgrade(&manager)).unwrap();
    manager.stop();
    let seen = seen.lock().unwrap().take();
    assert_eq!(seen, Some((MachineEnd::Stopped, Some(MachineEnd::Stopped))));
    drop(memory);
}

#[test]
fn something_is_done_once_after_the_first_exit() {
    let Some(kvm) = kvm() else { return };
    // Two port writes, and the end.
    let code = [&[0xba, RECORD as u8, 0x00, 0xee, 0xee][..], &POWER_OFF].concat();
    let mut guest = Guest::new(&kvm, &code, true);
    let (sender, done) = channel();
    let sender = Mutex::new(sender);
    guest.options.after_first_exit = Some(Arc::new(move |is_wanted| {
        let name = thread::current().name().unwrap().to_owned();
        sender.lock().unwrap().send((name, is_wanted())).unwrap();
    }));
    let name = format!("{}0", guest.options.thread_name);
    let started = guest.start();
    assert_eq!(started.end(), powered_off());
    assert_eq!(started.bus.accesses().len(), 2);
    assert_eq!(done.try_iter().collect::<Vec<_>>(), [(name, false)]);
}
