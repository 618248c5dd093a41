//! What a handle tells while its machine lives: needs `/dev/kvm`, and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::io::{self, Read};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_tests::machines::{LONG, builder, end, start};
use kiln_tests::{guests, host};
use kiln_vmm::virtio::{
    ActivateError, Activation, ActiveQueue, EventSet, IoEvent, QueueError, QueueHandler, Registrar,
    SimpleDevice, Turn, VirtioDevice,
};
use kiln_vmm::{CrashCause, Events, HandleError, Transport, VmEvent, VmExit, VmHandle};
use vmm_sys_util::eventfd::EventFd;

#[test]
fn handles_and_streams_can_be_shared_between_threads() {
    fn shared<T: Send + Sync + 'static>() {}
    fn cloned<T: Clone>() {}
    shared::<VmHandle>();
    shared::<Events>();
    cloned::<VmHandle>();
}

#[test]
fn a_life_is_told_from_its_start_to_its_end() {
    let host = host!();
    let vm = builder(&host, guests::busy()).build().unwrap();
    let events = vm.events().unwrap();
    let handle = vm.start().unwrap();
    handle.pause().unwrap();
    handle.pause().unwrap();
    let late = handle.events().unwrap();
    handle.resume().unwrap();
    handle.resume().unwrap();
    handle.stop();
    let all: Vec<_> = events.collect();
    let stopped = VmEvent::Ended(VmExit::Stopped);
    assert_eq!(
        all,
        [
            VmEvent::Started,
            VmEvent::Paused,
            VmEvent::Resumed,
            stopped.clone()
        ]
    );
    let seen: Vec<_> = late.collect();
    assert_eq!(seen, [VmEvent::Resumed, stopped.clone()]);
    let after: Vec<_> = handle.events().unwrap().collect();
    assert_eq!(after, [stopped]);
}

#[test]
fn the_end_is_told_though_nobody_waits_and_is_known_then() {
    let host = host!();
    for (code, exit) in [
        (guests::power_off(), VmExit::Shutdown),
        (guests::acpi_reset(), VmExit::Reset),
    ] {
        let handle = start(&host, code);
        let events = handle.events().unwrap();
        assert_eq!(
            events.recv_timeout(LONG),
            Some(VmEvent::Ended(exit.clone()))
        );
        assert_eq!(handle.try_wait().unwrap(), Some(exit));
        assert!(events.is_over());
    }
}

#[test]
fn the_last_output_is_written_when_the_end_is_told() {
    let host = host!();
    let (mut output, writer) = io::pipe().unwrap();
    let console = kiln_vmm::Console::new(
        kiln_vmm::ConsoleInput::null(),
        kiln_vmm::ConsoleOutput::fd(writer.into()),
    );
    let vm = builder(&host, guests::hello())
        .serial(console)
        .build()
        .unwrap();
    let events = vm.events().unwrap();
    let _handle = vm.start().unwrap();
    let last = events.last();
    assert_eq!(last, Some(VmEvent::Ended(VmExit::Shutdown)));
    let mut text = [0; 6];
    output.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello\n");
}

#[test]
fn a_guest_that_panics_is_told_before_its_machine_ends() {
    let host = host!();
    let vm = builder(&host, guests::panic()).build().unwrap();
    let events = vm.events().unwrap();
    let _handle = vm.start().unwrap();
    let all: Vec<_> = events.collect();
    assert_eq!(
        all,
        [
            VmEvent::Started,
            VmEvent::GuestPanic,
            VmEvent::Ended(VmExit::GuestPanic)
        ]
    );
}

#[test]
fn a_crash_is_told_with_its_cause() {
    let host = host!();
    let vm = builder(&host, guests::triple_fault()).build().unwrap();
    let events = vm.events().unwrap();
    let _handle = vm.start().unwrap();
    match events.last() {
        Some(VmEvent::Ended(VmExit::Crash(crash))) => {
            assert_eq!(crash.cause, CrashCause::TripleFault);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn streams_of_a_machine_that_never_starts_or_is_dropped_end() {
    let host = host!();
    let vm = builder(&host, guests::busy()).build().unwrap();
    let events = vm.events().unwrap();
    drop(vm);
    assert_eq!(events.recv(), None);

    let handle = start(&host, guests::busy());
    let events = handle.events().unwrap();
    drop(handle);
    assert_eq!(events.recv(), Some(VmEvent::Ended(VmExit::Stopped)));
    assert_eq!(events.recv(), None);
}

/// Drops its machine on the I/O thread, once it is told to by an event.
struct DropsItsMachine {
    told: EventFd,
    handle: Arc<Mutex<Option<VmHandle>>>,
}

impl QueueHandler for DropsItsMachine {
    fn start(&mut self, _features: u64, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        registrar.add(&self.told, Self::FIRST_TOKEN, EventSet::IN)
    }
    fn ready(&mut self, _event: IoEvent) -> Option<u16> {
        let _ = self.told.read();
        if let Some(handle) = self.handle.lock().unwrap().take() {
            assert!(matches!(handle.wait(), Err(HandleError::OnOwnThread)));
            assert!(matches!(handle.pause(), Err(HandleError::OnOwnThread)));
            handle.stop();
        }
        None
    }
    fn process(&mut self, _: &mut Turn<'_>, _: &mut Registrar<'_, '_>) -> Result<(), QueueError> {
        Ok(())
    }
}

#[test]
fn a_device_can_drop_the_last_handle_on_the_io_thread() {
    let host = host!();
    for _ in 0..10 {
        let told = EventFd::new(0).unwrap();
        let tell = told.try_clone().unwrap();
        let place = Arc::new(Mutex::new(None));
        let device = DropsItsMachine {
            told,
            handle: Arc::clone(&place),
        };
        let vm = builder(&host, guests::virtio_driver_ok())
            .virtio_device_on(
                Transport::Mmio,
                "drops",
                SimpleDevice::new(42, [16], device),
            )
            .build()
            .unwrap();
        let events = vm.events().unwrap();
        let handle = vm.start().unwrap();
        while handle.exit_counts()[0].pio_out == 0 {
            std::thread::yield_now();
        }
        *place.lock().unwrap() = Some(handle);
        tell.write(1).unwrap();
        assert_eq!(events.recv_timeout(LONG), Some(VmEvent::Started));
        let ended = events.recv_timeout(LONG);
        assert_eq!(ended, Some(VmEvent::Ended(VmExit::Stopped)));
        let gone = (0..6000).any(|_| {
            std::thread::sleep(Duration::from_millis(1));
            Arc::strong_count(&place) == 1
        });
        assert!(gone, "the machine still holds its device");
    }
}

/// A device that panics whenever its queues are taken from it.
struct PanicsAtRest;

impl VirtioDevice for PanicsAtRest {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[16]
    }
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
    fn activate(&mut self, _activation: Activation) -> Result<(), ActivateError> {
        Ok(())
    }
    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        panic!("no rest for this device")
    }
}

#[test]
fn a_device_that_panics_at_rest_ends_its_machine_and_not_the_thread_that_pauses() {
    let host = host!();
    for pause in [true, false] {
        let vm = builder(&host, guests::virtio_driver_ok())
            .virtio_device_on(Transport::Mmio, "panics", PanicsAtRest)
            .build()
            .unwrap();
        let events = vm.events().unwrap();
        let handle = vm.start().unwrap();
        while handle.exit_counts()[0].pio_out == 0 {
            std::thread::yield_now();
        }
        if pause {
            assert!(handle.pause().is_err());
        } else {
            handle.stop();
        }
        let expected = "a device panicked: no rest for this device".to_owned();
        assert_eq!(end(&handle), VmExit::DeviceFailure(expected.clone()));
        let error = VmEvent::DeviceError {
            device: "a device".to_owned(),
            reason: expected,
        };
        assert!(events.into_iter().any(|event| event == error));
    }
}

#[test]
fn a_device_that_gives_up_on_its_driver_is_told_once() {
    let host = host!();
    let vm = builder(&host, guests::virtio_bad_queue())
        .virtio_device_on(Transport::Mmio, "patient", PanicsAtRest)
        .build()
        .unwrap();
    let events = vm.events().unwrap();
    let handle = vm.start().unwrap();
    while handle.exit_counts()[0].pio_out < 100 {
        std::thread::yield_now();
    }
    handle.stop();
    let told: Vec<_> = events.collect();
    let error = VmEvent::DeviceError {
        device: "patient".to_owned(),
        reason: "queue 0: the available ring has no address".to_owned(),
    };
    let ended = VmEvent::Ended(VmExit::Stopped);
    assert_eq!(told, [VmEvent::Started, error, ended]);
}
