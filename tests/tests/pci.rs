//! PCI and its interrupts with bare-metal guests of a few bytes: needs `/dev/kvm`, and nothing
//! else.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use kiln_tests::machines::{builder, end};
use kiln_tests::{guests, host};
use kiln_vmm::virtio::{ActivateError, Activation, ActiveQueue, InterruptEvent, VirtioDevice};
use kiln_vmm::{
    BusDevice, Captured, Console, ConsoleInput, ConsoleOutput, Execution, ExitRequest, Host,
    Transport, VmBuilder, VmExit,
};

/// Interrupts its driver once it has started, from another thread.
#[derive(Default)]
struct Interrupts(Vec<ActiveQueue>);

impl VirtioDevice for Interrupts {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[16, 16]
    }
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.0 = activation.queues;
        let interrupt = activation.interrupt;
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            interrupt.trigger(InterruptEvent::Config);
        });
        Ok(())
    }
    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        std::mem::take(&mut self.0)
    }
}

fn machine(host: &Arc<Host>, code: &[u8]) -> (VmBuilder, Captured) {
    let (output, printed) = ConsoleOutput::capture(4096);
    let builder = builder(host, code)
        .serial(Console::new(ConsoleInput::null(), output))
        .virtio_device("interrupts", Interrupts::default());
    (builder, printed)
}

fn printed(host: &Arc<Host>, code: &[u8]) -> String {
    let (builder, printed) = machine(host, code);
    let handle = builder.build().unwrap().start().unwrap();
    assert_eq!(end(&handle), VmExit::Shutdown);
    printed.text()
}

#[test]
fn a_message_reaches_the_guest() {
    let host = host!();
    assert_eq!(printed(&host, guests::virtio_pci_message()), "m");
}

#[test]
fn a_line_interrupts_until_the_device_was_asked() {
    let host = host!();
    let printed = printed(&host, guests::virtio_pci_line());
    // A KVM that only emulates guests may tell of an end twice, and the interrupt comes once more
    // then, for no reason: a driver has to expect that of a line.
    let emulated = host.execution().unwrap() == Execution::Emulated;
    assert!(
        printed == "ii2." || emulated && printed == "ii2i0.",
        "{printed}"
    );
}

#[test]
fn notifications_stay_in_the_kernel_wherever_the_bar_is() {
    let host = host!();
    let (builder, _) = machine(&host, guests::virtio_pci_notify());
    let handle = builder.build().unwrap().start().unwrap();
    assert_eq!(end(&handle), VmExit::Shutdown);
    // Those to where it was before, and the few writes to configuration space.
    let writes = handle.exit_counts()[0].mmio_write;
    assert!((1000..1010).contains(&writes), "{writes}");
}

fn with_devices(mut builder: VmBuilder, transport: Transport, count: usize) -> VmBuilder {
    for number in 0..count {
        let name = format!("device {number}");
        builder = builder.virtio_device_on(transport, name, Interrupts::default());
    }
    builder
}

#[test]
fn the_number_of_devices_has_a_limit_that_is_said() {
    let host = host!();
    let code = guests::power_off();
    let build = |vm: Transport, on: Transport, count| {
        with_devices(builder(&host, code).transport(vm), on, count).build()
    };
    use Transport::{Mmio, Pci};
    for (vm, on, count) in [
        (Pci, Pci, 40),
        (Mmio, Pci, 40),
        (Mmio, Mmio, 18),
        (Pci, Mmio, 14),
    ] {
        let vm = build(vm, on, count).unwrap();
        assert_eq!(end(&vm.start().unwrap()), VmExit::Shutdown);
    }
    let refused = |vm, on, count| build(vm, on, count).unwrap_err().to_string();
    assert_eq!(
        refused(Pci, Pci, 41),
        "no room for `device 40`: a machine has at most 40 virtio devices, whatever their transport"
    );
    assert_eq!(refused(Pci, Mmio, 1000), refused(Pci, Pci, 41));
    assert_eq!(
        refused(Mmio, Mmio, 19),
        "no interrupt for `device 18` on the mmio transport: it takes one of the IOAPIC's 24 pins for \
         each device, and 18 of them are free for that; more devices fit on the pci transport"
    );
    assert!(refused(Pci, Mmio, 15).contains("and 14 of them are free"));
}

struct Nothing;

impl BusDevice for Nothing {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}
    fn write(&self, _offset: u64, _data: &[u8]) -> ControlFlow<ExitRequest> {
        ControlFlow::Continue(())
    }
}

#[test]
fn without_pci_there_is_no_bus() {
    let host = host!();
    let (output, printed) = ConsoleOutput::capture(4096);
    let vm = builder(&host, guests::virtio_magic())
        .transport(Transport::Mmio)
        .serial(Console::new(ConsoleInput::null(), output))
        .virtio_device("interrupts", Interrupts::default())
        .pio_device("mine", 0xcf8, 8, Arc::new(Nothing))
        .build()
        .unwrap();
    assert_eq!(end(&vm.start().unwrap()), VmExit::Shutdown);
    assert_eq!(printed.text(), "virt");
    let clash = builder(&host, guests::power_off())
        .pio_device("mine", 0xcf8, 8, Arc::new(Nothing))
        .build()
        .unwrap_err()
        .to_string();
    assert!(clash.contains("PCI configuration ports"), "{clash}");
}

#[test]
fn both_transports_can_be_in_one_machine() {
    let host = host!();
    let build = |count| {
        let builder = builder(&host, guests::power_off());
        let builder = with_devices(builder, Transport::Mmio, 14);
        with_devices(builder, Transport::Pci, count).build()
    };
    assert_eq!(end(&build(26).unwrap().start().unwrap()), VmExit::Shutdown);
    assert!(build(27).unwrap_err().to_string().contains("at most 40"));
}
