//! The console, with a driver that knows no ports.

use super::*;

over_each_transport!(
    what_is_sent_arrives_in_order_however_it_is_cut,
    what_is_typed_arrives_in_order_however_small_the_buffers_are,
    a_size_is_in_the_configuration_and_a_change_is_told,
    a_hostile_driver_gets_nowhere,
);

fn what_is_sent_arrives_in_order_however_it_is_cut(kind: TransportKind) {
    let (output, captured) = ConsoleOutput::capture(usize::MAX);
    let console = Console::new(ConsoleInput::null(), output);
    let device = VirtioConsole::new(console, Vec::new(), ConsoleSize::default()).unwrap();
    let mut guest = Guest::new(kind, 0, device);
    let bytes = pattern(300_000);
    guest.driver.fill(SENT, &bytes);
    let mut random = Random::new(1);
    let mut at = 0;
    while at < bytes.len() as u64 {
        let mut buffers = Vec::new();
        for _ in 0..1 + random.below(4) {
            let len = (1 + random.below(20_000)).min(bytes.len() as u64 - at);
            if len > 0 {
                buffers.push(Buffer::readable(SENT + at, len as u32));
            }
            at += len;
        }
        guest.driver.request(TRANSMIT, &buffers);
    }
    assert!(captured.bytes() == bytes);
}

fn what_is_typed_arrives_in_order_however_small_the_buffers_are(kind: TransportKind) {
    let bytes = pattern(20_000);
    let console = Console::new(ConsoleInput::bytes(bytes.clone()), ConsoleOutput::null());
    let device = VirtioConsole::new(console, Vec::new(), ConsoleSize::default()).unwrap();
    let mut guest = Guest::new(kind, 0, device);
    let mut received = Vec::new();
    let mut random = Random::new(2);
    while received.len() < bytes.len() {
        guest.expect(RECEIVE, 1 + random.below(300) as u32);
        received.extend(guest.came(RECEIVE));
    }
    assert!(received == bytes);
    // That was all: the next buffer stays with the device, and readable ones are given back.
    guest.expect(RECEIVE, 100);
    guest.driver.transport.pause();
    assert!(
        guest.driver.queues[RECEIVE]
            .used(&guest.driver.memory)
            .is_none()
    );
}

fn a_size_is_in_the_configuration_and_a_change_is_told(kind: TransportKind) {
    let size = ConsoleSize::new(80, 25);
    let device = VirtioConsole::new(Console::null(), Vec::new(), size.clone()).unwrap();
    let mut driver = MockDriver::over(kind, Box::new(device));
    let read = |driver: &MockDriver| {
        let mut config = [0xff; 12];
        driver.config(0, &mut config);
        config
    };
    assert_eq!(read(&driver), [80, 0, 25, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    driver.start(SIZE, 16);
    // Linux looks only when it is told.
    driver.line.wait_for(1);
    size.set(300, 100);
    driver.line.wait_for(2);
    assert_eq!(read(&driver)[..4], [44, 1, 100, 0]);
    // The same size again is no change, and nobody is told while there is no driver.
    size.set(300, 100);
    driver.transport.reset();
    size.set(1, 2);
    assert_eq!(driver.line.count(), 2);
    assert_eq!(size.get(), (1, 2));
    assert_eq!(format!("{size:?}"), "ConsoleSize(1x2)");
}

fn a_hostile_driver_gets_nowhere(kind: TransportKind) {
    for seed in 0..60 {
        let console = Console::new(
            ConsoleInput::bytes(pattern(100_000)),
            ConsoleOutput::writer(io::sink()),
        );
        let device = VirtioConsole::new(console, Vec::new(), ConsoleSize::new(80, 25)).unwrap();
        let mut guest = Guest::new(kind, SIZE, device);
        storm(&mut guest.driver, &mut Random::new(seed), 100);
        guest.driver.start(SIZE, 16);
        guest.send(TRANSMIT, b"still there");
    }
}

#[test]
fn only_a_console_with_ports_offers_them() {
    let driver = MockDriver::new(Box::new(nowhere()));
    assert_eq!(driver.offered() & 0x7, SIZE);
    let port = Port::new("a", Console::null());
    let device = VirtioConsole::new(Console::null(), vec![port], ConsoleSize::default()).unwrap();
    let driver = MockDriver::new(Box::new(device));
    assert_eq!(driver.offered() & 0x7, SIZE | MULTIPORT);
    let mut ports = [0; 4];
    driver.config(4, &mut ports);
    assert_eq!(ports, [2, 0, 0, 0]);
}

#[test]
fn a_host_that_takes_nothing_for_a_while_loses_nothing() {
    let (mut reader, writer) = io::pipe().unwrap();
    let device = VirtioConsole::new(output_to(writer), Vec::new(), ConsoleSize::default()).unwrap();
    let mut guest = Guest::new(TransportKind::Mmio, 0, device);
    // More than a pipe holds, in one buffer.
    let bytes = pattern(1 << 20);
    guest.offer(TRANSMIT, &bytes);
    std::thread::sleep(Duration::from_millis(50));
    assert!(guest.is_used(TRANSMIT, 0));
    let mut start = vec![0; 300_000];
    reader.read_exact(&mut start).unwrap();
    assert!(guest.is_used(TRANSMIT, 0));
    // In the middle of the buffer, twice.
    guest.driver.transport.pause();
    let mut middle = vec![0; 10_000];
    reader.read_exact(&mut middle).unwrap();
    guest.driver.transport.resume();
    guest.driver.transport.pause();
    guest.driver.transport.resume();
    let mut rest = vec![0; bytes.len() - 310_000];
    reader.read_exact(&mut rest).unwrap();
    guest.driver.queues[TRANSMIT].wait_used(&guest.driver.memory);
    assert!([start, middle, rest].concat() == bytes);
}

#[test]
fn what_was_sent_last_is_given_to_the_host_when_the_machine_stops() {
    let (mut socket, theirs) = UnixStream::pair().unwrap();
    let device = VirtioConsole::new(output_to(theirs), Vec::new(), ConsoleSize::default()).unwrap();
    let mut guest = Guest::new(TransportKind::Mmio, 0, device);
    for round in 0..200_u8 {
        let text = [b'a' + round % 26; 64];
        guest.offer(TRANSMIT, &text);
        guest.driver.transport.reset();
        let mut received = [0; 64];
        socket.read_exact(&mut received).unwrap();
        assert_eq!(received, text);
        guest.driver.start(0, 16);
    }
}

#[test]
fn a_reset_in_the_middle_of_a_buffer_forgets_it() {
    let (mut reader, writer) = io::pipe().unwrap();
    let device = VirtioConsole::new(output_to(writer), Vec::new(), ConsoleSize::default()).unwrap();
    let mut guest = Guest::new(TransportKind::Mmio, 0, device);
    guest.offer(TRANSMIT, &[b'x'; 1 << 20]);
    std::thread::sleep(Duration::from_millis(50));
    guest.driver.start(0, 16);
    guest.offer(TRANSMIT, b"after");
    let mut last = [0; 5];
    while &last != b"after" {
        let mut byte = [0];
        reader.read_exact(&mut byte).unwrap();
        last.rotate_left(1);
        last[4] = byte[0];
    }
}

#[test]
fn a_host_that_has_gone_does_not_hold_the_guest_up() {
    let (reader, writer) = io::pipe().unwrap();
    let device = VirtioConsole::new(output_to(writer), Vec::new(), ConsoleSize::default()).unwrap();
    let mut guest = Guest::new(TransportKind::Mmio, 0, device);
    guest.send(TRANSMIT, b"seen");
    drop(reader);
    for _ in 0..100 {
        guest.send(TRANSMIT, &[b'x'; 10_000]);
    }
    // And so does one that never was.
    let mut guest = Guest::new(TransportKind::Mmio, 0, nowhere());
    guest.send(TRANSMIT, &[b'x'; 10_000]);
}

#[test]
fn a_console_that_takes_nothing_for_long_is_waited_for_no_longer() {
    let (mut reader, writer) = io::pipe().unwrap();
    let mut device =
        VirtioConsole::new(output_to(writer), Vec::new(), ConsoleSize::default()).unwrap();
    device.set_patience(Duration::from_millis(100));
    let mut guest = Guest::new(TransportKind::Mmio, 0, device);
    for _ in 0..3 {
        // It is dropped, and so is what follows, without a wait.
        guest.send(TRANSMIT, &pattern(1 << 20));
        for _ in 0..20 {
            guest.send(TRANSMIT, b"dropped");
        }
        // The console is taken up again where somebody reads.
        let mut buffer = vec![0; 1 << 20];
        let mut kept = reader.read(&mut buffer).unwrap();
        wait_until("it goes on", || {
            guest.send(TRANSMIT, b"again");
            kept += reader.read(&mut buffer[kept..]).unwrap();
            buffer[..kept].ends_with(b"again")
        });
        let again = buffer[..kept]
            .windows(5)
            .position(|w| w == b"again")
            .unwrap();
        assert!(buffer[..again] == pattern(1 << 20)[..again]);
    }
}

#[test]
fn input_is_read_only_when_there_is_room_for_it() {
    let (mut socket, theirs) = UnixStream::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    let console = Console::new(ConsoleInput::fd(theirs.into()), ConsoleOutput::null());
    let device = VirtioConsole::new(console, Vec::new(), ConsoleSize::default()).unwrap();
    let mut guest = Guest::new(TransportKind::Mmio, 0, device);
    // The host sends as much as there is room for between the two.
    let mut sent = 0;
    let bytes = pattern(4 << 20);
    while let Ok(len) = socket.write(&bytes[sent..]) {
        sent += len;
    }
    std::thread::sleep(Duration::from_millis(50));
    assert!(socket.write(b"x").is_err());
    assert!(guest.receive_all(RECEIVE, sent) == bytes[..sent]);
    drop(socket);
    guest.expect(RECEIVE, 16);
    guest.send(TRANSMIT, b"the guest goes on");
}

#[test]
fn a_buffer_that_is_not_for_the_device_is_given_back() {
    let mut guest = Guest::new(TransportKind::Mmio, 0, nowhere());
    let (readable, writable) = (Buffer::readable(SENT, 9), Buffer::writable(RECEIVED, 9));
    assert_eq!(guest.driver.request(RECEIVE, &[readable]), 0);
    assert_eq!(guest.driver.request(TRANSMIT, &[writable]), 0);
}
