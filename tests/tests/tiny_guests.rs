//! The library with bare-metal guests of a few bytes: needs `/dev/kvm`, and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::io::Write;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_tests::machines::{
    assert_belongings, belongings, builder, end, is_alone, settled_belongings, start,
};
use kiln_tests::stubborn::STUBBORN;
use kiln_tests::{guests, host};
use kiln_vmm::{
    BusDevice, BusDeviceMut, Console, ConsoleInput, ConsoleOutput, CrashCause, Execution,
    ExitRequest, MemorySize, VmBuilder, VmExit, VmHandle, VmState,
};

/// Collects what a guest prints.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }

    fn wait_for(&self, text: &str) {
        for _ in 0..6000 {
            if self.text().contains(text) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("no `{text}` in `{}`", self.text());
    }
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn each_end_of_a_guest_is_told_apart() {
    let host = host!();
    assert_eq!(end(&start(&host, guests::power_off())), VmExit::Shutdown);
    assert_eq!(end(&start(&host, guests::acpi_reset())), VmExit::Reset);
    assert_eq!(end(&start(&host, guests::i8042_reset())), VmExit::Reset);
    assert_eq!(end(&start(&host, guests::panic())), VmExit::GuestPanic);
    match end(&start(&host, guests::triple_fault())) {
        VmExit::Crash(crash) => assert_eq!(crash.cause, CrashCause::TripleFault),
        other => panic!("{other}"),
    }
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_named() {
    let host = host!();
    let exit = end(&start(&host, guests::not_emulated()));
    if host.execution().unwrap() == Execution::Hardware {
        assert_eq!(exit, VmExit::Shutdown);
        return;
    }
    match exit {
        VmExit::Crash(crash) => {
            assert_eq!(crash.cause, CrashCause::EmulationFailure);
            assert_eq!(crash.rip, Some(0x10_0000));
            let instruction = crash.instruction.as_slice();
            assert_eq!(instruction[..4], guests::not_emulated()[..4]);
        }
        other => panic!("{other}"),
    }
}

#[test]
fn what_a_guest_prints_is_there_when_it_has_ended() {
    let host = host!();
    let output = Output::default();
    let serial = Console::writer(output.clone());
    let vm = builder(&host, guests::hello())
        .serial(serial)
        .build()
        .unwrap();
    assert_eq!(end(&vm.start().unwrap()), VmExit::Shutdown);
    assert_eq!(output.text(), "hello\n");
}

#[test]
fn what_is_typed_reaches_the_guest() {
    let host = host!();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let output = Output::default();
    let serial = Console::new(
        ConsoleInput::fd(OwnedFd::from(reader)),
        ConsoleOutput::writer(output.clone()),
    );
    let vm = builder(&host, guests::echo())
        .serial(serial)
        .build()
        .unwrap();
    let handle = vm.start().unwrap();
    let line = "a line that is longer than the 64 bytes of the port's receive buffer, by far\n";
    writer.write_all(line.as_bytes()).unwrap();
    assert_eq!(end(&handle), VmExit::Shutdown);
    assert_eq!(output.text(), line);
}

#[test]
fn any_machine_is_stopped_soon_whatever_it_is_at() {
    let host = host!();
    for (name, start) in STUBBORN {
        let (handle, _guard) = start(&host);
        assert_eq!(handle.try_wait().unwrap(), None, "{name}");
        assert_eq!(handle.state(), VmState::Running, "{name}");
        let since = std::time::Instant::now();
        handle.stop();
        // 100 ms is what a stop takes at most; the rest is for a test host that is busy.
        assert!(since.elapsed() < Duration::from_secs(30), "{name}");
        assert_eq!(end(&handle), VmExit::Stopped, "{name}");
        assert_eq!(handle.state(), VmState::Ended, "{name}");
    }
}

#[test]
fn a_stop_does_not_wait_for_a_backend_that_does_not_return_and_a_wait_does() {
    let host = host!();
    let (_, start) = STUBBORN
        .into_iter()
        .find(|(name, _)| name.contains("slow"))
        .unwrap();
    // On a busy host the backend may return before the stop looks.
    let seen = (0..20).any(|_| {
        let (handle, _guard) = start(&host);
        handle.stop();
        let was_busy = handle.try_wait().unwrap().is_none();
        assert_eq!(handle.wait().unwrap(), VmExit::Stopped);
        was_busy
    });
    assert!(seen, "every stop waited for its backend");
}

#[test]
fn a_paused_guest_makes_no_exits_until_it_is_resumed() {
    let host = host!();
    let handle = start(&host, guests::exit_storm());
    for _ in 0..10 {
        handle.pause().unwrap();
        assert_eq!(handle.state(), VmState::Paused);
        let before = handle.exit_counts()[0].pio_out;
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(handle.exit_counts()[0].pio_out, before);
        handle.resume().unwrap();
        while handle.exit_counts()[0].pio_out == before {
            std::thread::yield_now();
        }
    }
    handle.stop();
    assert!(handle.pause().is_err());
    assert!(handle.resume().is_err());
}

#[test]
fn the_power_button_reaches_the_guest_as_an_interrupt() {
    let host = host!();
    let output = Output::default();
    let serial = Console::writer(output.clone());
    let vm = builder(&host, guests::wait_for_power_button())
        .serial(serial)
        .build()
        .unwrap();
    let handle = vm.start().unwrap();
    output.wait_for("w");
    std::thread::sleep(Duration::from_millis(20));
    handle.power_button();
    assert_eq!(end(&handle), VmExit::Shutdown);
    assert_eq!(output.text(), "w1");
}

#[test]
fn the_second_vcpu_waits_until_the_guest_starts_it() {
    let host = host!();
    let output = Output::default();
    let serial = Console::writer(output.clone());
    let vm = builder(&host, guests::start_second_vcpu())
        .vcpus(2)
        .serial(serial)
        .build()
        .unwrap();
    let handle = vm.start().unwrap();
    assert_eq!(end(&handle), VmExit::Shutdown);
    assert_eq!(output.text(), "1");
    assert_eq!(handle.exit_counts().len(), 2);
}

#[derive(Default)]
struct Recorder {
    written: Vec<(u64, Vec<u8>)>,
    answer: u8,
}

impl BusDeviceMut for Recorder {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(self.answer);
    }
    fn write(&mut self, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        self.written.push((offset, data.to_vec()));
        ControlFlow::Continue(())
    }
}

#[test]
fn a_device_of_ones_own_answers_on_ports_and_in_memory() {
    let host = host!();
    let device = Arc::new(Mutex::new(Recorder {
        answer: 0x11,
        ..Recorder::default()
    }));
    let vm = builder(&host, guests::write_port())
        .pio_device(
            "recorder",
            0xb0,
            2,
            Arc::clone(&device) as Arc<dyn BusDevice>,
        )
        .build()
        .unwrap();
    assert_eq!(end(&vm.start().unwrap()), VmExit::Shutdown);
    assert_eq!(device.lock().unwrap().written, [(0, vec![0xef, 0xbe])]);

    let vm = builder(&host, guests::mmio_increment())
        .mmio_device(
            "recorder",
            0xe000_0000,
            16,
            Arc::clone(&device) as Arc<dyn BusDevice>,
        )
        .build()
        .unwrap();
    assert_eq!(end(&vm.start().unwrap()), VmExit::Shutdown);
    let written = &device.lock().unwrap().written;
    assert_eq!(written[1], (0, vec![0x12, 0x11, 0x11, 0x11]));
}

struct Panics;

impl BusDevice for Panics {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}
    fn write(&self, _offset: u64, _data: &[u8]) -> ControlFlow<ExitRequest> {
        panic!("a fault of this device");
    }
}

#[test]
fn a_device_that_panics_ends_its_machine_and_no_other() {
    let host = host!();
    let other = start(&host, guests::busy());
    let vm = builder(&host, guests::write_port())
        .pio_device("panics", 0xb0, 2, Arc::new(Panics))
        .build()
        .unwrap();
    match end(&vm.start().unwrap()) {
        VmExit::Crash(crash) => assert_eq!(
            crash.cause,
            CrashCause::DevicePanic("a fault of this device".to_owned())
        ),
        exit => panic!("{exit}"),
    }
    assert_eq!(other.state(), VmState::Running);
}

struct DropsItsMachine(Mutex<Option<VmHandle>>);

impl BusDevice for DropsItsMachine {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}
    fn write(&self, _offset: u64, _data: &[u8]) -> ControlFlow<ExitRequest> {
        let handle = self.0.lock().unwrap().take();
        if let Some(handle) = &handle {
            assert!(handle.wait().is_err());
        }
        drop(handle);
        ControlFlow::Continue(())
    }
}

#[test]
fn a_device_can_drop_the_last_handle_of_its_machine() {
    let host = host!();
    let device = Arc::new(DropsItsMachine(Mutex::new(None)));
    let vm = builder(&host, guests::exit_storm())
        .pio_device("drops", 0xf0, 1, Arc::clone(&device) as Arc<dyn BusDevice>)
        .build()
        .unwrap();
    // Held until the handle is in its place, so that the guest's first write already finds it.
    let mut place = device.0.lock().unwrap();
    *place = Some(vm.start().unwrap());
    drop(place);
    let gone = (0..6000).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        Arc::strong_count(&device) == 1
    });
    assert!(gone, "the machine still holds its device");
}

#[test]
fn a_hundred_machines_live_in_one_process_and_leave_nothing() {
    if !is_alone("a_hundred_machines_live_in_one_process_and_leave_nothing") {
        return;
    }
    let host = host!();
    start(&host, guests::power_off()).wait().unwrap();
    let before = settled_belongings();
    for _ in 0..5 {
        let machines: Vec<_> = (0..20)
            .map(|_| start(&host, guests::exit_storm()))
            .collect();
        let threads = belongings().0;
        assert!(
            threads >= before.0 + 40,
            "{threads} threads for 20 machines"
        );
        for machine in &machines {
            machine.pause().unwrap();
            assert_eq!(machine.state(), VmState::Paused);
        }
        for machine in &machines {
            machine.resume().unwrap();
        }
        for machine in &machines {
            machine.stop();
            assert_eq!(end(machine), VmExit::Stopped);
        }
    }
    assert_belongings(before, "after the last machine");
}

#[test]
fn a_machine_dropped_at_any_point_of_its_life_leaves_nothing() {
    if !is_alone("a_machine_dropped_at_any_point_of_its_life_leaves_nothing") {
        return;
    }
    let host = host!();
    // Once, so that what is made once a process is there.
    start(&host, guests::power_off()).wait().unwrap();
    let before = settled_belongings();
    for _ in 0..20 {
        drop(builder(&host, guests::busy()).build().unwrap());
        drop(start(&host, guests::busy()));
        let paused = start(&host, guests::exit_storm());
        paused.pause().unwrap();
        drop(paused);
        let ended = start(&host, guests::power_off());
        ended.wait().unwrap();
        drop(ended);
        assert!(
            builder(&host, guests::busy())
                .memory(MemorySize::bytes(5))
                .build()
                .is_err()
        );
        assert!(
            builder(&host, guests::busy())
                .initrd("/nonexistent")
                .build()
                .is_err()
        );
    }
    assert_belongings(before, "after the last machine");
}

#[test]
fn what_cannot_be_built_is_refused_in_one_line() {
    let host = host!();
    let refused = |builder: VmBuilder| {
        let error = builder.build().unwrap_err();
        let text = error.to_string();
        assert!(!text.contains('\n'), "{text}");
        text
    };
    let code = guests::power_off();
    let text = refused(VmBuilder::new());
    assert!(text.contains("kernel"), "{text}");
    let text = refused(builder(&host, code).vcpus(0));
    assert!(text.starts_with("0 vCPUs: there can be 1 to "), "{text}");
    let text = refused(builder(&host, code).vcpus(100_000));
    assert!(text.starts_with("100000 vCPUs"), "{text}");
    for bytes in [0, 4096, (16 << 20) + 1, u64::MAX, 1 << 56] {
        let text = refused(builder(&host, code).memory(MemorySize::bytes(bytes)));
        assert!(text.contains("memory"), "{text}");
    }
    let text = refused(builder(&host, code).initrd("/nonexistent/initrd"));
    assert!(text.contains("/nonexistent/initrd"), "{text}");
    let text = refused(builder(&host, code).cmdline("x".repeat(100_000)));
    assert!(text.contains("command line"), "{text}");
    let clash = builder(&host, code).pio_device("mine", 0x3f9, 1, Arc::new(Panics));
    let text = refused(clash);
    assert!(
        text.contains("mine") && text.contains("serial port"),
        "{text}"
    );
}

#[test]
fn the_vfio_device_is_made_once_and_refuses_what_is_not_vfio() {
    let host = host!();
    let mut vm = builder(&host, guests::power_off()).build().unwrap();
    let device = match vm.vfio() {
        Ok(device) => device,
        Err(error) => {
            let text = error.to_string();
            assert_eq!(text, "create a VFIO device in KVM (KVM_CREATE_DEVICE)");
            return eprintln!("skipped: {error}: {:?}", std::error::Error::source(&error));
        }
    };
    let again = vm.vfio().unwrap();
    assert!(Arc::ptr_eq(&device, &again));
    let file = std::fs::File::open("/dev/null").unwrap();
    let error = device.add_file(&file).unwrap_err();
    assert_eq!(
        error.to_string(),
        "KVM_DEV_VFIO_FILE_ADD (KVM_SET_DEVICE_ATTR)"
    );
    assert!(device.remove_file(&file).is_err());
    assert_eq!(end(&vm.start().unwrap()), VmExit::Shutdown);
}

#[test]
fn the_fds_of_a_machine_can_be_used_before_its_start() {
    let host = host!();
    assert!(host.capabilities().has("KVM_CAP_USER_MEMORY"));
    let vm = builder(&host, guests::busy()).build().unwrap();
    let mut regs = vm.vcpu_fds()[0].get_regs().unwrap();
    regs.rax = 0x34;
    vm.vcpu_fds()[0].set_regs(&regs).unwrap();
    assert_eq!(vm.vcpu_fds()[0].get_regs().unwrap().rax, 0x34);
    assert!(vm.vm_fd().check_extension_raw(32) > 0);
}
