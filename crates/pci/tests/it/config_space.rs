//! Every register, at every width and alignment, through both mechanisms.

use kiln_device_api::{BusDevice, ExitRequest};
use kiln_pci::{Ecam, PciAddress};

use std::ops::ControlFlow;

use crate::fixture::{ADDRESS, Fixture, Level, Random};

/// What the function's registers are, which bits of them can be written, and which are cleared by
/// writing ones: by the specification and the description of the fixture, not by the code.
struct Model {
    registers: Vec<u8>,
    writable: Vec<u8>,
    clearable: Vec<u8>,
}

impl Model {
    fn new() -> Self {
        let mut model = Self {
            registers: vec![0; 0x1000],
            writable: vec![0; 0x1000],
            clearable: vec![0; 0x1000],
        };
        for (at, value, writable) in [
            (0x00_usize, 0x1042_1af4_u32, 0_u32),
            // Command: I/O, memory, bus master, parity, SERR and INTx disable. Status: capabilities.
            (0x04, 0x0010_0000, 0x0000_0547),
            (0x08, 0x0180_5a01, 0),
            // Cache line size and latency timer; header type 0, no BIST.
            (0x0c, 0, 0x0000_ffff),
            (0x10, 0xe000_0000, 0xffff_f000),
            (0x14, 0x0000_000c, 0xffff_c000),
            (0x18, 0x0000_0010, 0xffff_ffff),
            (0x1c, 0x0000_c001, 0xffff_ffe0),
            (0x2c, 0x1100_1af4, 0),
            (0x34, 0x0000_0040, 0),
            // Slot 1's INTA# is on the second line, GSI 17.
            (0x3c, 0x0000_0111, 0x0000_00ff),
            (0x40, 0x0108_4809, 0),
            (0x44, 0x0504_0302, 0x8000_0fff),
            // Three vectors; enable and function mask.
            (0x48, 0x0002_0011, 0xc000_0000),
            (0x4c, 0x0000_1001, 0),
            (0x50, 0x0000_2001, 0),
            (0x100, 0x10c1_0003, 0),
            (0x104, 0x0403_0201, 0),
            (0x108, 0x0807_0605, 0),
            (0x10c, 0x0002_000b, 0),
            (0x110, 0x0909_0909, 0),
        ] {
            model.registers[at..at + 4].copy_from_slice(&value.to_le_bytes());
            model.writable[at..at + 4].copy_from_slice(&writable.to_le_bytes());
        }
        model.clearable[0x07] = 0xf9;
        model
    }

    fn write(&mut self, at: usize, data: &[u8]) {
        for (at, byte) in (at..self.registers.len()).zip(data) {
            let writable = self.writable[at];
            self.registers[at] &= !(self.clearable[at] & byte);
            self.registers[at] = self.registers[at] & !writable | byte & writable;
        }
    }

    /// What is read at an offset: nothing beyond the registers.
    fn read(&self, at: usize, data: &mut [u8]) {
        for (at, byte) in (at..self.registers.len()).zip(data) {
            *byte = self.registers[at];
        }
    }

    fn check_all(&self, fixture: &Fixture, when: &str) {
        let mut all = vec![0xff; 0x1000];
        fixture.ecam.read(ADDRESS.ecam_offset(), &mut all);
        for (at, (found, expected)) in all.iter().zip(&self.registers).enumerate() {
            assert_eq!(found, expected, "register {at:#x} {when}");
        }
    }
}

const PATTERNS: [u64; 5] = [
    0,
    u64::MAX,
    0xa5a5_a5a5_a5a5_a5a5,
    0x5a5a_5a5a_5a5a_5a5a,
    0x0123_4567_89ab_cdef,
];

#[test]
fn every_register_reads_as_specified_at_every_width_and_alignment_through_ecam() {
    let fixture = Fixture::new();
    let model = Model::new();
    for at in 0..0x1000 {
        for width in [1, 2, 4, 8] {
            let mut found = [0xff; 8];
            let mut expected = [0xff; 8];
            let offset = ADDRESS.ecam_offset() + at as u64;
            fixture.ecam.read(offset, &mut found[..width]);
            // Behind the function is the next, which does not exist.
            model.read(at, &mut expected[..width]);
            assert_eq!(found, expected, "{width} bytes at {at:#x}");
        }
    }
}

#[test]
fn every_register_takes_writes_of_every_width_and_alignment_through_ecam() {
    let fixture = Fixture::new();
    let mut model = Model::new();
    for at in 0..0x1000 {
        for width in [1, 2, 4, 8] {
            for pattern in PATTERNS {
                let data = &pattern.to_le_bytes()[..width];
                let offset = ADDRESS.ecam_offset() + at as u64;
                assert!(fixture.ecam.write(offset, data).is_continue());
                model.write(at, data);
                let mut found = [0xff; 16];
                let mut expected = [0xff; 16];
                let from = at.saturating_sub(4);
                let offset = ADDRESS.ecam_offset() + from as u64;
                fixture.ecam.read(offset, &mut found);
                model.read(from, &mut expected);
                assert_eq!(found, expected, "{width} bytes {pattern:#x} at {at:#x}");
            }
        }
        if at % 64 == 0 {
            model.check_all(&fixture, &format!("after writes to {at:#x}"));
        }
    }
    model.check_all(&fixture, "in the end");
}

#[test]
fn the_ports_read_and_write_the_first_256_bytes_at_every_width_and_alignment() {
    let fixture = Fixture::new();
    let mut model = Model::new();
    for register in (0..0x100_usize).step_by(4) {
        let address = 0x8000_0800 | register as u32;
        assert!(fixture.ports.write(0, &address.to_le_bytes()).is_continue());
        for within in 0..4_usize {
            for width in [1, 2, 4] {
                let fits = within + width <= 4;
                for pattern in PATTERNS {
                    let data = &pattern.to_le_bytes()[..width];
                    assert!(fixture.ports.write(4 + within as u64, data).is_continue());
                    if fits {
                        model.write(register + within, data);
                    }
                    let mut found = [0xff; 4];
                    let mut expected = [0xff; 4];
                    fixture.ports.read(4 + within as u64, &mut found[..width]);
                    if fits {
                        model.read(register + within, &mut expected[..width]);
                    }
                    assert_eq!(found, expected, "{width} bytes at {register:#x}+{within}");
                }
            }
        }
        model.check_all(&fixture, &format!("after writes to {register:#x}"));
    }
}

#[test]
fn what_is_read_only_never_changes() {
    let fixture = Fixture::new();
    let model = Model::new();
    let mut random = Random::new(0x0c0f_fee1);
    for round in 0..40_000_u32 {
        let data = random.next().to_le_bytes();
        let width = 1 << random.below(4);
        if random.below(2) == 0 {
            let offset = random.below(0x140);
            let offset = ADDRESS.ecam_offset() + offset;
            assert!(fixture.ecam.write(offset, &data[..width]).is_continue());
        } else {
            let address = 0x8000_0800 | random.below(0x100) as u32;
            assert!(fixture.ports.write(0, &address.to_le_bytes()).is_continue());
            let at = 4 + random.below(4);
            assert!(fixture.ports.write(at, &data[..width.min(4)]).is_continue());
        }
        if round % 100 != 0 {
            continue;
        }
        let mut all = vec![0xff; 0x1000];
        fixture.ecam.read(ADDRESS.ecam_offset(), &mut all);
        for (at, (found, original)) in all.iter().zip(&model.registers).enumerate() {
            let fixed = !(model.writable[at] | model.clearable[at]);
            assert_eq!(found & fixed, original & fixed, "register {at:#x}");
        }
    }
}

#[test]
fn where_no_function_is_ones_are_read_and_writes_are_dropped() {
    let fixture = Fixture::new();
    let before = fixture.bus.state();
    for devfn in 0..=0xff_u64 {
        let offset = devfn << 12;
        if offset == ADDRESS.ecam_offset() || devfn == 0 {
            continue;
        }
        for register in [0, 4, 0x10, 0xfff] {
            let mut data = [0xff; 1];
            let _ = fixture.ecam.write(offset + register, &[0]);
            fixture.ecam.read(offset + register, &mut data);
            assert_eq!(data, [0xff], "function {devfn:#x}");
        }
    }
    for beyond in [Ecam::SIZE, Ecam::SIZE + 0x8000, u64::MAX] {
        let mut data = [0xff; 8];
        fixture.ecam.read(beyond, &mut data);
        assert_eq!(data, [0xff; 8]);
        assert!(fixture.ecam.write(beyond, &data).is_continue());
    }
    assert_eq!(fixture.bus.state(), before);
}

#[test]
fn an_access_across_the_border_of_two_functions_is_of_both() {
    let fixture = Fixture::new();
    // From the end of function 0.7, which is not there, to the start of 1.0.
    let mut data = [0xff; 8];
    fixture.ecam.read(ADDRESS.ecam_offset() - 4, &mut data);
    assert_eq!(data, [0xff, 0xff, 0xff, 0xff, 0xf4, 0x1a, 0x42, 0x10]);
}

#[test]
fn a_host_bridge_is_at_the_first_address() {
    let fixture = Fixture::new();
    let mut data = [0xff; 0x40];
    fixture
        .bus
        .config_read(PciAddress::HOST_BRIDGE, 0, &mut data);
    assert_eq!(data[0..4], [0x36, 0x1b, 0x08, 0x00]);
    // Class, and a header of type 0 of one function.
    assert_eq!(data[0x9..0xc], [0, 0, 6]);
    assert_eq!(data[0xe], 0);
    assert_eq!(data[0x3d], 0);
}

#[test]
fn errors_in_the_status_register_stay_until_ones_are_written() {
    let fixture = Fixture::new();
    fixture.bus.set_status_errors(ADDRESS, 0xffff);
    assert_eq!(fixture.config(4) >> 16, 0xf910);
    // Zeros clear nothing, and a write of the command register alone neither.
    fixture.set_command(0xffff);
    fixture.set_config(4, 0);
    assert_eq!(fixture.config(4) >> 16, 0xf910);
    fixture.set_config(4, 0x2100_0000);
    assert_eq!(fixture.config(4) >> 16, 0xd810);
    // A byte at a time, as well.
    let written = fixture.bus.config_write(ADDRESS, 7, &[0x80]);
    assert!(written.is_continue());
    assert_eq!(fixture.config(4) >> 16, 0x5810);
}

#[test]
fn the_interrupt_status_bit_shows_the_pin_and_the_line_follows_unless_disabled() {
    let fixture = Fixture::new();
    let levels = |level: &Level| level.0.lock().unwrap().clone();
    assert_eq!(fixture.config(4) & 0x0008_0000, 0);
    fixture.pin.set(true);
    assert_eq!(fixture.config(4) & 0x0008_0000, 0x0008_0000);
    let mut byte = [0xff];
    fixture.bus.config_read(ADDRESS, 6, &mut byte);
    assert_eq!(byte, [0x18]);
    fixture.bus.config_read(ADDRESS, 7, &mut byte);
    assert_eq!(byte, [0]);
    assert_eq!(levels(&fixture.level), [true]);
    fixture.set_command(0x0400);
    assert_eq!(levels(&fixture.level), [true, false]);
    assert_eq!(fixture.config(4) & 0x0008_0000, 0x0008_0000);
    fixture.set_command(0);
    fixture.pin.set(false);
    assert_eq!(levels(&fixture.level), [true, false, true, false]);
    assert_eq!(fixture.config(4) & 0x0008_0000, 0);
}

#[test]
fn the_reset_control_port_resets_the_machine() {
    let fixture = Fixture::new();
    assert!(fixture.ports.write(1, &[0x02]).is_continue());
    let mut data = [0xff];
    fixture.ports.read(1, &mut data);
    assert_eq!(data, [0x02]);
    let end = fixture.ports.write(1, &[0x06]);
    assert_eq!(end, ControlFlow::Break(ExitRequest::Reset));
}

#[test]
fn the_address_port_is_taken_as_32_bits_only() {
    let fixture = Fixture::new();
    let address = |fixture: &Fixture| {
        let mut data = [0xff; 4];
        fixture.ports.read(0, &mut data);
        u32::from_le_bytes(data)
    };
    let _ = fixture.ports.write(0, &u32::MAX.to_le_bytes());
    assert_eq!(address(&fixture), 0x80ff_fffc);
    for (offset, data) in [
        (3, &[1][..]),
        (0, &[0]),
        (2, &[0]),
        (0, &[0, 0]),
        (2, &[0, 0]),
    ] {
        assert!(fixture.ports.write(offset, data).is_continue());
        let mut found = [0xff; 2];
        fixture.ports.read(offset, &mut found[..data.len()]);
        assert_eq!(found, [0xff; 2], "at {offset}");
    }
    assert_eq!(address(&fixture), 0x80ff_fffc);
    // Across the border of address and data, and beyond the ports.
    for offset in [1, 2, 3, 5, 6, 7, 8, u64::MAX] {
        let mut data = [0xff; 4];
        fixture.ports.read(offset, &mut data);
        assert_eq!(data, [0xff; 4], "at {offset}");
        assert!(fixture.ports.write(offset, &[0; 4]).is_continue());
    }
}

#[test]
fn the_data_port_needs_an_enabled_address_on_bus_0() {
    let fixture = Fixture::new();
    for (address, expected) in [
        (0x8000_0800_u32, 0x1042_1af4_u32),
        (0x0000_0800, u32::MAX),
        (0x8001_0800, u32::MAX),
        (0x80ff_0800, u32::MAX),
        (0x8000_0900, u32::MAX),
        (0x8000_0000, 0x0008_1b36),
    ] {
        let _ = fixture.ports.write(0, &address.to_le_bytes());
        let mut data = [0xff; 4];
        fixture.ports.read(4, &mut data);
        assert_eq!(u32::from_le_bytes(data), expected, "{address:#x}");
    }
}

#[test]
fn the_ports_keep_their_state() {
    let fixture = Fixture::new();
    let _ = fixture.ports.write(0, &0x8000_0844_u32.to_le_bytes());
    let _ = fixture.ports.write(1, &[0x0a]);
    let text = serde_json::to_string(&fixture.ports.state()).unwrap();
    let other = Fixture::new();
    other.ports.restore(&serde_json::from_str(&text).unwrap());
    assert_eq!(other.ports.state(), fixture.ports.state());
    let mut data = [0xff; 4];
    other.ports.read(0, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8000_0844);
}
