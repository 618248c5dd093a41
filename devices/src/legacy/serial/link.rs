//! What is between the port's registers, on vCPU threads, and the worker on the I/O thread.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::FIFO_SIZE;

/// The bytes of output that wait for the console at most.
pub(super) const OUTPUT_CAPACITY: usize = 64 * 1024;

#[derive(Default)]
struct Output {
    bytes: VecDeque<u8>,
    /// Whether there is a console that takes bytes.
    open: bool,
    /// Whether the guest was refused, and has to be told when there is room again.
    refused: bool,
}

impl Output {
    /// A driver sends a FIFO full of bytes after one look, so there is room only for all of them.
    fn has_room(&self) -> bool {
        self.bytes.len() <= OUTPUT_CAPACITY - FIFO_SIZE
    }

    /// Whether the guest is to be told of room now.
    fn take_refused(&mut self) -> bool {
        self.refused && self.has_room() && std::mem::take(&mut self.refused)
    }
}

/// What went through a serial port since it was made.
#[derive(Debug, Default)]
pub struct SerialCounters {
    /// Bytes that the guest sent.
    pub output_bytes: AtomicU64,
    /// Bytes of these that nobody was there to take, or that the guest sent to a port that was
    /// busy.
    pub dropped_bytes: AtomicU64,
    /// Bytes that were read from the console for the guest.
    pub input_bytes: AtomicU64,
}

pub(super) struct Link {
    output: Mutex<Output>,
    pub(super) counters: Arc<SerialCounters>,
    drained: Condvar,
    /// Whether the worker waits for the guest to take input.
    input_waits: AtomicBool,
    /// Wakes the worker: there is output, or the guest takes input.
    pub(super) wake: EventFd,
    /// How often the worker was called.
    #[cfg(test)]
    pub(super) calls: std::sync::atomic::AtomicUsize,
}

impl Link {
    pub(super) fn new(open: bool) -> io::Result<Self> {
        Ok(Self {
            output: Mutex::new(Output {
                open,
                ..Output::default()
            }),
            counters: Arc::default(),
            drained: Condvar::new(),
            input_waits: AtomicBool::new(false),
            wake: EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            #[cfg(test)]
            calls: std::sync::atomic::AtomicUsize::new(0),
        })
    }

    /// Held for moments only, never while anything is written.
    fn output(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kick(&self) {
        // It fails only where the counter is full, and then the worker is on its way.
        let _ = self.wake.write(1);
    }

    /// The guest sends a byte. One that does not fit is lost, as on a line whose other end is not
    /// listening: the guest did not look whether it may send.
    fn send(&self, byte: u8) {
        self.counters.output_bytes.fetch_add(1, Ordering::Relaxed);
        let mut output = self.output();
        if !output.open || output.bytes.len() >= OUTPUT_CAPACITY {
            self.counters.dropped_bytes.fetch_add(1, Ordering::Relaxed);
            return;
        }
        output.bytes.push_back(byte);
        output.refused |= !output.has_room();
        // The worker goes on by itself until it has seen the buffer empty.
        let first = output.bytes.len() == 1;
        drop(output);
        if first {
            self.kick();
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.output().has_room()
    }

    /// Copies the oldest bytes to `chunk`; returns how many, and whether they are all there are.
    pub(super) fn peek(&self, chunk: &mut [u8]) -> (usize, bool) {
        let output = self.output();
        let len = chunk.len().min(output.bytes.len());
        for (to, from) in chunk.iter_mut().zip(&output.bytes) {
            *to = *from;
        }
        (len, len == output.bytes.len())
    }

    /// Removes the oldest `len` bytes, which were written; returns whether the guest is to be told
    /// that there is room.
    pub(super) fn written(&self, len: usize) -> bool {
        let mut output = self.output();
        let len = len.min(output.bytes.len());
        output.bytes.drain(..len);
        if output.bytes.is_empty() {
            self.drained.notify_all();
        }
        output.take_refused()
    }

    /// Drops all output, and what will come; returns whether the guest is to be told that there is
    /// room.
    pub(super) fn discard(&self) -> bool {
        let mut output = self.output();
        output.open = false;
        let dropped = std::mem::take(&mut output.bytes).len() as u64;
        self.counters
            .dropped_bytes
            .fetch_add(dropped, Ordering::Relaxed);
        self.drained.notify_all();
        output.take_refused()
    }

    pub(super) fn wait_drained(&self, timeout: Duration) -> bool {
        // A timeout beyond what the clock can say is one that never comes.
        let deadline = Instant::now().checked_add(timeout);
        let mut output = self.output();
        while !output.bytes.is_empty() {
            let left = match deadline {
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
                None => Duration::from_secs(3600),
            };
            if left.is_zero() {
                return false;
            }
            output = self
                .drained
                .wait_timeout(output, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// The worker has found no room for input. To be called with the registers locked, so that
    /// what makes room comes before or after.
    pub(super) fn wait_for_input_room(&self) {
        self.input_waits.store(true, Ordering::Release);
    }

    /// The guest may have made room for input.
    pub(super) fn input_wanted(&self) {
        if self.input_waits.swap(false, Ordering::AcqRel) {
            self.kick();
        }
    }
}

/// The registers' way to the console.
pub(super) struct OutputWriter(pub(super) Arc<Link>);

impl Write for OutputWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.0.send(*byte);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The registers' way to say that the guest has taken the input.
pub(super) struct InputEvents(pub(super) Arc<Link>);

impl SerialEvents for InputEvents {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        self.0.input_wanted();
    }
}
