use super::*;
use kiln_device_api::{ExitRequest, VcpuBus};
use std::ops::ControlFlow;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// Answers with its number and the offset, and keeps what it was given.
struct Probe {
    number: u8,
    seen: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Probe {
    fn new(number: u8) -> Arc<Self> {
        Arc::new(Self {
            number,
            seen: Mutex::default(),
        })
    }

    fn take(&self) -> Vec<(u64, Vec<u8>)> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

impl BusDevice for Probe {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data[0] = self.number;
        if let Some(second) = data.get_mut(1) {
            *second = offset as u8;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        self.seen.lock().unwrap().push((offset, data.to_vec()));
        if data == [0xee] {
            return ControlFlow::Break(ExitRequest::Reset);
        }
        ControlFlow::Continue(())
    }
}

fn manager() -> DeviceManager {
    DeviceManager::new(24, 0xd000_0000..0xd000_4000).unwrap()
}

fn pio<const N: usize>(buses: &Buses, port: u16) -> [u8; N] {
    let mut data = [0xff; N];
    buses.pio_read(port, &mut data);
    data
}

fn mmio<const N: usize>(buses: &Buses, address: u64) -> [u8; N] {
    let mut data = [0xff; N];
    buses.mmio_read(address, &mut data);
    data
}

#[test]
fn an_access_reaches_the_device_that_is_there_with_its_offset() {
    let mut manager = manager();
    // Not in order, with a neighbour and with a gap.
    manager.add_pio("c", 0x600, 4, Probe::new(3)).unwrap();
    manager.add_pio("a", 0x60, 5, Probe::new(1)).unwrap();
    manager.add_pio("b", 0x65, 1, Probe::new(2)).unwrap();
    let buses = manager.build();
    assert_eq!(pio(&buses, 0x60), [1, 0]);
    assert_eq!(pio(&buses, 0x63), [1, 3]);
    assert_eq!(pio(&buses, 0x64), [1]);
    assert_eq!(pio(&buses, 0x65), [2]);
    assert_eq!(pio(&buses, 0x602), [3, 2]);
    for empty in [0, 0x5f, 0x66, 0x5ff, 0x604, 0xffff] {
        assert_eq!(pio(&buses, empty), [0xff], "{empty:#x}");
    }
}

#[test]
fn an_access_that_crosses_a_devices_end_is_not_delivered() {
    let (first, second) = (Probe::new(1), Probe::new(2));
    let mut manager = manager();
    manager.add_mmio("a", 0x1000, 4, first.clone()).unwrap();
    manager.add_mmio("b", 0x1004, 4, second.clone()).unwrap();
    let buses = manager.build();
    assert_eq!(mmio(&buses, 0x1002), [0xff; 4]);
    assert_eq!(mmio(&buses, 0xfff), [0xff; 2]);
    assert_eq!(mmio(&buses, 0x1007), [0xff; 2]);
    assert!(buses.mmio_write(0x1003, &[0; 2]).is_continue());
    assert!(buses.mmio_write(0x1000, &[0; 8]).is_continue());
    assert!(buses.mmio_write(0x1000, &[]).is_continue());
    assert!(first.take().is_empty() && second.take().is_empty());
    assert!(buses.mmio_write(0x1004, &[7; 4]).is_continue());
    assert_eq!(second.take(), [(0, vec![7; 4])]);
}

#[test]
fn the_ends_of_the_address_spaces_are_part_of_them() {
    let mut manager = manager();
    manager.add_pio("p", 0xffff, 1, Probe::new(1)).unwrap();
    manager.add_mmio("m", u64::MAX, 1, Probe::new(2)).unwrap();
    manager.add_mmio("n", 0, 1, Probe::new(3)).unwrap();
    let buses = manager.build();
    assert_eq!(pio(&buses, 0xffff), [1]);
    assert_eq!(mmio(&buses, u64::MAX), [2]);
    assert_eq!(mmio(&buses, 0), [3]);
    // These would wrap around.
    assert_eq!(pio(&buses, 0xffff), [0xff; 2]);
    assert_eq!(mmio(&buses, u64::MAX), [0xff; 8]);
}

#[test]
fn an_overlap_is_refused_and_names_both() {
    let mut manager = manager();
    manager
        .add_mmio("disk", 0x1000, 0x1000, Probe::new(1))
        .unwrap();
    for (base, size) in [
        (0x1000, 0x1000),
        (0xfff, 2),
        (0x1fff, 1),
        (0, 0x8000),
        (0x1800, 1),
    ] {
        let error = manager
            .add_mmio("net", base, size, Probe::new(2))
            .unwrap_err();
        let Error::Overlap {
            name,
            other,
            other_range,
            range,
            space,
        } = &error
        else {
            panic!("{error}");
        };
        assert_eq!((name.as_str(), other.as_str()), ("net", "disk"));
        assert_eq!((*range.start(), *other_range.end()), (base, 0x1fff));
        assert_eq!(*space, AddressSpace::Mmio);
    }
    // What was refused is not there, and the neighbourhood is free.
    manager.add_mmio("net", 0x2000, 1, Probe::new(2)).unwrap();
    manager.add_mmio("rng", 0xfff, 1, Probe::new(3)).unwrap();
    // The other address space is another one.
    manager.add_pio("port", 0x1000, 1, Probe::new(4)).unwrap();
    let buses = manager.build();
    assert_eq!(mmio(&buses, 0x1fff), [1]);
    assert_eq!(mmio(&buses, 0x2000), [2]);
}

#[test]
fn an_empty_range_and_one_that_wraps_around_are_refused() {
    let mut manager = manager();
    let refused = |error: Error| matches!(error, Error::Range { .. });
    assert!(refused(
        manager.add_pio("x", 0x60, 0, Probe::new(1)).unwrap_err()
    ));
    assert!(refused(
        manager.add_pio("x", 0xffff, 2, Probe::new(1)).unwrap_err()
    ));
    assert!(refused(
        manager.add_mmio("x", 0, 0, Probe::new(1)).unwrap_err()
    ));
    let error = manager
        .add_mmio("x", u64::MAX, 2, Probe::new(1))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "place `x` at addresses from 0xffffffffffffffff: 0x2 is no size that a device can have there"
    );
}

#[test]
fn a_request_for_the_end_of_the_machine_is_passed_on() {
    let mut manager = manager();
    manager.add_pio("p", 0x64, 1, Probe::new(1)).unwrap();
    manager.add_mmio("m", 0x64, 1, Probe::new(1)).unwrap();
    let buses = manager.build();
    let reset = ControlFlow::Break(ExitRequest::Reset);
    assert_eq!(buses.pio_write(0x64, &[0xee]), reset);
    assert_eq!(buses.mmio_write(0x64, &[0xee]), reset);
    assert!(buses.pio_write(0x65, &[0xee]).is_continue());
}

#[test]
fn the_end_of_an_interrupt_reaches_the_sink() {
    let buses = manager().build();
    buses.end_of_interrupt(3);
    let mut manager = manager();
    let seen = Arc::new(AtomicU8::new(0));
    let sink = Arc::clone(&seen);
    manager.on_end_of_interrupt(move |vector| sink.store(vector, Ordering::SeqCst));
    manager.build().end_of_interrupt(0x31);
    assert_eq!(seen.load(Ordering::SeqCst), 0x31);
}

#[test]
fn the_last_hit_of_one_vcpu_does_not_mislead_another() {
    let mut manager = manager();
    for number in 0..32 {
        let base = u64::from(number) * 0x20;
        manager
            .add_mmio("x", base, 0x10, Probe::new(number))
            .unwrap();
    }
    let buses = Arc::new(manager.build());
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..4u64)
        .map(|thread| {
            let (buses, stop) = (Arc::clone(&buses), Arc::clone(&stop));
            std::thread::spawn(move || {
                for round in 0..50_000u64 {
                    let number = (round * (2 * thread + 1)) % 32;
                    let answer: [u8; 2] = mmio(&buses, number * 0x20 + 3);
                    let hole: [u8; 1] = mmio(&buses, number * 0x20 + 0x10);
                    if answer != [number as u8, 3] || hole != [0xff] {
                        stop.store(true, Ordering::SeqCst);
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(!stop.load(Ordering::SeqCst));
}

#[test]
fn interrupts_are_given_once_around_those_that_are_reserved() {
    let mut manager = manager();
    manager.reserve_gsi("serial", 4).unwrap();
    manager.reserve_gsi("power", 9).unwrap();
    let error = manager.reserve_gsi("other", 4).unwrap_err();
    assert_eq!(
        error.to_string(),
        "reserve interrupt 4 for `other`: `serial` has it"
    );
    let error = manager.reserve_gsi("other", 24).unwrap_err();
    assert_eq!(
        error.to_string(),
        "reserve interrupt 24 for `other`: the machine has 0 to 23"
    );
    let given: Vec<_> = (0..22)
        .map(|_| manager.allocate_gsi("net").unwrap())
        .collect();
    let expected: Vec<_> = (0..24).filter(|gsi| ![4, 9].contains(gsi)).collect();
    assert_eq!(given, expected);
    let error = manager.allocate_gsi("disk7").unwrap_err();
    assert_eq!(
        error.to_string(),
        "no free interrupt for `disk7`: 24 of 24 in use"
    );
    let error = manager.reserve_gsi("late", 23).unwrap_err();
    assert!(matches!(error, Error::GsiTaken { .. }), "{error}");
}

#[test]
fn an_interrupt_that_was_allocated_cannot_be_reserved_and_a_later_one_can() {
    let mut manager = manager();
    assert_eq!(manager.allocate_gsi("a"), Ok(0));
    assert!(manager.reserve_gsi("b", 0).is_err());
    manager.reserve_gsi("b", 1).unwrap();
    assert_eq!(manager.allocate_gsi("c"), Ok(2));
}

#[test]
fn mmio_addresses_are_aligned_until_they_run_out() {
    let mut manager = manager();
    assert_eq!(manager.allocate_mmio("a", 0x10, 0x10), Ok(0xd000_0000));
    assert_eq!(manager.allocate_mmio("b", 0x1000, 0x1000), Ok(0xd000_1000));
    assert_eq!(manager.allocate_mmio("c", 0x2000, 0x1000), Ok(0xd000_2000));
    let error = manager.allocate_mmio("d", 0x1000, 0x1000).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no free MMIO addresses for `d`: 0x1000 bytes wanted, 0x3010 of 0x4000 in use"
    );
    assert_eq!(manager.allocate_mmio("e", 0x800, 0x800), Ok(0xd000_0800));
    for (size, alignment) in [(0, 1), (1, 0), (1, 3)] {
        let error = manager.allocate_mmio("f", size, alignment).unwrap_err();
        assert!(matches!(error, Error::MmioRequest { .. }), "{error}");
    }
    for size in [u64::MAX, 1 << 63] {
        let error = manager.allocate_mmio("g", size, 1 << 63).unwrap_err();
        assert!(matches!(error, Error::MmioExhausted { .. }), "{error}");
    }
}

#[test]
fn nothing_to_allocate_from_is_refused() {
    for pins in [0, 241, u32::MAX] {
        let error = DeviceManager::new(pins, 0..1).unwrap_err();
        assert_eq!(error, Error::GsiCount { pins });
    }
    #[expect(clippy::reversed_empty_ranges, reason = "what is to be refused")]
    for window in [5..5, 6..5, 0..0] {
        let error = DeviceManager::new(24, window).unwrap_err();
        assert!(matches!(error, Error::MmioWindow { .. }), "{error}");
    }
    assert!(DeviceManager::new(240, 0..u64::MAX).is_ok());
}

#[test]
fn the_map_can_be_printed() {
    let mut manager = manager();
    manager.add_pio("com1", 0x3f8, 8, Probe::new(1)).unwrap();
    let buses = manager.build();
    assert_eq!(format!("{buses:?}"), r#"{"0x3f8..=0x3ff": "com1"}"#);
}
