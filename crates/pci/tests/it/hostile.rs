//! A guest that does anything, anywhere, from several vCPUs.

use std::thread;

use kiln_device_api::BusDevice;

use crate::fixture::{ADDRESS, Fixture, IO, MEMORY_32, MEMORY_64, Random, VECTORS};

/// One access that makes no sense.
fn nonsense(fixture: &Fixture, random: &mut Random) {
    let data = random.next().to_le_bytes();
    let width = 1 << random.below(4);
    let write = random.below(2) == 0;
    let mut answer = [0xff; 8];
    let access = |device: &dyn BusDevice, offset: u64, answer: &mut [u8]| {
        if write {
            // Only the reset port ends a machine, and that is what a guest may do.
            let _ = device.write(offset, &data[..width]);
        } else {
            device.read(offset, &mut answer[..width]);
        }
    };
    match random.below(6) {
        0 => access(&fixture.ecam, random.next(), &mut answer),
        1 => {
            let offset = ADDRESS.ecam_offset() + random.below(0x120);
            access(&fixture.ecam, offset, &mut answer);
        }
        2 => {
            let register = 0x8000_0800 | random.below(0x100) as u32;
            let _ = fixture.ports.write(0, &register.to_le_bytes());
            access(&fixture.ports, random.below(10), &mut answer);
        }
        3 => access(&fixture.ports, random.below(10), &mut answer),
        4 => {
            // Lets the BARs answer, now and then where they were.
            fixture.set_command(random.next() as u16);
            fixture.set_config(0x14, MEMORY_64.start as u32);
            fixture.set_config(0x18, (MEMORY_64.start >> 32) as u32);
        }
        _ => {
            let (start, size) = [
                (MEMORY_32.start, 0x2000),
                (MEMORY_64.start, 0x5000),
                (MEMORY_64.start + 0x1000, 0x40),
                (IO.start, 0x40),
            ][random.below(4) as usize];
            let address = start + random.below(size);
            if write {
                fixture.write(address, &data[..width]);
            } else {
                let _: [u8; 8] = fixture.read(address);
            }
        }
    }
}

#[test]
fn random_accesses_from_several_vcpus_break_nothing() {
    let fixture = Fixture::new();
    thread::scope(|scope| {
        for seed in 1..=3 {
            let fixture = &fixture;
            scope.spawn(move || {
                let mut random = Random::new(seed * 0x9e37_79b9);
                for round in 0..20_000_u16 {
                    nonsense(fixture, &mut random);
                    fixture.msix.trigger(round % (VECTORS + 2));
                    fixture.pin.set(round % 3 == 0);
                }
            });
        }
    });
    // Whatever state that is: it can be saved, and another bus can be brought into it.
    let state = fixture.bus.state();
    let other = Fixture::new();
    let text = serde_json::to_string(&state).unwrap();
    other
        .bus
        .restore(&serde_json::from_str(&text).unwrap())
        .unwrap();
    // A vector that was pending and is open has been sent, but the pin is as it was.
    assert_eq!(
        other.bus.state().functions[1].config,
        state.functions[1].config
    );
    assert_eq!(other.pin.is_asserted(), fixture.pin.is_asserted());
    // And it can be reset.
    let fresh = Fixture::new();
    fixture.bus.reset();
    assert_eq!(fixture.bus.state(), fresh.bus.state());
    assert_eq!(fixture.level.0.lock().unwrap().last(), Some(&false));
}

#[test]
fn random_states_are_refused_or_kept_within_what_registers_can_have() {
    let fixture = Fixture::new();
    let text = serde_json::to_string(&fixture.bus.state()).unwrap();
    let mut random = Random::new(77);
    let (mut taken, mut refused) = (0, 0);
    for _ in 0..2000 {
        let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let registers = value["functions"][1]["config"]["registers"]
            .as_array_mut()
            .unwrap();
        let at = random.below(registers.len() as u64) as usize;
        registers[at] = (random.below(256)).into();
        let state = serde_json::from_value(value).unwrap();
        let before = fixture.bus.state();
        match fixture.bus.restore(&state) {
            Ok(()) => {
                taken += 1;
                assert_eq!(fixture.bus.state(), state);
            }
            Err(error) => {
                refused += 1;
                assert!(error.to_string().contains("00:01.0"), "{error}");
                assert_eq!(fixture.bus.state(), before);
            }
        }
        // The identity stays what it is.
        assert_eq!(fixture.config(0), 0x1042_1af4);
    }
    assert!(
        taken > 100 && refused > 100,
        "{taken} taken, {refused} refused"
    );
}
