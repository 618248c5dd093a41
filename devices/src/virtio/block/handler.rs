//! The work on a queue: requests out of it, and the answers.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use kiln_io_thread::{EventSet, IoEvent, Registrar};
use kiln_memory::GuestSlice;
use kiln_virtio_device::{Chain, QueueError, QueueHandler, Turn};
use tracing::Span;
use virtio_bindings::virtio_blk as raw;

use super::counters::count;
use super::engine::{Engine, Ringed};
use super::raw::Now;
use super::request::{self, Disk, ID_BYTES, IO_ERROR, OK, Request};
use super::ring::Operation;
use super::shared::{Shared, Source};
use super::task::{Next, Task};
use crate::rate_limit::Throttle;
use crate::virtio::LatencyHistogram;

/// The token of the timer that says when a request that waits for a limit may go on.
const THROTTLE: u32 = BlockHandler::FIRST_TOKEN;
/// The token of the ring.
const RING: u32 = BlockHandler::FIRST_TOKEN + 1;

/// What lives on the I/O thread.
pub(super) struct BlockHandler {
    shared: Arc<Shared>,
    queue: u16,
    engine: Engine,
    /// The driver does not flush, so every write has to last (virtio 1.3, section 5.2.6.2).
    no_flush: bool,
    told: bool,
    throttle: Throttle,
    /// The device's span, for the one message.
    span: Span,
}

impl BlockHandler {
    /// The work on the queue with this index.
    pub(super) fn new(queue: u16, shared: Arc<Shared>, engine: Engine) -> Self {
        Self {
            shared,
            queue,
            engine,
            no_flush: false,
            told: false,
            throttle: Throttle::new(THROTTLE),
            span: Span::none(),
        }
    }

    /// Serves a request, or lets a ring work on it. Gives whether there may be a next one: a limit
    /// makes it wait, and the request was put back, if not.
    fn serve<'m>(
        &mut self,
        mut chain: Chain<'m>,
        turn: &mut Turn<'m>,
        registrar: &mut Registrar<'_, '_>,
        clock: &mut Clock,
    ) -> Result<bool, QueueError> {
        // The status is the last writable byte, wherever it lies.
        let Some(status) = chain.writable.split_last_byte() else {
            // There is no place even for an answer.
            count(&self.shared.counters.errors, 1);
            turn.complete(chain, 0)?;
            return Ok(true);
        };
        let disk = Disk {
            sectors: self.shared.sectors(),
            read_only: self.shared.read_only,
            limits: self.shared.limits(),
        };
        let parsed = request::parse(&mut chain.readable, &chain.writable, &disk);
        let (code, written) = match parsed {
            Err(code) => {
                count(&self.shared.counters.errors, 1);
                (code, 0)
            }
            Ok(request) => {
                let data = match request {
                    Request::Read { .. } => chain.writable.slices(),
                    _ => chain.readable.slices(),
                };
                let len = match request {
                    Request::Read { .. } => chain.writable.len(),
                    _ => chain.readable.len(),
                };
                if !self.may(&request, len as u64, registrar)? {
                    turn.put_back(chain);
                    return Ok(false);
                }
                match self.try_now(&request, data) {
                    Now::All(result) => {
                        if request == Request::GetId {
                            // There is room for it.
                            let _ = chain.writable.write(&self.shared.id);
                        }
                        clock.lap(self.latency(&request));
                        let result = result.and_then(|()| self.last_now(&request, clock));
                        self.answer(&request, len, result)
                    }
                    Now::Part(done) => {
                        chain.writable.push(status);
                        self.start_task(request, chain, done, turn, registrar, clock)?;
                        return Ok(true);
                    }
                }
            }
        };
        status.copy_from(&[code]);
        turn.complete(chain, u32::try_from(written + 1).unwrap_or(u32::MAX))?;
        Ok(true)
    }

    /// Whether the limits of the disk let a request go on.
    fn may(
        &mut self,
        request: &Request,
        len: u64,
        registrar: &mut Registrar<'_, '_>,
    ) -> io::Result<bool> {
        let (is_read, bytes) = match request {
            Request::Read { .. } => (true, len),
            Request::Write { .. } => (false, len),
            Request::GetId => (true, 0),
            Request::Flush | Request::Discard(_) | Request::WriteZeroes(_) => (false, 0),
        };
        let (limits, counters) = (&self.shared.rate_limits, &self.shared.counters);
        limits.may(is_read, bytes, counters, &mut self.throttle, registrar)
    }

    /// Does a request, or what of it need not wait where there is a ring for the rest.
    fn try_now(&mut self, request: &Request, data: &[GuestSlice<'_>]) -> Now {
        let source = &self.shared.source;
        if *request == Request::Flush && self.shared.read_only || *request == Request::GetId {
            return Now::All(Ok(()));
        }
        if let (Source::Raw(file), true) = (source, self.engine.has_ring()) {
            let always = self.engine.is_always();
            match request {
                Request::Read { .. } | Request::Write { .. } if always => {
                    if !file.needs_copy(data) {
                        return Now::Part(0);
                    }
                }
                Request::Read { offset } => return file.read_now(*offset, data),
                Request::Write { offset } => return file.write_now(*offset, data),
                Request::Discard(_) | Request::WriteZeroes(_) if !file.is_file() => {}
                _ => return Now::Part(0),
            }
        }
        Now::All(source.serve(request, data))
    }

    /// Flushes what was written where the driver will not.
    fn last_now(&mut self, request: &Request, clock: &mut Clock) -> io::Result<()> {
        let is_write = matches!(request, Request::Write { .. } | Request::WriteZeroes(_));
        if !is_write || !self.must_last() {
            return Ok(());
        }
        let result = self.shared.source.flush();
        clock.lap(Some(&self.shared.counters.flush_latency));
        result
    }

    fn must_last(&self) -> bool {
        self.no_flush || !self.shared.is_writeback()
    }

    fn latency(&self, request: &Request) -> Option<&LatencyHistogram> {
        let counters = &self.shared.counters;
        match request {
            Request::Read { .. } => Some(&counters.read_latency),
            Request::Write { .. } => Some(&counters.write_latency),
            Request::Flush if self.shared.read_only => None,
            Request::Flush => Some(&counters.flush_latency),
            Request::Discard(_) => Some(&counters.discard_latency),
            Request::WriteZeroes(_) => Some(&counters.write_zeroes_latency),
            Request::GetId => None,
        }
    }

    /// Counts a request with `len` bytes of data; gives the status to answer with, and how many
    /// bytes of data were written.
    fn answer(&mut self, request: &Request, len: usize, result: io::Result<()>) -> (u8, usize) {
        let counters = &self.shared.counters;
        if let Err(error) = result {
            count(&counters.errors, 1);
            let what = match request {
                Request::Read { .. } | Request::GetId => "read from",
                Request::Write { .. } => "write to",
                Request::Flush => "flush",
                Request::Discard(_) => "discard a part of",
                Request::WriteZeroes(_) => "write zeros to",
            };
            self.tell(what, &error);
            return (IO_ERROR, 0);
        }
        let mut written = 0;
        match request {
            Request::Read { .. } => {
                count(&counters.reads, 1);
                count(&counters.read_bytes, len as u64);
                written = len;
            }
            Request::Write { .. } => {
                count(&counters.writes, 1);
                count(&counters.write_bytes, len as u64);
            }
            Request::Flush => count(&counters.flushes, 1),
            Request::GetId => {
                count(&counters.ids, 1);
                written = ID_BYTES;
            }
            Request::Discard(ranges) => {
                count(&counters.discards, 1);
                count(&counters.discard_bytes, ranges.bytes());
            }
            Request::WriteZeroes(ranges) => {
                count(&counters.write_zeroes, 1);
                count(&counters.write_zeroes_bytes, ranges.bytes());
            }
        }
        (OK, written)
    }

    /// Says what went wrong, once: a guest may make it go wrong as often as it likes.
    fn tell(&mut self, what: &str, error: &io::Error) {
        if !std::mem::replace(&mut self.told, true) {
            self.span
                .in_scope(|| tracing::warn!("{what} a disk (told once): {error}"));
        }
    }

    /// Lets the ring work on what is left of a request.
    fn start_task<'m>(
        &mut self,
        request: Request,
        chain: Chain<'m>,
        done: usize,
        turn: &mut Turn<'m>,
        registrar: &mut Registrar<'_, '_>,
        clock: &Clock,
    ) -> Result<(), QueueError> {
        let task = Task::new(request, turn.detach(chain), done, clock.0);
        let Some(ringed) = self
            .engine
            .ring(|ring| registrar.add(ring, RING, EventSet::IN | EventSet::EDGE_TRIGGERED))?
        else {
            return self.finish_without_ring(task, turn);
        };
        match ringed.ring.insert(task) {
            Ok(slot) => self.step(slot, turn),
            Err(task) => self.finish_without_ring(task, turn),
        }
    }

    /// Does what is left of a request here.
    fn finish_without_ring(
        &mut self,
        mut task: Task,
        turn: &mut Turn<'_>,
    ) -> Result<(), QueueError> {
        let request = task.request;
        let source = &self.shared.source;
        // From its beginning: what was done before is done again.
        let result = task.with_data(|data, _| source.serve(&request, data));
        let mut clock = Clock(task.begun);
        clock.lap(self.latency(&request));
        let result = result.and_then(|()| self.last_now(&request, &mut clock));
        let (status, written) = self.answer(&request, task.len(), result);
        task.complete(turn, status, written)
    }

    /// Goes on with the request in a slot, none of whose operations is under way.
    fn step(&mut self, slot: u16, turn: &mut Turn<'_>) -> Result<(), QueueError> {
        let must_last = self.must_last();
        loop {
            let Some(Ringed { ring, file }) = self.engine.existing() else {
                return Ok(());
            };
            let Some(task) = ring.get_mut(slot) else {
                return Ok(());
            };
            match task.next(file) {
                Next::Operation(operation) => {
                    if operation == Operation::Flush && task.request != Request::Flush {
                        let (request, begun) = (task.request, task.begun);
                        task.begun = Instant::now();
                        task.note_start(operation);
                        ring.start(slot, operation)?;
                        self.record(&request, begun);
                    } else {
                        task.note_start(operation);
                        ring.start(slot, operation)?;
                    }
                    return Ok(());
                }
                Next::Zeroes(range) => {
                    let result = file.zero(range.offset, range.len, range.unmap);
                    if let Err(error) = task.note_end(result.map(|()| 0), must_last) {
                        return self.finish(slot, Err(error), turn);
                    }
                }
                Next::Done => return self.finish(slot, Ok(()), turn),
            }
        }
    }

    fn record(&self, request: &Request, begun: Instant) {
        if let Some(latency) = self.latency(request) {
            latency.record(begun.elapsed());
        }
    }

    /// Answers the request in a slot.
    fn finish(
        &mut self,
        slot: u16,
        result: io::Result<()>,
        turn: &mut Turn<'_>,
    ) -> Result<(), QueueError> {
        let task = self.engine.existing().and_then(|it| it.ring.remove(slot));
        let Some(task) = task else {
            return Ok(());
        };
        if task.is_making_last() {
            let latency = &self.shared.counters.flush_latency;
            latency.record(task.begun.elapsed());
        } else {
            self.record(&task.request, task.begun);
        }
        let request = task.request;
        let (status, written) = self.answer(&request, task.len(), result);
        task.complete(turn, status, written)
    }

    /// Takes note of what has ended in the ring, and goes on with it.
    fn reap(&mut self, turn: &mut Turn<'_>) -> Result<(), QueueError> {
        let must_last = self.must_last();
        while let Some(Ringed { ring, file }) = self.engine.existing() {
            let Some(ended) = ring.next_completion() else {
                break;
            };
            let Some(task) = ring.get_mut(ended.slot) else {
                continue;
            };
            let result = match (ended.result, task.range(), &task.request) {
                // The file system does not have this.
                (Err(error), Some(range), Request::WriteZeroes(_)) if is_missing(&error) => {
                    file.zero(range.offset, range.len, range.unmap).map(|()| 0)
                }
                (result, ..) => result,
            };
            match task.note_end(result, must_last) {
                Ok(()) => self.step(ended.slot, turn)?,
                Err(error) => self.finish(ended.slot, Err(error), turn)?,
            }
        }
        Ok(())
    }

    /// Gives the kernel what is queued, and takes note of what ended meanwhile, until there is
    /// nothing to do but to wait.
    fn submit(&mut self, turn: &mut Turn<'_>) -> Result<(), QueueError> {
        while let Some(Ringed { ring, .. }) = self.engine.existing() {
            if !ring.is_queued() {
                break;
            }
            ring.submit()?;
            self.reap(turn)?;
        }
        Ok(())
    }

    fn has_room(&mut self) -> bool {
        self.engine.existing().is_none_or(|it| it.ring.has_room())
    }
}

fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}

/// The time that requests take which are served one behind the other: the end of one is the
/// beginning of the next.
struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    fn lap(&mut self, latency: Option<&LatencyHistogram>) {
        if let Some(latency) = latency {
            let now = Instant::now();
            latency.record(now.duration_since(self.0));
            self.0 = now;
        }
    }
}

impl QueueHandler for BlockHandler {
    fn start(&mut self, features: u64, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        self.span = Span::current();
        self.throttle.start();
        self.no_flush = features & (1 << raw::VIRTIO_BLK_F_FLUSH) == 0;
        match self.engine.existing() {
            Some(it) => registrar.add(&*it.ring, RING, EventSet::IN | EventSet::EDGE_TRIGGERED),
            None => Ok(()),
        }
    }

    fn ready(&mut self, event: IoEvent) -> Option<u16> {
        if event.token == THROTTLE {
            self.throttle.woken();
        }
        Some(self.queue)
    }

    fn process(
        &mut self,
        turn: &mut Turn<'_>,
        registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        self.reap(turn)?;
        let mut clock = Clock::start();
        loop {
            let mut is_full = true;
            while self.has_room() {
                let Some(chain) = turn.pop()? else {
                    is_full = false;
                    break;
                };
                if !self.serve(chain, turn, registrar, &mut clock)? {
                    is_full = false;
                    break;
                }
            }
            self.submit(turn)?;
            // Called again when something ends, which makes room.
            if !is_full || !self.has_room() {
                return Ok(());
            }
        }
    }

    fn drain(&mut self, turn: &mut Turn<'_>) {
        let mut drain = || -> Result<(), QueueError> {
            loop {
                self.reap(turn)?;
                match self.engine.existing() {
                    Some(it) if !it.ring.is_idle() => it.ring.wait()?,
                    _ => return Ok(()),
                }
            }
        };
        if drain().is_err() {
            self.abandon();
        }
    }

    fn abandon(&mut self) {
        if let Some(it) = self.engine.existing() {
            it.ring.abandon();
        }
    }
}
