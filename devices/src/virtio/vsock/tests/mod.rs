//! A device with real sockets behind it, and a guest that does what it should, or not.

mod guest;
mod limits;

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kiln_virtio_device::testing::{LONG, wait_until};

use super::handler::Patience;
use super::*;
use guest::*;

/// Long enough to be no matter, or short enough to be waited for.
const PATIENT: Patience = Patience {
    handshake: Duration::from_secs(60),
    close: Duration::from_secs(60),
};

struct Setup {
    guest: Guest,
    counters: Arc<VsockCounters>,
    folder: tempfile::TempDir,
}

impl Setup {
    fn new() -> Self {
        Self::with_patience(PATIENT)
    }

    fn with_patience(patience: Patience) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let device = Vsock::with_patience(CID as u32, &path, patience).unwrap();
        Self {
            counters: device.counters(),
            guest: Guest::new(device),
            folder,
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("vsock")
    }

    fn count(&self, counter: impl Fn(&VsockCounters) -> &AtomicU64) -> u64 {
        counter(&self.counters).load(Ordering::Relaxed)
    }

    fn wait_open(&self, open: u64) {
        wait_until("the number of connections", || {
            self.count(|counters| &counters.open) == open
        });
    }

    /// A program that listens on a port of the host.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.path().join(format!("vsock_{port}"))).unwrap()
    }

    /// A program that has connected to the device's socket, and sent this.
    fn client(&self, text: &str) -> UnixStream {
        let mut client = UnixStream::connect(self.path()).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        client.write_all(text.as_bytes()).unwrap();
        client
    }

    /// A connection that the host asked for: the program, and its port.
    fn host_asks(&mut self, port: u32) -> (UnixStream, u32) {
        let client = self.client(&format!("CONNECT {port}\n"));
        let host = self.guest.accept(port);
        assert_eq!(line(&client), format!("OK {host}\n"));
        (client, host)
    }

    /// A connection that the guest asked for.
    fn guest_asks(&mut self, src_port: u32, dst_port: u32) -> UnixStream {
        let listener = self.listen(dst_port);
        self.guest.connect(src_port, dst_port);
        let (program, _) = listener.accept().unwrap();
        program.set_read_timeout(Some(LONG)).unwrap();
        program
    }
}

/// The next line, and nothing of what follows it.
fn line(mut socket: &UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        socket.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn expect_end(mut socket: &UnixStream) {
    let mut rest = Vec::new();
    match socket.read_to_end(&mut rest) {
        Ok(_) => assert_eq!(rest, b""),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}

fn expect_bytes(mut socket: &UnixStream, expected: &[u8]) {
    let mut found = vec![0; expected.len()];
    socket.read_exact(&mut found).unwrap();
    assert!(found == expected);
}

#[test]
fn a_driver_sees_its_context_id_and_the_features() {
    let setup = Setup::new();
    let mut config = [0xff; 10];
    setup.guest.driver.config(0, &mut config);
    assert_eq!(config, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(setup.guest.driver.offered() & 0xff_ffff, 1);
    assert_eq!(setup.guest.driver.queues.len(), 3);
}

#[test]
fn a_reserved_context_id_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vsock");
    for cid in [0, 1, 2, u32::MAX] {
        let error = Vsock::new(cid, &path).unwrap_err();
        assert!(matches!(error, VsockError::Cid { .. }));
    }
    assert!(!path.exists());
    let error = Vsock::new(3, folder.path().join("no/such")).unwrap_err();
    assert!(matches!(error, VsockError::Listen { .. }));
}

#[test]
fn a_program_of_the_host_talks_to_one_of_the_guest() {
    let mut setup = Setup::new();
    // More than the line at once: the rest is for the guest.
    let mut client = setup.client("CONNECT 5000\nearly");
    let host = setup.guest.accept(5000);
    assert!(host >= 1 << 30);
    assert_eq!(line(&client), format!("OK {host}\n"));
    let packet = setup.guest.expect(RW);
    assert_eq!((packet.src_port, packet.dst_port), (host, 5000));
    assert_eq!(packet.data, b"early");
    client.write_all(b"late").unwrap();
    assert_eq!(setup.guest.expect(RW).data, b"late");
    setup
        .guest
        .send(&Packet::new(RW, 5000, host).data(b"hello"));
    expect_bytes(&client, b"hello");
    assert_eq!(setup.count(|c| &c.from_host), 1);
    assert_eq!(setup.count(|c| &c.rx_bytes), 9);
    assert_eq!(setup.count(|c| &c.tx_bytes), 5);
}

#[test]
fn a_program_of_the_guest_talks_to_one_of_the_host() {
    let mut setup = Setup::new();
    let mut program = setup.guest_asks(1024, 52);
    program.write_all(b"to the guest").unwrap();
    let packet = setup.guest.expect(RW);
    assert_eq!((packet.src_port, packet.dst_port), (52, 1024));
    assert_eq!(packet.data, b"to the guest");
    setup
        .guest
        .send(&Packet::new(RW, 1024, 52).data(b"to the host"));
    expect_bytes(&program, b"to the host");
    assert_eq!(setup.count(|c| &c.from_guest), 1);
}

#[test]
fn a_port_where_nobody_listens_is_refused_both_ways() {
    let mut setup = Setup::new();
    setup.guest.send(&Packet::new(REQUEST, 1024, 99));
    let reset = setup.guest.expect(RST);
    assert_eq!((reset.src_port, reset.dst_port), (99, 1024));
    // A file that is no socket, and a socket whose program has gone.
    std::fs::write(setup.folder.path().join("vsock_7"), "").unwrap();
    drop(setup.listen(8));
    for port in [7, 8] {
        setup.guest.send(&Packet::new(REQUEST, 1024, port));
        setup.guest.expect(RST);
    }
    let client = setup.client("CONNECT 6000\n");
    let request = setup.guest.expect(REQUEST);
    setup.guest.send(&request.answer(RST));
    expect_end(&client);
    setup.wait_open(0);
    assert_eq!(setup.count(|c| &c.refused), 4);
}

#[test]
fn a_client_that_does_not_speak_the_protocol_is_closed() {
    let mut setup = Setup::new();
    for text in [
        "hello\n",
        "CONNECT x\n",
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    ] {
        expect_end(&setup.client(text));
    }
    setup.client("CONN").shutdown(Shutdown::Both).unwrap();
    wait_until("the refusals", || setup.count(|c| &c.refused) == 4);
    setup.guest.expect_silence();
}

#[test]
fn the_end_of_data_goes_one_way_while_the_other_goes_on() {
    let mut setup = Setup::new();
    let (mut client, host) = setup.host_asks(5000);
    client.write_all(b"last").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(setup.guest.expect(RW).data, b"last");
    assert_eq!(setup.guest.expect(SHUTDOWN).flags, 2);
    for _ in 0..3 {
        setup.guest.send(&Packet::new(RW, 5000, host).data(b"more"));
    }
    expect_bytes(&client, b"moremoremore");
    setup
        .guest
        .send(&Packet::new(SHUTDOWN, 5000, host).flags(2));
    expect_end(&client);
    // Both ways are closed, and so is the connection.
    expect_full_shutdown(&mut setup.guest);
    setup.guest.send(&Packet::new(RST, 5000, host));
    setup.wait_open(0);

    // And the other way round.
    let mut program = setup.guest_asks(1024, 52);
    setup.guest.send(&Packet::new(RW, 1024, 52).data(b"last"));
    setup.guest.send(&Packet::new(SHUTDOWN, 1024, 52).flags(2));
    let mut found = Vec::new();
    program.read_to_end(&mut found).unwrap();
    assert_eq!(found, b"last");
    program.write_all(b"more").unwrap();
    assert_eq!(setup.guest.expect(RW).data, b"more");
    drop(program);
    assert_eq!(setup.guest.expect(SHUTDOWN).flags & 1, 1);
}

/// Both directions are shut down: in one packet, or in two where the end of the program's data was
/// read before it was seen that the program is gone.
fn expect_full_shutdown(guest: &mut Guest) {
    let mut flags = 0;
    while flags != 3 {
        let packet = guest.expect(SHUTDOWN);
        assert_ne!(packet.flags | flags, flags, "it says nothing new");
        flags |= packet.flags;
    }
}

#[test]
fn a_guest_that_does_not_receive_any_more_stops_the_program() {
    let mut setup = Setup::new();
    let (mut client, host) = setup.host_asks(5000);
    setup
        .guest
        .send(&Packet::new(SHUTDOWN, 5000, host).flags(1));
    let error = client.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    setup
        .guest
        .send(&Packet::new(RW, 5000, host).data(b"still"));
    expect_bytes(&client, b"still");
    drop(client);
    expect_full_shutdown(&mut setup.guest);
    setup.guest.send(&Packet::new(RST, 5000, host));
    setup.wait_open(0);
}

#[test]
fn a_program_that_closes_is_a_shutdown_and_one_that_leaves_data_unread_a_reset() {
    let mut setup = Setup::new();
    let (mut client, host) = setup.host_asks(5000);
    client.write_all(b"bye").unwrap();
    drop(client);
    // All of the data comes first.
    assert_eq!(setup.guest.expect(RW).data, b"bye");
    expect_full_shutdown(&mut setup.guest);
    // What the guest sent before it knew is dropped.
    setup.guest.send(&Packet::new(RW, 5000, host).data(b"late"));
    setup.guest.send(&Packet::new(RST, 5000, host));
    setup.wait_open(0);

    let (client, host) = setup.host_asks(5000);
    setup
        .guest
        .send(&Packet::new(RW, 5000, host).data(b"unread"));
    drop(client);
    let mut packet = setup.guest.receive();
    while packet.op == SHUTDOWN {
        packet = setup.guest.receive();
    }
    assert_eq!((packet.op, packet.dst_port), (RST, 5000));
    setup.wait_open(0);
}

#[test]
fn a_guest_that_closes_gets_its_answer_and_its_data_arrives() {
    let mut setup = Setup::new();
    let mut program = setup.guest_asks(1024, 52);
    // More than the socket takes, less than the room of a connection behind it.
    let mut sent = 0;
    while sent < 3 << 17 {
        let block: Vec<u8> = (sent..sent + 1024).map(|at| (at >> 3) as u8).collect();
        setup.guest.send(&Packet::new(RW, 1024, 52).data(&block));
        sent += 1024;
        if setup.count(|c| &c.tx_bytes) < sent {
            panic!("refused after {sent} bytes");
        }
        if let Some(packet) = setup.guest.take() {
            assert_eq!(packet.op, CREDIT_UPDATE);
        }
        // The program does not read: what the socket took is known by the counts.
        setup.guest.send(&Packet::new(CREDIT_REQUEST, 1024, 52));
        let update = setup.guest.expect(CREDIT_UPDATE);
        if sent - u64::from(update.fwd_cnt) > 100 << 10 {
            break;
        }
    }
    setup.guest.send(&Packet::new(SHUTDOWN, 1024, 52).flags(3));
    setup.guest.expect(RST);
    // Its ports are free again, while the old data waits.
    setup.guest.send(&Packet::new(RST, 1024, 52));
    std::fs::remove_file(setup.folder.path().join("vsock_52")).unwrap();
    let second = setup.guest_asks(1024, 52);
    setup.wait_open(2);
    let mut found = Vec::new();
    program.read_to_end(&mut found).unwrap();
    assert_eq!(found.len() as u64, sent);
    assert!(
        (0..sent)
            .zip(&found)
            .all(|(at, byte)| *byte == (at >> 3) as u8)
    );
    setup.wait_open(1);
    drop(second);
}

#[test]
fn data_waits_for_the_room_of_the_guest() {
    let mut setup = Setup::new();
    let mut client = setup.client("CONNECT 5000\n");
    let request = setup.guest.expect(REQUEST);
    let mut response = request.answer(RESPONSE);
    response.buf_alloc = 1000;
    setup.guest.send(&response);
    line(&client);
    client.write_all(&[7; 2500]).unwrap();
    assert_eq!(setup.guest.expect(RW).data, [7; 1000]);
    setup.guest.expect(CREDIT_REQUEST);
    setup.guest.expect_silence();
    let mut update = request.answer(CREDIT_UPDATE);
    update.buf_alloc = 1000;
    update.fwd_cnt = 600;
    setup.guest.send(&update);
    assert_eq!(setup.guest.expect(RW).data, [7; 600]);
    setup.guest.expect(CREDIT_REQUEST);
    update.fwd_cnt = 1600;
    setup.guest.send(&update);
    assert_eq!(setup.guest.expect(RW).data, [7; 900]);
}

#[test]
fn a_program_that_does_not_read_holds_up_its_own_stream_alone() {
    let mut setup = Setup::new();
    let slow = setup.guest_asks(1024, 52);
    let (mut fast, host) = setup.host_asks(5000);
    let block = vec![1; 16 << 10];
    let mut sent: u64 = 0;
    let mut freed = 0;
    // As much as the credit allows.
    while sent + block.len() as u64 <= freed + (128 << 10) {
        setup.guest.send(&Packet::new(RW, 1024, 52).data(&block));
        sent += block.len() as u64;
        setup.guest.send(&Packet::new(CREDIT_REQUEST, 1024, 52));
        let mut update = setup.guest.expect(CREDIT_UPDATE);
        while let Some(next) = setup.guest.take() {
            update = next;
        }
        freed = u64::from(update.fwd_cnt);
    }
    fast.write_all(b"through").unwrap();
    assert_eq!(setup.guest.expect(RW).data, b"through");
    setup.guest.send(&Packet::new(RW, 5000, host).data(b"back"));
    expect_bytes(&fast, b"back");
    // Read at last, all of it is there, and the guest has its credit back.
    let mut slow = BufReader::new(slow);
    let mut found: u64 = 0;
    while found < sent {
        let bytes = slow.fill_buf().unwrap();
        assert!(bytes.iter().all(|byte| *byte == 1) && !bytes.is_empty());
        let count = bytes.len();
        slow.consume(count);
        found += count as u64;
    }
    let mut update = setup.guest.expect(CREDIT_UPDATE);
    while u64::from(update.fwd_cnt) < sent - (64 << 10) {
        update = setup.guest.expect(CREDIT_UPDATE);
    }
}

#[test]
fn a_pause_leaves_connections_and_a_reset_closes_them() {
    let mut setup = Setup::new();
    let (mut client, host) = setup.host_asks(5000);
    let mut program = setup.guest_asks(1024, 52);
    let waiting = setup.client("CONNECT 50");
    setup.guest.driver.transport.pause();
    setup.guest.driver.transport.state().unwrap();
    client.write_all(b"while it is paused").unwrap();
    (&waiting).write_all(b"01\n").unwrap();
    setup.guest.driver.transport.resume();
    let mut packets = [setup.guest.receive(), setup.guest.receive()];
    packets.sort_by_key(|packet| packet.op);
    assert_eq!((packets[0].op, packets[0].dst_port), (REQUEST, 5001));
    assert_eq!(packets[1].data, b"while it is paused");
    setup
        .guest
        .send(&Packet::new(RW, 5000, host).data(b"after"));
    expect_bytes(&client, b"after");
    program.write_all(b"too").unwrap();
    assert_eq!(setup.guest.expect(RW).data, b"too");

    setup.guest.start();
    for socket in [&client, &program, &waiting] {
        expect_end(socket);
    }
    setup.wait_open(0);
    // The driver that knows nothing of them is served, and old packets are refused.
    setup.guest.send(&Packet::new(RW, 5000, host).data(b"old"));
    setup.guest.expect(RST);
    setup.host_asks(5000);
}

#[test]
fn a_client_that_comes_before_the_driver_is_served_when_it_is_there() {
    let mut setup = Setup::new();
    setup
        .guest
        .driver
        .write(kiln_virtio_device::testing::register::STATUS, 0);
    let client = setup.client("CONNECT 5000\n");
    setup.guest.start();
    let host = setup.guest.accept(5000);
    assert_eq!(line(&client), format!("OK {host}\n"));
}
