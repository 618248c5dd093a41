use super::*;
use crate::test_support::{Random, every_access};

#[derive(Default)]
struct Router {
    sets: Mutex<Vec<Vec<MsiRoute>>>,
    resampled: Mutex<Vec<u32>>,
}

impl Router {
    fn sets(&self) -> usize {
        self.sets.lock().unwrap().len()
    }

    fn last(&self) -> Vec<MsiRoute> {
        self.sets.lock().unwrap().last().cloned().unwrap()
    }
}

impl MsiRouter for Router {
    fn set_routes(&self, routes: &[MsiRoute]) {
        self.sets.lock().unwrap().push(routes.to_vec());
    }

    fn resample(&self, gsi: u32) {
        self.resampled.lock().unwrap().push(gsi);
    }
}

fn ioapic(used: &[u32]) -> (IoApic, Arc<Router>) {
    let router = Arc::new(Router::default());
    (IoApic::new(used, router.clone()), router)
}

fn select(ioapic: &IoApic, register: u8) {
    assert!(ioapic.write(0, &[register, 0, 0, 0]).is_continue());
}

fn write(ioapic: &IoApic, register: u8, value: u32) {
    select(ioapic, register);
    assert!(ioapic.write(0x10, &value.to_le_bytes()).is_continue());
}

fn read(ioapic: &IoApic, register: u8) -> u32 {
    select(ioapic, register);
    let mut data = [0xff; 4];
    ioapic.read(0x10, &mut data);
    u32::from_le_bytes(data)
}

/// The register of the lower half of a pin's entry.
const fn low(pin: u8) -> u8 {
    REDIRECTION_TABLE + 2 * pin
}

const MASKED_LOW: u32 = MASKED as u32;
const LEVEL_LOW: u32 = LEVEL as u32;

fn route(gsi: u32, address: u64, data: u32) -> MsiRoute {
    MsiRoute {
        gsi,
        message: MsiMessage { address, data },
    }
}

#[test]
fn after_a_reset_all_is_masked_and_nobody_was_told() {
    let (ioapic, router) = ioapic(&[4, 5]);
    assert_eq!(read(&ioapic, VERSION), 0x0017_0020);
    for pin in 0..24 {
        assert_eq!(read(&ioapic, low(pin)), MASKED_LOW);
        assert_eq!(read(&ioapic, low(pin) + 1), 0);
    }
    assert_eq!(read(&ioapic, low(24)), 0);
    assert_eq!(router.sets(), 0);
}

#[test]
fn an_unmasked_entry_is_a_route() {
    let (ioapic, router) = ioapic(&[4, 9]);
    write(&ioapic, low(4) + 1, 3 << 24);
    assert_eq!(router.sets(), 0, "it is still masked");
    write(&ioapic, low(4), 0x31);
    assert_eq!(router.last(), [route(4, 0xfee0_3000, 0x31)]);
    // Lowest priority, logical, level-triggered and active low.
    write(&ioapic, low(9) + 1, 0xff << 24);
    write(&ioapic, low(9), 0x42 | 1 << 8 | 1 << 11 | 1 << 13 | 1 << 15);
    let expected = [route(4, 0xfee0_3000, 0x31), route(9, 0xfeef_f004, 0x8142)];
    assert_eq!(router.last(), expected);
    assert_eq!(router.sets(), 2);
    write(&ioapic, low(4), 0x31 | MASKED_LOW);
    assert_eq!(router.last(), expected[1..]);
}

#[test]
fn only_what_can_be_observed_is_told() {
    let (ioapic, router) = ioapic(&[4]);
    // As Linux does at boot: each entry masked, in two halves.
    for pin in 0..24 {
        write(&ioapic, low(pin) + 1, 0);
        write(&ioapic, low(pin), MASKED_LOW);
    }
    // A pin that nobody uses.
    write(&ioapic, low(5), 0x50);
    assert_eq!(router.sets(), 0);
    write(&ioapic, low(4), 0x31);
    write(&ioapic, low(4), 0x31);
    // The polarity is the line's, not the message's.
    write(&ioapic, low(4), 0x31 | 1 << 13);
    write(&ioapic, low(4) + 1, 0);
    assert_eq!(router.sets(), 1);
    // From an 8259, which is not there.
    write(&ioapic, low(4), 0x731);
    assert_eq!(router.last(), []);
}

#[test]
fn a_change_of_affinity_ends_with_the_new_destination() {
    let (ioapic, router) = ioapic(&[4]);
    write(&ioapic, low(4), 0x31);
    write(&ioapic, low(4), 0x31 | MASKED_LOW);
    write(&ioapic, low(4) + 1, 1 << 24);
    write(&ioapic, low(4), 0x32 | MASKED_LOW);
    assert_eq!(router.sets(), 2);
    write(&ioapic, low(4), 0x32);
    assert_eq!(router.sets(), 3);
    assert_eq!(router.last(), [route(4, 0xfee0_1000, 0x32)]);
}

#[test]
fn the_extended_destination_goes_where_kvm_looks_for_it() {
    let (ioapic, router) = ioapic(&[4]);
    // APIC id 0x1234: bits 0 to 7 in the entry's bits 56 on, 8 to 14 in 49 on.
    write(&ioapic, low(4) + 1, 0x34 << 24 | 0x12 << 17);
    write(&ioapic, low(4), 0x31);
    assert_eq!(router.last(), [route(4, 0x1200_fee3_4000, 0x31)]);
}

#[test]
fn read_only_and_reserved_bits_stay() {
    let (ioapic, _) = ioapic(&[]);
    write(&ioapic, low(7), u32::MAX);
    write(&ioapic, low(7) + 1, u32::MAX);
    assert_eq!(read(&ioapic, low(7)), 0x0001_afff);
    assert_eq!(read(&ioapic, low(7) + 1), 0xfffe_0000);
    write(&ioapic, ID, u32::MAX);
    assert_eq!(read(&ioapic, ID), 0x0f00_0000);
    assert_eq!(read(&ioapic, ARBITRATION), 0x0f00_0000);
    write(&ioapic, VERSION, 0);
    write(&ioapic, ARBITRATION, 0);
    assert_eq!(read(&ioapic, VERSION), 0x0017_0020);
    assert_eq!(read(&ioapic, ARBITRATION), 0x0f00_0000);
}

#[test]
fn narrow_and_wide_accesses_are_those_of_kvm() {
    let (ioapic, _) = ioapic(&[]);
    select(&ioapic, low(3));
    assert!(ioapic.write(0x10, &[0x44]).is_continue());
    assert_eq!(read(&ioapic, low(3)), 0x44, "extended with zeros");
    assert!(ioapic.write(0x10, &[1, 0, 1, 0, 9, 9, 9, 9]).is_continue());
    let mut data = [0xff; 8];
    ioapic.read(0x10, &mut data);
    assert_eq!(data, [1, 0, 1, 0, 0, 0, 0, 0]);
    ioapic.read(0, &mut data[..1]);
    assert_eq!(data[0], low(3));
    // Between the registers there is nothing.
    assert!(ioapic.write(0x12, &[0; 4]).is_continue());
    data = [0xff; 8];
    ioapic.read(0x12, &mut data);
    assert_eq!(data, [0xff; 8]);
    assert_eq!(read(&ioapic, low(3)), 0x1_0001);
}

#[test]
fn a_level_interrupt_is_delivered_again_only_after_its_end() {
    let (ioapic, router) = ioapic(&[10, 11]);
    assert!(!ioapic.deliver(10), "masked");
    write(&ioapic, low(10), 0x60 | LEVEL_LOW);
    write(&ioapic, low(11), 0x61);
    assert!(ioapic.deliver(10));
    assert!(!ioapic.deliver(10));
    assert_eq!(read(&ioapic, low(10)), 0x60 | LEVEL_LOW | 1 << 14);
    // A write cannot change it.
    write(&ioapic, low(10), 0x60 | LEVEL_LOW);
    assert!(!ioapic.deliver(10));
    ioapic.end_of_interrupt(0x61);
    ioapic.end_of_interrupt(0x62);
    assert!(
        router.resampled.lock().unwrap().is_empty(),
        "no level entry"
    );
    ioapic.end_of_interrupt(0x60);
    assert_eq!(*router.resampled.lock().unwrap(), [10]);
    assert!(ioapic.deliver(10));
    // The register for it, and the old way: edge and back.
    assert!(ioapic.write(0x40, &[0x60, 0, 0, 0]).is_continue());
    assert!(ioapic.deliver(10));
    write(&ioapic, low(10), 0x60);
    write(&ioapic, low(10), 0x60 | LEVEL_LOW);
    assert!(ioapic.deliver(10));
    // Edges have no end.
    assert!(ioapic.deliver(11) && ioapic.deliver(11));
    assert!(!ioapic.deliver(24) && !ioapic.deliver(u32::MAX));
}

#[test]
fn a_restored_one_sets_its_routes() {
    let (ioapic, router) = ioapic(&[4, 10]);
    write(&ioapic, ID, 5 << 24);
    write(&ioapic, low(4), 0x31);
    write(&ioapic, low(10), 0x60 | LEVEL_LOW);
    assert!(ioapic.deliver(10));
    let state = serde_json::to_string(&ioapic.state()).unwrap();
    let state: IoApicState = serde_json::from_str(&state).unwrap();
    let restored = Arc::new(Router::default());
    let copy = IoApic::from_state(&state, &[4, 10], restored.clone());
    assert_eq!(copy.state(), ioapic.state());
    assert_eq!(restored.sets(), 1);
    assert_eq!(restored.last(), router.last());
    assert!(!copy.deliver(10), "not ended yet");
}

#[test]
fn a_nonsense_state_does_no_harm() {
    let state = IoApicState {
        id: u32::MAX,
        select: 0xff,
        entries: vec![u64::MAX; 1000],
    };
    let (_, router) = ioapic(&[]);
    let ioapic = IoApic::from_state(&state, &[0, 23, 24, u32::MAX], router);
    assert_eq!(read(&ioapic, low(0) + 1), 0xfffe_0000);
    let state = IoApicState {
        entries: Vec::new(),
        ..state
    };
    let (_, router) = self::ioapic(&[]);
    let ioapic = IoApic::from_state(&state, &[0, 23], router.clone());
    assert_eq!(read(&ioapic, low(23)), MASKED_LOW);
    assert_eq!(router.sets(), 0);
}

#[test]
fn hostile_writes_never_end_the_machine_nor_break_the_routes() {
    let used = [0, 4, 9, 23];
    let (ioapic, router) = ioapic(&used);
    every_access(&ioapic, 0x48, |_, _, end| assert!(end.is_continue()));
    let mut random = Random::new(1);
    for _ in 0..20_000 {
        let bits = random.next();
        write(&ioapic, bits as u8, (bits >> 8) as u32);
        ioapic.end_of_interrupt((bits >> 40) as u8);
        ioapic.deliver((bits >> 48) as u32 % 32);
    }
    // What the router has is what the table says, and each change was one.
    let sets = router.sets.lock().unwrap();
    assert!(sets.len() > 100);
    assert!(sets.windows(2).all(|pair| pair[0] != pair[1]));
    let state = ioapic.state();
    let expected: Vec<_> = used
        .iter()
        .filter_map(|gsi| {
            let message = message(state.entries[*gsi as usize])?;
            Some(MsiRoute { gsi: *gsi, message })
        })
        .collect();
    assert_eq!(sets.last(), Some(&expected));
}
