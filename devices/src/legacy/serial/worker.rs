//! The handler on the I/O thread: it writes the output and reads the input.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kiln_io_thread::{EventSet, IoEvent, IoHandler, Registrar};

use super::{FIFO_SIZE, Shared};
use crate::console::{
    CHUNK, ConsoleInput, ConsoleOutput, InputPump, OutputPump, Read, Written, log_end,
};

const WAKE: u32 = 0;
const OUTPUT: u32 = 1;
const INPUT: u32 = 2;

/// The most writes or reads in one call: the thread has other handlers.
const ROUNDS: usize = 16;

pub(super) struct Worker {
    shared: Arc<Shared>,
    input: InputPump,
    output: OutputPump,
    chunk: Box<[u8]>,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, input: ConsoleInput, output: ConsoleOutput) -> Self {
        let output = OutputPump::new(output, OUTPUT);
        Self {
            shared,
            input: InputPump::new(input, INPUT),
            chunk: vec![0; if output.is_open() { CHUNK } else { 0 }].into(),
            output,
        }
    }

    fn call_again(&self) {
        let _ = self.shared.link.wake.write(1);
    }

    /// Writes what there is. `ready` says that the output is known to take bytes.
    fn write_output(&mut self, mut ready: bool, registrar: &mut Registrar<'_, '_>) {
        for _ in 0..ROUNDS {
            let chunk = &mut self.chunk[..self.output.chunk()];
            let (len, last) = self.shared.link.peek(chunk);
            if len == 0 {
                self.output.rest(registrar);
                return;
            }
            match self.output.write(&chunk[..len], last, ready, registrar) {
                Written::Bytes(len) => {
                    ready = false;
                    if self.shared.link.written(len) {
                        self.shared.uart().raise_again();
                    }
                }
                Written::Later | Written::Closed => return,
                Written::Ended(error) => {
                    log_end("the serial port's output", &error);
                    // What the guest sends is dropped from now on.
                    if self.shared.link.discard() {
                        self.shared.uart().raise_again();
                    }
                    return;
                }
            }
        }
        self.call_again();
    }

    /// Gives the guest what there is for it, as much as it has room for. `ready` says that the input
    /// is known to have something.
    fn read_input(&mut self, ready: bool, registrar: &mut Registrar<'_, '_>) {
        for _ in 0..ROUNDS {
            let room = {
                let mut uart = self.shared.uart();
                let room = uart.feed();
                if room == 0 {
                    self.shared.link.wait_for_input_room();
                }
                room
            };
            if room == 0 {
                self.input.rest(registrar);
                return;
            }
            let mut buffer = [0; FIFO_SIZE];
            let buffer = &mut buffer[..room.min(FIFO_SIZE)];
            match self.input.read(buffer, ready, registrar) {
                Read::Bytes(len) => {
                    let read = &self.shared.link.counters.input_bytes;
                    read.fetch_add(len as u64, Ordering::Relaxed);
                    let mut uart = self.shared.uart();
                    uart.input.extend_from_slice(&buffer[..len]);
                    uart.feed();
                }
                Read::Later | Read::Closed | Read::Ended(None) => return,
                Read::Ended(Some(error)) => {
                    tracing::debug!("the serial port's input ends: {error}");
                    return;
                }
            }
            if self.input.tells() {
                // Readiness is told again where there is more.
                return;
            }
        }
        self.call_again();
    }
}

impl IoHandler for Worker {
    fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        registrar.add(&self.shared.link.wake, WAKE, EventSet::IN)?;
        // A worker that was taken off a thread waits for nothing on the next.
        self.input.start();
        self.output.start();
        self.call_again();
        Ok(())
    }

    fn ready(&mut self, event: IoEvent, registrar: &mut Registrar<'_, '_>) {
        #[cfg(test)]
        self.shared.link.calls.fetch_add(1, Ordering::SeqCst);
        match event.token {
            WAKE => {
                let _ = self.shared.link.wake.read();
                self.write_output(false, registrar);
                self.read_input(false, registrar);
            }
            OUTPUT => self.write_output(true, registrar),
            INPUT => self.read_input(true, registrar),
            _ => {}
        }
    }
}
