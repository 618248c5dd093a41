//! What is done with the queues, on the I/O thread.
//!
//! However much a driver puts into a chain, a turn on a queue does a bounded part of it, and the
//! chain waits, half done, until other queues had their turn.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_io_thread::{EventSet, IoEvent, Registrar};
use kiln_memory::{discard, discard_slice};
use kiln_virtio_device::{Chain, GuestBuffers, QueueError, QueueHandler, Turn};
use tracing::Span;
use vm_memory::GuestAddress;

use super::BalloonStatistics;
use super::control::Shared;
use super::device::{PAGE_REPORTING, STATS_VQ};
use super::pages::{PAGE_SIZE, ranges};
use super::statistics::MAX_BYTES;

/// The bytes of a page number.
const NUMBER_BYTES: usize = 4;
/// The page numbers that are read and sorted at once. Linux sends 256.
const BATCH: usize = 1024;
/// The page numbers that a turn takes: in the worst case, each of them is a system call.
const TURN_NUMBERS: usize = 4 * BATCH;
/// The bytes of reports that a turn gives back.
const TURN_BYTES: usize = 64 << 20;
/// What a piece of a report counts for at least: each is a system call, and a turn makes no more of
/// them for reports than for page numbers.
const PIECE_BYTES: usize = TURN_BYTES / TURN_NUMBERS;
/// The queues that a balloon has at most.
const QUEUES: usize = 5;
const STATISTICS: u16 = 2;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Statistics,
    Report,
    Nothing,
}

impl Role {
    /// What the queue with this index is for (virtio 1.3, section 5.5.2).
    ///
    /// The queue for reports is number 4. Linux before 6.11 numbers the queues without those that
    /// it does not use, and takes 3 for it, or 2 where it also has no statistics. Since queue 3 is
    /// for hints, which are not offered, nobody can mean something else by it.
    fn of(index: u16, features: u64) -> Self {
        match index {
            0 => Self::Inflate,
            1 => Self::Deflate,
            STATISTICS if features & STATS_VQ != 0 => Self::Statistics,
            2..=4 if features & PAGE_REPORTING != 0 => Self::Report,
            _ => Self::Nothing,
        }
    }
}

/// What lives on the I/O thread.
pub(super) struct BalloonHandler {
    shared: Arc<Shared>,
    features: u64,
    /// The bytes of each queue's next chain that are done.
    done: [usize; QUEUES],
    /// Statistics were read from the next chain of their queue, which is kept until the driver is
    /// to give new ones.
    kept: bool,
    /// The last request for statistics that the driver was told of.
    told: u64,
    numbers: Vec<u32>,
    warned: bool,
    span: Span,
}

impl BalloonHandler {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            features: 0,
            done: [0; QUEUES],
            kept: false,
            told: 0,
            numbers: Vec::with_capacity(BATCH),
            warned: false,
            span: Span::none(),
        }
    }

    /// The next chain, with what is already done of it taken off its front.
    fn next<'m>(&mut self, turn: &mut Turn<'m>) -> Result<Option<(Chain<'m>, usize)>, QueueError> {
        let Some(mut chain) = turn.pop()? else {
            return Ok(None);
        };
        let done = self.done.get_mut(usize::from(turn.index()));
        let done = done.map_or(0, std::mem::take);
        for buffers in [&mut chain.readable, &mut chain.writable] {
            // A driver that makes a chain shorter meanwhile has nothing more to say.
            if !buffers.is_empty() && buffers.skip(done).is_err() {
                buffers.clear();
            }
        }
        Ok(Some((chain, done)))
    }

    /// Puts back a chain of which `done` bytes are done.
    fn later<'m>(&mut self, turn: &mut Turn<'m>, chain: Chain<'m>, done: usize) {
        if let Some(slot) = self.done.get_mut(usize::from(turn.index())) {
            *slot = done;
        }
        turn.put_back(chain);
        turn.give_way();
    }

    /// Gives the pages that the driver puts into the balloon to the host.
    fn inflate(&mut self, turn: &mut Turn<'_>) -> Result<(), QueueError> {
        let mut left = TURN_NUMBERS;
        while let Some((mut chain, mut done)) = self.next(turn)? {
            while chain.readable.len() >= NUMBER_BYTES {
                if left == 0 {
                    self.later(turn, chain, done);
                    return Ok(());
                }
                let count = self.read_numbers(&mut chain.readable, left)?;
                for range in ranges(&mut self.numbers) {
                    let len = range.end - range.start;
                    let given = discard(turn.memory(), GuestAddress(range.start), len);
                    let counter = &self.shared.counters.inflated_bytes;
                    count_given(given, counter, &self.shared, &mut self.warned, &self.span);
                }
                left -= count;
                done += count * NUMBER_BYTES;
            }
            turn.complete(chain, 0)?;
        }
        Ok(())
    }

    /// Reads up to `most` page numbers, and says how many.
    fn read_numbers(
        &mut self,
        from: &mut GuestBuffers<'_>,
        most: usize,
    ) -> Result<usize, QueueError> {
        let mut bytes = [0; BATCH * NUMBER_BYTES];
        let count = (from.len() / NUMBER_BYTES).min(BATCH).min(most);
        let bytes = &mut bytes[..count * NUMBER_BYTES];
        from.read(bytes)?;
        let numbers = bytes
            .chunks_exact(NUMBER_BYTES)
            .filter_map(|bytes| bytes.try_into().ok());
        self.numbers.clear();
        self.numbers.extend(numbers.map(u32::from_le_bytes));
        Ok(count)
    }

    /// The driver takes pages out of the balloon: it only has to touch them.
    fn deflate(&mut self, turn: &mut Turn<'_>) -> Result<(), QueueError> {
        while let Some(chain) = turn.pop()? {
            let pages = (chain.readable.len() / NUMBER_BYTES) as u64;
            let counter = &self.shared.counters.deflated_bytes;
            counter.fetch_add(pages * PAGE_SIZE, Ordering::Relaxed);
            turn.complete(chain, 0)?;
        }
        Ok(())
    }

    /// Gives the pages that the driver reports as free to the host (virtio 1.3, section 5.5.6.7).
    /// They are the chain's buffers themselves. To write them is what is done, in effect, so only
    /// those count that the device may write.
    fn report(&mut self, turn: &mut Turn<'_>) -> Result<(), QueueError> {
        let mut left = TURN_BYTES;
        while let Some((mut chain, mut done)) = self.next(turn)? {
            while let Some(slice) = chain.writable.slices().first() {
                if left == 0 {
                    self.later(turn, chain, done);
                    return Ok(());
                }
                let len = slice.len().min(left);
                let given = match slice.subslice(0, len) {
                    Ok(piece) => discard_slice(turn.memory(), &piece),
                    Err(_) => Ok(0),
                };
                let counter = &self.shared.counters.reported_bytes;
                count_given(given, counter, &self.shared, &mut self.warned, &self.span);
                chain.writable.skip(len)?;
                left = left.saturating_sub(len.max(PIECE_BYTES));
                done += len;
            }
            turn.complete(chain, 0)?;
        }
        Ok(())
    }

    /// Reads statistics as they come, and gives the buffer back only when the driver is to fill it
    /// again (virtio 1.3, section 5.5.6.3).
    fn statistics(&mut self, turn: &mut Turn<'_>) -> Result<(), QueueError> {
        while let Some(mut chain) = turn.pop()? {
            if !self.kept {
                let mut bytes = [0; MAX_BYTES];
                let bytes = &mut bytes[..chain.readable.len().min(MAX_BYTES)];
                chain.readable.read(bytes)?;
                let statistics = BalloonStatistics::parse(bytes);
                self.shared.publish_statistics(self.told, statistics);
            }
            let asked = self.shared.statistics_asked();
            self.kept = asked <= self.told;
            if self.kept {
                turn.put_back(chain);
                break;
            }
            self.told = asked;
            turn.complete(chain, 0)?;
        }
        Ok(())
    }
}

/// Counts what was given back; a host that takes nothing is worth one line for each device.
fn count_given(
    given: Result<u64, kiln_memory::Error>,
    counter: &AtomicU64,
    shared: &Shared,
    warned: &mut bool,
    span: &Span,
) {
    match given {
        Ok(bytes) => drop(counter.fetch_add(bytes, Ordering::Relaxed)),
        Err(error) => {
            shared.counters.failures.fetch_add(1, Ordering::Relaxed);
            if !std::mem::replace(warned, true) {
                let _in_span = span.enter();
                let source = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!("{error}: {}", source.unwrap_or_default());
            }
        }
    }
}

impl QueueHandler for BalloonHandler {
    fn start(&mut self, features: u64, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        self.features = features;
        // What was done of a chain before may be done again.
        self.done = [0; QUEUES];
        self.kept = false;
        self.span = Span::current();
        registrar.add(&self.shared.wake, Self::FIRST_TOKEN, EventSet::IN)
    }

    fn process(
        &mut self,
        turn: &mut Turn<'_>,
        _registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        match Role::of(turn.index(), self.features) {
            Role::Inflate => self.inflate(turn),
            Role::Deflate => self.deflate(turn),
            Role::Statistics => self.statistics(turn),
            Role::Report => self.report(turn),
            Role::Nothing => Ok(()),
        }
    }

    /// Statistics are asked for.
    fn ready(&mut self, _event: IoEvent) -> Option<u16> {
        let _ = self.shared.wake.read();
        (self.features & STATS_VQ != 0).then_some(STATISTICS)
    }
}
