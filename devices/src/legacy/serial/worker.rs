//! The handler on the I/O thread: it writes the output and reads the input.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kiln_io_thread::{EventSet, IoEvent, IoHandler, Registrar};

use super::console::{CHUNK, Sink, Source, Target};
use super::{FIFO_SIZE, Shared};

const WAKE: u32 = 0;
const OUTPUT: u32 = 1;
const INPUT: u32 = 2;

/// The most writes or reads in one call: the thread has other handlers.
const ROUNDS: usize = 16;

/// Which of its file descriptors the worker waits for.
#[derive(Default)]
struct Waits {
    output: bool,
    input: bool,
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    source: Option<Source>,
    sink: Option<Sink>,
    waits: Waits,
    /// A regular file has no readiness, and is read whenever there is room.
    poll_source: bool,
    chunk: Box<[u8]>,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, source: Option<Source>, sink: Option<Sink>) -> Self {
        Self {
            shared,
            poll_source: matches!(source, Some(Source::File(_))),
            source,
            chunk: vec![0; sink.as_ref().map_or(0, |_| CHUNK)].into(),
            sink,
            waits: Waits::default(),
        }
    }

    fn call_again(&self) {
        let _ = self.shared.link.wake.write(1);
    }

    /// Writes what there is. `ready` says that the output is known to take bytes.
    fn write_output(&mut self, mut ready: bool, registrar: &mut Registrar<'_, '_>) {
        for _ in 0..ROUNDS {
            let Some(sink) = &mut self.sink else {
                return;
            };
            let chunk = &mut self.chunk[..sink.chunk];
            let (len, last) = self.shared.link.peek(chunk);
            if len == 0 {
                self.stop_waiting_for_output(registrar);
                return;
            }
            if sink.wait && !ready {
                self.wait_for_output(registrar);
                return;
            }
            match sink.write(&chunk[..len], last) {
                // A writer that takes nothing will not do so later either.
                Ok(0) => self.end_output(&ErrorKind::WriteZero.into(), registrar),
                Ok(len) => {
                    ready = false;
                    if self.shared.link.written(len) {
                        self.shared.uart().raise_again();
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error)
                    if error.kind() == ErrorKind::WouldBlock
                        && matches!(sink.target, Target::File(_)) =>
                {
                    self.wait_for_output(registrar);
                    return;
                }
                Err(error) => self.end_output(&error, registrar),
            }
        }
        self.call_again();
    }

    fn output_file(&self) -> Option<&File> {
        match self.sink.as_ref().map(|sink| &sink.target) {
            Some(Target::File(file)) => Some(file),
            _ => None,
        }
    }

    fn wait_for_output(&mut self, registrar: &mut Registrar<'_, '_>) {
        if self.waits.output {
            return;
        }
        let Some(file) = self.output_file() else {
            return;
        };
        match registrar.add(file, OUTPUT, EventSet::OUT) {
            Ok(()) => self.waits.output = true,
            // A regular file: it takes all there is.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                if let Some(sink) = &mut self.sink {
                    sink.wait = false;
                }
                self.call_again();
            }
            Err(error) => self.end_output(&error, registrar),
        }
    }

    fn stop_waiting_for_output(&mut self, registrar: &mut Registrar<'_, '_>) {
        if std::mem::take(&mut self.waits.output)
            && let Some(file) = self.output_file()
        {
            let _ = registrar.remove(file);
        }
    }

    /// The output failed: what the guest sends is dropped from now on.
    fn end_output(&mut self, error: &io::Error, registrar: &mut Registrar<'_, '_>) {
        // A reader that goes away is nothing special; a disk that is full may be. Said only once.
        if error.kind() == ErrorKind::BrokenPipe {
            tracing::debug!("the serial port's output ends: {error}");
        } else {
            tracing::warn!("the serial port's output ends: {error}");
        }
        self.stop_waiting_for_output(registrar);
        self.sink = None;
        if self.shared.link.discard() {
            self.shared.uart().raise_again();
        }
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
                self.stop_waiting_for_input(registrar);
                return;
            }
            if self.poll_source && !ready {
                self.wait_for_input(registrar);
                return;
            }
            let Some(source) = &mut self.source else {
                return;
            };
            let mut buffer = [0; FIFO_SIZE];
            match source.read(&mut buffer[..room.min(FIFO_SIZE)]) {
                Ok(0) => return self.end_input(registrar),
                Ok(len) => {
                    let read = &self.shared.link.counters.input_bytes;
                    read.fetch_add(len as u64, Ordering::Relaxed);
                    let mut uart = self.shared.uart();
                    uart.input.extend_from_slice(&buffer[..len]);
                    uart.feed();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock && self.poll_source => {}
                Err(error) => {
                    tracing::debug!("the serial port's input ends: {error}");
                    return self.end_input(registrar);
                }
            }
            if self.poll_source {
                // Readiness is told again where there is more.
                return;
            }
        }
        self.call_again();
    }

    fn wait_for_input(&mut self, registrar: &mut Registrar<'_, '_>) {
        let Some(Source::File(file)) = &self.source else {
            return;
        };
        if self.waits.input {
            return;
        }
        match registrar.add(file, INPUT, EventSet::IN) {
            Ok(()) => self.waits.input = true,
            // A regular file, or one like /dev/null: it can be read at any time.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                self.poll_source = false;
                self.call_again();
            }
            Err(error) => {
                tracing::debug!("the serial port's input ends: {error}");
                self.end_input(registrar);
            }
        }
    }

    fn stop_waiting_for_input(&mut self, registrar: &mut Registrar<'_, '_>) {
        if std::mem::take(&mut self.waits.input)
            && let Some(Source::File(file)) = &self.source
        {
            let _ = registrar.remove(file);
        }
    }

    fn end_input(&mut self, registrar: &mut Registrar<'_, '_>) {
        self.stop_waiting_for_input(registrar);
        self.source = None;
        self.poll_source = false;
    }
}

impl IoHandler for Worker {
    fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        registrar.add(&self.shared.link.wake, WAKE, EventSet::IN)?;
        // A worker that was taken off a thread waits for nothing on the next.
        self.waits = Waits::default();
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
