use super::*;

fn space() -> ConfigSpace {
    ConfigSpace::new(&Identity::default())
}

fn byte(space: &ConfigSpace, at: usize) -> u8 {
    let mut data = [0xff];
    space.read(at, &mut data);
    data[0]
}

#[test]
fn capabilities_form_a_list_in_the_order_of_their_addition() {
    let mut space = space();
    assert_eq!(byte(&space, CAPABILITIES_POINTER), 0);
    assert_eq!(byte(&space, STATUS), 0);
    let sizes = [0_usize, 1, 2, 3, 14];
    let mut offsets = Vec::new();
    for (id, size) in (1..).zip(sizes) {
        let capability = Capability::new(id, vec![id; size]);
        offsets.push(space.add_capability("it", &capability).unwrap());
    }
    assert_eq!(offsets, [0x40, 0x44, 0x48, 0x4c, 0x54]);
    assert_eq!(byte(&space, STATUS), 0x10);
    let mut walked = Vec::new();
    let mut at = usize::from(byte(&space, CAPABILITIES_POINTER));
    while at != 0 {
        assert_eq!(usize::from(byte(&space, at)), walked.len() + 1);
        walked.push(at);
        at = usize::from(byte(&space, at + 1));
    }
    assert_eq!(walked, offsets);
}

#[test]
fn a_capability_that_does_not_fit_is_refused() {
    let mut space = space();
    let all = Capability::new(9, vec![0; 0xc0 - 2]);
    let too_much = Capability::new(9, vec![0; 0xc0 - 1]);
    let error = space.add_capability("it", &too_much).unwrap_err();
    assert_eq!(
        error.to_string(),
        "give `it` capability 0x9 of 193 bytes: 192 bytes of its configuration space are left"
    );
    assert_eq!(space.add_capability("it", &all).unwrap(), 0x40);
    let error = space
        .add_capability("it", &Capability::new(9, []))
        .unwrap_err();
    assert!(matches!(error, Error::CapabilityRoom { left: 0, .. }));
    let extended = ExtendedCapability::new(9, 1, vec![0; 0xf00 - 3]);
    let error = space.add_extended_capability("it", &extended).unwrap_err();
    assert!(matches!(error, Error::CapabilityRoom { left: 0xf00, .. }));
    let extended = ExtendedCapability::new(9, 1, vec![0; 0xf00 - 4]);
    assert_eq!(
        space.add_extended_capability("it", &extended).unwrap(),
        0x100
    );
    let error = space.add_extended_capability("it", &extended).unwrap_err();
    assert!(matches!(error, Error::CapabilityRoom { left: 0, .. }));
}

#[test]
fn a_write_mask_of_another_length_is_refused() {
    let capability = Capability::new(9, [1, 2, 3]).writable([0xff]);
    let error = space().add_capability("it", &capability).unwrap_err();
    assert!(matches!(
        error,
        Error::CapabilityMask {
            body: 3,
            mask: 1,
            ..
        }
    ));
}

#[test]
fn bars_of_sizes_that_none_has_are_refused() {
    for bar in [
        Bar::memory32(0),
        Bar::memory32(8),
        Bar::memory32(0x1001),
        Bar::memory32(1 << 32),
        Bar::memory64(1 << 63),
        Bar::memory64(u64::MAX),
        Bar::io(2),
        Bar::io(512),
        Bar::io(12),
    ] {
        let error = space().add_bar("it", bar).unwrap_err();
        assert!(matches!(error, Error::BarSize { .. }), "{bar:?}");
    }
    for bar in [
        Bar::memory32(16),
        Bar::memory32(1 << 31),
        Bar::memory64(16),
        Bar::memory64(1 << 62),
        Bar::io(4),
        Bar::io(256),
    ] {
        assert_eq!(space().add_bar("it", bar).unwrap(), 0, "{bar:?}");
    }
}

#[test]
fn six_registers_are_there_for_bars() {
    let mut space = space();
    for expected in [0, 2] {
        let number = space.add_bar("it", Bar::memory64(0x1000)).unwrap();
        assert_eq!(number, expected);
    }
    assert_eq!(space.add_bar("it", Bar::io(4)).unwrap(), 4);
    let error = space.add_bar("it", Bar::memory64(0x1000)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "give `it` another BAR: its six registers are taken"
    );
    assert_eq!(space.add_bar("it", Bar::memory32(0x10)).unwrap(), 5);
    assert!(space.add_bar("it", Bar::memory32(0x10)).is_err());
}

#[test]
fn a_function_without_bars_can_not_enable_them() {
    let mut space = space();
    space.write(COMMAND, &[0xff, 0xff]);
    assert_eq!(space.command(), 0x544);
    assert_eq!(space.decoded(), [None; BAR_COUNT]);
}

#[test]
fn a_state_is_short_and_restores_what_can_change() {
    let mut space = space();
    space.add_bar("it", Bar::memory64(1 << 20)).unwrap();
    let fresh = space.clone();
    space.write(BAR0, &0x12_3456_0000_0000_u64.to_le_bytes());
    space.write(COMMAND, &[2]);
    space.set_status_errors(0x8000);
    let state = space.state();
    assert!(state.registers.len() < 0x40);
    let mut other = fresh;
    other.check(&state).unwrap();
    other.restore(&state);
    assert_eq!(other.state(), state);
    assert_eq!(other.decoded()[0], Some(0x12_3456_0000_0000));
}

#[test]
fn a_state_of_another_function_is_refused() {
    let space = space();
    let other = ConfigSpace::new(&Identity {
        device_id: 5,
        ..Identity::default()
    });
    let error = space.check(&other.state()).unwrap_err();
    assert!(error.contains("register 0x2 is 0x05"), "{error}");
    let long = ConfigState {
        registers: vec![0; EXTENDED_SIZE + 1],
    };
    assert!(space.check(&long).is_err());
}
