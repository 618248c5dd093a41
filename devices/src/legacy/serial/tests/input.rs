use super::*;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

fn from(fd: impl Into<OwnedFd>) -> Bench {
    let input = ConsoleInput::fd(fd.into());
    Bench::new(Console::new(input, ConsoleOutput::null()))
}

#[test]
fn a_flood_through_a_pipe_arrives_whole_and_no_faster_than_it_is_read() {
    let (reader, mut writer) = io::pipe().unwrap();
    let bench = from(reader);
    let bytes = pattern(1 << 20);
    let flood = bytes.clone();
    let writer = std::thread::spawn(move || writer.write_all(&flood).unwrap());
    wait_for("input arrives", || {
        bench.serial.state().fifo.len() == FIFO_SIZE
    });
    bench.assert_quiet();
    let state = bench.serial.state();
    assert_eq!((state.fifo.len(), state.input.len()), (FIFO_SIZE, 0));
    assert!(bench.receive_exactly(bytes.len()) == bytes);
    writer.join().unwrap();
    let read = bench.serial.counters().input_bytes.load(Ordering::Relaxed);
    assert_eq!(read, bytes.len() as u64);
    // The writer is gone: that is the end, and not a reason to look again and again.
    bench.assert_quiet();
}

#[test]
fn a_guest_is_interrupted_for_input() {
    let (reader, mut writer) = io::pipe().unwrap();
    let bench = from(reader);
    bench.set(IER, IER_RECEIVE);
    // Enabling the interrupt enables nothing else.
    let before = bench.line.count();
    for byte in *b"abc" {
        let count = bench.line.count();
        writer.write_all(&[byte]).unwrap();
        wait_for("the interrupt", || bench.line.count() > count);
        assert_eq!(bench.get(IIR) & IIR_ID, IIR_DATA_AVAILABLE);
        assert_eq!(bench.receive_exactly(1), [byte]);
    }
    assert!(bench.line.count() >= before + 3);
}

#[test]
fn input_that_comes_while_the_fifo_is_full_waits() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let bench = from(theirs);
    let bytes = pattern(3 * FIFO_SIZE + 5);
    ours.write_all(&bytes[..FIFO_SIZE]).unwrap();
    wait_for("the FIFO is full", || {
        bench.serial.state().fifo.len() == FIFO_SIZE
    });
    ours.write_all(&bytes[FIFO_SIZE..]).unwrap();
    bench.assert_quiet();
    assert_eq!(bench.receive_exactly(bytes.len()), bytes);
}

#[test]
fn input_is_kept_while_the_guest_tests_its_port() {
    let (reader, mut writer) = io::pipe().unwrap();
    let bench = from(reader);
    bench.settle();
    bench.set(MCR, MCR_LOOP);
    writer.write_all(b"typed early").unwrap();
    bench.assert_quiet();
    bench.send(b"\xae");
    assert_eq!(bench.receive_exactly(1), [0xae]);
    bench.settle();
    bench.set(MCR, 0);
    assert_eq!(bench.receive_exactly(11), b"typed early");
}

#[test]
fn a_fifo_that_was_filled_by_loopback_loses_no_input() {
    let (reader, mut writer) = io::pipe().unwrap();
    let bench = from(reader);
    bench.settle();
    bench.set(MCR, MCR_LOOP);
    bench.send(&[1; FIFO_SIZE]);
    bench.set(MCR, 0);
    writer.write_all(b"and then").unwrap();
    bench.assert_quiet();
    assert_eq!(
        bench.receive_exactly(FIFO_SIZE + 8)[FIFO_SIZE..],
        *b"and then"
    );
}

#[test]
fn a_regular_file_is_read_as_the_guest_takes_it() {
    let mut file = tempfile::tempfile().unwrap();
    let bytes = pattern(100_000);
    file.write_all(&bytes).unwrap();
    file.rewind().unwrap();
    let bench = from(file);
    bench.assert_quiet();
    assert!(bench.receive_exactly(bytes.len()) == bytes);
    bench.assert_quiet();
}

#[test]
fn the_end_of_input_is_one_and_not_looked_for_again() {
    for end in ["/dev/null", "empty file", "closed pipe", "closed socket"] {
        let fd: OwnedFd = match end {
            "/dev/null" => File::open("/dev/null").unwrap().into(),
            "empty file" => tempfile::tempfile().unwrap().into(),
            "closed pipe" => io::pipe().unwrap().0.into(),
            _ => UnixStream::pair().unwrap().0.into(),
        };
        let bench = from(fd);
        bench.assert_quiet();
        assert_eq!(bench.get(LSR) & LSR_READY, 0, "{end}");
        // A guest that reads nothing again and again wakes nobody.
        let before = bench.calls();
        for _ in 0..1000 {
            bench.get(DATA as u8);
        }
        bench.settle();
        assert!(bench.calls() - before <= 2, "{end}");
    }
}

#[test]
fn a_descriptor_that_cannot_be_read_is_the_end_of_input() {
    let (_reader, writer) = io::pipe().unwrap();
    let bench = from(writer);
    bench.assert_quiet();
    let directory = File::open("/").unwrap();
    let bench = from(directory);
    bench.assert_quiet();
}

#[test]
fn input_and_output_of_one_console_do_not_wait_for_each_other() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let console = Console::new(
        ConsoleInput::fd(theirs.try_clone().unwrap().into()),
        ConsoleOutput::fd(theirs.into()),
    );
    let bench = Bench::new(console);
    // Nobody reads the output.
    bench.send(&pattern(1 << 20));
    bench.settle();
    assert!(!bench.takes_output());
    (&ours).write_all(b"stop").unwrap();
    assert_eq!(bench.receive_exactly(4), b"stop");
}

#[test]
fn bytes_and_readers_are_input_too() {
    let input = ConsoleInput::bytes("root\n");
    let bench = Bench::new(Console::new(input, ConsoleOutput::null()));
    assert_eq!(bench.receive_exactly(5), b"root\n");

    let reader = io::Read::take(io::repeat(b'x'), 1000);
    let input = ConsoleInput::reader(reader);
    let bench = Bench::new(Console::new(input, ConsoleOutput::null()));
    assert_eq!(bench.receive_exactly(1000), [b'x'; 1000]);
    bench.assert_quiet();
}

#[test]
fn a_closed_console_gives_no_more_input_and_its_descriptors_are_closed() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let bench = from(theirs);
    ours.write_all(b"a").unwrap();
    assert_eq!(bench.receive_exactly(1), b"a");
    assert!(bench.serial.close(LONG));
    let error = ours.write_all(b"b").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
}
