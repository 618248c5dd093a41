//! Guests and programs that mean harm, or die.

use kiln_virtio_device::testing::{Buffer, MockDriver, register, status};

use super::super::connection::ROOM;
use super::super::handler::{MAX_CLIENTS, MAX_CONNECTIONS, MAX_RESETS, connection_limit};
use super::*;
use crate::virtio::hostile::{Random, storm};

const SHORT: Patience = Patience {
    handshake: Duration::from_millis(50),
    close: Duration::from_millis(50),
};

#[test]
fn what_is_not_for_this_host_is_dropped_or_refused() {
    let mut setup = Setup::new();
    // No header; a guest that it is not.
    setup.guest.send_bytes(&[0; 43]);
    for cid in [0, 2, 4, CID | 1 << 32] {
        let mut packet = Packet::new(REQUEST, 1024, 52);
        packet.src_cid = cid;
        setup.guest.send(&packet);
    }
    setup.guest.expect_silence();
    assert_eq!(setup.count(|c| &c.tx_dropped), 5);
    // Somebody else than the host; a type and operations that do not exist; no connection.
    let mut packet = Packet::new(REQUEST, 1024, 52);
    packet.dst_cid = 7;
    setup.guest.send(&packet);
    assert_eq!(setup.guest.expect(RST).src_cid, 7);
    let mut packet = Packet::new(REQUEST, 1024, 52);
    packet.kind = 2;
    setup.guest.send(&packet);
    assert_eq!(setup.guest.expect(RST).kind, 2);
    for op in [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 0, 8] {
        setup.guest.send(&Packet::new(op, 1024, 52));
        setup.guest.expect(RST);
    }
    setup.guest.send(&Packet::new(RST, 1024, 52));
    setup.guest.expect_silence();
}

#[test]
fn a_guest_that_breaks_the_rules_loses_its_connection_and_no_other() {
    let mut setup = Setup::new();
    let (mut kept, kept_port) = setup.host_asks(4000);
    let block = vec![0; 1 << 16];
    let overrun = |setup: &mut Setup, host| {
        // Nobody reads: more than the socket and the room take.
        for _ in 0..100 {
            setup.guest.send(&Packet::new(RW, 5000, host).data(&block));
            while let Some(packet) = setup.guest.take() {
                if packet.op == RST {
                    setup.guest.early.push_back(packet);
                    return;
                }
            }
        }
    };
    let wrong_length = |setup: &mut Setup, host| {
        let mut bytes = Packet::new(RW, 5000, host).data(b"abc").bytes();
        bytes.pop();
        setup.guest.send_bytes(&bytes);
    };
    let after_the_end = |setup: &mut Setup, host| {
        setup
            .guest
            .send(&Packet::new(SHUTDOWN, 5000, host).flags(2));
        setup.guest.send(&Packet::new(RW, 5000, host).data(b"x"));
    };
    let twice = |setup: &mut Setup, host| {
        setup.guest.send(&Packet::new(REQUEST, 5000, host));
    };
    let unknown = |setup: &mut Setup, host| {
        setup.guest.send(&Packet::new(77, 5000, host));
    };
    for wrong in [
        &overrun as &dyn Fn(&mut Setup, u32),
        &wrong_length,
        &after_the_end,
        &twice,
        &unknown,
    ] {
        let (client, host) = setup.host_asks(5000);
        wrong(&mut setup, host);
        let reset = setup.guest.expect(RST);
        assert_eq!((reset.src_port, reset.dst_port), (host, 5000));
        setup.wait_open(1);
        drop(client);
        kept.write_all(b"there").unwrap();
        assert_eq!(setup.guest.expect(RW).data, b"there");
    }
    setup
        .guest
        .send(&Packet::new(RW, 4000, kept_port).data(b"x"));
    expect_bytes(&kept, b"x");
}

#[test]
fn there_are_so_many_connections_and_no_more() {
    // Each has two descriptors in this process: fewer than the system gives without asking.
    rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit {
            current: rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum,
            ..rustix::process::getrlimit(rustix::process::Resource::Nofile)
        },
    )
    .unwrap();
    let mut setup = Setup::new();
    let listener = setup.listen(52);
    let programs = std::thread::spawn(move || {
        let programs: Vec<_> = (0..MAX_CONNECTIONS)
            .map(|_| listener.accept().unwrap().0)
            .collect();
        (listener, programs)
    });
    for port in 0..MAX_CONNECTIONS as u32 {
        setup.guest.connect(port, 52);
    }
    let (listener, mut programs) = programs.join().unwrap();
    setup.guest.send(&Packet::new(REQUEST, 5000, 52));
    setup.guest.expect(RST);
    let client = setup.client("CONNECT 5000\n");
    expect_end(&client);
    // One goes, and there is room for one.
    programs.pop();
    let mut flags = 0;
    let mut last = None;
    while flags != 3 {
        let packet = setup.guest.expect(SHUTDOWN);
        flags |= packet.flags;
        last = Some(packet);
    }
    setup.guest.send(&last.unwrap().answer(RST));
    setup.guest.connect(5000, 52);
    drop(listener);
    setup.guest.driver.write(register::STATUS, 0);
    setup.wait_open(0);
    for program in &programs {
        expect_end(program);
    }
}

#[test]
fn connections_leave_file_descriptors_to_others() {
    let limits = [Some(0), Some(140), Some(256), Some(1024), Some(1152), None];
    let found = limits.map(connection_limit);
    assert_eq!(found, [16, 16, 128, 896, 1024, 1024]);
}

#[test]
fn a_new_device_does_not_begin_with_the_ports_of_one_before() {
    let [first, second] = [(); 2].map(|()| {
        let mut setup = Setup::new();
        setup.host_asks(5000).1
    });
    assert_ne!(first, second);
    assert!([first, second].iter().all(|port| port >> 30 == 1));
}

#[test]
fn half_made_handshakes_are_given_up() {
    let mut setup = Setup::with_patience(SHORT);
    // More clients that say nothing than there may be: others get their turn after them.
    let silent: Vec<_> = (0..MAX_CLIENTS + 10).map(|_| setup.client("")).collect();
    let slow = setup.client("CONNECT 50");
    // A guest that does not answer, once for a client that has waited for its turn.
    let unanswered = setup.client("CONNECT 5000\n");
    for client in &silent {
        expect_end(client);
    }
    expect_end(&slow);
    let request = setup.guest.expect(REQUEST);
    expect_end(&unanswered);
    let reset = setup.guest.expect(RST);
    assert_eq!(reset.src_port, request.src_port);
    // A guest that answers too late.
    setup.guest.send(&request.answer(RESPONSE));
    setup.guest.expect(RST);
    setup.wait_open(0);
}

#[test]
fn a_guest_that_does_not_answer_the_end_is_reset() {
    let mut setup = Setup::with_patience(SHORT);
    let (client, host) = setup.host_asks(5000);
    drop(client);
    let mut packet = setup.guest.expect(SHUTDOWN);
    while packet.flags != 3 {
        packet = setup.guest.expect(SHUTDOWN);
    }
    assert_eq!(setup.guest.expect(RST).src_port, host);
    setup.wait_open(0);
}

#[test]
fn a_program_with_too_many_connections_waiting_is_tried_again() {
    let mut setup = Setup::new();
    let path = setup.folder.path().join("vsock_52");
    let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
    let listener = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let listener = UnixListener::from(listener);
    for port in 0..20 {
        setup.guest.send(&Packet::new(REQUEST, port, 52));
    }
    let programs: Vec<_> = (0..20).map(|_| listener.accept().unwrap().0).collect();
    let mut ports: Vec<_> = (0..20)
        .map(|_| setup.guest.expect(RESPONSE).dst_port)
        .collect();
    ports.sort_unstable();
    assert!(ports.into_iter().eq(0..20));
    drop(programs);

    let mut setup = Setup::with_patience(SHORT);
    let path = setup.folder.path().join("vsock_52");
    let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
    let listener = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    for port in 0..20 {
        setup.guest.send(&Packet::new(REQUEST, port, 52));
    }
    let mut refused = 0;
    while refused < 19 {
        let packet = setup.guest.receive();
        refused += u32::from(packet.op == RST);
    }
    setup.wait_open(1);
}

#[test]
fn more_than_are_tried_again_at_once_are_all_connected() {
    let mut setup = Setup::new();
    let path = setup.folder.path().join("vsock_52");
    let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
    let listener = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let listener = UnixListener::from(listener);
    for port in 0..100 {
        setup.guest.send(&Packet::new(REQUEST, port, 52));
    }
    // Those that are tried first do not have what others wait for.
    let other = setup.listen(53);
    setup.guest.send(&Packet::new(REQUEST, 100, 53));
    other.accept().unwrap();
    let programs: Vec<_> = (0..100).map(|_| listener.accept().unwrap().0).collect();
    let mut ports = std::collections::BTreeSet::new();
    while ports.len() < 101 {
        let packet = setup.guest.receive();
        if packet.op == RESPONSE {
            ports.insert(packet.dst_port);
        }
    }
    drop(programs);
}

#[test]
fn a_pause_does_not_count_for_those_who_wait() {
    let mut setup = Setup::with_patience(Patience {
        handshake: Duration::from_millis(500),
        ..PATIENT
    });
    let begin = Instant::now();
    let silent = setup.client("CONN");
    let unanswered = setup.client("CONNECT 5000\n");
    setup.guest.expect(REQUEST);
    setup.guest.driver.transport.pause();
    let spent = begin.elapsed();
    std::thread::sleep(Duration::from_millis(600));
    let resumed = Instant::now();
    setup.guest.driver.transport.resume();
    // What was left before is left now.
    let left = Duration::from_millis(500).saturating_sub(spent);
    expect_end(&silent);
    assert!(resumed.elapsed() >= left, "the client");
    setup.guest.expect(RST);
    assert!(resumed.elapsed() >= left, "the connection");
    expect_end(&unanswered);
}

#[test]
fn a_guest_without_buffers_waits_and_nothing_piles_up() {
    let mut setup = Setup::new();
    setup.guest.start_without_buffers();
    // Packets that are to be refused, more than may wait.
    let packet = Packet::new(RW, 1024, 52).bytes();
    setup.guest.driver.fill(TX_DATA, &packet);
    let buffer = [Buffer::readable(TX_DATA, packet.len() as u32)];
    let wanted = MAX_RESETS + 100;
    let (mut added, mut used) = (0, 0);
    while added < wanted {
        let queue = &mut setup.guest.driver.queues[TX];
        while added < wanted && added - used < 200 {
            queue.add(&setup.guest.driver.memory, &buffer);
            added += 1;
        }
        setup.guest.driver.notify(TX as u32);
        let queue = &mut setup.guest.driver.queues[TX];
        while added - used > 110 {
            queue.wait_used(&setup.guest.driver.memory);
            used += 1;
        }
    }
    let memory = Arc::clone(&setup.guest.driver.memory);
    while used < MAX_RESETS {
        setup.guest.driver.queues[TX].wait_used(&memory);
        used += 1;
    }
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(setup.guest.driver.queues[TX].used(&memory), None);
    // With buffers, all goes on.
    for _ in 0..256 {
        setup.guest.give_buffer();
    }
    setup.guest.driver.notify(RX as u32);
    for _ in 0..wanted {
        setup.guest.expect(RST);
    }
    for _ in used..wanted {
        setup.guest.driver.queues[TX].wait_used(&memory);
    }
    setup.guest.expect_silence();
}

#[test]
fn buffers_without_room_go_back() {
    let mut setup = Setup::new();
    setup.guest.start_without_buffers();
    let mut client = setup.client("CONNECT 5000\n");
    let give = |setup: &mut Setup, len| {
        let queue = &mut setup.guest.driver.queues[RX];
        queue.add(
            &setup.guest.driver.memory,
            &[Buffer::writable(0x60_0000, len)],
        );
        setup.guest.driver.notify(RX as u32);
        let memory = &setup.guest.driver.memory;
        setup.guest.driver.queues[RX].wait_used(memory).1
    };
    assert_eq!(give(&mut setup, 43), 0);
    assert_eq!(give(&mut setup, 44), 44);
    let request = setup.guest.driver.bytes(0x60_0000, 44);
    let host = u32::from_le_bytes(request[16..20].try_into().unwrap());
    setup.guest.send(&Packet::new(RESPONSE, 5000, host));
    line(&client);
    client.write_all(b"data").unwrap();
    assert_eq!(give(&mut setup, 44), 0);
    assert_eq!(give(&mut setup, 46), 46);
    assert_eq!(setup.guest.driver.bytes(0x60_0000 + 44, 2), b"da");
    assert_eq!(give(&mut setup, 100), 46);
    assert_eq!(setup.count(|c| &c.rx_errors), 2);
}

#[test]
fn bad_chains_make_the_device_need_a_reset_and_close_its_sockets() {
    let mut setup = Setup::new();
    for queue in [RX, TX] {
        setup.guest.start();
        let (client, _) = setup.host_asks(5000);
        if queue == RX {
            setup.guest.start_without_buffers();
            expect_end(&client);
            // Wanted, so that the chain is looked at.
            let _client = setup.client("CONNECT 5000\n");
            std::thread::sleep(Duration::from_millis(10));
            bad_chain(&mut setup, queue);
        } else {
            bad_chain(&mut setup, queue);
            expect_end(&client);
        }
        setup.wait_open(0);
    }
    setup.guest.start();
    setup.host_asks(5000);
}

fn bad_chain(setup: &mut Setup, queue: usize) {
    let buffer = Buffer {
        address: MockDriver::END - 1,
        len: 60,
        writable: queue == RX,
    };
    setup.guest.driver.queues[queue].add(&setup.guest.driver.memory, &[buffer]);
    setup.guest.driver.notify(queue as u32);
    setup.guest.driver.wait_needs_reset();
}

#[test]
fn a_chain_of_the_wrong_direction_is_given_back() {
    let mut setup = Setup::new();
    let driver = &mut setup.guest.driver;
    assert_eq!(driver.request(TX, &[Buffer::writable(TX_DATA, 100)]), 0);
    assert_eq!(driver.status() & status::NEEDS_RESET, 0);
    setup.host_asks(5000);
}

#[test]
fn no_driver_breaks_a_socket_device() {
    let mut setup = Setup::with_patience(SHORT);
    let listener = setup.listen(52);
    listener.set_nonblocking(true).unwrap();
    let mut random = Random::new(5);
    for _ in 0..100 {
        setup.guest.driver.start(0, 8);
        let mut clients: Vec<_> = (0..random.below(4))
            .map(|_| setup.client("CONNECT 5000\nhello"))
            .collect();
        // Headers where the storm's descriptors point to.
        for at in [0, 0x1000, 0x20_0000] {
            let op = random.below(9) as u16;
            let port = random.one_of(&[52, 53, 1 << 30]);
            let packet = Packet::new(op, 5000, port).data(b"0123456789");
            setup.guest.driver.fill(at, &packet.bytes());
        }
        let steps = random.below(60) as usize;
        storm(&mut setup.guest.driver, &mut random, steps);
        clients.pop();
        while let Ok((program, _)) = listener.accept() {
            drop(program);
        }
    }
    setup.guest.start();
    setup.wait_open(0);
    let (mut client, host) = setup.host_asks(6000);
    client.write_all(b"alive").unwrap();
    assert_eq!(setup.guest.expect(RW).data, b"alive");
    setup.guest.send(&Packet::new(RW, 6000, host).data(b"too"));
    expect_bytes(&client, b"too");
}

/// Packets of a guest that knows its way, in no order that makes sense.
#[test]
fn no_packets_break_a_socket_device() {
    let mut setup = Setup::with_patience(SHORT);
    let listener = setup.listen(52);
    listener.set_nonblocking(true).unwrap();
    let mut random = Random::new(6);
    let mut hosts = vec![52, 53];
    let mut clients = Vec::new();
    for _ in 0..4000 {
        match random.below(12) {
            0 => clients.push(setup.client(random.one_of(&["CONNECT 1\n", "CONNECT 2\nab", "C"]))),
            1 if !clients.is_empty() => {
                let at = random.below(clients.len() as u64) as usize;
                drop(clients.swap_remove(at));
            }
            2 => {
                if let Ok((program, _)) = listener.accept() {
                    program.set_nonblocking(true).unwrap();
                    clients.push(program);
                }
            }
            3 => {
                for client in &clients {
                    client.set_nonblocking(true).unwrap();
                    let _ = rustix::net::send(
                        client,
                        &[0; 3000],
                        rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT,
                    );
                }
            }
            4 => {
                for mut client in &clients {
                    client.set_nonblocking(true).unwrap();
                    let _ = client.read(&mut [0; 9000]);
                }
            }
            _ => {
                let op = random.one_of(&[0, 1, 1, 2, 2, 3, 4, 5, 5, 5, 6, 7, 8]);
                let mut packet = Packet::new(op, random.below(3) as u32, random.one_of(&hosts));
                packet.flags = random.below(4) as u32;
                packet.buf_alloc = random.one_of(&[0, 100, 1 << 18, u32::MAX]);
                packet.fwd_cnt = random.one_of(&[0, 0, 0, 3000, u32::MAX]);
                packet.data = vec![0; random.one_of(&[0, 1, 4096, ROOM as usize])];
                setup.guest.send(&packet);
            }
        }
        while let Some(packet) = setup.guest.take() {
            if packet.op == REQUEST {
                hosts.push(packet.src_port);
                if hosts.len() > 8 {
                    hosts.remove(2);
                }
            }
        }
    }
    assert_eq!(setup.guest.driver.status() & status::NEEDS_RESET, 0);
    drop(clients);
    setup.guest.start();
    setup.wait_open(0);
    setup.host_asks(6000);
}
