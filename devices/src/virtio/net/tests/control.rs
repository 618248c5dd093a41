//! The control queue, and several pairs of queues.

use std::sync::atomic::AtomicU64;

use super::*;
use kiln_virtio_device::testing::LONG;

const CONTROL: usize = 2;
const COMMAND: u64 = 0x60_0000;
const ANSWER: u64 = 0x61_0000;
const OWN: [u8; 6] = [2, 1, 2, 3, 4, 5];
const OTHER: [u8; 6] = [2, 9, 9, 9, 9, 9];
const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 7];
const BROADCAST: [u8; 6] = [0xff; 6];

const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
const CTRL_VQ: u64 = 1 << 17;
const CTRL_RX: u64 = 1 << 18;
const CTRL_VLAN: u64 = 1 << 19;
const CTRL_RX_EXTRA: u64 = 1 << 20;
const GUEST_ANNOUNCE: u64 = 1 << 21;
const MQ: u64 = 1 << 22;
const CTRL_MAC_ADDR: u64 = 1 << 23;
const CONTROLS: u64 = CTRL_VQ
    | CTRL_RX
    | CTRL_VLAN
    | CTRL_RX_EXTRA
    | GUEST_ANNOUNCE
    | CTRL_MAC_ADDR
    | CTRL_GUEST_OFFLOADS;

/// A command, and what comes of it; no answer where there is no room for one.
fn command(driver: &mut MockDriver, queue: usize, bytes: &[u8]) -> u8 {
    driver.fill(COMMAND, bytes);
    driver.fill(ANSWER, &[0xee]);
    let buffers = [
        Buffer::readable(COMMAND, bytes.len() as u32),
        Buffer::writable(ANSWER, 1),
    ];
    assert_eq!(driver.request(queue, &buffers), 1);
    driver.bytes(ANSWER, 1)[0]
}

fn frame(to: [u8; 6]) -> Vec<u8> {
    let mut packet = packet(80, 1);
    packet[12..18].copy_from_slice(&to);
    packet[24..26].copy_from_slice(&[0x08, 0]);
    packet
}

fn tagged(to: [u8; 6], vlan: u16) -> Vec<u8> {
    let mut packet = frame(to);
    packet[24..26].copy_from_slice(&[0x81, 0]);
    packet[26..28].copy_from_slice(&vlan.to_be_bytes());
    packet
}

impl Setup {
    fn command(&mut self, bytes: &[u8]) -> u8 {
        command(&mut self.driver, CONTROL, bytes)
    }

    /// Whether the driver gets a packet: one behind it, which it gets, tells.
    fn gets(&mut self, packet: &[u8]) -> bool {
        let before = self.count(|c| &c.rx_packets);
        let filtered = self.count(|c| &c.rx_filtered);
        self.send_from_network(packet);
        self.send_from_network(&frame(BROADCAST));
        self.give(&[(DATA, 2048)]);
        self.give(&[(DATA + 0x1000, 2048)]);
        let (_, len) = self.used();
        assert_eq!(len, 80);
        let got = self.driver.bytes(DATA, 80)[12..] == packet[12..];
        if got {
            self.used();
        }
        wait_until("both packets", || {
            let packets = self.count(|c| &c.rx_packets) - before;
            packets + self.count(|c| &c.rx_filtered) - filtered == 2
        });
        if !got {
            // For the buffer that is left.
            self.send_from_network(&frame(BROADCAST));
            self.used();
        }
        got
    }
}

/// A table of addresses as a command has it.
fn table(addresses: &[[u8; 6]]) -> Vec<u8> {
    let mut bytes = (addresses.len() as u32).to_le_bytes().to_vec();
    bytes.extend(addresses.concat());
    bytes
}

fn set_tables(unicast: &[[u8; 6]], multicast: &[[u8; 6]]) -> Vec<u8> {
    [vec![1, 0], table(unicast), table(multicast)].concat()
}

#[test]
fn a_driver_gets_the_packets_that_it_asked_for() {
    for features in [0, MRG_RXBUF | GUEST_CSUM | GUEST_TSO4] {
        let mut setup = Setup::new(ALL, CONTROLS | features, 16);
        assert!(setup.gets(&frame(OTHER)));
        // No longer everything.
        assert_eq!(setup.command(&[0, 0, 0]), 0);
        assert!(setup.gets(&frame(OWN)));
        assert!(!setup.gets(&frame(OTHER)));
        assert!(!setup.gets(&frame(GROUP)));
        assert_eq!(setup.command(&set_tables(&[OTHER], &[GROUP])), 0);
        assert!(setup.gets(&frame(OTHER)));
        assert!(setup.gets(&frame(GROUP)));
        assert_eq!(setup.command(&set_tables(&[], &[])), 0);
        assert!(!setup.gets(&frame(GROUP)));
        assert_eq!(setup.command(&[0, 1, 1]), 0);
        assert!(setup.gets(&frame(GROUP)));
        // More addresses than there is room for: those of the one kind come all, of the other not.
        assert_eq!(setup.command(&set_tables(&[[4; 6]; 65], &[])), 0);
        assert!(setup.gets(&frame(OTHER)));
        assert_eq!(setup.command(&[0, 4, 1]), 0);
        assert!(!setup.gets(&frame(OWN)));
        assert_eq!(setup.command(&[0, 4, 0]), 0);
        // VLANs.
        assert!(!setup.gets(&tagged(OWN, 5)));
        assert_eq!(setup.command(&[2, 0, 5, 0]), 0);
        assert!(setup.gets(&tagged(OWN, 5)));
        assert!(!setup.gets(&tagged(OWN, 6)));
        assert_eq!(setup.command(&[2, 1, 5, 0]), 0);
        assert!(!setup.gets(&tagged(OWN, 5)));
        // A reset brings everything back.
        setup.driver.start(CONTROLS | features, 16);
        assert!(setup.gets(&tagged(OTHER, 5)));
    }
}

#[test]
fn a_pause_keeps_what_a_driver_has_asked_for_and_a_state_has_it() {
    let mut setup = Setup::new(ALL, CONTROLS, 16);
    let control = setup.control.clone();
    assert_eq!(setup.command(&[0, 0, 0]), 0);
    assert_eq!(setup.command(&[2, 0, 5, 0]), 0);
    assert_eq!(setup.command(&[1, 1, 2, 9, 9, 9, 9, 9]), 0);
    setup.driver.transport.pause();
    let state = control.shared.state();
    setup.driver.transport.resume();
    assert!(setup.gets(&frame(OTHER)));
    assert!(!setup.gets(&frame(OWN)));
    assert!(setup.gets(&tagged(OTHER, 5)));

    let text = serde_json::to_string(&state).unwrap();
    let read: NetState = serde_json::from_str(&text).unwrap();
    assert_eq!(read, state);
    let (socket, _peer) = UnixDatagram::pair().unwrap();
    let cable = |socket: &UnixDatagram| Cable {
        socket: socket.try_clone().unwrap(),
        offloads: ALL,
        controls: Arc::default(),
    };
    let options = NetOptions {
        mac: Some(MacAddress::new(OWN)),
        ..Default::default()
    };
    let net = Net::from_state(cable(&socket), options.clone(), &read).unwrap();
    assert_eq!(net.state(), state);
    for change in [
        |state: &mut NetState| state.queue_pairs = 2,
        |state: &mut NetState| state.queue_pairs = 0,
        |state: &mut NetState| state.filter.vlans = vec![5, 5],
        |state: &mut NetState| state.offloads = Some(1),
    ] {
        let mut wrong = state.clone();
        change(&mut wrong);
        let refused = Net::from_state(cable(&socket), options.clone(), &wrong);
        assert!(matches!(refused, Err(NetError::State { .. })));
    }
}

#[test]
fn a_driver_sets_its_address_and_offloads() {
    let mut setup = Setup::new(ALL, CONTROLS | GUEST_CSUM | GUEST_TSO4, 16);
    assert_eq!(setup.command(&[1, 1, 2, 9, 9, 9, 9, 9]), 0);
    let mut mac = [0; 6];
    setup.driver.config(0, &mut mac);
    assert_eq!(mac, OTHER);
    assert_eq!(setup.control.mac(), MacAddress::new(OTHER));
    // A group's, and zero.
    assert_eq!(setup.command(&[1, 1, 3, 9, 9, 9, 9, 9]), 1);
    assert_eq!(setup.command(&[1, 1, 0, 0, 0, 0, 0, 0]), 1);
    setup.driver.config(0, &mut mac);
    assert_eq!(mac, OTHER);

    let offloads = |bits: u64| [vec![5, 0], bits.to_le_bytes().to_vec()].concat();
    assert_eq!(setup.command(&offloads(GUEST_CSUM)), 0);
    let expected = Offloads {
        checksum: true,
        ..Default::default()
    };
    assert_eq!(*setup.controls.guest.lock().unwrap(), Some(expected));
    // Not agreed on, without what it builds on, no offload.
    for bits in [GUEST_CSUM | 1 << 8, GUEST_TSO4, MRG_RXBUF, u64::MAX] {
        assert_eq!(setup.command(&offloads(bits)), 1, "{bits:#x}");
    }
    assert_eq!(*setup.controls.guest.lock().unwrap(), Some(expected));
    assert_eq!(setup.command(&offloads(0)), 0);
    assert_eq!(
        *setup.controls.guest.lock().unwrap(),
        Some(Offloads::default())
    );
    // All of it goes with a reset.
    setup.driver.start(CONTROLS | GUEST_CSUM | GUEST_TSO4, 16);
    setup.driver.config(0, &mut mac);
    assert_eq!(mac, OWN);
    let expected = Offloads {
        checksum: true,
        tso4: true,
        ..Default::default()
    };
    assert_eq!(*setup.controls.guest.lock().unwrap(), Some(expected));
}

#[test]
fn commands_that_are_none_are_answered_so() {
    let mut setup = Setup::new(ALL, CONTROLS, 16);
    let count = |count: u32| [vec![1, 0], count.to_le_bytes().to_vec()].concat();
    let wrong: Vec<Vec<u8>> = vec![
        vec![0],
        vec![0, 0],
        vec![0, 6, 1],
        vec![1, 2, 0],
        vec![1, 1, 2, 0, 0, 0, 0],
        vec![2, 0, 0],
        vec![2, 0, 0, 0x10],
        vec![2, 2, 0, 0],
        vec![3, 1],
        // Pairs of queues: not agreed on.
        vec![4, 0, 1, 0],
        vec![5, 0, 0, 0],
        vec![9, 9, 9, 9],
        vec![0xff; 300],
        // Tables that are not there, or not whole.
        count(0),
        count(1),
        count(64),
        count(65),
        count(0x2aaa_aaab),
        count(u32::MAX),
        [set_tables(&[OTHER], &[]), vec![]].concat()[..15].to_vec(),
        [count(0), u32::MAX.to_le_bytes().to_vec()].concat(),
    ];
    let before = setup.control.shared.state();
    for bytes in &wrong {
        assert_eq!(setup.command(bytes), 1, "{bytes:?}");
    }
    assert_eq!(setup.control.shared.state(), before);
    // Without room for an answer, without a command.
    setup.driver.fill(COMMAND, &[0, 0, 0]);
    let buffers = [Buffer::readable(COMMAND, 3)];
    assert_eq!(setup.driver.request(CONTROL, &buffers), 0);
    assert!(!setup.control.shared.state().filter.promiscuous);
    assert_eq!(
        setup
            .driver
            .request(CONTROL, &[Buffer::writable(ANSWER, 9)]),
        1
    );
    assert_eq!(setup.driver.bytes(ANSWER, 1), [1]);
    // What a driver has not agreed on.
    setup.driver.start(CTRL_VQ, 16);
    for bytes in [
        vec![0, 0, 0],
        set_tables(&[], &[]),
        vec![1, 1, 2, 0, 0, 0, 0, 1],
        vec![2, 0, 1, 0],
        vec![3, 0],
    ] {
        assert_eq!(setup.command(&bytes), 1, "{bytes:?}");
    }
    assert!(setup.gets(&frame(OTHER)));
    // And what builds on what it has not.
    for features in [CTRL_RX, CTRL_VLAN, MQ, CTRL_GUEST_OFFLOADS] {
        assert!(!setup.driver.negotiate(features));
    }
}

#[test]
fn a_command_may_be_cut_at_any_byte() {
    let mut setup = Setup::new(ALL, CONTROLS, 16);
    let bytes = set_tables(&[OTHER, OWN], &[GROUP]);
    for cut in 1..bytes.len() {
        assert_eq!(setup.command(&set_tables(&[], &[])), 0);
        setup.driver.fill(COMMAND + 0x1000, &bytes[..cut]);
        setup.driver.fill(COMMAND, &bytes[cut..]);
        let buffers = [
            Buffer::readable(COMMAND + 0x1000, cut as u32),
            Buffer::readable(COMMAND, (bytes.len() - cut) as u32),
            Buffer::writable(ANSWER, 1),
            Buffer::writable(ANSWER + 8, 1),
        ];
        assert_eq!(setup.driver.request(CONTROL, &buffers), 1);
        assert_eq!(setup.driver.bytes(ANSWER, 1), [0], "cut at {cut}");
        let filter = setup.control.shared.state().filter;
        assert_eq!(
            filter.multicast,
            Some(vec![MacAddress::new(GROUP)]),
            "cut at {cut}"
        );
    }
}

#[test]
fn the_cable_is_plugged_out_and_in() {
    let mut setup = Setup::new(ALL, CONTROLS, 16);
    let control = setup.control.clone();
    let status = |setup: &Setup| {
        let mut status = [0; 2];
        setup.driver.config(6, &mut status);
        u16::from_le_bytes(status)
    };
    assert!(control.is_link_up());
    control.set_link(false);
    assert!(!control.is_link_up());
    assert_eq!(status(&setup), 0);
    assert_ne!(setup.driver.read(register::INTERRUPT_STATUS) & 2, 0);
    setup.driver.write(register::INTERRUPT_ACK, 3);
    // Nothing goes out, and nothing comes in: not even later.
    setup.driver.fill(TX_DATA, &packet(60, 3));
    assert_eq!(
        setup.driver.request(TX, &[Buffer::readable(TX_DATA, 60)]),
        0
    );
    assert_eq!(setup.count(|c| &c.tx_dropped), 1);
    setup.give(&[(DATA, 2048)]);
    setup.send_from_network(&frame(OWN));
    wait_until("the packet is dropped", || {
        setup.count(|c| &c.rx_filtered) == 1
    });
    // The same again is no change, and a reset is not the host's business.
    setup.driver.write(register::INTERRUPT_ACK, 3);
    control.set_link(false);
    assert_eq!(setup.driver.read(register::INTERRUPT_STATUS) & 2, 0);
    setup.driver.start(CONTROLS, 16);
    assert_eq!(status(&setup), 0);
    // Where nobody listens at the time, the driver is told later.
    setup.driver.transport.pause();
    control.set_link(true);
    assert_eq!(setup.driver.read(register::INTERRUPT_STATUS) & 2, 0);
    setup.driver.transport.resume();
    assert_ne!(setup.driver.read(register::INTERRUPT_STATUS) & 2, 0);
    assert_eq!(status(&setup), 1);
    setup.check_both_ways();
    // An announcement is asked for until it was made.
    setup.driver.write(register::INTERRUPT_ACK, 3);
    control.announce();
    assert_eq!(status(&setup), 3);
    assert_ne!(setup.driver.read(register::INTERRUPT_STATUS) & 2, 0);
    assert_eq!(setup.command(&[3, 0]), 0);
    assert_eq!(status(&setup), 1);
}

/// What the pairs of a network were told last.
type Enabled = Arc<Mutex<Vec<Option<bool>>>>;

/// A network with several pairs of queues, each a socket of its own.
struct Hub {
    sockets: Vec<UnixDatagram>,
    cable: UnixDatagram,
    pair: usize,
    enabled: Enabled,
}

impl Hub {
    fn new(pairs: usize) -> (Self, Vec<UnixDatagram>) {
        let (sockets, peers): (Vec<_>, _) = (0..pairs)
            .map(|_| {
                let (socket, peer) = UnixDatagram::pair().unwrap();
                socket.set_nonblocking(true).unwrap();
                peer.set_read_timeout(Some(LONG)).unwrap();
                (socket, peer)
            })
            .unzip();
        let hub = Self {
            cable: sockets[0].try_clone().unwrap(),
            sockets,
            pair: 0,
            enabled: Arc::new(Mutex::new(vec![None; pairs])),
        };
        (hub, peers)
    }
}

impl NetBackend for Hub {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.cable.as_fd()
    }

    fn send(&mut self, packet: &[GuestSlice<'_>]) -> io::Result<()> {
        crate::virtio::iovec::write_packet(self.cable.as_fd(), packet)
    }

    fn receive(&mut self, buffers: &[GuestSlice<'_>]) -> io::Result<usize> {
        crate::virtio::iovec::read_packet(self.cable.as_fd(), buffers)
    }

    fn queue_pairs(&self) -> u16 {
        self.sockets.len() as u16
    }

    fn add_queue_pair(&mut self) -> io::Result<Box<dyn NetBackend>> {
        self.pair += 1;
        let socket = self.sockets.get(self.pair).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(Self {
            sockets: Vec::new(),
            cable: socket.try_clone()?,
            pair: self.pair,
            enabled: Arc::clone(&self.enabled),
        }))
    }

    fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        let pair = if self.sockets.is_empty() {
            self.pair
        } else {
            0
        };
        self.enabled.lock().unwrap()[pair] = Some(enabled);
        Ok(())
    }
}

fn with_pairs(pairs: usize, features: u64) -> (MockDriver, Vec<UnixDatagram>, Enabled) {
    let (hub, peers) = Hub::new(pairs);
    let enabled = Arc::clone(&hub.enabled);
    let mut driver = MockDriver::new(Box::new(Net::new(hub, NetOptions::default()).unwrap()));
    driver.start(features, 16);
    (driver, peers, enabled)
}

fn pairs_set(pairs: u16) -> Vec<u8> {
    [vec![4, 0], pairs.to_le_bytes().to_vec()].concat()
}

/// Sends and receives a packet with this pair.
fn check_pair(driver: &mut MockDriver, pair: usize, peer: &UnixDatagram) {
    let sent = packet(70, 10 + pair as u64);
    driver.fill(TX_DATA, &sent);
    assert_eq!(
        driver.request(2 * pair + 1, &[Buffer::readable(TX_DATA, 70)]),
        0
    );
    let mut bytes = [0; 100];
    assert_eq!(peer.recv(&mut bytes).unwrap(), 70);
    assert_eq!(bytes[..70], sent);
    peer.send(&sent).unwrap();
    assert_eq!(
        driver.request(2 * pair, &[Buffer::writable(DATA, 2048)]),
        70
    );
    assert_eq!(driver.bytes(DATA, 70), delivered(&sent, 1));
}

#[test]
fn a_driver_uses_as_many_pairs_of_queues_as_it_says() {
    let (mut driver, peers, enabled) = with_pairs(3, CTRL_VQ | MQ);
    let control = 6;
    let mut config = [0; 2];
    driver.config(8, &mut config);
    assert_eq!(u16::from_le_bytes(config), 3);
    assert_eq!(
        *enabled.lock().unwrap(),
        [Some(true), Some(false), Some(false)]
    );
    check_pair(&mut driver, 0, &peers[0]);
    // What a driver sends with other queues meanwhile goes nowhere, and it gets nothing there.
    driver.fill(TX_DATA, &packet(70, 1));
    assert_eq!(driver.request(3, &[Buffer::readable(TX_DATA, 70)]), 0);
    peers[1].set_nonblocking(true).unwrap();
    assert!(peers[1].recv(&mut [0; 100]).is_err());
    peers[1].set_nonblocking(false).unwrap();
    peers[2].send(&packet(70, 5)).unwrap();
    driver.queues[4].add(&driver.memory, &[Buffer::writable(DATA, 2048)]);
    driver.notify(4);
    for pairs in [0, 4, 0x8000, 0xffff] {
        assert_eq!(
            command(&mut driver, control, &pairs_set(pairs)),
            1,
            "{pairs}"
        );
    }
    assert_eq!(driver.queues[4].used(&driver.memory), None);
    assert_eq!(command(&mut driver, control, &pairs_set(3)), 0);
    wait_until("all pairs", || *enabled.lock().unwrap() == [Some(true); 3]);
    // With no notice of the driver's the packet that waited comes.
    assert_eq!(driver.queues[4].wait_used(&driver.memory).1, 70);
    for (pair, peer) in peers.iter().enumerate() {
        check_pair(&mut driver, pair, peer);
    }
    assert_eq!(command(&mut driver, control, &pairs_set(2)), 0);
    wait_until("two pairs", || {
        *enabled.lock().unwrap() == [Some(true), Some(true), Some(false)]
    });
    // A pause keeps it, a reset does not.
    driver.transport.pause();
    driver.transport.resume();
    check_pair(&mut driver, 1, &peers[1]);
    assert_eq!(
        *enabled.lock().unwrap(),
        [Some(true), Some(true), Some(false)]
    );
    driver.start(CTRL_VQ | MQ, 16);
    assert_eq!(
        *enabled.lock().unwrap(),
        [Some(true), Some(false), Some(false)]
    );
    check_pair(&mut driver, 0, &peers[0]);
}

#[test]
fn a_driver_of_one_pair_finds_the_control_queue_behind_it() {
    let (mut driver, peers, enabled) = with_pairs(3, CTRL_VQ | CTRL_RX);
    check_pair(&mut driver, 0, &peers[0]);
    assert_eq!(command(&mut driver, 2, &[0, 0, 0]), 0);
    assert_eq!(command(&mut driver, 2, &pairs_set(2)), 1);
    assert_eq!(enabled.lock().unwrap()[1], Some(false));
}

#[test]
fn queues_are_reset_one_by_one_and_pairs_go_on() {
    let features = CTRL_VQ | MQ | MockDriver::RING_RESET;
    let (mut driver, peers, _) = with_pairs(2, features);
    assert_eq!(command(&mut driver, 4, &pairs_set(2)), 0);
    check_pair(&mut driver, 1, &peers[1]);
    for queue in 0..5_u32 {
        driver.write(register::QUEUE_SEL, queue);
        driver.write(register::QUEUE_RESET, 1);
        assert_eq!(driver.read(register::QUEUE_READY), 0);
        // The others go on, whichever queue is missing.
        let other = usize::from(queue / 2 == 0);
        check_pair(&mut driver, other, &peers[other]);
        let address = DATA + 0x1_0000 * (1 + u64::from(queue));
        let fresh = kiln_virtio_device::testing::DriverQueue::new(&driver.memory, address, 16);
        driver.enable_queue(queue, &fresh);
        driver.queues[queue as usize] = fresh;
    }
    assert_eq!(command(&mut driver, 4, &pairs_set(1)), 0);
    check_pair(&mut driver, 0, &peers[0]);
    // A pair of which the driver has enabled nothing.
    for queue in [2, 3] {
        driver.write(register::QUEUE_SEL, queue);
        driver.write(register::QUEUE_RESET, 1);
    }
    assert_eq!(command(&mut driver, 4, &pairs_set(2)), 0);
    check_pair(&mut driver, 0, &peers[0]);
}

#[test]
fn a_network_has_as_many_pairs_as_it_can() {
    let options = |pairs| NetOptions {
        queue_pairs: Some(pairs),
        ..Default::default()
    };
    for pairs in [0, 65, 0xffff] {
        let refused = Net::new(Hub::new(1).0, options(pairs));
        assert!(matches!(refused, Err(NetError::QueuePairs { .. })));
    }
    let refused = Net::new(Hub::new(2).0, options(3)).unwrap_err();
    assert!(matches!(refused, NetError::AddQueuePair { pairs: 3, .. }));
    let net = Net::new(Hub::new(3).0, options(2)).unwrap();
    assert_eq!(net.queue_pairs(), 2);
    let (socket, _peer) = UnixDatagram::pair().unwrap();
    let cable = Cable {
        socket,
        offloads: ALL,
        controls: Arc::default(),
    };
    let refused = Net::new(cable, options(2)).unwrap_err();
    assert!(matches!(refused, NetError::AddQueuePair { .. }));
    let mtu = NetOptions {
        mtu: Some(1279),
        ..Default::default()
    };
    assert!(matches!(
        Net::new(Hub::new(1).0, mtu),
        Err(NetError::Mtu { mtu: 1279 })
    ));
    let mtu = NetOptions {
        mtu: Some(9000),
        ..Default::default()
    };
    let driver = MockDriver::new(Box::new(Net::new(Hub::new(1).0, mtu).unwrap()));
    assert_ne!(driver.offered() & 1 << 3, 0);
    let mut config = [0; 4];
    driver.config(8, &mut config);
    assert_eq!(config, [0, 0, 0x28, 0x23]);
}

#[test]
fn no_driver_breaks_the_control_queue_or_a_pair() {
    let (mut driver, peers, _) = with_pairs(3, 0);
    let control = 6;
    for peer in &peers {
        peer.set_nonblocking(true).unwrap();
    }
    let mut random = Random::new(11);
    let sent = AtomicU64::new(0);
    for _ in 0..150 {
        let features = CONTROLS & !CTRL_GUEST_OFFLOADS
            | random.one_of(&[0, MQ, MQ | MRG_RXBUF])
            | random.one_of(&[0, MockDriver::EVENT_IDX])
            | random.one_of(&[0, MockDriver::RING_RESET]);
        driver.start(features, 8);
        let control = if features & MQ == 0 { 2 } else { control };
        for _ in 0..random.below(10) {
            // A command that may be right, or nearly, with any length behind it.
            let mut bytes = vec![random.below(7) as u8, random.below(6) as u8];
            bytes.extend(
                random
                    .one_of(&[0_u32, 1, 2, 3, 4, 64, 65, 0xffff, u32::MAX])
                    .to_le_bytes(),
            );
            bytes.extend((0..random.below(500)).map(|at| at as u8));
            bytes.truncate(random.below(bytes.len() as u64 + 1) as usize);
            driver.fill(COMMAND, &bytes);
            let cut = random.below(bytes.len() as u64 + 1) as u32;
            let buffers = [
                Buffer::readable(COMMAND, cut),
                Buffer::readable(COMMAND + u64::from(cut), bytes.len() as u32 - cut),
                Buffer::writable(ANSWER, random.below(3) as u32 + 1),
            ];
            driver.request(control, &buffers);
            if random.below(2) == 0 {
                let peer = &peers[random.below(3) as usize];
                let _ = peer.send(&packet(random.below(3000).max(1) as usize, 1));
                sent.fetch_add(1, Ordering::Relaxed);
            }
        }
        let steps = random.below(40) as usize;
        storm(&mut driver, &mut random, steps);
        // Of a driver that begins anew everything works.
        driver.start(CTRL_VQ | MQ, 16);
        assert_eq!(command(&mut driver, 6, &pairs_set(3)), 0);
        for (pair, peer) in peers.iter().enumerate() {
            while peer.recv(&mut [0; 1]).is_ok() {}
            driver.fill(TX_DATA, &packet(70, 3));
            assert_eq!(
                driver.request(2 * pair + 1, &[Buffer::readable(TX_DATA, 70)]),
                0
            );
            let mut bytes = [0; 100];
            assert_eq!(peer.recv(&mut bytes).unwrap(), 70);
        }
    }
    assert_ne!(sent.load(Ordering::Relaxed), 0);
}
