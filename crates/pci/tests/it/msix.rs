//! MSI-X as a driver uses it: capability, table and pending bits, by configuration space and BAR.

use kiln_pci::{MsiMessage, MsixPlacement};

use crate::fixture::{BAR_64, Fixture, MEMORY_64, PENDING_OFFSET, TABLE_OFFSET, VECTORS, echo};

const MEMORY: u16 = 0x2;
/// The capability, with its control register in the upper half.
const CAPABILITY: u16 = 0x48;
const ENABLE: u32 = 0x8000_0000;
const FUNCTION_MASK: u32 = 0x4000_0000;

fn message(vector: u16) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_1000,
        data: 0x30 + u32::from(vector),
    }
}

/// Writes a table entry as Linux does, a double word at a time, and unmasks it last.
fn unmask(fixture: &Fixture, bar: u64, vector: u16) {
    let entry = bar + TABLE_OFFSET + u64::from(vector) * 16;
    let message = message(vector);
    fixture.write(entry, &(message.address as u32).to_le_bytes());
    fixture.write(entry + 4, &((message.address >> 32) as u32).to_le_bytes());
    fixture.write(entry + 8, &message.data.to_le_bytes());
    fixture.write(entry + 12, &[0; 4]);
}

fn sent(fixture: &Fixture) -> Vec<(u16, MsiMessage)> {
    std::mem::take(&mut *fixture.messages.0.lock().unwrap())
}

#[test]
fn a_driver_sets_msix_up_and_gets_messages() {
    let fixture = Fixture::new();
    let bar = MEMORY_64.start;
    fixture.set_command(MEMORY);
    assert!(!fixture.msix.trigger(1), "MSI-X is off: INTx is to be used");
    fixture.set_config(CAPABILITY, ENABLE | FUNCTION_MASK);
    assert!(fixture.msix.is_enabled());
    for vector in 0..VECTORS {
        unmask(&fixture, bar, vector);
    }
    assert!(fixture.msix.trigger(1));
    assert_eq!(sent(&fixture), []);
    assert_eq!(fixture.read(bar + PENDING_OFFSET), [0b10, 0, 0, 0]);
    fixture.set_config(CAPABILITY, ENABLE);
    assert_eq!(sent(&fixture), [(1, message(1))]);
    assert_eq!(fixture.read(bar + PENDING_OFFSET), [0; 8]);
    assert!(fixture.msix.trigger(2));
    assert!(!fixture.msix.trigger(VECTORS));
    assert_eq!(sent(&fixture), [(2, message(2))]);
    fixture.set_config(CAPABILITY, 0);
    assert!(!fixture.msix.is_enabled());
    assert!(!fixture.msix.trigger(2));
    assert_eq!(sent(&fixture), []);
}

#[test]
fn the_table_moves_with_its_bar() {
    let fixture = Fixture::new();
    fixture.set_command(MEMORY);
    fixture.set_config(CAPABILITY, ENABLE);
    unmask(&fixture, MEMORY_64.start, 0);
    let moved = MEMORY_64.start + 0x10_0000;
    fixture.set_config(0x14, moved as u32);
    unmask(&fixture, moved, 1);
    assert_eq!(fixture.read(MEMORY_64.start + TABLE_OFFSET), [0xff; 4]);
    let data = fixture.read(moved + TABLE_OFFSET + 8);
    assert_eq!(u32::from_le_bytes(data), message(0).data);
    fixture.msix.trigger(0);
    fixture.msix.trigger(1);
    assert_eq!(sent(&fixture), [(0, message(0)), (1, message(1))]);
}

#[test]
fn the_device_answers_for_what_is_around_the_structures() {
    let fixture = Fixture::new();
    fixture.set_command(MEMORY);
    let structures = [
        (TABLE_OFFSET, MsixPlacement::table_size(VECTORS)),
        (PENDING_OFFSET, MsixPlacement::pending_size(VECTORS)),
    ];
    for (start, size) in structures {
        for offset in [start - 1, start + size] {
            let address = MEMORY_64.start + offset;
            assert_eq!(fixture.read(address), [echo(BAR_64, offset)], "{offset:#x}");
            fixture.write(address, &[1]);
        }
        for offset in start..start + size {
            fixture.write(MEMORY_64.start + offset, &[0]);
        }
    }
    let writes = fixture.echo.writes.lock().unwrap();
    let offsets: Vec<_> = writes.iter().map(|(_, offset, _)| *offset).collect();
    assert_eq!(offsets, [0xfff, 0x1030, 0x1fff, 0x2008]);
    // The pending bits are read-only, and bytes of the table are not written one at a time.
    assert_eq!(fixture.read(MEMORY_64.start + PENDING_OFFSET), [0; 8]);
    assert_eq!(
        fixture.read(MEMORY_64.start + TABLE_OFFSET + 12),
        [1, 0, 0, 0]
    );
}

#[test]
fn a_restored_bus_sends_what_was_pending() {
    let fixture = Fixture::new();
    fixture.set_command(MEMORY);
    fixture.set_config(CAPABILITY, ENABLE | FUNCTION_MASK);
    unmask(&fixture, MEMORY_64.start, 2);
    fixture.msix.trigger(2);
    let text = serde_json::to_string(&fixture.bus.state()).unwrap();

    let other = Fixture::new();
    other
        .bus
        .restore(&serde_json::from_str(&text).unwrap())
        .unwrap();
    assert_eq!(other.bus.state(), fixture.bus.state());
    assert!(other.msix.is_enabled());
    let moves = other.moves.0.lock().unwrap().clone();
    assert!(
        moves.contains(&(BAR_64, Some(MEMORY_64.start))),
        "{moves:?}"
    );
    assert_eq!(sent(&other), []);
    other.set_config(CAPABILITY, ENABLE);
    assert_eq!(sent(&other), [(2, message(2))]);
}

#[test]
fn the_pin_is_kept_from_its_line_while_msix_is_enabled() {
    let fixture = Fixture::new();
    let levels = || fixture.level.0.lock().unwrap().clone();
    fixture.pin.set(true);
    fixture.set_config(0x48, 0x8000_0000);
    assert_eq!(levels(), [true, false]);
    fixture.pin.set(false);
    fixture.pin.set(true);
    assert_eq!(levels(), [true, false]);
    // A bus that is restored like that does not assert it either.
    let state = fixture.bus.state();
    fixture.bus.restore(&state).unwrap();
    assert_eq!(levels(), [true, false]);
    fixture.set_config(0x48, 0);
    assert_eq!(levels(), [true, false, true]);
}
