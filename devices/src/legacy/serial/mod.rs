//! The serial port (16550, over [`vm_superio::Serial`]) and the console at its other end.
//!
//! A guest's vCPU never waits for the console. What the guest sends goes to a buffer of bounded
//! size, which a handler on the I/O thread empties into the [`ConsoleOutput`] as fast as that
//! takes it; while the buffer is full the port says that it is busy (LSR), and it raises the guest's
//! transmit interrupt when there is room again. What the [`ConsoleInput`] has is read no faster
//! than the guest takes it.
//!
//! | module | what lives there |
//! |---|---|
//! | `mod` | [`Serial`]: the registers, and the port's state |
//! | `link` | the buffer between the two, their ways to wake each other, and [`SerialCounters`] |
//! | `worker` | the handler on the I/O thread |

mod link;
mod worker;

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::mem;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_device_api::{BusDevice, ExitRequest, InterruptLine};
use kiln_io_thread::{Attached, IoHandle};
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;

pub use crate::console::{Captured, Console, ConsoleInput, ConsoleOutput};
pub use link::SerialCounters;

use link::{InputEvents, Link, OutputWriter};
use worker::Worker;

/// The ports, from the first on.
const REGISTERS: u64 = 8;
const IER: u8 = 1;
const IIR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;

/// IIR: the bits that say which interrupt is pending.
const IIR_ID: u8 = 0x0f;
const IIR_TRANSMITTER_EMPTY: u8 = 0x02;
const IIR_DATA_AVAILABLE: u8 = 0x04;
/// LCR: the first two registers are the divisor's.
const LCR_DLAB: u8 = 1 << 7;
/// MCR: what is sent is received.
const MCR_LOOP: u8 = 1 << 4;
/// LSR: the transmitter takes bytes, and has sent all.
const LSR_TRANSMITTER: u8 = 1 << 5 | 1 << 6;

/// The bytes that fit in the receive FIFO, which a driver may send in one go, too.
const FIFO_SIZE: usize = 64;

/// Why a serial port could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SerialError {
    /// An eventfd could not be had.
    #[error("create an eventfd for the serial port")]
    EventFd(#[source] io::Error),
    /// The console's file descriptors could not be waited for.
    #[error("attach the serial port's console to the I/O thread")]
    Attach(#[source] kiln_io_thread::Error),
    /// The state holds more input than the port can.
    #[error("restore the serial port: the state holds {len} bytes of input, at most {max} fit")]
    State {
        /// The bytes of input in one of the state's two buffers.
        len: usize,
        /// The bytes that fit.
        max: usize,
    },
}

/// The state of a [`Serial`] port: its registers, and the input that the guest has not read yet.
///
/// Output that was sent and not written to the console yet is not part of it:
/// [`Serial::flush`] first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub divisor_low: u8,
    /// Divisor latch, high byte.
    pub divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// The receive FIFO.
    pub fifo: Vec<u8>,
    /// Input that was read from the console and did not fit in the FIFO.
    pub input: Vec<u8>,
}

impl Default for SerialState {
    fn default() -> Self {
        Self::new(vm_superio::SerialState::default(), Vec::new())
    }
}

impl SerialState {
    fn new(registers: vm_superio::SerialState, input: Vec<u8>) -> Self {
        Self {
            divisor_low: registers.baud_divisor_low,
            divisor_high: registers.baud_divisor_high,
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            fifo: registers.in_buffer,
            input,
        }
    }

    fn registers(&self) -> vm_superio::SerialState {
        vm_superio::SerialState {
            baud_divisor_low: self.divisor_low,
            baud_divisor_high: self.divisor_high,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.fifo.clone(),
        }
    }
}

struct Line(Arc<dyn InterruptLine>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.trigger();
        Ok(())
    }
}

/// The registers, and the input that waits to get into their FIFO.
struct Uart {
    registers: vm_superio::Serial<Line, InputEvents, OutputWriter>,
    input: Vec<u8>,
}

impl Uart {
    fn in_loopback(&mut self) -> bool {
        self.registers.read(MCR) & MCR_LOOP != 0
    }

    /// Has the registers look again at what is pending: they raise the interrupts that are enabled.
    ///
    /// In vm-superio a write of the interrupt enable register does that.
    fn raise_again(&mut self) {
        let line_control = self.registers.read(LCR);
        // The register is not there to be written while the divisor is.
        let _ = self.registers.write(LCR, line_control & !LCR_DLAB);
        let enabled = self.registers.read(IER);
        let _ = self.registers.write(IER, enabled);
        let _ = self.registers.write(LCR, line_control);
    }

    /// Moves input to the FIFO; returns how many bytes more would fit.
    fn feed(&mut self) -> usize {
        // In loopback the line is cut, and what is received then would be lost.
        if self.in_loopback() {
            return 0;
        }
        if !self.input.is_empty() {
            let taken = self.registers.enqueue_raw_bytes(&self.input).unwrap_or(0);
            self.input.drain(..taken);
        }
        self.registers.fifo_capacity()
    }

    fn read(&mut self, register: u8, link: &Link) -> u8 {
        let value = self.registers.read(register);
        match register {
            IIR if value & IIR_ID == IIR_TRANSMITTER_EMPTY | IIR_DATA_AVAILABLE => {
                // There is no such interrupt: the received data come first, and the other one stays
                // pending. vm-superio shows both at once and forgets both.
                self.raise_again();
                value & !IIR_TRANSMITTER_EMPTY
            }
            LSR if !link.has_room() && !self.in_loopback() => value & !LSR_TRANSMITTER,
            _ => value,
        }
    }

    fn write(&mut self, register: u8, value: u8, link: &Link) {
        // A write fails only where output or interrupt do, and ours don't.
        let _ = self.registers.write(register, value);
        if register == MCR && value & MCR_LOOP == 0 {
            link.input_wanted();
        }
    }
}

/// What the port and its worker share.
struct Shared {
    uart: Mutex<Uart>,
    link: Arc<Link>,
}

impl Shared {
    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A serial port: the eight ports of a 16550 with its console.
///
/// Dropping it takes its handler off the I/O thread and closes the console's file descriptors;
/// output that was not written by then is lost, so [`close`](Self::close) it first.
pub struct Serial {
    shared: Arc<Shared>,
    worker: Mutex<Place>,
}

/// Where the half of the port is that serves the console.
enum Place {
    /// Not at work yet.
    Idle(Worker),
    /// On an I/O thread; held for its end.
    #[expect(dead_code, reason = "dropping it takes the worker off its thread")]
    Working(Attached<Worker>),
    /// There is no console, or none any more.
    None,
}

impl Serial {
    /// A port after a reset, whose interrupt is `interrupt`, with `console` at its other end.
    /// [`connect`](Self::connect) has the console served.
    ///
    /// # Errors
    ///
    /// [`SerialError::EventFd`] where the process can't have another file descriptor.
    pub fn new(console: Console, interrupt: Arc<dyn InterruptLine>) -> Result<Self, SerialError> {
        Self::from_state(&SerialState::default(), console, interrupt)
    }

    /// A port as it was when `state` was taken.
    ///
    /// # Errors
    ///
    /// [`SerialError::State`] where the state makes no sense, and those of [`new`](Self::new).
    pub fn from_state(
        state: &SerialState,
        console: Console,
        interrupt: Arc<dyn InterruptLine>,
    ) -> Result<Self, SerialError> {
        let Console { input, output } = console;
        for len in [state.fifo.len(), state.input.len()] {
            if len > FIFO_SIZE {
                return Err(SerialError::State {
                    len,
                    max: FIFO_SIZE,
                });
            }
        }
        let link = Arc::new(Link::new(output.is_open()).map_err(SerialError::EventFd)?);
        let registers = vm_superio::Serial::from_state(
            &state.registers(),
            Line(interrupt),
            InputEvents(Arc::clone(&link)),
            OutputWriter(Arc::clone(&link)),
        )
        .map_err(|_| SerialError::State {
            len: state.fifo.len(),
            max: FIFO_SIZE,
        })?;
        let mut uart = Uart {
            registers,
            input: state.input.clone(),
        };
        // The guest may have been waiting for room that there is now.
        uart.raise_again();
        let shared = Arc::new(Shared {
            uart: Mutex::new(uart),
            link,
        });
        let worker = if !output.is_open() && !input.is_open() && state.input.is_empty() {
            Place::None
        } else {
            Place::Idle(Worker::new(Arc::clone(&shared), input, output))
        };
        Ok(Self {
            shared,
            worker: Mutex::new(worker),
        })
    }

    /// Has the console served on the thread of `io`; to be called once. What the guest sends before
    /// waits, as far as there is room.
    ///
    /// # Errors
    ///
    /// [`SerialError::Attach`] where the console's file descriptors cannot be waited for, or the
    /// thread has ended.
    pub fn connect(&self, io: &IoHandle) -> Result<(), SerialError> {
        let mut place = self.place();
        *place = match mem::replace(&mut *place, Place::None) {
            Place::Idle(worker) => Place::Working(io.attach(worker).map_err(SerialError::Attach)?),
            other => other,
        };
        Ok(())
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, for [`from_state`](Self::from_state).
    pub fn state(&self) -> SerialState {
        let uart = self.shared.uart();
        SerialState::new(uart.registers.state(), uart.input.clone())
    }

    /// What went through the port, to be looked at while it works.
    pub fn counters(&self) -> Arc<SerialCounters> {
        Arc::clone(&self.shared.link.counters)
    }

    /// Waits until all that the guest has sent was written to the console, for at most `timeout`.
    /// Returns whether nothing is left.
    ///
    /// It must not be called on the I/O thread, which does the writing.
    pub fn flush(&self, timeout: Duration) -> bool {
        self.shared.link.wait_drained(timeout)
    }

    /// Ends the console: [flushes](Self::flush) the output for at most `timeout`, then drops what
    /// is left, and closes the console's file descriptors. Returns whether nothing was dropped.
    ///
    /// The registers stay; what a guest sends from now on is dropped. It must not be called on the
    /// I/O thread.
    pub fn close(&self, timeout: Duration) -> bool {
        let all = self.flush(timeout);
        self.shared.link.discard();
        *self.place() = Place::None;
        all
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = self.shared.uart();
        for (register, byte) in (offset..REGISTERS).zip(data) {
            *byte = uart.read(register as u8, &self.shared.link);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        let mut uart = self.shared.uart();
        for (register, byte) in (offset..REGISTERS).zip(data) {
            uart.write(register as u8, *byte, &self.shared.link);
        }
        ControlFlow::Continue(())
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial")
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
