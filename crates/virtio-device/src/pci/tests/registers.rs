//! Identity, capabilities, and every register at every width.

use std::sync::Arc;

use kiln_io_thread::{IoThread, Registrar};
use kiln_pci::{AddressSpace, IntxLine, PciBusBuilder};

use super::{driver, echo, read, state, write};
use crate::testing::{InterruptRecorder, MockDriver, TestPci, TransportKind};
use crate::{
    PciTransport, QueueError, QueueHandler, SimpleDevice, TransportError, Turn, VirtioDevice,
    VirtioTransport,
};

struct Idle;

impl QueueHandler for Idle {
    fn process(&mut self, _: &mut Turn<'_>, _: &mut Registrar<'_, '_>) -> Result<(), QueueError> {
        Ok(())
    }
}

fn device(device_type: u32, queues: usize) -> Box<dyn VirtioDevice> {
    Box::new(SimpleDevice::new(device_type, vec![8; queues], Idle))
}

/// Each field: offset, width, whether it can be written.
const FIELDS: [(u64, usize, bool); 27] = [
    (0x00, 4, true),
    (0x04, 4, false),
    (0x08, 4, true),
    (0x0c, 4, true),
    (0x10, 2, true),
    (0x12, 2, false),
    (0x14, 1, true),
    (0x15, 1, false),
    (0x16, 2, true),
    (0x18, 2, true),
    (0x1a, 2, true),
    (0x1c, 2, true),
    (0x1e, 2, false),
    (0x20, 4, true),
    (0x20, 8, true),
    (0x24, 4, true),
    (0x28, 4, true),
    (0x28, 8, true),
    (0x2c, 4, true),
    (0x30, 4, true),
    (0x30, 8, true),
    (0x34, 4, true),
    (0x38, 2, false),
    (0x3a, 2, true),
    (0x3c, 2, false),
    (0x3e, 2, false),
    // The ISR status, from the common configuration on.
    (0x1000, 1, false),
];

#[test]
fn a_guest_knows_a_device_by_its_type() {
    for (device_type, class) in [
        (1, 0x02_00_00),
        (2, 0x01_80_00),
        (3, 0x07_80_00),
        (4, 0x00_ff_00),
        (5, 0x00_ff_00),
        (19, 0x02_80_00),
        (0x3f, 0x00_ff_00),
    ] {
        let driver = MockDriver::over(TransportKind::Pci, device(device_type, 1));
        let pci = driver.transport.pci();
        assert_eq!(pci.transport.device_type(), device_type);
        let id = 0x1040_1af4 + (device_type << 16);
        assert_eq!(u32::from_le_bytes(pci.config(0x00)), id);
        // With the revision in the lowest byte.
        assert_eq!(u32::from_le_bytes(pci.config(0x08)), class << 8 | 1);
        assert_eq!(u32::from_le_bytes(pci.config(0x2c)), 0x1100_1af4);
        assert_eq!(pci.config(0x3d), [1], "an interrupt pin");
    }
}

#[test]
fn a_type_without_a_pci_number_is_refused() {
    let memory = MockDriver::new(device(4, 1)).memory;
    let io = IoThread::spawn("test-io", |_| ()).unwrap();
    for device_type in [0x40, 0xffff, 0x1_0000, u32::MAX] {
        let sink = Arc::new(InterruptRecorder::default());
        let handle = io.handle().clone();
        let refused = PciTransport::new(
            device(device_type, 1),
            Arc::clone(&memory),
            handle,
            "odd",
            sink,
        );
        let error = refused.unwrap_err();
        assert!(
            matches!(error, TransportError::PciDeviceType { device_type: found } if found == device_type)
        );
    }
}

#[test]
fn fields_answer_aligned_accesses_of_their_own_width_only() {
    let (driver, _) = driver();
    let pci = driver.transport.pci();
    for offset in (0..0x60).chain(0xff0..0x1010) {
        for len in [1, 2, 3, 4, 5, 8] {
            let field = FIELDS
                .iter()
                .find(|field| (field.0, field.1) == (offset, len));
            let mut data = [[0xff; 8], [0; 8]];
            pci.read(offset, &mut data[0][..len]);
            pci.read(offset, &mut data[1][..len]);
            let answered = data[0][..len] == data[1][..len];
            assert_eq!(answered, field.is_some(), "{len} bytes at {offset:#x}");
            if !field.is_some_and(|field| field.2) {
                let before = driver.transport.state().unwrap();
                for value in [u64::MAX, 1, 0] {
                    write(pci, offset, len, value);
                    assert_eq!(
                        driver.transport.state().unwrap(),
                        before,
                        "{len} bytes at {offset:#x}"
                    );
                }
            }
        }
    }
}

#[test]
fn what_a_driver_writes_reads_back() {
    let (driver, _) = driver();
    let pci = driver.transport.pci();
    assert_eq!(read(pci, 0x12, 2), 2, "queues");
    for select in [1, 2, 0xdead_beef, 0] {
        write(pci, 0x00, 4, select);
        write(pci, 0x08, 4, select);
        write(pci, 0x0c, 4, 0xabcd_0000 + select);
        assert_eq!(read(pci, 0x00, 4), select);
        assert_eq!(read(pci, 0x08, 4), select);
        let kept = if select < 2 { 0xabcd_0000 + select } else { 0 };
        assert_eq!(read(pci, 0x0c, 4), kept);
    }
    write(pci, 0x14, 1, 3);
    assert_eq!(read(pci, 0x14, 1), 3);
    for queue in [0, 1] {
        write(pci, 0x16, 2, queue);
        assert_eq!(read(pci, 0x16, 2), queue);
        assert_eq!(read(pci, 0x18, 2), [64, 16][queue as usize]);
        write(pci, 0x18, 2, 8);
        assert_eq!(read(pci, 0x18, 2), 8);
        assert_eq!(read(pci, 0x1e, 2), queue, "the notification register");
        for (at, address) in [0x20, 0x28, 0x30]
            .into_iter()
            .zip(0x1234_5678_9abc_0000 + queue..)
        {
            write(pci, at, 8, address);
            assert_eq!(read(pci, at, 8), address);
            assert_eq!(read(pci, at, 4), address & 0xffff_ffff);
            assert_eq!(read(pci, at + 4, 4), address >> 32);
            write(pci, at + 4, 4, 0x55);
            assert_eq!(read(pci, at, 8), 0x55 << 32 | address & 0xffff_ffff);
            write(pci, at, 4, 0xaa);
            assert_eq!(read(pci, at, 8), 0x55_0000_00aa);
        }
        write(pci, 0x1c, 2, 1);
        assert_eq!(read(pci, 0x1c, 2), 1);
    }
    // A queue that does not exist.
    write(pci, 0x16, 2, 2);
    for (at, len) in [(0x18, 2), (0x1c, 2), (0x20, 8), (0x28, 8), (0x30, 8)] {
        write(pci, at, len, 1);
        assert_eq!(read(pci, at, len), 0);
    }
    write(pci, 0x1a, 2, 0);
    assert_eq!(read(pci, 0x1a, 2), 0xffff);
    // What is not offered.
    for at in [0x38, 0x3a, 0x3c, 0x3e] {
        assert_eq!(read(pci, at, 2), 0);
    }
}

#[test]
fn a_notification_of_16_or_32_bits_at_its_register_kicks_the_queue() {
    let (driver, _) = driver();
    let pci = driver.transport.pci();
    let kicks = driver.transport.kicks();
    let kicked = || kicks.iter().position(|kick| kick.read().is_ok());
    for queue in [0, 1] {
        assert_eq!(PciTransport::notify_offset(queue), pci.notify(queue));
        let at = pci.notify(queue);
        for (len, value) in [(2, u64::from(queue)), (4, 0), (2, 0xffff), (4, 0xdead_beef)] {
            write(pci, at, len, value);
            assert_eq!(kicked(), Some(usize::from(queue)));
        }
        for (offset, len) in [(0, 1), (0, 8), (1, 2), (2, 2), (3, 1)] {
            write(pci, at + offset, len, 0);
            assert_eq!(kicked(), None, "{len} bytes at {offset}");
        }
        let mut data = [0xff; 4];
        pci.read(at, &mut data);
        assert_eq!((data, kicked()), ([0xff; 4], None));
    }
    // Behind the last queue.
    for queue in [2, 3, 0x3ff] {
        write(pci, pci.notify(queue), 2, 0);
    }
    assert_eq!(kicked(), None);
}

#[test]
fn only_the_window_and_the_vectors_control_change_among_the_capabilities() {
    let (driver, _) = driver();
    let pci = driver.transport.pci();
    let before: [u8; 192] = pci.config(0x40);
    for at in (0x40..0x100).step_by(4) {
        // A window of 2^32 - 1 bytes leads nowhere, so that nothing else happens.
        pci.set_config(at, &[0xff; 4]);
    }
    let after: [u8; 192] = pci.config(0x40);
    let window = usize::from(pci.pci_capability()) - 0x40;
    let msix = usize::from(pci.msix_capability()) - 0x40;
    for at in 0..192_usize {
        let expected = match at.checked_sub(window) {
            // bar, offset, length, pci_cfg_data.
            Some(4 | 8..=19) => 0xff,
            _ if at == msix + 3 => 0xc0,
            _ => before[at],
        };
        assert_eq!(after[at], expected, "at {:#x}", 0x40 + at);
    }
    // Bytes and words read as the double words do.
    for at in 0..192_u16 {
        assert_eq!(pci.config(0x40 + at), [after[usize::from(at)]]);
        if at < 191 {
            let pair = [after[usize::from(at)], after[usize::from(at) + 1]];
            assert_eq!(pci.config(0x40 + at), pair);
        }
    }
}

#[test]
fn a_device_with_more_queues_than_vectors_has_them_all() {
    let queues = 3000;
    assert_eq!(PciTransport::vectors_for(&*device(4, 0)), 1);
    assert_eq!(PciTransport::vectors_for(&*device(4, 2047)), 2048);
    assert_eq!(PciTransport::vectors_for(&*device(4, 2048)), 2048);
    let driver = MockDriver::over(TransportKind::Pci, device(4, queues));
    let pci = driver.transport.pci();
    assert_eq!(read(pci, 0x12, 2), 3000);
    write(pci, 0x16, 2, 2999);
    assert_eq!(read(pci, 0x1e, 2), 2999);
    for (vector, kept) in [(2047, 2047), (2048, 0xffff), (5, 5), (3000, 0xffff)] {
        write(pci, 0x1a, 2, vector);
        assert_eq!(read(pci, 0x1a, 2), kept);
    }
    write(pci, pci.notify(2999), 2, 2999);
    assert_eq!(driver.transport.kicks()[2999].read().unwrap(), 1);
}

#[test]
fn a_device_without_queues_is_one() {
    let driver = MockDriver::over(TransportKind::Pci, device(4, 0));
    let pci = driver.transport.pci();
    assert_eq!(read(pci, 0x12, 2), 0);
    write(pci, pci.notify(0), 2, 0);
    assert!(driver.negotiate(0));
}

#[test]
fn forty_devices_work_on_one_bus() {
    let memory = MockDriver::new(device(4, 1)).memory;
    let io = IoThread::spawn("test-io", |_| ()).unwrap();
    let level = Arc::new(InterruptRecorder::default());
    let mut builder = PciBusBuilder::new();
    builder
        .add_window(AddressSpace::Memory, 0xe000_0000..0xe100_0000)
        .unwrap();
    builder.set_intx_lines([16, 17, 18, 19].map(|gsi| IntxLine {
        gsi,
        level: Arc::clone(&level) as _,
    }));
    for number in 0..40 {
        let sink = Arc::new(InterruptRecorder::default());
        let handle = io.handle().clone();
        let memory = Arc::clone(&memory);
        let device = device(number + 1, number as usize);
        let (transport, description) =
            PciTransport::new(device, memory, handle, "one of many", sink).unwrap();
        builder.add(description, transport).unwrap();
    }
    let bus = builder.build().unwrap();
    let window = &bus.windows()[0];
    let functions: Vec<_> = bus.functions().skip(1).collect();
    assert_eq!(functions.len(), 40);
    for (number, function) in (0..).zip(&functions) {
        let _ = bus.config_write(function.address, 4, &[6, 0]);
        let mut bar = [0; 4];
        bus.config_read(function.address, 0x10, &mut bar);
        let bar = u64::from(u32::from_le_bytes(bar) & !0xf) - window.range.start;
        let mut queues = [0xff; 2];
        window.device.read(bar + 0x12, &mut queues);
        assert_eq!(u16::from_le_bytes(queues), number);
    }
}

#[test]
fn a_reset_of_the_bus_resets_the_device() {
    let (mut driver, controls) = driver();
    let fresh = driver.transport.state().unwrap();
    driver.start(MockDriver::EVENT_IDX, 8);
    echo(&mut driver);
    let pci = driver.transport.pci();
    pci.bus.reset();
    assert_eq!(*controls.given_back.lock().unwrap(), [0, 1]);
    assert_eq!(state(&driver).core, *fresh.core());
    assert_eq!(state(&driver).queue_vectors, [0xffff; 2]);
    assert_eq!(pci.config(0x04), [0, 0], "the command register");
    pci.enable_memory();
    pci.enable_msix(3);
    driver.start(0, 8);
    echo(&mut driver);
}

#[test]
fn a_structure_lies_in_pages_of_its_own() {
    let (driver, _) = driver();
    let pci: &TestPci = driver.transport.pci();
    let mut pages = [
        pci.common(),
        pci.isr(),
        pci.device(),
        pci.notify(0),
        u64::from(u32::from_le_bytes(pci.config(pci.msix_capability() + 4))),
        u64::from(u32::from_le_bytes(pci.config(pci.msix_capability() + 8))),
    ]
    .map(|offset| offset & !0xfff);
    pages.sort_unstable();
    assert!(pages.windows(2).all(|pair| pair[0] != pair[1]));
}
