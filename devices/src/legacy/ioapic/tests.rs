use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::test_support::{Random, every_access};

#[derive(Default)]
struct Router {
    sets: Mutex<Vec<Vec<MsiRoute>>>,
    /// The data of the messages that were sent.
    sent: Mutex<Vec<u32>>,
    /// No processor takes a message.
    deaf: AtomicBool,
}

impl Router {
    fn sets(&self) -> usize {
        self.sets.lock().unwrap().len()
    }

    /// The data of the messages since the last call.
    fn take_sent(&self) -> Vec<u32> {
        std::mem::take(&mut self.sent.lock().unwrap())
    }

    fn last(&self) -> Vec<MsiRoute> {
        self.sets.lock().unwrap().last().cloned().unwrap()
    }
}

impl MsiRouter for Router {
    fn set_routes(&self, routes: &[MsiRoute]) {
        self.sets.lock().unwrap().push(routes.to_vec());
    }

    fn send(&self, message: MsiMessage) -> bool {
        self.sent.lock().unwrap().push(message.data);
        !self.deaf.load(Ordering::Relaxed)
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

const SENT: u32 = 0x60 | LEVEL_LOW;

#[test]
fn an_asserted_level_is_delivered_once_an_end_of_interrupt() {
    let (ioapic, router) = ioapic(&[10, 11]);
    write(&ioapic, low(10), 0x60 | LEVEL_LOW);
    assert!(router.take_sent().is_empty(), "not asserted");
    ioapic.set_level(10, true);
    ioapic.set_level(10, true);
    assert_eq!(router.take_sent(), [SENT]);
    assert_eq!(read(&ioapic, low(10)), 0x60 | LEVEL_LOW | 1 << 14);
    // A write cannot change that it waits for its end.
    write(&ioapic, low(10), 0x60 | LEVEL_LOW);
    ioapic.end_of_interrupt(0x61);
    assert!(router.take_sent().is_empty(), "another vector");
    ioapic.end_of_interrupt(0x60);
    assert_eq!(router.take_sent(), [SENT], "it is still asserted");
    ioapic.set_level(10, false);
    ioapic.end_of_interrupt(0x60);
    assert!(router.take_sent().is_empty());
    assert_eq!(read(&ioapic, low(10)), 0x60 | LEVEL_LOW);
    // The register for the end of interrupts.
    ioapic.set_level(10, true);
    assert!(ioapic.write(0x40, &[0x60, 0, 0, 0]).is_continue());
    assert_eq!(router.take_sent(), [SENT, SENT]);
}

#[test]
fn a_level_that_comes_and_goes_while_it_is_served_is_not_delivered() {
    let (ioapic, router) = ioapic(&[10]);
    write(&ioapic, low(10), 0x60 | LEVEL_LOW);
    ioapic.set_level(10, true);
    for _ in 0..3 {
        ioapic.set_level(10, false);
        ioapic.set_level(10, true);
    }
    ioapic.set_level(10, false);
    ioapic.end_of_interrupt(0x60);
    assert_eq!(router.take_sent(), [SENT]);
}

#[test]
fn a_level_that_was_masked_is_delivered_when_it_is_unmasked() {
    let (ioapic, router) = ioapic(&[10]);
    ioapic.set_level(10, true);
    write(&ioapic, low(10), 0x60 | LEVEL_LOW | MASKED_LOW);
    assert!(router.take_sent().is_empty());
    write(&ioapic, low(10), 0x60 | LEVEL_LOW);
    assert_eq!(router.take_sent(), [SENT]);
    // Masked while it is served: its end is noted, for which KVM needs the route, and the level
    // kept.
    write(&ioapic, low(10), 0x60 | LEVEL_LOW | MASKED_LOW);
    assert_eq!(router.last().len(), 1);
    ioapic.end_of_interrupt(0x60);
    assert!(router.take_sent().is_empty());
    write(&ioapic, low(10), 0x60 | LEVEL_LOW);
    assert_eq!(router.take_sent(), [SENT]);
    // How guests end one without the register: to edge and back.
    write(&ioapic, low(10), 0x60 | MASKED_LOW);
    write(&ioapic, low(10), 0x60 | LEVEL_LOW);
    assert_eq!(router.take_sent(), [SENT]);
}

#[test]
fn a_level_on_an_edge_triggered_entry_is_delivered_when_it_rises() {
    let (ioapic, router) = ioapic(&[10]);
    write(&ioapic, low(10), 0x60);
    ioapic.set_level(10, true);
    ioapic.set_level(10, true);
    ioapic.end_of_interrupt(0x60);
    assert_eq!(router.take_sent(), [0x60]);
    ioapic.set_level(10, false);
    ioapic.set_level(10, true);
    assert_eq!(router.take_sent(), [0x60]);
}

#[test]
fn what_no_processor_took_has_no_end_to_wait_for() {
    let (ioapic, router) = ioapic(&[10]);
    router.deaf.store(true, Ordering::Relaxed);
    write(&ioapic, low(10), 0x60 | LEVEL_LOW);
    ioapic.set_level(10, true);
    assert_eq!(router.take_sent(), [SENT]);
    assert_eq!(read(&ioapic, low(10)), 0x60 | LEVEL_LOW);
    router.deaf.store(false, Ordering::Relaxed);
    write(&ioapic, low(10) + 1, 0);
    assert_eq!(router.take_sent(), [SENT]);
}

#[test]
fn pins_that_nothing_is_connected_to_have_no_level() {
    let (ioapic, router) = ioapic(&[10]);
    write(&ioapic, low(11), 0x60 | LEVEL_LOW);
    for gsi in [11, 24, u32::MAX] {
        ioapic.set_level(gsi, true);
    }
    assert!(router.take_sent().is_empty());
}

#[test]
fn a_restored_one_sets_its_routes() {
    let (ioapic, router) = ioapic(&[4, 10]);
    write(&ioapic, ID, 5 << 24);
    write(&ioapic, low(4), 0x31);
    write(&ioapic, low(10), 0x60 | LEVEL_LOW);
    ioapic.set_level(10, true);
    let state = serde_json::to_string(&ioapic.state()).unwrap();
    let state: IoApicState = serde_json::from_str(&state).unwrap();
    let restored = Arc::new(Router::default());
    let copy = IoApic::from_state(&state, &[4, 10], restored.clone());
    assert_eq!(copy.state(), ioapic.state());
    assert_eq!(restored.sets(), 1);
    assert_eq!(restored.last(), router.last());
    copy.set_level(10, true);
    assert!(restored.take_sent().is_empty(), "not ended yet");
    copy.end_of_interrupt(0x60);
    assert_eq!(restored.take_sent(), [SENT]);
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
        ioapic.set_level((bits >> 48) as u32 % 32, bits >> 63 != 0);
    }
    // What the router has is what the table says, and each change was one.
    let sets = router.sets.lock().unwrap();
    assert!(sets.len() > 100);
    assert!(sets.windows(2).all(|pair| pair[0] != pair[1]));
    let state = ioapic.state();
    let expected: Vec<_> = used
        .iter()
        .filter_map(|gsi| {
            let message = super::route(state.entries[*gsi as usize])?;
            Some(MsiRoute { gsi: *gsi, message })
        })
        .collect();
    assert_eq!(sets.last(), Some(&expected));
}
