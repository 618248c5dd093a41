//! Named ports, and control messages.

use super::*;

over_each_transport!(
    a_driver_is_told_of_every_port_in_the_order_of_the_specification,
    a_named_port_carries_bytes_both_ways,
    programs_of_the_host_have_a_port_one_after_the_other,
    a_hostile_driver_of_ports_gets_nowhere,
);

/// The queues of the first port that is not the console.
const PORT_RECEIVE: usize = 4;
const PORT_TRANSMIT: usize = 5;

fn with_ports(ports: Vec<Port>, size: &ConsoleSize) -> VirtioConsole {
    VirtioConsole::new(Console::null(), ports, size.clone()).unwrap()
}

/// A driver that has taken on a port which leads to the socket that is given back.
fn socket_port(kind: TransportKind) -> (Guest, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(LONG)).unwrap();
    let device = with_ports(vec![Port::socket("agent", theirs)], &ConsoleSize::default());
    let mut guest = Guest::new(kind, MULTIPORT, device);
    guest.take_ports_on(&[true, true]);
    (guest, ours)
}

fn a_driver_is_told_of_every_port_in_the_order_of_the_specification(kind: TransportKind) {
    let size = ConsoleSize::new(80, 25);
    let port = |name: &str| Port::new(name, Console::null());
    let device = with_ports(vec![port("first"), port("org.kiln.second")], &size);
    let mut guest = Guest::new(kind, MULTIPORT | SIZE, device);
    // Nothing before the driver says that it is ready.
    guest.expect(CONTROL_RECEIVE, 4096);
    guest.say(1, 3, 0);
    guest.say(1, 6, 1);
    assert!(guest.is_used(CONTROL_RECEIVE, 0));
    guest.say(0, 0, 1);
    let added = guest.came(CONTROL_RECEIVE);
    assert_eq!(added, control(0, 1, 0));
    for port in 1..3 {
        assert_eq!(guest.hear(), (port, 1, 0, Vec::new()));
    }
    guest.say(0, 3, 1);
    assert_eq!(guest.hear(), (0, 4, 1, Vec::new()));
    assert_eq!(guest.hear(), (0, 6, 1, Vec::new()));
    assert_eq!(guest.hear(), (0, 5, 0, vec![80, 0, 25, 0]));
    guest.say(2, 3, 1);
    assert_eq!(guest.hear(), (2, 7, 1, b"org.kiln.second".to_vec()));
    guest.say(1, 3, 1);
    assert_eq!(guest.hear(), (1, 7, 1, b"first".to_vec()));
    size.set(300, 100);
    assert_eq!(guest.hear(), (0, 5, 0, vec![44, 1, 100, 0]));
    // A driver that begins anew is told anew.
    guest.driver.start(MULTIPORT | SIZE, 16);
    guest.say(0, 0, 1);
    assert_eq!(guest.hear(), (0, 1, 0, Vec::new()));
}

fn a_named_port_carries_bytes_both_ways(kind: TransportKind) {
    let (mut guest, mut host) = socket_port(kind);
    let bytes = pattern(100_000);
    host.write_all(&bytes[..50]).unwrap();
    guest.expect(PORT_RECEIVE, 4096);
    // The guest has not opened it: what comes would be thrown away.
    guest.send(PORT_TRANSMIT, b"early");
    assert!(guest.is_used(PORT_RECEIVE, 0));
    guest.say(1, 6, 1);
    assert_eq!(guest.came(PORT_RECEIVE), bytes[..50]);
    let mut early = [0; 5];
    host.read_exact(&mut early).unwrap();
    assert_eq!(&early, b"early");

    let mut writer = host.try_clone().unwrap();
    let to_guest = bytes.clone();
    let writer = std::thread::spawn(move || writer.write_all(&to_guest).unwrap());
    assert!(guest.receive_all(PORT_RECEIVE, bytes.len()) == bytes);
    writer.join().unwrap();
    let mut received = vec![0; bytes.len()];
    let reader = std::thread::spawn(move || {
        host.read_exact(&mut received).unwrap();
        (received, host)
    });
    for part in bytes.chunks(7000) {
        guest.send(PORT_TRANSMIT, part);
    }
    let (received, host) = reader.join().unwrap();
    assert!(received == bytes);
    // The host's end goes, and the guest is told; what it sends then goes nowhere.
    drop(host);
    assert_eq!(guest.hear(), (1, 6, 0, Vec::new()));
    guest.send(PORT_TRANSMIT, &bytes[..10_000]);
}

fn programs_of_the_host_have_a_port_one_after_the_other(kind: TransportKind) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port");
    let device = with_ports(vec![Port::listen("x", &path)], &ConsoleSize::default());
    let mut guest = Guest::new(kind, MULTIPORT, device);
    guest.take_ports_on(&[true, false]);
    guest.say(1, 6, 1);
    for round in 0..20_u8 {
        // The next one comes before this one has gone.
        let mut first = UnixStream::connect(&path).unwrap();
        assert_eq!(guest.hear(), (1, 6, 1, Vec::new()));
        let mut second = UnixStream::connect(&path).unwrap();
        second.write_all(b"second").unwrap();
        first.write_all(&[round; 3]).unwrap();
        assert_eq!(guest.receive_all(PORT_RECEIVE, 3), [round; 3]);
        guest.send(PORT_TRANSMIT, b"answer");
        let mut answer = [0; 6];
        first.read_exact(&mut answer).unwrap();
        // What it has sent before it goes is read, and then its end is told.
        first.write_all(b"last words").unwrap();
        drop(first);
        assert_eq!(guest.receive_all(PORT_RECEIVE, 10), b"last words");
        guest.expect(PORT_RECEIVE, 4096);
        assert_eq!(guest.hear(), (1, 6, 0, Vec::new()));
        assert_eq!(guest.hear(), (1, 6, 1, Vec::new()));
        assert_eq!(guest.came(PORT_RECEIVE), b"second");
        drop(second);
        assert_eq!(guest.hear(), (1, 6, 0, Vec::new()));
    }
    drop(guest);
    assert!(!path.exists());
}

fn a_hostile_driver_of_ports_gets_nowhere(kind: TransportKind) {
    for seed in 0..80 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("port");
        let ports = vec![
            Port::new("a", Console::writer(io::sink())),
            Port::listen("b", &path),
        ];
        let size = ConsoleSize::new(80, 25);
        let mut guest = Guest::new(kind, MULTIPORT, with_ports(ports, &size));
        let mut random = Random::new(seed);
        let mut clients = Vec::new();
        for _ in 0..20 {
            for _ in 0..random.below(6) {
                let port = random.one_of(&[0, 1, 2, 3, 0x1_0000, u32::MAX]);
                let event = random.one_of(&[0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 6, 7, 8, 0xffff]);
                let mut message = control(port, event, random.one_of(&[0, 1, 1, 2, 0xffff]));
                message.truncate(1 + random.below(8) as usize);
                if random.below(4) > 0 {
                    message = control(port, event, 1);
                }
                guest.offer(CONTROL_TRANSMIT, &message);
            }
            match random.below(4) {
                0 => guest.expect(CONTROL_RECEIVE, random.one_of(&[8, 11, 12, 4096])),
                1 => clients.extend(UnixStream::connect(&path).ok()),
                2 => drop(clients.pop()),
                _ => size.set(random.below(500) as u16, 50),
            }
            storm(&mut guest.driver, &mut random, 5);
        }
        guest.driver.start(MULTIPORT, 16);
        // Clients may be there or not.
        guest.say(0, 0, 1);
        for port in 0..3 {
            assert_eq!(guest.hear(), (port, 1, 0, Vec::new()));
        }
        guest.say(0, 3, 1);
        assert_eq!(guest.hear(), (0, 4, 1, Vec::new()));
    }
}

#[test]
fn a_buffer_too_short_for_a_message_makes_the_device_need_a_reset() {
    let mut guest = Guest::new(
        TransportKind::Mmio,
        MULTIPORT,
        with_ports(
            vec![Port::new("a", Console::null())],
            &ConsoleSize::default(),
        ),
    );
    guest.expect(CONTROL_RECEIVE, 7);
    guest.offer(CONTROL_TRANSMIT, &control(0, 0, 1));
    guest.driver.wait_needs_reset();
    guest.driver.start(MULTIPORT, 16);
    guest.take_ports_on(&[true, false]);
}

#[test]
fn a_port_can_be_given_up_and_taken_on_again() {
    let (mut guest, mut host) = socket_port(TransportKind::Mmio);
    guest.say(1, 6, 1);
    guest.say(1, 3, 0);
    host.write_all(b"hello").unwrap();
    guest.expect(PORT_RECEIVE, 16);
    // Messages about ports that there are not, and that nobody should send.
    for (port, event) in [(2, 3), (u32::MAX, 6), (1, 1), (1, 7), (0, 5), (1, 0x1234)] {
        guest.say(port, event, 1);
    }
    guest.say(1, 3, 1);
    guest.say(1, 6, 1);
    assert_eq!(guest.came(PORT_RECEIVE), b"hello");
}

#[test]
fn a_driver_without_ports_has_the_console_alone() {
    let (output, captured) = ConsoleOutput::capture(100);
    let console = Console::new(ConsoleInput::bytes("typed"), output);
    let port = Port::new("a", Console::null());
    let device = VirtioConsole::new(console, vec![port], ConsoleSize::default()).unwrap();
    let mut guest = Guest::new(TransportKind::Mmio, 0, device);
    guest.send(TRANSMIT, b"hello");
    assert_eq!(guest.receive(RECEIVE), b"typed");
    assert_eq!(captured.text(), "hello");
    // The other queues are there, and nothing happens on them.
    guest.offer(CONTROL_TRANSMIT, &control(0, 0, 1));
    guest.expect(CONTROL_RECEIVE, 100);
    guest.offer(PORT_TRANSMIT, b"nobody");
    guest.send(TRANSMIT, b"!");
    for queue in [CONTROL_RECEIVE, CONTROL_TRANSMIT, PORT_TRANSMIT] {
        assert!(guest.is_used(queue, 0));
    }
}

#[test]
fn a_console_with_ports_is_given_input_once_it_is_open() {
    let console = Console::new(ConsoleInput::bytes("typed"), ConsoleOutput::null());
    let port = Port::new("a", Console::null());
    let device = VirtioConsole::new(console, vec![port], ConsoleSize::default()).unwrap();
    let mut guest = Guest::new(TransportKind::Mmio, MULTIPORT, device);
    guest.expect(RECEIVE, 100);
    guest.take_ports_on(&[true, false]);
    assert!(guest.is_used(RECEIVE, 0));
    guest.say(0, 6, 1);
    assert_eq!(guest.came(RECEIVE), b"typed");
}

#[test]
fn a_client_that_only_listens_on_is_answered() {
    let (mut guest, mut host) = socket_port(TransportKind::Mmio);
    guest.say(1, 6, 1);
    host.write_all(b"question").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.receive_all(PORT_RECEIVE, 8), b"question");
    guest.expect(PORT_RECEIVE, 16);
    guest.send(PORT_TRANSMIT, b"answer");
    let mut answer = [0; 6];
    host.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    drop(host);
    assert_eq!(guest.hear(), (1, 6, 0, Vec::new()));
}

#[test]
fn a_client_that_comes_and_goes_unnoticed_leaves_what_it_has_sent() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port");
    let device = with_ports(vec![Port::listen("x", &path)], &ConsoleSize::default());
    let mut guest = Guest::new(TransportKind::Mmio, MULTIPORT, device);
    // Before there is a driver that knows of the port.
    UnixStream::connect(&path)
        .unwrap()
        .write_all(b"left behind")
        .unwrap();
    guest.take_ports_on(&[true, true]);
    guest.say(1, 6, 1);
    assert_eq!(guest.receive_all(PORT_RECEIVE, 11), b"left behind");
    guest.expect(PORT_RECEIVE, 16);
    assert_eq!(guest.hear(), (1, 6, 0, Vec::new()));
}

#[test]
fn a_slow_program_loses_nothing_and_holds_up_nobody_else() {
    let (mut guest, mut host) = socket_port(TransportKind::Mmio);
    let bytes = pattern(2 << 20);
    guest.offer(PORT_TRANSMIT, &bytes);
    for _ in 0..100 {
        // To the console.
        let elsewhere = Buffer::readable(SENT + (4 << 20), 100);
        guest.driver.request(TRANSMIT, &[elsewhere]);
    }
    assert!(guest.is_used(PORT_TRANSMIT, 0));
    let mut received = vec![0; bytes.len()];
    host.read_exact(&mut received).unwrap();
    assert!(received == bytes);
    guest.driver.queues[PORT_TRANSMIT].wait_used(&guest.driver.memory);
}

#[test]
fn what_the_driver_knows_outlives_a_pause_and_a_restore() {
    let size = ConsoleSize::default();
    let build = |state: Option<&VirtioConsoleState>| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ports = vec![Port::socket("agent", theirs)];
        let (console, size) = (Console::null(), size.clone());
        let device = match state {
            None => VirtioConsole::new(console, ports, size),
            Some(state) => VirtioConsole::from_state(console, ports, size, state),
        };
        (device.unwrap(), ours)
    };
    let (device, mut host) = build(None);
    let mut guest = Guest::new(TransportKind::Mmio, MULTIPORT, device);
    guest.take_ports_on(&[true, true]);
    guest.say(1, 6, 1);
    size.set(80, 25);
    assert_eq!(guest.hear(), (0, 5, 0, vec![80, 0, 25, 0]));
    guest.driver.transport.pause();
    host.write_all(b"meanwhile").unwrap();
    guest.driver.transport.resume();
    assert_eq!(guest.receive_all(PORT_RECEIVE, 9), b"meanwhile");
    guest.driver.transport.pause();

    let known = PortState {
        added: true,
        ready: true,
        introduced: true,
        host_open: true,
        guest_open: false,
        size: (80, 25),
        taken: 0,
    };
    let state = VirtioConsoleState {
        driver_ready: true,
        ports: vec![
            known.clone(),
            PortState {
                guest_open: true,
                size: (0, 0),
                ..known
            },
        ],
        size: (80, 25),
    };
    let json = serde_json::to_string(&state).unwrap();
    assert_eq!(
        serde_json::from_str::<VirtioConsoleState>(&json).unwrap(),
        state
    );
    let (mut device, mut host) = build(Some(&state));
    assert_eq!(device.state(), Some(state));
    let transport = guest.driver.transport.state().unwrap();
    guest.driver.restore(Box::new(device), &transport).unwrap();
    guest.driver.transport.resume();
    host.write_all(b"restored").unwrap();
    assert_eq!(guest.receive_all(PORT_RECEIVE, 8), b"restored");
    drop(host);
    assert_eq!(guest.hear(), (1, 6, 0, Vec::new()));
}

#[test]
fn ports_that_cannot_be_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("taken");
    std::fs::write(&path, "").unwrap();
    let port = |name: &str| Port::new(name, Console::null());
    let long = "x".repeat(65);
    let many: Vec<Port> = (0..16).map(|n| port(&format!("port{n}"))).collect();
    for (ports, words) in [
        (vec![port("")], vec!["\"\"", "1 to 64"]),
        (vec![port(&long)], vec!["1 to 64"]),
        (vec![port("a/b")], vec!["a/b", "slash"]),
        (vec![port("a b")], vec!["a b", "blank"]),
        (vec![port("ä")], vec!["ä", "ASCII"]),
        (
            vec![port("a"), port("b"), port("a")],
            vec!["`a`", "another"],
        ),
        (many, vec!["port15", "15 ports"]),
        (vec![Port::listen("a", &path)], vec!["taken", "something"]),
        (
            vec![Port::listen("a", folder.path().join("no/where"))],
            vec!["no/where"],
        ),
    ] {
        let error = VirtioConsole::new(Console::null(), ports, ConsoleSize::default());
        let error = error.unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "no {word} in: {error}");
        }
    }
    let most = (0..15).map(|n| port(&format!("port{n}"))).collect();
    let mut device = with_ports(most, &ConsoleSize::default());
    let mut state = device.state().unwrap();
    state.ports.pop();
    let error = VirtioConsole::from_state(
        Console::null(),
        vec![port("a")],
        ConsoleSize::default(),
        &state,
    );
    assert!(error.unwrap_err().to_string().contains("15"));
}

#[test]
fn a_driver_that_wakes_up_takes_its_ports_on_without_being_told_of_them() {
    let (mut guest, mut host) = socket_port(TransportKind::Mmio);
    guest.say(1, 6, 1);
    guest.driver.start(MULTIPORT, 16);
    guest.say(0, 3, 1);
    guest.say(1, 3, 1);
    guest.say(1, 6, 1);
    assert_eq!(guest.hear(), (0, 4, 1, Vec::new()));
    assert_eq!(guest.hear(), (0, 6, 1, Vec::new()));
    assert_eq!(guest.hear(), (1, 7, 1, b"agent".to_vec()));
    assert_eq!(guest.hear(), (1, 6, 1, Vec::new()));
    // Once more is no news.
    guest.say(1, 3, 1);
    host.write_all(b"awake").unwrap();
    assert_eq!(guest.receive_all(PORT_RECEIVE, 5), b"awake");
    assert!(guest.is_used(CONTROL_RECEIVE, 4));
}

#[test]
fn what_a_client_has_not_taken_goes_to_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port");
    let device = with_ports(vec![Port::listen("x", &path)], &ConsoleSize::default());
    let mut guest = Guest::new(TransportKind::Mmio, MULTIPORT, device);
    guest.take_ports_on(&[true, false]);
    guest.say(1, 6, 1);
    for round in 1..=20 {
        let mut first = UnixStream::connect(&path).unwrap();
        assert_eq!(guest.hear(), (1, 6, 1, Vec::new()));
        // More than the socket holds.
        guest.offer(PORT_TRANSMIT, &[b'x'; 2 << 20]);
        first.read_exact(&mut [0; 1000]).unwrap();
        let mut second = UnixStream::connect(&path).unwrap();
        second.set_read_timeout(Some(LONG)).unwrap();
        guest.expect(CONTROL_RECEIVE, 4096);
        let next = Buffer::writable(RECEIVED + 0x8_0000, 4096);
        guest.driver.queues[CONTROL_RECEIVE].add(&guest.driver.memory, &[next]);
        guest.driver.notify(CONTROL_RECEIVE as u32);
        drop(first);
        assert_eq!(guest.came(CONTROL_RECEIVE), control(1, 6, 0));
        guest.driver.queues[CONTROL_RECEIVE].wait_used(&guest.driver.memory);
        assert_eq!(guest.driver.bytes(RECEIVED + 0x8_0000, 8), control(1, 6, 1));
        // The first one's is given back, and is not the second one's.
        guest.driver.queues[PORT_TRANSMIT].wait_used(&guest.driver.memory);
        guest.send(PORT_TRANSMIT, b"yours");
        let mut yours = [0; 5];
        second.read_exact(&mut yours).unwrap();
        assert_eq!(&yours, b"yours", "in round {round}");
        drop(second);
        assert_eq!(guest.hear(), (1, 6, 0, Vec::new()));
    }
}
