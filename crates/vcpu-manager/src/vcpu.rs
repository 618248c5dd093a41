//! One vCPU's thread: in and out of the guest.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use kiln_device_api::{ExitRequest, VcpuBus, panic_message};
use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::VcpuFd;

use crate::counters::Kind;
use crate::end::{CrashCause, InstructionBytes, MachineEnd};
use crate::options::AfterFirstExit;
use crate::run_page::{Exit, Pio, RunPage};
use crate::shared::{NAP, Shared, Vcpu, lock, vcpu_id};

/// How often in a row KVM may say "not yet" before the thread rests.
const PATIENCE: u32 = 16;

/// Why a vCPU's loop was left.
enum Left {
    /// KVM_RUN came back with EINTR. It has completed what the last exit left unfinished, so this
    /// is the one point at which the vCPU's state is whole.
    Interrupted,
    /// KVM does not let the vCPU run: it waits for its start-up interrupt.
    NotStarted,
    /// HLT, with nothing that could wake the vCPU.
    Halted,
    Requested(ExitRequest),
    Crash(CrashCause, InstructionBytes),
}

impl From<CrashCause> for Left {
    fn from(cause: CrashCause) -> Self {
        Self::Crash(cause, InstructionBytes::default())
    }
}

/// The body of a vCPU's thread. The next turn of its loop decides what follows from what happened
/// in this one: an end is a changed goal, for this thread as for all others.
pub(crate) fn run_thread(shared: &Shared, index: usize) {
    let entered = shared.enter(index);
    let vcpu = &shared.vcpus[index];
    let mut can_run = true;
    let mut first_exit = shared.after_first_exit.as_ref().filter(|_| index == 0);
    while shared.wait_to_run(can_run) {
        let mut fd = lock(&vcpu.fd);
        let left = catch_unwind(AssertUnwindSafe(|| {
            run(vcpu, &mut fd, &*shared.bus, &mut first_exit)
        }))
        .unwrap_or_else(|payload| CrashCause::DevicePanic(panic_message(&*payload)).into());
        match left {
            Left::Interrupted => {}
            Left::NotStarted => shared.rest(),
            Left::Halted => {
                can_run = false;
                if shared.halt_one() {
                    shared.crash(index, &fd, CrashCause::Halted, InstructionBytes::default());
                }
            }
            Left::Requested(request) => {
                shared.finish(MachineEnd::Requested {
                    vcpu: vcpu_id(index),
                    request,
                });
            }
            Left::Crash(cause, known) => shared.crash(index, &fd, cause, known),
        }
    }
    drop(entered);
    // This thread may have ended the machine, with nobody waiting yet who would see to the others.
    while !shared.send_owed() {
        thread::sleep(NAP);
    }
    shared.after_last();
}

/// Runs the guest until there is something for the thread to decide. Allocates, locks and logs
/// nothing while the guest runs on, but for what is to be done after its first exit.
fn run(
    vcpu: &Vcpu,
    fd: &mut VcpuFd,
    bus: &dyn VcpuBus,
    first_exit: &mut Option<&AfterFirstExit>,
) -> Left {
    let page = &vcpu.page;
    let mut not_started = 0;
    loop {
        // What the exit was is read from the page, so the decoded form is left alone.
        if let Err(error) = fd.run().map(drop) {
            match error.errno() {
                libc::EINTR => {
                    vcpu.counters.count(Kind::Interrupted);
                    page.clear_exit_request();
                    return Left::Interrupted;
                }
                libc::EAGAIN => {
                    not_started += 1;
                    if not_started == PATIENCE {
                        return Left::NotStarted;
                    }
                    continue;
                }
                errno => return CrashCause::RunFailed(errno).into(),
            }
        }
        not_started = 0;
        let exit = page.exit();
        vcpu.counters.count(kind(&exit));
        if let ControlFlow::Break(left) = handle(page, bus, exit) {
            return left;
        }
        if let Some(then) = first_exit.take() {
            then(&|| page.exit_is_requested());
        }
    }
}

fn handle(page: &RunPage, bus: &dyn VcpuBus, exit: Exit) -> ControlFlow<Left> {
    let cause = match exit {
        Exit::Pio(pio) => return handle_pio(page, bus, &pio).map_break(Left::Requested),
        Exit::MmioWrite {
            address,
            data,
            length,
        } => {
            return bus
                .mmio_write(address, &data[..length])
                .map_break(Left::Requested);
        }
        Exit::MmioRead { address, length } => {
            let mut data = [0xff; 8];
            bus.mmio_read(address, &mut data[..length]);
            page.mmio_in(data);
            return ControlFlow::Continue(());
        }
        Exit::EndOfInterrupt(vector) => {
            bus.end_of_interrupt(vector);
            return ControlFlow::Continue(());
        }
        Exit::Msr => {
            page.refuse_msr();
            return ControlFlow::Continue(());
        }
        Exit::Nothing => return ControlFlow::Continue(()),
        Exit::Halt => return ControlFlow::Break(Left::Halted),
        Exit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN) => {
            return ControlFlow::Break(Left::Requested(ExitRequest::Shutdown));
        }
        Exit::SystemEvent(KVM_SYSTEM_EVENT_RESET) => {
            return ControlFlow::Break(Left::Requested(ExitRequest::Reset));
        }
        Exit::SystemEvent(KVM_SYSTEM_EVENT_CRASH) => {
            return ControlFlow::Break(Left::Requested(ExitRequest::GuestPanic));
        }
        Exit::InternalError => {
            let (cause, instruction) = page.internal_error();
            return ControlFlow::Break(Left::Crash(cause, instruction));
        }
        Exit::SystemEvent(kind) => CrashCause::SystemEvent { kind },
        Exit::Shutdown => CrashCause::TripleFault,
        Exit::FailedEntry => page.failed_entry(),
        Exit::MemoryFault => page.memory_fault(),
        Exit::Other(reason) => CrashCause::UnexpectedExit(reason),
    };
    ControlFlow::Break(cause.into())
}

/// Delivers a port access element by element, as the instruction would on hardware.
fn handle_pio(page: &RunPage, bus: &dyn VcpuBus, pio: &Pio) -> ControlFlow<ExitRequest> {
    for index in 0..pio.count {
        if pio.out {
            bus.pio_write(pio.port, &page.pio_out(pio, index)[..pio.size])?;
        } else {
            let mut data = [0xff; 4];
            bus.pio_read(pio.port, &mut data[..pio.size]);
            page.pio_in(pio, index, data);
        }
    }
    ControlFlow::Continue(())
}

fn kind(exit: &Exit) -> Kind {
    match exit {
        Exit::Pio(pio) if pio.out => Kind::PioOut,
        Exit::Pio(_) => Kind::PioIn,
        Exit::MmioRead { .. } => Kind::MmioRead,
        Exit::MmioWrite { .. } => Kind::MmioWrite,
        Exit::EndOfInterrupt(_) => Kind::EndOfInterrupt,
        _ => Kind::Other,
    }
}

/// What a spawned thread runs: it owns its share, so that the last one out frees it.
pub(crate) fn thread_body(shared: Arc<Shared>, index: usize) -> impl FnOnce() + Send + 'static {
    let span = tracing::Span::current();
    move || {
        let _in_span = span.entered();
        run_thread(&shared, index);
        drop(shared);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nobody accesses this bus.
    struct Unused;

    impl VcpuBus for Unused {
        fn pio_read(&self, _port: u16, _data: &mut [u8]) {}

        fn pio_write(&self, _port: u16, _data: &[u8]) -> ControlFlow<ExitRequest> {
            ControlFlow::Continue(())
        }

        fn mmio_read(&self, _address: u64, _data: &mut [u8]) {}

        fn mmio_write(&self, _address: u64, _data: &[u8]) -> ControlFlow<ExitRequest> {
            ControlFlow::Continue(())
        }
    }

    fn page() -> Option<RunPage> {
        let kvm = kvm_ioctls::Kvm::new()
            .inspect_err(|error| println!("skipped: /dev/kvm: {error}"))
            .ok()?;
        let vcpu = kvm.create_vm().unwrap().create_vcpu(0).unwrap();
        Some(RunPage::map(&vcpu).unwrap())
    }

    #[test]
    fn a_system_event_is_the_request_that_it_stands_for() {
        let Some(page) = page() else { return };
        for (event, expected) in [
            (KVM_SYSTEM_EVENT_SHUTDOWN, ExitRequest::Shutdown),
            (KVM_SYSTEM_EVENT_RESET, ExitRequest::Reset),
            (KVM_SYSTEM_EVENT_CRASH, ExitRequest::GuestPanic),
        ] {
            match handle(&page, &Unused, Exit::SystemEvent(event)) {
                ControlFlow::Break(Left::Requested(request)) => assert_eq!(request, expected),
                _ => panic!("system event {event} was no request"),
            }
        }
    }

    #[test]
    fn what_nobody_asked_for_is_a_crash() {
        let Some(page) = page() else { return };
        for (exit, expected) in [
            (Exit::SystemEvent(6), CrashCause::SystemEvent { kind: 6 }),
            (Exit::Shutdown, CrashCause::TripleFault),
            (Exit::Other(31), CrashCause::UnexpectedExit(31)),
        ] {
            match handle(&page, &Unused, exit) {
                ControlFlow::Break(Left::Crash(cause, _)) => assert_eq!(cause, expected),
                _ => panic!("{exit:?} was no crash"),
            }
        }
        assert!(handle(&page, &Unused, Exit::Nothing).is_continue());
    }

    #[test]
    fn a_panic_without_a_text_is_reported_too() {
        assert_eq!(panic_message(&"text"), "text");
        assert_eq!(panic_message(&"text".to_owned()), "text");
        assert_eq!(panic_message(&7), "no message");
    }
}
