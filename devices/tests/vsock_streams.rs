//! Many streams of a socket device at once, and programs that die; what is counted is all that this
//! process has, so these tests have a program of their own.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../src/virtio/vsock/tests/guest.rs"]
#[allow(dead_code)] // These tests use a part.
mod guest;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use guest::*;
use kiln_devices::virtio::vsock::Vsock;
use kiln_virtio_device::testing::{DriverQueue, LONG, register, wait_until};

const STREAMS: u32 = 200;
/// The bytes of a stream in each direction: 128 MiB for all, and as much the other way.
const BYTES: u64 = (128 << 20) / STREAMS as u64;
const ROOM: u32 = 1 << 18;

/// One test at a time: descriptors are counted.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Bytes that go on and on without a period, the same for the same seed, with a sum of those so
/// far in which order matters.
struct Bytes {
    state: u64,
    sum: u64,
    count: u64,
}

impl Bytes {
    fn new(seed: u64) -> Self {
        Self {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            sum: 0,
            count: 0,
        }
    }

    /// The next bytes; a multiple of 8.
    fn fill(&mut self, block: &mut [u8]) {
        for word in block.chunks_exact_mut(8) {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            word.copy_from_slice(&self.state.to_le_bytes());
        }
        self.add(block);
    }

    /// Adds to the sum, in whatever pieces.
    fn add(&mut self, block: &[u8]) {
        for byte in block {
            self.sum = (self.sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        self.count += block.len() as u64;
    }
}

/// A program of the host with one stream: sends its bytes, and gives the sum of what it received.
fn program(socket: UnixStream, seed: u64) -> JoinHandle<(u64, u64, u64)> {
    let reader = socket.try_clone().unwrap();
    let spawn = |name: &str| Builder::new().name(name.into()).stack_size(256 << 10);
    let writing = spawn("writer").spawn(move || {
        let mut bytes = Bytes::new(seed);
        let mut block = [0; 8192];
        while bytes.count < BYTES {
            let len = block.len().min((BYTES - bytes.count) as usize);
            bytes.fill(&mut block[..len]);
            (&socket).write_all(&block[..len]).unwrap();
        }
        socket.shutdown(Shutdown::Write).unwrap();
        bytes.sum
    });
    let reading = move || {
        let mut found = Bytes::new(0);
        let mut block = [0; 16 << 10];
        loop {
            match (&reader).read(&mut block).unwrap() {
                0 => break,
                count => found.add(&block[..count]),
            }
        }
        (writing.unwrap().join().unwrap(), found.sum, found.count)
    };
    spawn("reader").spawn(reading).unwrap()
}

/// A stream as the guest has it.
struct GuestStream {
    /// Of the program at the other end.
    number: u64,
    guest_port: u32,
    host_port: u32,
    sending: Bytes,
    received: Bytes,
    told: u32,
    device_room: u32,
    device_freed: u32,
    done: bool,
}

impl GuestStream {
    fn packet(&mut self, op: u16) -> Packet {
        let mut packet = Packet::new(op, self.guest_port, self.host_port);
        self.told = self.received.count as u32;
        packet.buf_alloc = ROOM;
        packet.fwd_cnt = self.told;
        packet
    }

    /// The next packet to send, if there is one.
    fn next(&mut self) -> Option<Packet> {
        if (self.received.count as u32).wrapping_sub(self.told) > ROOM / 2 {
            return Some(self.packet(CREDIT_UPDATE));
        }
        let left = BYTES - self.sending.count;
        let on_the_way = (self.sending.count as u32).wrapping_sub(self.device_freed);
        let room = self.device_room.saturating_sub(on_the_way);
        let len = left.min(u64::from(room)).min(16 << 10) & !7;
        if len > 0 {
            let mut data = vec![0; len as usize];
            self.sending.fill(&mut data);
            let mut packet = self.packet(RW);
            packet.data = data;
            return Some(packet);
        }
        if left == 0 && !self.done {
            self.done = true;
            return Some(self.packet(SHUTDOWN).flags(2));
        }
        None
    }
}

#[test]
fn two_hundred_streams_carry_256_mib_both_ways_with_equal_sums() {
    let _alone = alone();
    let before = descriptors();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vsock");
    let device = Vsock::new(CID as u32, &path).unwrap();
    let counters = device.counters();
    let mut guest = Guest::new(device);

    // One half is asked for by the host, the other by the guest.
    let mut programs = Vec::new();
    let mut streams = HashMap::new();
    let mut add = |guest_port: u32, host_port: u32, room: u32, seed: u64| {
        let stream = GuestStream {
            number: seed,
            guest_port,
            host_port,
            sending: Bytes::new(1000 + seed),
            received: Bytes::new(0),
            told: 0,
            device_room: room,
            device_freed: 0,
            done: false,
        };
        streams.insert((guest_port, host_port), stream);
    };
    for number in 0..STREAMS / 2 {
        let (socket, host_port) = ask(&mut guest, &path, 5000);
        add(5000, host_port, 128 << 10, programs.len() as u64);
        programs.push(program(socket, programs.len() as u64));
        let listener = UnixListener::bind(folder.path().join(format!("vsock_{number}"))).unwrap();
        let mut request = Packet::new(REQUEST, 1024, number);
        request.buf_alloc = ROOM;
        guest.send(&request);
        let (socket, _) = listener.accept().unwrap();
        add(1024, number, 0, programs.len() as u64);
        programs.push(program(socket, programs.len() as u64));
    }
    assert_eq!(counters.open.load(Ordering::Relaxed), u64::from(STREAMS));

    run(&mut guest, &mut streams);
    let mut total = 0;
    let by_number: HashMap<u64, GuestStream> = streams
        .into_values()
        .map(|stream| (stream.number, stream))
        .collect();
    for (index, program) in programs.into_iter().enumerate() {
        let stream = &by_number[&(index as u64)];
        let (sent, received, count) = program.join().unwrap();
        assert_eq!((count, stream.received.count), (BYTES, BYTES), "{index}");
        assert_eq!(stream.received.sum, sent, "to the guest, {index}");
        assert_eq!(received, stream.sending.sum, "to the host, {index}");
        total += 2 * BYTES;
    }
    assert!(total > 255 << 20);
    assert_eq!(counters.rx_bytes.load(Ordering::Relaxed), total / 2);
    assert_eq!(counters.tx_bytes.load(Ordering::Relaxed), total / 2);
    wait_until("the end of all connections", || {
        counters.open.load(Ordering::Relaxed) == 0
    });
    drop(guest);
    assert!(!path.exists());
    assert_eq!(descriptors(), before);
}

/// Asks the guest for a connection; gives the program's socket and the port of the host.
fn ask(guest: &mut Guest, path: &Path, port: u32) -> (UnixStream, u32) {
    let mut socket = UnixStream::connect(path).unwrap();
    socket
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .unwrap();
    // Packets of streams that are open already come in between.
    let mut others = Vec::new();
    let request = loop {
        let packet = guest.receive();
        if packet.op == REQUEST {
            break packet;
        }
        others.push(packet);
    };
    guest.early.extend(others);
    let mut response = request.answer(RESPONSE);
    response.buf_alloc = ROOM;
    guest.send(&response);
    let expected = format!("OK {}\n", request.src_port);
    let mut line = vec![0; expected.len()];
    socket.read_exact(&mut line).unwrap();
    assert_eq!(line, expected.as_bytes());
    (socket, request.src_port)
}

/// The guest's side of all streams, until each is closed.
fn run(guest: &mut Guest, streams: &mut HashMap<(u32, u32), GuestStream>) {
    let mut open = streams.len();
    let mut moved = Instant::now();
    let keys: Vec<_> = streams.keys().copied().collect();
    while open > 0 {
        let mut idle = true;
        while let Some(packet) = guest.early.pop_front().or_else(|| guest.take()) {
            idle = false;
            let key = (packet.dst_port, packet.src_port);
            let stream = streams.get_mut(&key).unwrap();
            stream.device_room = packet.buf_alloc;
            stream.device_freed = packet.fwd_cnt;
            match packet.op {
                RW => stream.received.add(&packet.data),
                SHUTDOWN if packet.flags == 3 => {
                    open -= 1;
                    let reset = stream.packet(RST);
                    guest.send(&reset);
                }
                CREDIT_REQUEST => {
                    let update = stream.packet(CREDIT_UPDATE);
                    guest.send(&update);
                }
                RESPONSE | CREDIT_UPDATE | SHUTDOWN => {}
                other => panic!("{other}: {packet:?}"),
            }
        }
        for key in &keys {
            if let Some(packet) = streams.get_mut(key).and_then(GuestStream::next) {
                idle = false;
                guest.send(&packet);
            }
        }
        if !idle {
            moved = Instant::now();
        }
        assert!(moved.elapsed() < LONG, "{open} streams do not end");
    }
}

/// What a program was doing when it was killed.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Connected,
    HalfALine,
    NotAsked,
    Asked,
    Open,
    Flooding,
    Flooded,
    HostFinished,
    GuestFinished,
    Draining,
    NotAccepted,
    Listening,
}

#[test]
fn a_program_killed_at_any_stage_leaves_nothing_behind() {
    let _alone = alone();
    let before = descriptors();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vsock");
    let device = Vsock::new(CID as u32, &path).unwrap();
    let counters = device.counters();
    let mut guest = Guest::new(device);
    let idle = descriptors();
    for _ in 0..20 {
        for stage in [
            Stage::Connected,
            Stage::HalfALine,
            Stage::NotAsked,
            Stage::Asked,
            Stage::Open,
            Stage::Flooding,
            Stage::Flooded,
            Stage::HostFinished,
            Stage::GuestFinished,
            Stage::Draining,
            Stage::NotAccepted,
            Stage::Listening,
        ] {
            kill_at(stage, &mut guest, &path);
            end_in_the_guest(&mut guest, stage);
            wait_until("the end of the connection", || {
                counters.open.load(Ordering::Relaxed) == 0 && descriptors() == idle
            });
        }
    }
    // And all is as it was.
    let (mut socket, port) = ask(&mut guest, &path, 5000);
    socket.write_all(b"alive").unwrap();
    assert_eq!(guest.expect(RW).data, b"alive");
    guest.send(&Packet::new(RST, 5000, port));
    drop(socket);
    drop(guest);
    assert_eq!(descriptors(), before);
}

/// Brings a connection to a stage, where the program dies.
fn kill_at(stage: Stage, guest: &mut Guest, path: &Path) {
    let block = [5; 16 << 10];
    let connect = |text: &str| {
        let mut socket = UnixStream::connect(path).unwrap();
        socket.write_all(text.as_bytes()).unwrap();
        socket
    };
    match stage {
        Stage::Connected => drop(connect("")),
        Stage::HalfALine => drop(connect("CONNECT 50")),
        Stage::NotAsked => {
            guest.start_without_buffers();
            drop(connect("CONNECT 5000\n"));
            std::thread::sleep(Duration::from_millis(2));
            guest.start();
        }
        Stage::Asked => {
            let _socket = connect("CONNECT 5000\n");
            guest.expect(REQUEST);
        }
        Stage::Open => drop(ask(guest, path, 5000)),
        Stage::Flooding => {
            let (socket, _) = ask(guest, path, 5000);
            socket.set_nonblocking(true).unwrap();
            while (&socket).write(&block).is_ok() {}
        }
        Stage::Flooded | Stage::Draining => {
            let (_socket, port) = ask(guest, path, 5000);
            flood(guest, port);
            if matches!(stage, Stage::Draining) {
                guest.send(&Packet::new(SHUTDOWN, 5000, port).flags(3));
            }
        }
        Stage::HostFinished => {
            let (socket, port) = ask(guest, path, 5000);
            socket.shutdown(Shutdown::Write).unwrap();
            guest.send(&Packet::new(RW, 5000, port).data(b"unread"));
        }
        Stage::GuestFinished => {
            let (mut socket, port) = ask(guest, path, 5000);
            guest.send(&Packet::new(SHUTDOWN, 5000, port).flags(2));
            socket.write_all(b"going on").unwrap();
        }
        Stage::NotAccepted | Stage::Listening => {
            let mut at = PathBuf::from(path).into_os_string();
            at.push("_52");
            let listener = UnixListener::bind(&at).unwrap();
            guest.send(&Packet::new(REQUEST, 5000, 52));
            let program = matches!(stage, Stage::Listening).then(|| listener.accept().unwrap());
            std::fs::remove_file(at).unwrap();
            drop((listener, program));
        }
    }
}

/// Sends as much as the device takes for a program that does not read.
fn flood(guest: &mut Guest, port: u32) {
    let block = [5; 16 << 10];
    let (mut sent, mut freed) = (0, 0);
    while sent + block.len() as u32 <= freed + (128 << 10) {
        guest.send(&Packet::new(RW, 5000, port).data(&block));
        sent += block.len() as u32;
        guest.send(&Packet::new(CREDIT_REQUEST, 5000, port));
        freed = guest.expect(CREDIT_UPDATE).fwd_cnt;
        while let Some(packet) = guest.take() {
            freed = packet.fwd_cnt;
        }
    }
}

/// What a guest does with a connection that has ended: it answers a shutdown by a reset.
fn end_in_the_guest(guest: &mut Guest, stage: Stage) {
    if matches!(
        stage,
        Stage::Connected | Stage::HalfALine | Stage::NotAsked | Stage::Draining
    ) {
        if matches!(stage, Stage::Draining) {
            while guest.receive().op != RST {}
        }
        return;
    }
    let mut received = 0;
    loop {
        let packet = guest.receive();
        match packet.op {
            RST => return,
            SHUTDOWN if packet.flags == 3 => {
                guest.send(&packet.answer(RST));
                return;
            }
            RW => {
                received += packet.data.len() as u32;
                let mut update = packet.answer(CREDIT_UPDATE);
                update.fwd_cnt = received;
                guest.send(&update);
            }
            REQUEST | RESPONSE | SHUTDOWN | CREDIT_UPDATE | CREDIT_REQUEST => {}
            other => panic!("{stage:?}: {other}"),
        }
    }
}

#[test]
fn a_driver_without_the_queue_for_packets_to_it_keeps_nobody_busy() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vsock");
    let mut guest = Guest::new(Vsock::new(CID as u32, &path).unwrap());
    assert!(guest.driver.negotiate(0));
    let queue = DriverQueue::new(&guest.driver.memory, 0x10_0000, 16);
    guest.driver.enable_queue(TX as u32, &queue);
    guest.driver.write(register::STATUS, 15);
    let clients: Vec<_> = (0..5)
        .map(|_| {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(b"CONNECT 1\n").unwrap();
            client
        })
        .collect();
    std::thread::sleep(Duration::from_millis(20));
    let before = processor_ticks("test-io");
    std::thread::sleep(Duration::from_millis(500));
    // A thread that turns round and round takes all of that time, which is 50 ticks.
    assert!(processor_ticks("test-io") - before < 10);
    guest.start();
    for _ in &clients {
        guest.expect(REQUEST);
    }
}

/// The processor time, in hundredths of a second, that the threads with this name have taken.
fn processor_ticks(name: &str) -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok())
        .filter(|stat| stat.contains(&format!("({name})")))
        .map(|stat| {
            let fields: Vec<_> = stat.rsplit(')').next().unwrap().split(' ').collect();
            fields[12].parse::<u64>().unwrap() + fields[13].parse::<u64>().unwrap()
        })
        .sum()
}
