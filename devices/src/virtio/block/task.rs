//! A request that is under way in a ring: what has been done of it, and what comes next.

use std::io;
use std::time::Instant;

use kiln_memory::GuestSlice;
use kiln_virtio_device::{InFlight, Turn};

use super::RawFile;
use super::request::{Range, Request};
use super::ring::Operation;
use crate::virtio::iovec::mark_written;

/// A request, and the chain that it came by, whose last byte is for the status.
pub(super) struct Task {
    pub(super) request: Request,
    chain: InFlight,
    /// The bytes that are done, or the ranges.
    done: usize,
    /// The bytes that there are.
    len: usize,
    /// What is written is to last before the driver is told.
    must_last: bool,
    is_flushing: bool,
    pub(super) begun: Instant,
}

/// What is to be done next of a request.
#[derive(Debug)]
pub(super) enum Next {
    Operation(Operation),
    /// A range that the kernel has no operation for.
    Zeroes(Range),
    /// All of it is done.
    Done,
}

impl Task {
    /// A request of which `done` bytes are done already.
    pub(super) fn new(request: Request, chain: InFlight, done: usize, begun: Instant) -> Self {
        let mut task = Self {
            request,
            chain,
            done,
            len: 0,
            must_last: false,
            is_flushing: false,
            begun,
        };
        let mut len = 0;
        task.with_data(|data, _| len = data.iter().map(|slice| slice.len()).sum());
        task.len = len;
        task
    }

    /// Lets `f` have the data of a read or a write, and the bytes of it that are done.
    pub(super) fn with_data<R>(&mut self, f: impl FnOnce(&[GuestSlice<'_>], usize) -> R) -> R {
        let done = self.done;
        let is_read = matches!(self.request, Request::Read { .. });
        self.chain.with(|chain| {
            if !is_read {
                return f(chain.readable.slices(), done);
            }
            let status = chain.writable.split_last_byte();
            let result = f(chain.writable.slices(), done);
            if let Some(status) = status {
                chain.writable.push(status);
            }
            result
        })
    }

    /// What comes after so much.
    pub(super) fn next(&self, file: &RawFile) -> Next {
        let last = || {
            if self.must_last && !self.is_flushing {
                Next::Operation(Operation::Flush)
            } else {
                Next::Done
            }
        };
        match &self.request {
            Request::Read { offset } if self.done < self.len => Next::Operation(Operation::Read {
                offset: offset + self.done as u64,
            }),
            Request::Read { .. } => Next::Done,
            Request::Write { offset } if self.done < self.len => {
                Next::Operation(Operation::Write {
                    offset: offset + self.done as u64,
                })
            }
            Request::Write { .. } => last(),
            Request::Flush if !self.is_flushing => Next::Operation(Operation::Flush),
            Request::Flush | Request::GetId => Next::Done,
            Request::Discard(_) => match self.range() {
                Some(range) => Next::Operation(file.discard_operation(range)),
                None => Next::Done,
            },
            Request::WriteZeroes(_) => match self.range() {
                Some(range) => match file.zero_operation(range) {
                    Some(operation) => Next::Operation(operation),
                    None => Next::Zeroes(range),
                },
                None => last(),
            },
        }
    }

    /// Notes that what was next is under way, for what cannot be told from how much is done.
    pub(super) fn note_start(&mut self, operation: Operation) {
        self.is_flushing = operation == Operation::Flush;
    }

    /// Whether it waits for what it wrote to last.
    pub(super) fn is_making_last(&self) -> bool {
        self.is_flushing && self.request != Request::Flush
    }

    /// The range that is being worked on.
    pub(super) fn range(&self) -> Option<Range> {
        match &self.request {
            Request::Discard(ranges) | Request::WriteZeroes(ranges) => ranges.iter().nth(self.done),
            _ => None,
        }
    }

    /// The bytes of data.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Notes how an operation has ended. `must_last` says whether what has been written is to last
    /// before the driver is told.
    ///
    /// # Errors
    ///
    /// Where the request has failed.
    pub(super) fn note_end(
        &mut self,
        result: io::Result<usize>,
        must_last: bool,
    ) -> io::Result<()> {
        let count = match result {
            Ok(count) => count,
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {
                // Once more.
                self.is_flushing = false;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        self.must_last |= must_last;
        match self.request {
            _ if self.is_flushing => {}
            Request::Read { .. } if count == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            Request::Write { .. } if count == 0 => return Err(io::ErrorKind::WriteZero.into()),
            Request::Read { .. } => {
                self.with_data(|data, done| mark_written(data, done, count));
                self.done += count;
            }
            Request::Write { .. } => self.done += count,
            Request::Discard(_) | Request::WriteZeroes(_) => self.done += 1,
            Request::Flush | Request::GetId => {}
        }
        Ok(())
    }

    /// Answers the driver: with a status, and how many bytes of data were written.
    ///
    /// # Errors
    ///
    /// As [`Turn::complete`].
    pub(super) fn complete(
        mut self,
        turn: &mut Turn<'_>,
        status: u8,
        written: usize,
    ) -> Result<(), kiln_virtio_device::QueueError> {
        self.chain.with(|chain| {
            if let Some(byte) = chain.writable.split_last_byte() {
                byte.copy_from(&[status]);
            }
        });
        let written = u32::try_from(written + 1).unwrap_or(u32::MAX);
        turn.complete_in_flight(self.chain, written)
    }
}
