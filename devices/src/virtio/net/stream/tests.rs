use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_virtio_device::testing::{Buffer, LONG, MockDriver, wait_until};

use super::*;
use crate::virtio::hostile::Random;
use crate::virtio::net::{Net, NetCounters, NetOptions};

const RX: usize = 0;
const TX: usize = 1;
const RX_DATA: u64 = 0x20_0000;
const TX_DATA: u64 = 0x40_0000;
const MRG_RXBUF: u64 = 1 << 15;
const QUEUE: u16 = 256;

struct Setup {
    driver: MockDriver,
    counters: Arc<NetCounters>,
    failures: Arc<Mutex<Vec<String>>>,
}

impl Setup {
    fn pair() -> (Self, UnixStream) {
        let (ours, peer) = UnixStream::pair().unwrap();
        peer.set_read_timeout(Some(LONG)).unwrap();
        (Self::new(StreamSocket::from_fd(ours.into()).unwrap()), peer)
    }

    fn new(backend: impl NetBackend) -> Self {
        let mut net = Net::new(backend, NetOptions::default()).unwrap();
        let failures = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&failures);
        net.on_failure(move |reason| told.lock().unwrap().push(reason.to_owned()));
        let counters = net.counters();
        let mut driver = MockDriver::new(Box::new(net));
        driver.start(MRG_RXBUF, QUEUE);
        Self {
            driver,
            counters,
            failures,
        }
    }

    /// Gives the device so many buffers of 2 KiB to receive into.
    fn give(&mut self, count: u64) {
        for at in 0..count {
            let buffer = Buffer::writable(RX_DATA + 2048 * at, 2048);
            self.driver.queues[RX].add(&self.driver.memory, &[buffer]);
        }
        self.driver.notify(RX as u32);
    }

    /// The frame that the device has received into buffers of 2 KiB given one after the other, of
    /// which `at` is the first.
    fn received(&mut self, at: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut left = 1;
        let mut next = at;
        while left > 0 {
            let (_, len) = self.driver.queues[RX].wait_used(&self.driver.memory);
            let part = self.driver.bytes(RX_DATA + 2048 * next, len as usize);
            if next == at {
                left = u16::from_le_bytes([part[10], part[11]]);
                assert_eq!(part[..10], [0; 10], "a header with offloads");
            }
            bytes.extend(part);
            left -= 1;
            next += 1;
        }
        bytes.split_off(HEADER_BYTES)
    }

    /// Makes a packet available, which is at the place with this number.
    fn add(&mut self, place: u64, frame: &[u8]) {
        let address = TX_DATA + place * 0x1_1000;
        let mut packet = vec![0; HEADER_BYTES];
        packet.extend_from_slice(frame);
        self.driver.fill(address, &packet);
        let buffer = Buffer::readable(address, packet.len() as u32);
        self.driver.queues[TX].add(&self.driver.memory, &[buffer]);
    }

    fn wait_sent(&mut self) {
        self.driver.queues[TX].wait_used(&self.driver.memory);
    }

    fn link_is_up(&self) -> bool {
        let mut status = [0; 2];
        self.driver.config(6, &mut status);
        u16::from_le_bytes(status) == 1
    }

    fn wait_down(&mut self) -> String {
        wait_until("the link's end", || !self.link_is_up());
        wait_until("the report", || !self.failures.lock().unwrap().is_empty());
        self.failures.lock().unwrap().remove(0)
    }

    fn count(&self, counter: impl Fn(&NetCounters) -> &AtomicU64) -> u64 {
        counter(&self.counters).load(Ordering::Relaxed)
    }
}

fn frame(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed + 1);
    (0..len).map(|_| random.next() as u8).collect()
}

fn framed(frame: &[u8]) -> Vec<u8> {
    let mut bytes = (frame.len() as u32).to_be_bytes().to_vec();
    bytes.extend_from_slice(frame);
    bytes
}

fn read_frame(peer: &mut UnixStream) -> Vec<u8> {
    let mut prefix = [0; PREFIX];
    peer.read_exact(&mut prefix).unwrap();
    let mut bytes = vec![0; u32::from_be_bytes(prefix) as usize];
    peer.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn frames_of_every_size_go_through_whole_both_ways() {
    let (mut setup, mut peer) = Setup::pair();
    for (seed, len) in (0..).zip([14, 60, 1514, 2035, 2036, 2037, 4096, 4097, 9014, MAX_FRAME]) {
        let sent = frame(len, seed);
        setup.add(0, &sent);
        setup.driver.notify(TX as u32);
        assert!(read_frame(&mut peer) == sent, "{len} bytes out");
        setup.wait_sent();
        let buffers = (HEADER_BYTES + len).div_ceil(2048) as u64;
        setup.give(buffers);
        peer.write_all(&framed(&sent)).unwrap();
        assert!(setup.received(0) == sent, "{len} bytes in");
    }
    assert_eq!(setup.count(|c| &c.tx_packets), 10);
    assert_eq!(setup.count(|c| &c.rx_packets), 10);
    assert!(setup.link_is_up());
}

#[test]
fn frames_of_one_read_all_arrive_and_packets_of_one_turn_are_one_write() {
    let (mut setup, mut peer) = Setup::pair();
    let frames: Vec<_> = (0..100).map(|seed| frame(60 + seed, seed as u64)).collect();
    let stream: Vec<u8> = frames.iter().flat_map(|frame| framed(frame)).collect();
    setup.give(100);
    peer.write_all(&stream).unwrap();
    for (at, frame) in (0..).zip(&frames) {
        assert!(setup.received(at) == *frame, "frame {at}");
    }
    for (place, frame) in (0..).zip(&frames[..40]) {
        setup.add(place, frame);
    }
    setup.driver.notify(TX as u32);
    let expected: Vec<u8> = frames[..40]
        .iter()
        .flat_map(|frame| framed(frame))
        .collect();
    let mut bytes = vec![0; 2 * expected.len()];
    let count = peer.read(&mut bytes).unwrap();
    assert!(bytes[..count] == expected, "one write: {count} bytes");
}

#[test]
fn a_frame_that_comes_byte_by_byte_arrives() {
    let (mut setup, mut peer) = Setup::pair();
    setup.give(2);
    for at in 0..2 {
        let frame = frame(70, at);
        for byte in framed(&frame) {
            peer.write_all(&[byte]).unwrap();
        }
        assert!(setup.received(at) == frame);
    }
}

/// More than a socket holds, of frames of these sizes in turn.
fn everything_arrives_at_a_slow_reader(sizes: &[usize]) {
    let (mut setup, mut peer) = Setup::pair();
    let frames: Vec<_> = (0..40)
        .map(|seed| frame(sizes[seed % sizes.len()], seed as u64))
        .collect();
    for (place, frame) in (0..).zip(&frames) {
        setup.add(place, frame);
    }
    setup.driver.notify(TX as u32);
    std::thread::sleep(Duration::from_millis(30));
    // Nobody has read, so not all of it was taken, and nothing was lost.
    assert_eq!(setup.count(|c| &c.tx_dropped), 0);
    assert!(setup.count(|c| &c.tx_packets) < 40);
    setup.driver.notify(TX as u32);
    let expected: Vec<u8> = frames.iter().flat_map(|frame| framed(frame)).collect();
    let mut found = Vec::new();
    let mut piece = vec![0; 7001];
    while found.len() < expected.len() {
        let count = peer.read(&mut piece).unwrap();
        assert!(count > 0);
        found.extend_from_slice(&piece[..count]);
    }
    assert!(found == expected);
    for _ in 0..40 {
        setup.wait_sent();
    }
    assert_eq!(setup.count(|c| &c.tx_packets), 40);
    assert_eq!(setup.count(|c| &c.tx_dropped), 0);
}

#[test]
fn packets_wait_for_a_slow_reader_and_frames_half_sent_are_finished() {
    everything_arrives_at_a_slow_reader(&[MAX_FRAME]);
    everything_arrives_at_a_slow_reader(&[60_000, 100, 14, 4096, 33_333, 4097]);
}

#[test]
fn packets_that_wait_are_dropped_when_the_reader_goes() {
    let (mut setup, peer) = Setup::pair();
    let frame = frame(MAX_FRAME, 1);
    for place in 0..20 {
        setup.add(place, &frame);
    }
    setup.driver.notify(TX as u32);
    std::thread::sleep(Duration::from_millis(20));
    drop(peer);
    for _ in 0..20 {
        setup.wait_sent();
    }
    let reason = setup.wait_down();
    assert!(reason.starts_with("the socket: "), "{reason}");
    assert!(setup.count(|c| &c.tx_dropped) > 0);
    // One that comes later neither waits nor does harm.
    setup.add(0, &frame);
    setup.driver.notify(TX as u32);
    setup.wait_sent();
    assert!(setup.failures.lock().unwrap().is_empty(), "told once");
}

#[test]
fn a_length_that_no_frame_has_ends_the_connection() {
    for len in [MAX_FRAME as u32 + 1, 0x8000_0000, u32::MAX] {
        let (mut setup, mut peer) = Setup::pair();
        setup.give(4);
        peer.write_all(&framed(b"a frame of some bytes")).unwrap();
        peer.write_all(&len.to_be_bytes()).unwrap();
        assert_eq!(setup.received(0), b"a frame of some bytes");
        let reason = setup.wait_down();
        assert!(reason.contains(&len.to_string()), "{reason}");
        assert_eq!(reason.lines().count(), 1);
        wait_until("the end", || {
            matches!(peer.read(&mut [0; 8]), Ok(0) | Err(_))
        });
    }
}

#[test]
fn frames_too_short_to_be_any_do_no_harm() {
    let (mut setup, mut peer) = Setup::pair();
    setup.give(4);
    for frame in [&b""[..], b"x", b"a thirteenth."] {
        peer.write_all(&framed(frame)).unwrap();
    }
    for (at, len) in [(0, 0), (1, 1), (2, 13)] {
        assert_eq!(setup.received(at).len(), len);
    }
    assert!(setup.link_is_up());
}

#[test]
fn a_peer_may_close_at_any_byte() {
    let stream = [framed(&frame(40, 1)), framed(&frame(50, 2))].concat();
    for cut in 0..=stream.len() {
        let (mut setup, mut peer) = Setup::pair();
        setup.give(4);
        peer.write_all(&stream[..cut]).unwrap();
        drop(peer);
        setup.wait_down();
        let whole = usize::from(cut >= 44) + usize::from(cut == stream.len());
        assert_eq!(setup.count(|c| &c.rx_packets), whole as u64, "cut at {cut}");
    }
}

#[test]
fn garbage_does_no_harm() {
    for seed in 0..30 {
        let (mut setup, mut peer) = Setup::pair();
        setup.give(200);
        let mut random = Random::new(seed + 1);
        let mut garbage = frame(3000, seed);
        // Short frames of garbage first, so that the stream goes on for a while.
        for at in (0..2000).step_by(100) {
            garbage[at..at + 4].copy_from_slice(&((random.next() % 97) as u32).to_be_bytes());
        }
        let _ = peer.write_all(&garbage);
        drop(peer);
        setup.wait_down();
    }
}

/// Whether a descriptor is readable now.
fn is_ready(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).unwrap() > 0
}

#[test]
fn a_network_that_has_gone_keeps_no_thread_busy() {
    let (ours, peer) = UnixStream::pair().unwrap();
    let mut stream = StreamSocket::from_fd(ours.into()).unwrap();
    assert!(!is_ready(stream.readiness()) && !is_ready(stream.send_readiness().unwrap()));
    drop(peer);
    assert!(is_ready(stream.readiness()));
    let error = stream.receive(&[]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert!(stream.failure().is_some());
    assert!(!is_ready(stream.readiness()));
    // What waited for room is looked at once.
    assert!(is_ready(stream.send_readiness().unwrap()));
    stream.flush();
    assert!(!is_ready(stream.send_readiness().unwrap()));
    assert_eq!(
        stream.send(&[]).unwrap_err().kind(),
        io::ErrorKind::NotConnected
    );
}

#[test]
fn a_connection_is_made_again_where_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("net");
    let mut listener = UnixListener::bind(&path).unwrap();
    let stream = StreamSocket::connect(&path)
        .unwrap()
        .reconnect(Duration::from_millis(1))
        .unwrap();
    let mut setup = Setup::new(stream);
    for at in 0..3 {
        let (mut peer, _) = listener.accept().unwrap();
        peer.set_read_timeout(Some(LONG)).unwrap();
        setup.give(1);
        let frame = frame(100, at);
        peer.write_all(&framed(&frame)).unwrap();
        assert!(setup.received(0) == frame);
        assert!(setup.link_is_up());
        setup.add(0, &frame);
        setup.driver.notify(TX as u32);
        assert!(read_frame(&mut peer) == frame);
        setup.wait_sent();
        // Nobody listens for a while, and a part of a frame is left behind.
        drop(listener);
        std::fs::remove_file(&path).unwrap();
        setup.give(1);
        peer.write_all(&[0, 0, 1]).unwrap();
        drop(peer);
        let reason = setup.wait_down();
        assert!(reason.contains("/net`"), "{reason}");
        std::thread::sleep(Duration::from_millis(30));
        listener = UnixListener::bind(&path).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        peer.write_all(&framed(&frame)).unwrap();
        assert!(setup.received(0) == frame);
        // One that goes and comes at once.
        setup.give(1);
        drop(peer);
        setup.wait_down();
        setup.give(1);
        let (mut peer, _) = listener.accept().unwrap();
        peer.write_all(&framed(&frame)).unwrap();
        assert!(setup.received(0) == frame);
        drop(peer);
        setup.wait_down();
        assert!(setup.driver.queues[RX].used(&setup.driver.memory).is_none());
    }
}

#[test]
fn what_is_no_network_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("absent");
    let error = StreamSocket::connect(&path).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("connect to the network at the socket `/"),
        "{text}"
    );
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    let file = tempfile::tempfile().unwrap();
    for fd in [OwnedFd::from(datagram), listener.into(), file.into()] {
        let error = StreamSocket::from_fd(fd).unwrap_err();
        assert!(matches!(error, StreamError::NotAStream), "{error}");
    }
}
