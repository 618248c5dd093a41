use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_memory::GuestSlice;
use kiln_virtio_device::testing::{Buffer, MockDriver, register, status, wait_until};

use super::*;
use crate::virtio::hostile::{Random, storm};

mod control;
mod limits;

const RX: usize = 0;
const TX: usize = 1;
const DATA: u64 = 0x20_0000;
const TX_DATA: u64 = 0x40_0000;

const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;
const MRG_RXBUF: u64 = 1 << 15;

const ALL: Offloads = Offloads {
    checksum: true,
    tso4: true,
    tso6: true,
    ecn: true,
    ufo: true,
    uso: true,
};

/// What a test makes the cable do, and learns of it.
#[derive(Default)]
struct Controls {
    fail: AtomicBool,
    receives: AtomicUsize,
    guest: Mutex<Option<Offloads>>,
}

/// A datagram socket whose other end is the test.
struct Cable {
    socket: UnixDatagram,
    offloads: Offloads,
    controls: Arc<Controls>,
}

impl NetBackend for Cable {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_offloads(&mut self, guest: Offloads) -> io::Result<()> {
        *self.controls.guest.lock().unwrap() = Some(guest);
        Ok(())
    }

    fn send(&mut self, packet: &[GuestSlice<'_>]) -> io::Result<()> {
        crate::virtio::iovec::write_packet(self.socket.as_fd(), packet)
    }

    fn receive(&mut self, buffers: &[GuestSlice<'_>]) -> io::Result<usize> {
        self.controls.receives.fetch_add(1, Ordering::SeqCst);
        if self.controls.fail.load(Ordering::SeqCst) {
            return Err(io::Error::other("as the test asked"));
        }
        crate::virtio::iovec::read_packet(self.socket.as_fd(), buffers)
    }

    fn mtu(&self) -> Option<u16> {
        Some(1400)
    }
}

struct Setup {
    driver: MockDriver,
    peer: UnixDatagram,
    controls: Arc<Controls>,
    counters: Arc<NetCounters>,
    control: NetControl,
}

impl Setup {
    fn new(offloads: Offloads, features: u64, size: u16) -> Self {
        let (socket, peer) = UnixDatagram::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        peer.set_read_timeout(Some(kiln_virtio_device::testing::LONG))
            .unwrap();
        let controls = Arc::new(Controls::default());
        let cable = Cable {
            socket,
            offloads,
            controls: Arc::clone(&controls),
        };
        let options = NetOptions {
            mac: Some(MacAddress::new([2, 1, 2, 3, 4, 5])),
            ..Default::default()
        };
        let net = Net::new(cable, options).unwrap();
        let (counters, control) = (net.counters(), net.control());
        let mut driver = MockDriver::new(Box::new(net));
        driver.start(features, size);
        Self {
            driver,
            peer,
            controls,
            counters,
            control,
        }
    }

    /// Gives the device a buffer to receive into, of these pieces.
    fn give(&mut self, pieces: &[(u64, u32)]) {
        let buffers: Vec<_> = pieces
            .iter()
            .map(|(address, len)| Buffer::writable(*address, *len))
            .collect();
        self.driver.queues[RX].add(&self.driver.memory, &buffers);
        self.driver.notify(RX as u32);
    }

    fn send_from_network(&self, packet: &[u8]) {
        self.peer.send(packet).unwrap();
    }

    fn used(&mut self) -> (u32, u32) {
        self.driver.queues[RX].wait_used(&self.driver.memory)
    }

    fn count(&self, counter: impl Fn(&NetCounters) -> &std::sync::atomic::AtomicU64) -> u64 {
        counter(&self.counters).load(Ordering::Relaxed)
    }

    /// A packet each way: it must go through whole.
    fn check_both_ways(&mut self) {
        let packet = packet(100, 3);
        self.give(&[(DATA, 2048)]);
        self.send_from_network(&packet);
        assert_eq!(self.used().1, 100);
        assert_eq!(self.driver.bytes(DATA, 100), delivered(&packet, 1));
        self.driver.fill(TX_DATA, &packet);
        assert_eq!(
            self.driver.request(TX, &[Buffer::readable(TX_DATA, 100)]),
            0
        );
        assert_eq!(self.received(), packet);
    }

    /// The next packet on the network.
    fn received(&self) -> Vec<u8> {
        let mut bytes = vec![0; 70_000];
        let len = self.peer.recv(&mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }
}

/// A packet of `len` bytes whose header is zero.
fn packet(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = vec![0; 12];
    bytes.extend((12..len).map(|_| random.next() as u8));
    bytes
}

/// What the driver is to see of a packet: the number of buffers is in its header.
fn delivered(packet: &[u8], buffers: u16) -> Vec<u8> {
    let mut bytes = packet.to_vec();
    bytes[10..12].copy_from_slice(&buffers.to_le_bytes());
    bytes
}

#[test]
fn packets_go_through_whole_both_ways() {
    for features in [0, MRG_RXBUF, MRG_RXBUF | MockDriver::EVENT_IDX] {
        let mut setup = Setup::new(Offloads::default(), features, 16);
        for _ in 0..40 {
            setup.check_both_ways();
        }
        assert_eq!(setup.count(|c| &c.rx_packets), 40);
        assert_eq!(setup.count(|c| &c.tx_packets), 40);
        assert_eq!(setup.count(|c| &c.rx_bytes), 40 * 88);
        assert_eq!(setup.count(|c| &c.tx_bytes), 40 * 88);
    }
}

#[test]
fn the_configuration_has_address_link_and_mtu() {
    let setup = Setup::new(ALL, 0, 16);
    let mut config = [0xff; 16];
    setup.driver.config(0, &mut config);
    assert_eq!(config[..8], [2, 1, 2, 3, 4, 5, 1, 0]);
    assert_eq!(config[8..12], [0, 0, 0x78, 5]);
    assert_eq!(config[12..], [0; 4]);
    let offered = setup.driver.offered();
    assert_eq!(offered & 0xff_ffff, 0xbf_ffaf, "{offered:#x}");
    assert_eq!(offered >> 50, 0b111 << 4, "{offered:#x}");
    let (socket, _peer) = UnixDatagram::pair().unwrap();
    for mac in [[1, 0, 0, 0, 0, 0], [0; 6], [0xff; 6]] {
        let socket = socket.try_clone().unwrap();
        let cable = Cable {
            socket,
            offloads: ALL,
            controls: Arc::default(),
        };
        let options = NetOptions {
            mac: Some(MacAddress::new(mac)),
            ..Default::default()
        };
        assert!(matches!(
            Net::new(cable, options),
            Err(NetError::Mac { .. })
        ));
    }
}

#[test]
fn offloads_are_offered_as_the_network_has_them_and_taken_as_they_build_on_each_other() {
    let setup = Setup::new(Offloads::default(), 0, 16);
    assert_eq!(
        setup.driver.offered() & (CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4),
        0
    );
    let mut setup = Setup::new(ALL, 0, 16);
    assert_eq!(
        *setup.controls.guest.lock().unwrap(),
        Some(Offloads::default())
    );
    for refused in [
        GUEST_TSO4,
        HOST_TSO4,
        CSUM | GUEST_TSO4,
        GUEST_CSUM | HOST_TSO4,
        1 << 13,
    ] {
        assert!(!setup.driver.negotiate(refused), "{refused:#x}");
    }
    setup.driver.start(GUEST_CSUM | GUEST_TSO4, 16);
    let expected = Offloads {
        checksum: true,
        tso4: true,
        ..Default::default()
    };
    assert_eq!(*setup.controls.guest.lock().unwrap(), Some(expected));
}

#[test]
fn a_network_that_is_not_read_does_not_keep_the_thread_busy() {
    let mut setup = Setup::new(Offloads::default(), 0, 16);
    let packets: Vec<_> = (0..4).map(|seed| packet(60, seed)).collect();
    for packet in &packets {
        setup.send_from_network(packet);
    }
    // One buffer: after it there are packets and no buffers.
    setup.give(&[(DATA, 2048)]);
    setup.used();
    std::thread::sleep(Duration::from_millis(20));
    let receives = setup.controls.receives.load(Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(setup.controls.receives.load(Ordering::SeqCst), receives);
    for (at, packet) in packets.iter().enumerate().skip(1) {
        setup.give(&[(DATA + 0x1000 * at as u64, 2048)]);
        assert_eq!(setup.used().1, 60);
        assert_eq!(
            setup.driver.bytes(DATA + 0x1000 * at as u64, 60),
            delivered(packet, 1)
        );
    }
    // Buffers and no packets: not busy either, and woken by the next packet.
    setup.give(&[(DATA, 2048)]);
    std::thread::sleep(Duration::from_millis(20));
    let receives = setup.controls.receives.load(Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(setup.controls.receives.load(Ordering::SeqCst), receives);
    setup.send_from_network(&packets[0]);
    assert_eq!(setup.used().1, 60);
}

#[test]
fn a_large_packet_fills_several_buffers_and_is_seen_at_once() {
    for features in [MRG_RXBUF, MRG_RXBUF | GUEST_CSUM | GUEST_TSO4] {
        let mut setup = Setup::new(ALL, features, 16);
        setup.driver.transport.pause();
        for at in 0..6 {
            setup.give(&[(DATA + 0x1000 * at, 1000), (DATA + 0x1000 * at + 2000, 500)]);
        }
        setup.driver.transport.resume();
        let large = packet(5001, 1);
        setup.send_from_network(&large);
        let first = setup.used();
        // All four are there when the first is.
        assert_eq!(setup.driver.queues[RX].used_index(&setup.driver.memory), 4);
        let used = [first, setup.used(), setup.used(), setup.used()];
        assert_eq!(used.map(|(head, _)| head), [0, 2, 4, 6]);
        assert_eq!(used.map(|(_, len)| len), [1500, 1500, 1500, 501]);
        let mut found = Vec::new();
        for at in 0..4 {
            found.extend(setup.driver.bytes(DATA + 0x1000 * at, 1000));
            found.extend(setup.driver.bytes(DATA + 0x1000 * at + 2000, 500));
        }
        found.truncate(5001);
        assert!(found == delivered(&large, 4));
        // The next packet goes into the next buffer.
        setup.send_from_network(&packet(60, 2));
        assert_eq!(setup.used(), (8, 60));
        assert_eq!(setup.count(|c| &c.rx_packets), 2);
    }
}

#[test]
fn a_packet_waits_for_buffers_enough() {
    for features in [0, GUEST_CSUM | GUEST_TSO4, MockDriver::EVENT_IDX] {
        let mut setup = Setup::new(ALL, MRG_RXBUF | features, 16);
        let large = packet(4000, 1);
        let small = packet(60, 2);
        setup.send_from_network(&large);
        setup.send_from_network(&small);
        setup.give(&[(DATA, 1500)]);
        wait_until("a look at the packet", || {
            setup.controls.receives.load(Ordering::SeqCst) > 0
        });
        setup.driver.start(MRG_RXBUF | features, 16);
        // A reset drops a packet that was kept, and nothing else.
        setup.give(&[(DATA, 1500)]);
        assert_eq!(setup.used().1, 60);

        setup.send_from_network(&large);
        setup.send_from_network(&small);
        setup.give(&[(DATA, 1500)]);
        setup.give(&[(DATA + 0x1000, 1500)]);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(setup.driver.queues[RX].used(&setup.driver.memory), None);
        // Only as much notice as the device asks for.
        let added = setup.driver.queues[RX].add(
            &setup.driver.memory,
            &[Buffer::writable(DATA + 0x2000, 1500)],
        );
        wait_until("the device's wish to be told", || {
            if features == MockDriver::EVENT_IDX {
                setup.driver.queues[RX].avail_event(&setup.driver.memory) == 3
            } else {
                setup.driver.queues[RX].used_flags(&setup.driver.memory) == 0
            }
        });
        setup.driver.notify(RX as u32);
        let used = [setup.used(), setup.used(), setup.used()];
        assert_eq!(used.map(|(_, len)| len), [1500, 1500, 1000]);
        assert_eq!(used[2].0, u32::from(added));
        let found: Vec<u8> = (0..3)
            .flat_map(|at| setup.driver.bytes(DATA + 0x1000 * at, 1500))
            .take(4000)
            .collect();
        assert!(found == delivered(&large, 3));
        setup.give(&[(DATA, 1500)]);
        assert_eq!(setup.used().1, 60);
    }
}

#[test]
fn a_packet_for_which_there_can_be_no_room_is_dropped() {
    // With one buffer a packet: larger than the buffer.
    let mut setup = Setup::new(ALL, 0, 16);
    setup.give(&[(DATA, 1000)]);
    setup.send_from_network(&packet(1001, 1));
    setup.send_from_network(&packet(1000, 2));
    assert_eq!(setup.used().1, 1000);
    assert_eq!(
        setup.driver.bytes(DATA, 1000),
        delivered(&packet(1000, 2), 1)
    );
    assert_eq!(setup.count(|c| &c.rx_dropped), 1);
    // With several: larger than the whole ring.
    let mut setup = Setup::new(ALL, MRG_RXBUF, 4);
    setup.send_from_network(&packet(4001, 1));
    setup.send_from_network(&packet(4000, 2));
    for at in 0..4 {
        setup.give(&[(DATA + 0x1000 * at, 1000)]);
    }
    for _ in 0..4 {
        assert_eq!(setup.used().1, 1000);
    }
    assert_eq!(setup.count(|c| &c.rx_dropped), 1);
    // Too short to be a packet; a buffer too short for a header goes back at once.
    let mut setup = Setup::new(ALL, MRG_RXBUF, 4);
    setup.give(&[(DATA, 11)]);
    assert_eq!(setup.used().1, 0);
    assert_eq!(setup.count(|c| &c.rx_errors), 1);
    setup.give(&[(DATA, 100)]);
    setup.send_from_network(&[0; 11]);
    setup.send_from_network(&packet(60, 1));
    assert_eq!(setup.used().1, 60);
    assert_eq!(setup.count(|c| &c.rx_dropped), 1);
}

#[test]
fn the_largest_packet_arrives_in_the_smallest_buffers() {
    let mut setup = Setup::new(ALL, MRG_RXBUF | GUEST_CSUM | GUEST_TSO4, 256);
    setup.driver.transport.pause();
    let count = 256_u64;
    for at in 0..count {
        setup.give(&[(DATA + 0x200 * at, 257)]);
    }
    setup.driver.transport.resume();
    let largest = packet(65_566, 1);
    setup.send_from_network(&largest);
    let mut found = Vec::new();
    while found.len() < largest.len() {
        let (head, len) = setup.used();
        found.extend(
            setup
                .driver
                .bytes(DATA + 0x200 * u64::from(head), len as usize),
        );
    }
    assert!(found == delivered(&largest, 256));
}

#[test]
fn a_packets_flags_mean_nothing_to_a_driver_without_checksums() {
    for (features, flags) in [(0, 0), (GUEST_CSUM, 2)] {
        let mut setup = Setup::new(ALL, features, 16);
        let mut packet = packet(60, 1);
        packet[0] = 2;
        setup.give(&[(DATA, 60)]);
        setup.send_from_network(&packet);
        assert_eq!(setup.used().1, 60);
        packet[0] = flags;
        assert_eq!(setup.driver.bytes(DATA, 60), delivered(&packet, 1));
    }
}

#[test]
fn a_packet_may_be_cut_at_any_byte() {
    let mut setup = Setup::new(ALL, 0, 16);
    let packet = packet(80, 1);
    for cut in 0..=80 {
        setup.driver.fill(TX_DATA + 0x1000, &packet[..cut]);
        setup.driver.fill(TX_DATA, &packet[cut..]);
        let buffers = [
            Buffer::readable(TX_DATA + 0x1000, cut as u32),
            Buffer::readable(TX_DATA, 80 - cut as u32),
        ];
        assert_eq!(setup.driver.request(TX, &buffers), 0);
        assert_eq!(setup.received(), packet, "cut at {cut}");

        setup.give(&[(DATA + 0x1000, cut as u32), (DATA, 80 - cut as u32)]);
        setup.send_from_network(&packet);
        assert_eq!(setup.used().1, 80);
        let mut found = setup.driver.bytes(DATA + 0x1000, cut);
        found.extend(setup.driver.bytes(DATA, 80 - cut));
        assert_eq!(found, delivered(&packet, 1), "cut at {cut}");
    }
}

#[test]
fn what_is_no_packet_is_dropped_and_given_back() {
    let mut setup = Setup::new(ALL, 0, 16);
    for len in [0, 1, 11, 12, 25, 65_567, 1 << 20] {
        // A chain needs a byte at least: where there is none to read, one to write.
        let buffers = [Buffer::readable(TX_DATA, len), Buffer::writable(DATA, 1)];
        assert_eq!(setup.driver.request(TX, &buffers), 0);
    }
    assert_eq!(setup.count(|c| &c.tx_dropped), 7);
    assert_eq!(setup.count(|c| &c.tx_packets), 0);
    setup.check_both_ways();
}

#[test]
fn a_network_that_is_full_drops_packets_and_holds_nothing_up() {
    let mut setup = Setup::new(ALL, 0, 64);
    setup.driver.fill(TX_DATA, &packet(1000, 1));
    for _ in 0..4 {
        for _ in 0..50 {
            let memory = &setup.driver.memory;
            setup.driver.queues[TX].add(memory, &[Buffer::readable(TX_DATA, 1000)]);
        }
        setup.driver.notify(TX as u32);
        for _ in 0..50 {
            setup.driver.queues[TX].wait_used(&setup.driver.memory);
        }
    }
    let dropped = setup.count(|c| &c.tx_dropped);
    let sent = setup.count(|c| &c.tx_packets);
    assert!(dropped > 0 && sent > 0);
    assert_eq!(dropped + sent, 200);
    for _ in 0..sent {
        setup.received();
    }
    setup.check_both_ways();
}

#[test]
fn a_broken_network_is_left_alone_until_the_driver_asks_again() {
    let mut setup = Setup::new(ALL, MRG_RXBUF, 16);
    setup.controls.fail.store(true, Ordering::SeqCst);
    setup.give(&[(DATA, 2048)]);
    wait_until("errors", || setup.count(|c| &c.rx_errors) >= 16);
    setup.send_from_network(&packet(60, 1));
    std::thread::sleep(Duration::from_millis(20));
    let receives = setup.controls.receives.load(Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(setup.controls.receives.load(Ordering::SeqCst), receives);
    setup.controls.fail.store(false, Ordering::SeqCst);
    wait_until("the device's wish to be told", || {
        setup.driver.queues[RX].used_flags(&setup.driver.memory) == 0
    });
    setup.give(&[(DATA + 0x1000, 2048)]);
    assert_eq!(setup.used(), (0, 60));
}

#[test]
fn bad_chains_make_the_device_need_a_reset() {
    let mut setup = Setup::new(ALL, 0, 16);
    for queue in [RX, TX] {
        for (address, len) in [
            (MockDriver::HOLE - 10, 60),
            (MockDriver::END - 1, 60),
            (u64::MAX - 59, 60),
            (0, u32::MAX),
        ] {
            setup.driver.start(0, 16);
            let buffer = Buffer {
                address,
                len,
                writable: queue == RX,
            };
            setup.driver.queues[queue].add(&setup.driver.memory, &[buffer]);
            setup.driver.notify(queue as u32);
            setup.driver.wait_needs_reset();
        }
    }
    // The wrong direction is not dangerous: such a chain is given back.
    setup.driver.start(0, 16);
    setup.driver.queues[RX].add(&setup.driver.memory, &[Buffer::readable(DATA, 2048)]);
    setup.driver.notify(RX as u32);
    assert_eq!(setup.used(), (0, 0));
    assert_eq!(setup.driver.request(TX, &[Buffer::writable(DATA, 2048)]), 0);
    assert_eq!(setup.driver.status() & status::NEEDS_RESET, 0);
    setup.check_both_ways();
}

#[test]
fn one_queue_alone_works() {
    let setup = Setup::new(ALL, 0, 16);
    assert!(setup.driver.negotiate(0));
    let mut queue = kiln_virtio_device::testing::DriverQueue::new(&setup.driver.memory, DATA, 16);
    setup.driver.enable_queue(TX as u32, &queue);
    setup.driver.write(register::STATUS, 15);
    setup.send_from_network(&packet(60, 1));
    setup.driver.notify(RX as u32);
    let packet = packet(60, 2);
    setup.driver.fill(TX_DATA, &packet);
    queue.add(&setup.driver.memory, &[Buffer::readable(TX_DATA, 60)]);
    setup.driver.notify(TX as u32);
    queue.wait_used(&setup.driver.memory);
    assert_eq!(setup.received(), packet);
}

#[test]
fn no_driver_breaks_a_network_device() {
    let mut setup = Setup::new(ALL, 0, 16);
    setup.peer.set_nonblocking(true).unwrap();
    let mut random = Random::new(7);
    for _ in 0..150 {
        let features = random.one_of(&[0, MRG_RXBUF, MRG_RXBUF | GUEST_CSUM | GUEST_TSO4])
            | random.one_of(&[0, MockDriver::EVENT_IDX]);
        setup.driver.start(features, 8);
        for _ in 0..random.below(6) {
            let len = random.one_of(&[1, 12, 60, 1500, 9000]);
            let _ = setup.peer.send(&packet(len.max(12), 1)[..len]);
        }
        let steps = random.below(40) as usize;
        storm(&mut setup.driver, &mut random, steps);
        setup.driver.start(features, 16);
        // What is still on its way goes first.
        while setup.peer.recv(&mut [0; 1]).is_ok() {}
        setup.driver.fill(TX_DATA, &packet(100, 3));
        assert_eq!(
            setup.driver.request(TX, &[Buffer::readable(TX_DATA, 100)]),
            0
        );
        assert_eq!(setup.received(), packet(100, 3));
        // So that old packets are dropped, and one that is told apart arrives.
        let mut buffers = 0;
        setup.controls.fail.store(false, Ordering::SeqCst);
        while setup.peer.send(&packet(77, 4)).is_err() {
            give_and_wait(&mut setup, &mut buffers);
        }
        loop {
            let (address, len) = give_and_wait(&mut setup, &mut buffers);
            if len == 77 {
                assert_eq!(
                    setup.driver.bytes(address, 77),
                    delivered(&packet(77, 4), 1)
                );
                break;
            }
        }
    }
}

/// A buffer large enough for all packets of the test; where it is, and the length used.
fn give_and_wait(setup: &mut Setup, buffers: &mut u64) -> (u64, u32) {
    let address = DATA + 0x4000 * (*buffers % 16);
    *buffers += 1;
    setup.give(&[(address, 0x4000)]);
    let (_, len) = setup.used();
    (address, len)
}
