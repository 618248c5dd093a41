use super::*;
use std::fs::{File, OpenOptions};
use std::io::{PipeReader, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{OFlags, fcntl_getfl};

use super::link::OUTPUT_CAPACITY;

fn to(fd: impl Into<OwnedFd>) -> Bench {
    let output = ConsoleOutput::fd(fd.into());
    Bench::new(Console::new(ConsoleInput::null(), output))
}

fn stalled_pipe() -> (Bench, PipeReader) {
    let (reader, writer) = io::pipe().unwrap();
    (to(writer), reader)
}

/// Sends until the port is busy and stays so; returns what was sent.
fn send_until_busy(bench: &Bench) -> Vec<u8> {
    let mut sent = Vec::new();
    loop {
        // The worker moves on as far as it can.
        while bench.takes_output() {
            let byte = sent.len() as u8;
            bench.send(&[byte]);
            sent.push(byte);
            assert!(sent.len() < 16 << 20, "it is never busy");
        }
        bench.settle();
        if !bench.takes_output() {
            return sent;
        }
    }
}

#[test]
fn output_arrives_in_order_and_flush_waits_for_it() {
    let (output, captured) = ConsoleOutput::capture(usize::MAX);
    let bench = Bench::new(Console::new(ConsoleInput::null(), output));
    let bytes = pattern(200_000);
    bench.send_politely(&bytes);
    assert!(bench.serial.flush(LONG));
    assert!(captured.bytes() == bytes);
}

#[test]
fn what_is_sent_is_counted_and_so_is_what_nobody_takes() {
    let count = |bench: &Bench| {
        let counters = bench.serial.counters();
        let [sent, dropped] = [&counters.output_bytes, &counters.dropped_bytes];
        (
            sent.load(Ordering::Relaxed),
            dropped.load(Ordering::Relaxed),
        )
    };
    let (output, captured) = ConsoleOutput::capture(usize::MAX);
    let bench = Bench::new(Console::new(ConsoleInput::null(), output));
    bench.send_politely(&pattern(1000));
    assert!(bench.serial.flush(LONG));
    assert_eq!((captured.bytes().len(), count(&bench)), (1000, (1000, 0)));
    let bench = Bench::new(Console::null());
    bench.send(&pattern(1000));
    assert_eq!(count(&bench), (1000, 1000));
    let (bench, mut reader) = stalled_pipe();
    bench.send(&pattern(1 << 20));
    bench.settle();
    bench.serial.close(Duration::ZERO);
    let mut received = Vec::new();
    reader.read_to_end(&mut received).unwrap();
    assert_eq!(count(&bench), (1 << 20, (1 << 20) - received.len() as u64));
}

#[test]
fn a_guest_does_not_wait_for_a_reader_that_does_not_read() {
    let (bench, _reader) = stalled_pipe();
    // All of this returns, although nobody takes any of it, and the rest is dropped.
    bench.send(&pattern(1 << 20));
    bench.settle();
    assert!(!bench.takes_output());
    assert!(!bench.serial.close(Duration::from_millis(50)));
    assert!(
        bench.takes_output(),
        "a closed console takes all and drops it"
    );
}

#[test]
fn a_slow_reader_gets_every_byte_also_those_sent_just_before_the_end() {
    let (bench, mut reader) = stalled_pipe();
    let mut sent = send_until_busy(&bench);
    assert!(sent.len() >= OUTPUT_CAPACITY - FIFO_SIZE);
    let slow = std::thread::spawn(move || {
        let mut received = Vec::new();
        let mut buffer = [0; 1000];
        loop {
            match reader.read(&mut buffer).unwrap() {
                0 => return received,
                len => received.extend_from_slice(&buffer[..len]),
            }
            std::thread::sleep(Duration::from_micros(300));
        }
    });
    let more = pattern(100_000);
    bench.send_politely(&more);
    sent.extend_from_slice(&more);
    assert!(bench.serial.close(LONG));
    assert!(slow.join().unwrap() == sent);
}

#[test]
fn a_whole_fifo_may_be_sent_after_one_look() {
    let (output, captured) = ConsoleOutput::capture(usize::MAX);
    let bench = Bench::new(Console::new(ConsoleInput::null(), output));
    let held = bench.hold();
    let mut sent = vec![7];
    bench.send(&sent);
    let burst = pattern(FIFO_SIZE);
    while bench.takes_output() {
        bench.send(&burst);
        sent.extend_from_slice(&burst);
    }
    drop(held);
    assert!(bench.serial.flush(LONG));
    assert!(captured.bytes() == sent);
}

#[test]
fn a_guest_that_was_refused_is_interrupted_when_there_is_room() {
    for divisor_visible in [false, true] {
        let (bench, mut reader) = stalled_pipe();
        bench.set(IER, IER_TRANSMIT);
        send_until_busy(&bench);
        // As a driver's handler, that finds nothing it may do.
        assert_eq!(bench.get(IIR) & IIR_ID, IIR_TRANSMITTER_EMPTY);
        assert_eq!(bench.get(IIR) & IIR_ID, 1);
        if divisor_visible {
            bench.set(LCR, LCR_DLAB);
            bench.set(0, 0x34);
            bench.set(1, 0x12);
        }
        let before = bench.line.count();
        reader.read_exact(&mut vec![0; 8192]).unwrap();
        wait_for("the interrupt", || bench.line.count() > before);
        assert!(bench.takes_output());
        assert_eq!(bench.get(IIR) & IIR_ID, IIR_TRANSMITTER_EMPTY);
        if divisor_visible {
            assert_eq!((bench.get(0), bench.get(1)), (0x34, 0x12));
            assert_eq!(bench.get(LCR), LCR_DLAB);
        }
    }
}

#[test]
fn a_restored_guest_that_waited_for_room_is_interrupted() {
    let (bench, _reader) = stalled_pipe();
    bench.set(IER, IER_TRANSMIT);
    send_until_busy(&bench);
    bench.get(IIR);
    let copy = Bench::restore(&bench.serial.state(), Console::null());
    assert_eq!(copy.line.count(), 1);
    assert!(copy.takes_output());
}

#[test]
fn a_file_gets_all_and_is_appended_to_where_it_stands() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"before ").unwrap();
    let bench = to(file.try_clone().unwrap());
    let bytes = pattern(150_000);
    bench.send_politely(&bytes);
    assert!(bench.serial.close(LONG));
    let mut all = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut all).unwrap();
    assert!(all == [b"before ".as_slice(), &bytes].concat());
}

#[test]
fn a_named_file_is_emptied_first() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console.log");
    std::fs::write(&path, "old and long").unwrap();
    let bench = Bench::new(Console::file(&path).unwrap());
    bench.send(b"new");
    assert!(bench.serial.close(LONG));
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    assert!(Console::file(directory.path()).is_err());
}

#[test]
fn a_socket_gets_all_and_its_stall_blocks_nobody() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let bench = to(ours);
    let sent = send_until_busy(&bench);
    bench.settle();
    let reader = std::thread::spawn(move || {
        let mut received = Vec::new();
        theirs.read_to_end(&mut received).unwrap();
        received
    });
    assert!(bench.serial.close(LONG));
    assert!(reader.join().unwrap() == sent);
}

#[test]
fn a_reader_that_goes_away_costs_the_guest_nothing() {
    let (bench, reader) = stalled_pipe();
    send_until_busy(&bench);
    drop(reader);
    wait_for("output is dropped", || bench.takes_output());
    bench.send(&pattern(200_000));
    assert!(bench.takes_output());
    assert!(bench.serial.flush(LONG));
    bench.assert_quiet();
}

#[test]
fn a_full_disk_costs_the_guest_nothing() {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let bench = to(full);
    bench.send_politely(&pattern(200_000));
    assert!(bench.serial.flush(LONG));
    bench.assert_quiet();
}

#[test]
fn a_writer_is_given_all_and_then_flushed() {
    struct Flushed(Sender<usize>, usize);
    impl Write for Flushed {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // It may take less than it is offered.
            self.1 += 1;
            let _ = bytes;
            Ok(1)
        }
        fn flush(&mut self) -> io::Result<()> {
            self.0.send(self.1).unwrap();
            Ok(())
        }
    }
    let (sender, flushed) = channel();
    let bench = Bench::new(Console::writer(Flushed(sender, 0)));
    let held = bench.hold();
    bench.send(b"hello");
    drop(held);
    assert!(bench.serial.flush(LONG));
    assert_eq!(flushed.try_iter().last(), Some(5));
}

#[test]
fn many_bytes_cost_one_wakeup() {
    let (output, captured) = ConsoleOutput::capture(usize::MAX);
    let bench = Bench::new(Console::new(ConsoleInput::null(), output));
    bench.settle();
    let before = bench.calls();
    let held = bench.hold();
    let bytes = pattern(4000);
    bench.send(&bytes);
    let wake = &bench.serial.shared.link.wake;
    assert_eq!(wake.read().unwrap(), 1, "one system call");
    wake.write(1).unwrap();
    drop(held);
    assert!(bench.serial.flush(LONG));
    assert_eq!(captured.bytes(), bytes);
    assert_eq!(bench.calls() - before, 1);
}

#[test]
fn a_console_of_nothing_is_never_busy() {
    let bench = Bench::new(Console::null());
    bench.send(&pattern(1 << 20));
    assert!(bench.takes_output());
    assert!(bench.serial.close(Duration::ZERO));
}

#[test]
fn the_first_bytes_are_captured_and_no_more() {
    let (output, captured) = ConsoleOutput::capture(4);
    let bench = Bench::new(Console::new(ConsoleInput::null(), output));
    bench.send(b"123");
    assert!(bench.serial.flush(LONG));
    bench.send(b"456");
    assert!(bench.serial.flush(LONG));
    assert_eq!(captured.text(), "1234");
}

/// The two ends of a new pseudoterminal.
fn terminal() -> (File, File) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let mut options = OpenOptions::new();
    let slave = options
        .read(true)
        .write(true)
        .open(name.to_str().unwrap())
        .unwrap();
    let mut mode = rustix::termios::tcgetattr(&slave).unwrap();
    mode.make_raw();
    rustix::termios::tcsetattr(&slave, rustix::termios::OptionalActions::Now, &mode).unwrap();
    (File::from(master), slave)
}

#[test]
fn a_terminal_that_is_stopped_blocks_nobody_and_keeps_its_flags() {
    let (mut master, slave) = terminal();
    let bench = to(slave.try_clone().unwrap());
    let sent = send_until_busy(&bench);
    bench.settle();
    assert!(!fcntl_getfl(&slave).unwrap().contains(OFlags::NONBLOCK));
    let own = ConsoleOutput::fd(slave.try_clone().unwrap().into());
    assert!(!own.may_block(), "a write of ours cannot block");
    let len = sent.len();
    let reader = std::thread::spawn(move || {
        let mut received = vec![0; len];
        master.read_exact(&mut received).unwrap();
        received
    });
    assert!(bench.serial.close(LONG));
    assert!(reader.join().unwrap() == sent);
}

#[test]
fn the_master_of_a_pseudoterminal_is_used_itself() {
    let (master, mut slave) = terminal();
    let bench = to(master.try_clone().unwrap());
    bench.send(b"typed");
    assert!(bench.serial.flush(LONG));
    let mut received = [0; 5];
    slave.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"typed");
}

#[test]
fn a_pipe_keeps_the_flags_that_others_see() {
    let (_reader, writer) = io::pipe().unwrap();
    let bench = to(writer.as_fd().try_clone_to_owned().unwrap());
    send_until_busy(&bench);
    assert!(!fcntl_getfl(&writer).unwrap().contains(OFlags::NONBLOCK));
}
