//! The one signal, and all the others.

use std::mem::MaybeUninit;
use std::ops::ControlFlow;
use std::ptr::null_mut;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use kiln_device_api::{ExitRequest, VcpuBus};
use kiln_vcpu_manager::{EndHooks, Error, KickSignal, VcpuManager, VcpuOptions};

use crate::support::*;

/// A counting guest that is kicked by `SIGRTMIN + offset`.
fn guest_kicked_by(offset: u8) -> Option<Guest> {
    let kvm = kvm()?;
    let mut guest = Guest::new(&kvm, &[0x66, 0xed, 0xeb, 0xfc], true);
    guest.options.kick_signal = KickSignal::real_time(offset).unwrap();
    Some(guest.regs(|regs| regs.rdx = TICKET.into()))
}

fn set_disposition(signal: i32, handler: libc::sighandler_t) {
    // SAFETY: a zeroed action with a handler is valid; the handler is SIG_IGN or does nothing.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = handler;
        assert_eq!(libc::sigaction(signal, &raw const action, null_mut()), 0);
    }
}

extern "C" fn foreign(_signal: libc::c_int) {}

/// The signals that the calling thread blocks.
fn blocked() -> Vec<i32> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: only queries; the set is written before it is read.
    let set = unsafe {
        libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), set.as_mut_ptr());
        set.assume_init()
    };
    // SAFETY: `set` is valid.
    (1..libc::SIGRTMAX())
        .filter(|signal| unsafe { libc::sigismember(&set, *signal) } == 1)
        .collect()
}

#[test]
fn a_signal_that_is_handled_already_is_refused() {
    let Some(guest) = guest_kicked_by(9) else {
        return;
    };
    let signal = KickSignal::real_time(9).unwrap().number();
    set_disposition(
        signal,
        foreign as extern "C" fn(libc::c_int) as libc::sighandler_t,
    );
    let error = guest.try_start(|_| {}).err().unwrap();
    assert!(matches!(error, Error::SignalTaken { offset: 9, .. }));
    let text = error.to_string();
    assert!(
        text.contains("SIGRTMIN+9") && text.contains("kick_signal"),
        "{text}"
    );
}

#[test]
fn a_signal_that_is_ignored_is_refused() {
    let Some(guest) = guest_kicked_by(10) else {
        return;
    };
    set_disposition(KickSignal::real_time(10).unwrap().number(), libc::SIG_IGN);
    let result = guest.try_start(|_| {});
    assert!(matches!(result, Err(Error::SignalTaken { offset: 10, .. })));
}

#[test]
fn a_number_beyond_the_real_time_signals_is_refused() {
    let last = u8::try_from(libc::SIGRTMAX() - libc::SIGRTMIN()).unwrap();
    assert!(KickSignal::real_time(last).is_ok());
    assert!(matches!(
        KickSignal::real_time(last + 1),
        Err(Error::NoSuchSignal { .. })
    ));
}

#[test]
fn another_signal_can_be_chosen() {
    let Some(guest) = guest_kicked_by(11) else {
        return;
    };
    let started = guest.start();
    eventually("it runs", || started.bus.tickets() > 10);
    started.manager.pause().unwrap();
    let stands = started.bus.tickets();
    started.manager.resume().unwrap();
    eventually("it goes on", || started.bus.tickets() > stands);
}

/// The name of a thread, and the signals that it blocks.
type NameAndBlocked = (String, Vec<i32>);

/// Says that of the vCPU's thread at the first write.
struct Tells(Mutex<Option<SyncSender<NameAndBlocked>>>);

impl VcpuBus for Tells {
    fn pio_read(&self, _port: u16, _data: &mut [u8]) {}

    fn pio_write(&self, _port: u16, _data: &[u8]) -> ControlFlow<ExitRequest> {
        if let Some(sender) = self.0.lock().unwrap().take() {
            let name = std::thread::current().name().unwrap_or_default().to_owned();
            sender.send((name, blocked())).unwrap();
        }
        ControlFlow::Continue(())
    }

    fn mmio_read(&self, _address: u64, _data: &mut [u8]) {}

    fn mmio_write(&self, _address: u64, _data: &[u8]) -> ControlFlow<ExitRequest> {
        ControlFlow::Continue(())
    }
}

#[test]
fn vcpu_threads_leave_all_other_signals_to_the_embedder() {
    let Some(kvm) = kvm() else { return };
    // out %al, %dx; jmp: it writes for ever, so that a kick has something to break into.
    let Guest {
        vm: _vm,
        vcpus,
        memory: _memory,
        ..
    } = Guest::new(&kvm, &[0xee, 0xeb, 0xfd], true);
    let (sender, receive) = sync_channel(1);
    let kick = KickSignal::default().number();
    // The embedder's own mask has the kick blocked, and nothing else.
    // SAFETY: the set is made before it is used; only this thread's mask changes.
    unsafe {
        let mut set = MaybeUninit::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), kick);
        libc::pthread_sigmask(libc::SIG_SETMASK, set.as_ptr(), null_mut());
    }
    let options = VcpuOptions {
        thread_name: "guest-\0".to_owned(),
        ..VcpuOptions::default()
    };
    let bus = Arc::new(Tells(Mutex::new(Some(sender))));
    let manager = VcpuManager::start(vcpus, bus, options, EndHooks::default()).unwrap();
    assert_eq!(blocked(), [kick], "the starter's mask is as it was");
    let (name, blocked) = receive.recv_timeout(PATIENCE).unwrap();
    assert_eq!(name, "guest-0");
    for signal in [
        libc::SIGTERM,
        libc::SIGINT,
        libc::SIGHUP,
        libc::SIGCHLD,
        libc::SIGUSR1,
    ] {
        assert!(blocked.contains(&signal), "{signal}");
    }
    for signal in [kick, libc::SIGSEGV, libc::SIGBUS, libc::SIGABRT] {
        assert!(!blocked.contains(&signal), "{signal}");
    }
    manager.pause().unwrap();
    manager.stop();
}
