//! The configuration access capability.

use super::{driver, echo, read, state, write};
use crate::testing::{Buffer, TestPci, status};

/// Offsets into the capability.
const BAR: u16 = 4;
const OFFSET: u16 = 8;
const LENGTH: u16 = 12;
const DATA: u16 = 16;

fn place(pci: &TestPci, bar: u8, offset: u64, len: u32) {
    let capability = pci.pci_capability();
    pci.set_config(capability + BAR, &[bar]);
    pci.set_config(capability + OFFSET, &(offset as u32).to_le_bytes());
    pci.set_config(capability + LENGTH, &len.to_le_bytes());
}

fn read_through(pci: &TestPci, offset: u64, len: u32) -> u64 {
    place(pci, 0, offset, len);
    let data: [u8; 4] = pci.config(pci.pci_capability() + DATA);
    u64::from(u32::from_le_bytes(data)) & ((1 << (8 * len)) - 1)
}

fn write_through(pci: &TestPci, offset: u64, len: u32, value: u32) {
    place(pci, 0, offset, len);
    let len = len as usize;
    pci.set_config(pci.pci_capability() + DATA, &value.to_le_bytes()[..len]);
}

#[test]
fn the_window_reads_what_the_bar_does() {
    let (mut driver, _) = driver();
    driver.start(0, 8);
    driver.transport.pause();
    let pci = driver.transport.pci();
    for offset in (0..0x40).chain(0x2000..0x2010).chain(0x8000..0x8040) {
        for len in [1, 2, 4_u32] {
            if offset % u64::from(len) == 0 {
                let mut direct = [0xff; 4];
                pci.read(offset, &mut direct[..len as usize]);
                let direct = u64::from(u32::from_le_bytes(direct)) & ((1 << (8 * len)) - 1);
                assert_eq!(
                    read_through(pci, offset, len),
                    direct,
                    "{len} at {offset:#x}"
                );
            }
        }
    }
}

#[test]
fn a_guest_can_drive_the_device_through_the_window_alone() {
    let (mut driver, _) = driver();
    driver.start(0, 8);
    echo(&mut driver);
    let pci = driver.transport.pci();
    // The BAR does not answer, as in a guest that cannot map it.
    pci.set_config(4, &[0, 0]);
    assert_eq!(read_through(pci, pci.common() + 0x14, 1), 0xf);
    driver.fill(0x1000, b"again");
    let buffers = [Buffer::readable(0x1000, 5), Buffer::writable(0x2000, 8)];
    driver.queues[0].add(&driver.memory, &buffers);
    let pci = driver.transport.pci();
    write_through(pci, pci.notify(0), 2, 0);
    driver.queues[0].wait_used(&driver.memory);
    assert_eq!(driver.bytes(0x2000, 5), b"again");

    write_through(pci, pci.device() + 4, 4, u32::from_le_bytes(*b"ABCD"));
    assert_eq!(read_through(pci, pci.device() + 4, 2), 0x4241);
    // The vectors' table and pending bits.
    write_through(pci, 0x8008, 4, 0x1234);
    assert_eq!(read_through(pci, 0x8008, 4), 0x1234);
    assert_eq!(read_through(pci, 0x3000, 4), 0);
    write_through(pci, pci.common() + 0x14, 1, 0);
    assert_eq!(state(&driver).core.status, 0);
}

#[test]
fn the_interrupt_status_is_cleared_through_the_window_too() {
    let (mut driver, _) = driver();
    driver.transport.pci().disable_msix();
    driver.start(0, 8);
    echo(&mut driver);
    driver.line.wait_for(1);
    let pci = driver.transport.pci();
    assert!(driver.line.is_asserted());
    assert_eq!(read_through(pci, pci.isr(), 1), 1);
    assert!(!driver.line.is_asserted());
    assert_eq!(read(pci, pci.isr(), 1), 0);
}

#[test]
fn a_window_that_is_not_in_the_bar_leads_nowhere() {
    let (driver, _) = driver();
    let pci = driver.transport.pci();
    let status = pci.common() + 0x14;
    write(pci, status, 1, u64::from(status::ACKNOWLEDGE));
    let before = state(&driver);
    let end = 0x2_0000;
    for (bar, offset, len) in [
        (1, status, 1),
        (5, status, 1),
        (6, status, 1),
        (0xff, status, 1),
        (0, status, 0),
        (0, status, 3),
        (0, status, 8),
        (0, status, u32::MAX),
        (0, status + 1, 2),
        (0, status + 2, 4),
        (0, end, 1),
        (0, end, 4),
        (0, 0xffff_fffc, 4),
    ] {
        place(pci, bar, offset, len);
        let data = pci.pci_capability() + DATA;
        pci.set_config(data, &[0, 0, 0x5a, 0]);
        assert_eq!(
            pci.config(data),
            [0, 0, 0x5a, 0],
            "{len} bytes at {offset:#x} of BAR {bar}"
        );
        assert_eq!(state(&driver), before);
    }
    // The last bytes of the BAR are notification registers of no queue.
    assert_eq!(read_through(pci, end - 4, 4), 0xffff_ffff);
}

#[test]
fn parts_of_the_data_are_parts_of_what_is_read() {
    let (driver, _) = driver();
    let pci = driver.transport.pci();
    let data = pci.pci_capability() + DATA;
    place(pci, 0, pci.device() + 4, 4);
    assert_eq!(&pci.config(data), b"igur");
    for at in 0..4 {
        assert_eq!(pci.config(data + at), [b"igur"[usize::from(at)]]);
    }
    assert_eq!(&pci.config(data + 2), b"ur");
    // Bytes beyond the window are those that were written last.
    pci.set_config(pci.pci_capability() + LENGTH, &[2]);
    assert_eq!(&pci.config::<2>(data), b"ig");
    // A write of one byte writes all of the window, the others as they were written before.
    place(pci, 0, pci.device(), 0);
    pci.set_config(data, b"WXYZ");
    pci.set_config(pci.pci_capability() + LENGTH, &[4]);
    pci.set_config(data + 1, b"_");
    assert_eq!(&pci.config(data), b"W_YZ");
}
