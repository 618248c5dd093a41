//! The work on a queue: requests out of it, and the answers.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use kiln_io_thread::{IoEvent, Registrar};
use kiln_virtio_device::{Chain, GuestBuffers, QueueError, QueueHandler, Turn};
use tracing::Span;
use virtio_bindings::virtio_blk as raw;

use super::counters::count;
use super::request::{self, Disk, ID_BYTES, IO_ERROR, OK, Ranges, Request};
use super::shared::Shared;
use crate::rate_limit::Throttle;
use crate::virtio::LatencyHistogram;

/// What lives on the I/O thread.
pub(super) struct BlockHandler {
    shared: Arc<Shared>,
    /// The driver does not flush, so every write has to last (virtio 1.3, section 5.2.6.2).
    no_flush: bool,
    told: bool,
    throttle: Throttle,
    /// The index of the queue.
    queue: u16,
    /// The device's span, for the one message.
    span: Span,
}

/// The answer to a request: how many bytes of data were written to the guest, or what status to
/// report.
type Answer = Result<usize, u8>;

impl BlockHandler {
    pub(super) fn new(queue: u16, shared: Arc<Shared>) -> Self {
        Self {
            shared,
            no_flush: false,
            told: false,
            throttle: Throttle::new(Self::FIRST_TOKEN),
            queue,
            span: Span::none(),
        }
    }

    /// Serves a request; gives the number of bytes that were written to the chain, or `None` where
    /// it has to wait.
    fn serve(
        &mut self,
        chain: &mut Chain<'_>,
        clock: &mut Clock,
        registrar: &mut Registrar<'_, '_>,
    ) -> io::Result<Option<u32>> {
        // The status is the last writable byte, wherever it lies.
        let data = chain.writable.len().checked_sub(1);
        let Some(Ok(mut status)) = data.map(|data| chain.writable.split_off(data)) else {
            // There is no place even for an answer.
            count(&self.shared.counters.errors, 1);
            return Ok(Some(0));
        };
        let disk = Disk {
            sectors: self.shared.sectors(),
            read_only: self.shared.read_only,
            limits: self.shared.limits(),
        };
        let (readable, writable) = (&mut chain.readable, &mut chain.writable);
        let request = request::parse(readable, writable, &disk);
        if let Ok(request) = &request {
            let (is_read, bytes) = match request {
                Request::Read { .. } => (true, writable.len()),
                Request::Write { .. } => (false, readable.len()),
                Request::GetId => (true, 0),
                Request::Flush | Request::Discard(_) | Request::WriteZeroes(_) => (false, 0),
            };
            if !self.may(is_read, bytes as u64, registrar)? {
                return Ok(None);
            }
        }
        let answer = request.and_then(|request| self.answer(request, readable, writable, clock));
        let (code, written) = match answer {
            Ok(written) => (OK, written),
            Err(code) => {
                count(&self.shared.counters.errors, 1);
                (code, 0)
            }
        };
        // It has the one byte.
        let _ = status.write(&[code]);
        Ok(Some(u32::try_from(written + 1).unwrap_or(u32::MAX)))
    }

    /// Whether the limits of the disk let a request go on.
    fn may(
        &mut self,
        is_read: bool,
        bytes: u64,
        registrar: &mut Registrar<'_, '_>,
    ) -> io::Result<bool> {
        let (limits, counters) = (&self.shared.rate_limits, &self.shared.counters);
        limits.may(is_read, bytes, counters, &mut self.throttle, registrar)
    }

    fn answer(
        &mut self,
        request: Request,
        readable: &GuestBuffers<'_>,
        writable: &mut GuestBuffers<'_>,
        clock: &mut Clock,
    ) -> Answer {
        match request {
            Request::Read { offset } => self.read(offset, writable, clock),
            Request::Write { offset } => self.write(offset, readable, clock),
            Request::Flush => self.flush(clock),
            Request::Discard(ranges) => self.discard(&ranges, clock),
            Request::WriteZeroes(ranges) => self.write_zeroes(&ranges, clock),
            Request::GetId => {
                writable.write(&self.shared.id).map_err(|_| IO_ERROR)?;
                count(&self.shared.counters.ids, 1);
                Ok(ID_BYTES)
            }
        }
    }

    fn read(&mut self, offset: u64, data: &GuestBuffers<'_>, clock: &mut Clock) -> Answer {
        let result = self.shared.source.read(offset, data.slices());
        let counters = &self.shared.counters;
        clock.lap(&counters.read_latency);
        result.map_err(|error| self.tell("read from", &error))?;
        let counters = &self.shared.counters;
        count(&counters.reads, 1);
        count(&counters.read_bytes, data.len() as u64);
        Ok(data.len())
    }

    fn write(&mut self, offset: u64, data: &GuestBuffers<'_>, clock: &mut Clock) -> Answer {
        let result = self.shared.source.write(offset, data.slices());
        clock.lap(&self.shared.counters.write_latency);
        result.map_err(|error| self.tell("write to", &error))?;
        self.make_last(clock)?;
        count(&self.shared.counters.writes, 1);
        count(&self.shared.counters.write_bytes, data.len() as u64);
        Ok(0)
    }

    fn flush(&mut self, clock: &mut Clock) -> Answer {
        if !self.shared.read_only {
            self.flush_source(clock)?;
        }
        count(&self.shared.counters.flushes, 1);
        Ok(0)
    }

    fn discard(&mut self, ranges: &Ranges, clock: &mut Clock) -> Answer {
        let source = &self.shared.source;
        let mut each = ranges.iter();
        let result = each.try_for_each(|range| source.discard(range.offset, range.len));
        clock.lap(&self.shared.counters.discard_latency);
        result.map_err(|error| self.tell("discard a part of", &error))?;
        count(&self.shared.counters.discards, 1);
        count(&self.shared.counters.discard_bytes, ranges.bytes());
        Ok(0)
    }

    fn write_zeroes(&mut self, ranges: &Ranges, clock: &mut Clock) -> Answer {
        let source = &self.shared.source;
        let mut each = ranges.iter();
        let result =
            each.try_for_each(|range| source.write_zeroes(range.offset, range.len, range.unmap));
        clock.lap(&self.shared.counters.write_zeroes_latency);
        result.map_err(|error| self.tell("write zeros to", &error))?;
        self.make_last(clock)?;
        count(&self.shared.counters.write_zeroes, 1);
        count(&self.shared.counters.write_zeroes_bytes, ranges.bytes());
        Ok(0)
    }

    /// Flushes what was written where the driver will not.
    fn make_last(&mut self, clock: &mut Clock) -> Result<(), u8> {
        if self.no_flush || !self.shared.is_writeback() {
            self.flush_source(clock)?;
        }
        Ok(())
    }

    fn flush_source(&mut self, clock: &mut Clock) -> Result<(), u8> {
        let result = self.shared.source.flush();
        clock.lap(&self.shared.counters.flush_latency);
        result.map_err(|error| self.tell("flush", &error))
    }

    /// Says what went wrong, once: a guest may make it go wrong as often as it likes.
    fn tell(&mut self, what: &str, error: &io::Error) -> u8 {
        if !std::mem::replace(&mut self.told, true) {
            self.span
                .in_scope(|| tracing::warn!("{what} a disk (told once): {error}"));
        }
        IO_ERROR
    }
}

/// The time that requests take which are served one behind the other: the end of one is the
/// beginning of the next.
struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    fn lap(&mut self, latency: &LatencyHistogram) {
        let now = Instant::now();
        latency.record(now.duration_since(self.0));
        self.0 = now;
    }
}

impl QueueHandler for BlockHandler {
    fn start(&mut self, features: u64, _registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        self.span = Span::current();
        self.throttle.start();
        self.no_flush = features & (1 << raw::VIRTIO_BLK_F_FLUSH) == 0;
        Ok(())
    }

    fn process(
        &mut self,
        turn: &mut Turn<'_>,
        registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        let mut clock = Clock::start();
        while let Some(mut chain) = turn.pop()? {
            let Some(written) = self.serve(&mut chain, &mut clock, registrar)? else {
                turn.put_back(chain);
                break;
            };
            turn.complete(chain, written)?;
        }
        Ok(())
    }
    fn ready(&mut self, _event: IoEvent) -> Option<u16> {
        self.throttle.woken();
        Some(self.queue)
    }
}
