use super::*;
use crate::test_support::every_access;

const SCRATCH: u8 = 7;

#[test]
fn a_port_after_a_reset_is_that_of_vm_superio() {
    let bench = Bench::new(Console::null());
    assert_eq!(bench.serial.state(), SerialState::default());
    assert_eq!(bench.get(IER), 0);
    assert_eq!(bench.get(IIR), 0xc1);
    assert_eq!(bench.get(LSR), 0x60);
    bench.set(SCRATCH, 0x5a);
    assert_eq!(bench.get(SCRATCH), 0x5a);
    // The divisor hides the first two registers.
    bench.set(LCR, LCR_DLAB | 3);
    bench.set(0, 0x34);
    bench.set(1, 0x12);
    assert_eq!((bench.get(0), bench.get(1)), (0x34, 0x12));
    bench.set(LCR, 3);
    assert_eq!(bench.get(IER), 0);
    assert_eq!(bench.line.count(), 0);
}

#[test]
fn a_wide_access_is_one_of_several_bytes() {
    let bench = Bench::new(Console::null());
    assert!(bench.serial.write(6, &[0, 0x42, 0x43]).is_continue());
    let mut data = [0xff; 4];
    bench.serial.read(6, &mut data);
    // Behind the last register there is nothing.
    assert_eq!(data[1..], [0x42, 0xff, 0xff]);
}

#[test]
fn the_transmit_interrupt_comes_when_it_is_enabled_and_after_each_byte() {
    let bench = Bench::new(Console::null());
    bench.set(IER, IER_TRANSMIT);
    assert_eq!(bench.line.count(), 1);
    assert_eq!(bench.get(IIR) & IIR_ID, IIR_TRANSMITTER_EMPTY);
    assert_eq!(bench.get(IIR) & IIR_ID, 1, "reading it ends it");
    bench.send(b"x");
    assert_eq!(bench.line.count(), 2);
}

#[test]
fn received_data_come_before_a_free_transmitter_and_neither_is_forgotten() {
    let bench = Bench::new(Console::new(
        ConsoleInput::bytes("ab"),
        ConsoleOutput::null(),
    ));
    bench.set(IER, IER_RECEIVE | IER_TRANSMIT);
    wait_for("input arrives", || bench.get(LSR) & LSR_READY != 0);
    bench.settle();
    let before = bench.line.count();
    assert_eq!(bench.get(IIR), 0xc4);
    assert!(
        bench.line.count() > before,
        "an edge for what is still pending"
    );
    assert_eq!(bench.receive_exactly(2), b"ab");
    assert_eq!(bench.get(IIR), 0xc2);
    assert_eq!(bench.get(IIR), 0xc1);
}

#[test]
fn loopback_gives_back_what_is_sent_and_keeps_it_from_the_console() {
    let (output, captured) = ConsoleOutput::capture(100);
    let bench = Bench::new(Console::new(ConsoleInput::null(), output));
    bench.set(MCR, MCR_LOOP);
    bench.send(b"loop");
    assert_eq!(bench.receive_exactly(4), b"loop");
    bench.set(MCR, 0);
    bench.send(b"out");
    assert!(bench.serial.flush(LONG));
    assert_eq!(captured.bytes(), b"out");
}

#[test]
fn the_state_survives_with_the_input_that_was_not_read() {
    let input = pattern(FIFO_SIZE + 30);
    let (reader, mut writer) = io::pipe().unwrap();
    let console = Console::new(ConsoleInput::fd(reader.into()), ConsoleOutput::null());
    let bench = Bench::new(console);
    bench.set(SCRATCH, 9);
    bench.set(LCR, 0x1b);
    io::Write::write_all(&mut writer, &input[..FIFO_SIZE]).unwrap();
    wait_for("the FIFO is full", || {
        bench.serial.state().fifo.len() == FIFO_SIZE
    });
    let mut state = bench.serial.state();
    assert_eq!(state.fifo, input[..FIFO_SIZE]);
    // As if the guest had looped bytes while the worker was reading.
    state.input = input[FIFO_SIZE..].to_vec();
    let json = serde_json::to_string(&state).unwrap();
    let state: SerialState = serde_json::from_str(&json).unwrap();

    let copy = Bench::restore(&state, Console::null());
    assert_eq!(copy.serial.state(), state);
    assert_eq!((copy.get(SCRATCH), copy.get(LCR)), (9, 0x1b));
    assert_eq!(copy.receive_exactly(input.len()), input);
}

#[test]
fn a_state_with_too_much_input_is_refused() {
    for state in [
        SerialState {
            fifo: vec![0; FIFO_SIZE + 1],
            ..SerialState::default()
        },
        SerialState {
            input: vec![0; FIFO_SIZE + 1],
            ..SerialState::default()
        },
    ] {
        let line = Arc::new(Recorder::default());
        match Serial::from_state(&state, Console::null(), line) {
            Err(error @ SerialError::State { len: 65, max: 64 }) => assert_eq!(
                error.to_string(),
                "restore the serial port: the state holds 65 bytes of input, at most 64 fit"
            ),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn no_access_ends_the_machine_or_grows_it() {
    let (output, captured) = ConsoleOutput::capture(1000);
    let input = ConsoleInput::bytes(pattern(10_000));
    let bench = Bench::new(Console::new(input, output));
    every_access(&bench.serial, 8, |_, _, end| assert!(end.is_continue()));
    let state = bench.serial.state();
    assert!(state.fifo.len() <= FIFO_SIZE && state.input.len() <= FIFO_SIZE);
    assert!(bench.serial.close(LONG));
    assert!(captured.bytes().len() <= 1000);
}
