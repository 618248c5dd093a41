//! Sizing BARs, and moving them while they are used.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;

use kiln_device_api::ExitRequest;
use kiln_pci::{
    AddressSpace, Bar, FunctionDescription, Identity, PciBus, PciBusBuilder, PciFunction,
};

use crate::fixture::{ADDRESS, BAR_32, BAR_64, BAR_IO, Fixture, MEMORY_32, MEMORY_64, echo};

const DECODE: u16 = 0x3;

#[test]
fn writing_ones_to_a_bar_gives_its_size() {
    let fixture = Fixture::new();
    for (offset, expected) in [
        (0x10, 0xffff_f000_u32),
        (0x14, 0xffff_c00c),
        (0x18, 0xffff_ffff),
        (0x1c, 0xffff_ffe1),
        (0x20, 0),
        (0x24, 0),
        // The expansion ROM.
        (0x30, 0),
    ] {
        let before = fixture.config(offset);
        fixture.set_config(offset, u32::MAX);
        assert_eq!(fixture.config(offset), expected, "BAR at {offset:#x}");
        fixture.set_config(offset, before);
        assert_eq!(fixture.config(offset), before);
    }
}

#[test]
fn a_bar_answers_only_while_its_space_is_enabled() {
    let fixture = Fixture::new();
    let places = [
        (BAR_32, MEMORY_32.start, 0x2),
        (BAR_64, MEMORY_64.start, 0x2),
        (BAR_IO, 0xc000, 0x1),
    ];
    for command in 0..4 {
        fixture.set_command(command);
        for (bar, address, bit) in places {
            let expected = if command & bit != 0 {
                [echo(bar, 4), echo(bar, 5)]
            } else {
                [0xff; 2]
            };
            assert_eq!(
                fixture.read(address + 4),
                expected,
                "BAR {bar}, {command:#x}"
            );
        }
    }
    let moves = fixture.moves.0.lock().unwrap();
    assert_eq!(
        *moves,
        [
            (BAR_IO, Some(0xc000)),
            (BAR_32, Some(MEMORY_32.start)),
            (BAR_64, Some(MEMORY_64.start)),
            (BAR_IO, None),
            (BAR_IO, Some(0xc000)),
        ]
    );
}

#[test]
fn a_bar_that_was_moved_answers_at_its_new_place_only() {
    let fixture = Fixture::new();
    fixture.set_command(DECODE);
    fixture.moves.0.lock().unwrap().clear();
    let (old, new) = (MEMORY_64.start, MEMORY_64.start + 0x8000);
    fixture.set_config(0x14, new as u32);
    assert_eq!(fixture.read(old), [0xff; 4]);
    assert_eq!(fixture.read(new), [0x10, 0x11, 0x12, 0x13]);
    // Below 4 GiB a 64-bit BAR works as well; on the way it is in no window.
    fixture.set_config(0x18, 0);
    assert_eq!(fixture.read(new), [0xff; 4]);
    fixture.set_config(0x14, 0xe080_0000);
    assert_eq!(fixture.read(0xe080_0001), [0x11, 0x12]);
    let moves = fixture.moves.0.lock().unwrap();
    let expected = [
        (BAR_64, Some(new)),
        (BAR_64, None),
        (BAR_64, Some(0xe080_0000)),
    ];
    assert_eq!(*moves, expected);
}

#[test]
fn a_bar_on_top_of_another_answers_nowhere_until_that_is_gone() {
    let fixture = Fixture::new();
    fixture.set_command(DECODE);
    fixture.moves.0.lock().unwrap().clear();
    fixture.set_config(0x18, 0);
    fixture.set_config(0x14, MEMORY_32.start as u32);
    assert_eq!(fixture.read(MEMORY_32.start), [0x00]);
    assert_eq!(fixture.read(MEMORY_32.start + 0x3000), [0xff]);
    fixture.set_config(0x10, 0xe080_0000);
    assert_eq!(fixture.read(MEMORY_32.start), [0x10]);
    let moves = fixture.moves.0.lock().unwrap();
    let expected = [
        (BAR_64, None),
        (BAR_32, Some(0xe080_0000)),
        (BAR_64, Some(MEMORY_32.start)),
    ];
    assert_eq!(*moves, expected);
}

#[test]
fn an_access_across_the_end_of_a_bar_reaches_nobody() {
    let fixture = Fixture::new();
    fixture.set_command(DECODE);
    assert_eq!(fixture.read(MEMORY_32.start + 0xffe), [0xff; 4]);
    fixture.write(MEMORY_32.start + 0xffe, &[0; 4]);
    assert!(fixture.echo.writes.lock().unwrap().is_empty());
    fixture.write(MEMORY_32.start + 0xffc, &[1, 2, 3, 4]);
    let writes = fixture.echo.writes.lock().unwrap();
    assert_eq!(*writes, [(BAR_32, 0xffc, vec![1, 2, 3, 4])]);
}

#[test]
fn a_bar_moves_while_other_threads_use_it() {
    let fixture = Fixture::new();
    let places = [0, 0x1000, 0x7f_f000].map(|offset| MEMORY_32.start + offset);
    let stop = AtomicBool::new(false);
    let answered = AtomicU64::new(0);
    fixture.set_command(DECODE);
    thread::scope(|scope| {
        for thread in 0..3_u64 {
            let (fixture, stop, answered) = (&fixture, &stop, &answered);
            scope.spawn(move || {
                let mut turn = thread;
                while !stop.load(Ordering::Relaxed) {
                    turn += 1;
                    let offset = turn * 4 % 0x800;
                    let address = places[turn as usize % places.len()] + offset;
                    let data: [u8; 4] = fixture.read(address);
                    let device = [0, 1, 2, 3].map(|byte| echo(BAR_32, offset + byte));
                    assert!(data == device || data == [0xff; 4], "{data:x?}");
                    if data == device {
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                    fixture.write(address, &turn.to_le_bytes());
                    // The other BAR stays where it is, and always answers.
                    let other: [u8; 2] = fixture.read(MEMORY_64.start + 0x10);
                    assert_eq!(other, [0x10, 0x11]);
                }
            });
        }
        let mut turn = 0;
        while turn < 3000 || answered.load(Ordering::Relaxed) < 100 {
            turn += 1;
            fixture.set_config(0x10, places[turn % places.len()] as u32);
            if turn % 64 == 0 {
                thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let last = fixture.config(0x10);
    let moves = fixture.moves.0.lock().unwrap();
    assert_eq!(moves.last(), Some(&(BAR_32, Some(last.into()))));
    assert_eq!(fixture.read(u64::from(last) + 5), [echo(BAR_32, 5)]);
}

#[test]
fn two_vcpus_that_move_bars_agree_with_the_observer_in_the_end() {
    let fixture = Fixture::new();
    fixture.set_command(DECODE);
    thread::scope(|scope| {
        for (register, bar_offset) in [(0x10_u16, 0x40_0000_u32), (0x10, 0x50_0000), (0x1c, 0)] {
            let fixture = &fixture;
            scope.spawn(move || {
                for turn in 0..2000_u32 {
                    let value = if register == 0x10 {
                        MEMORY_32.start as u32 + bar_offset + (turn % 7) * 0x1000
                    } else {
                        0xc000 + (turn % 5) * 0x20
                    };
                    fixture.set_config(register, value);
                }
            });
        }
    });
    let moves = fixture.moves.0.lock().unwrap();
    for (bar, register, mask) in [(BAR_32, 0x10, !0xfff_u32), (BAR_IO, 0x1c, !0x1f)] {
        let last = moves.iter().rev().find(|(moved, _)| *moved == bar).unwrap();
        let address = u64::from(fixture.config(register) & mask);
        assert_eq!(*last, (bar, Some(address)));
        // Between two calls of the observer the place has changed.
        let of_bar: Vec<_> = moves.iter().filter(|(moved, _)| *moved == bar).collect();
        assert!(of_bar.windows(2).all(|pair| pair[0] != pair[1]));
    }
}

/// Moves its own BAR when it is written to, as a capability for configuration access could.
#[derive(Default)]
struct Mover {
    bus: OnceLock<Weak<PciBus>>,
}

impl PciFunction for Mover {
    fn bar_read(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0x42);
    }

    fn bar_write(&self, _bar: usize, _offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        match self.bus.get().and_then(Weak::upgrade) {
            Some(bus) => bus.config_write(ADDRESS, 0x10, data),
            None => ControlFlow::Continue(()),
        }
    }

    fn reset(&self) {}
}

#[test]
fn a_bar_can_be_moved_from_within_an_access_to_it() {
    let mut description = FunctionDescription::new("mover", &Identity::default());
    description.add_bar(Bar::memory32(0x1000)).unwrap();
    let mover = Arc::new(Mover::default());
    let mut builder = PciBusBuilder::new();
    builder.add_window(AddressSpace::Memory, MEMORY_32).unwrap();
    builder.add(description, mover.clone()).unwrap();
    let bus = builder.build().unwrap();
    mover.bus.set(Arc::downgrade(&bus)).unwrap();
    let window = bus.windows()[0].device.clone();
    let _ = bus.config_write(ADDRESS, 4, &[2]);
    let _ = window.write(0, &0xe000_5000_u32.to_le_bytes());
    for (offset, expected) in [(0x5000, 0x42), (0, 0xff)] {
        let mut data = [0xff];
        window.read(offset, &mut data);
        assert_eq!(data, [expected], "at {offset:#x}");
    }
}
