//! What is special about the PCI transport, through a real bus; what it has in common with others
//! is tested with the core.

mod hostile;
mod interrupts;
mod moving_bar;
mod registers;
mod window;

use std::sync::Arc;

use crate::PciTransportState;
use crate::test_device::{Controls, EchoDevice};
use crate::testing::{Buffer, MockDriver, TestPci, TestState, TransportKind};

fn driver() -> (MockDriver, Arc<Controls>) {
    let (device, controls) = EchoDevice::boxed();
    (MockDriver::over(TransportKind::Pci, device), controls)
}

/// A request over queue 0: it must be answered rightly.
fn echo(driver: &mut MockDriver) {
    driver.fill(0x1000, b"hello");
    driver.fill(0x2000, &[0; 5]);
    let buffers = [Buffer::readable(0x1000, 5), Buffer::writable(0x2000, 8)];
    assert_eq!(driver.request(0, &buffers), 5);
    assert_eq!(driver.bytes(0x2000, 5), b"hello");
}

/// Reads `len` bytes of BAR 0 as a number.
fn read(pci: &TestPci, offset: u64, len: usize) -> u64 {
    let mut data = [0; 8];
    pci.read(offset, &mut data[..len]);
    u64::from_le_bytes(data)
}

/// Writes the lowest `len` bytes of a number to BAR 0.
fn write(pci: &TestPci, offset: u64, len: usize, value: u64) {
    pci.write(offset, &value.to_le_bytes()[..len]);
}

/// The transport's part of the state.
fn state(driver: &MockDriver) -> PciTransportState {
    match driver.transport.state().unwrap() {
        TestState::Pci { transport, .. } => transport,
        TestState::Mmio(_) => panic!("this is no PCI transport"),
    }
}
