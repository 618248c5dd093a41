//! One turn of a handler on a queue: chains out of the available ring, chains into the used ring,
//! and the two kinds of notification, which are decided here and nowhere else.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use kiln_memory::GuestMemory;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::InFlight;
use super::in_flight::SpareChains;
use crate::buffers::split_chain;
use crate::counters::add_alone;
use crate::{
    ActiveQueue, GuestBuffers, InterruptEvent, QueueCounters, QueueError, VirtioInterrupt,
};

/// The chains that a turn completes before other queues get theirs.
const TURN_CHAINS: usize = 128;
/// The bytes that the chains of a turn may have before other queues get theirs: a turn ends with
/// the chain that passes this.
const TURN_BYTES: usize = 8 << 20;

/// A descriptor chain that the driver made available: a request, or room for an answer.
///
/// It is to be completed or put back; one that is dropped never returns to the driver.
#[derive(Debug)]
#[must_use = "a chain that is dropped never returns to the driver"]
pub struct Chain<'m> {
    head: u16,
    /// The bytes of both parts, before anything was read or written.
    bytes: usize,
    readable_bytes: usize,
    /// What the driver wrote for the device to read.
    pub readable: GuestBuffers<'m>,
    /// What the device is to write.
    pub writable: GuestBuffers<'m>,
}

impl<'m> Chain<'m> {
    fn empty() -> Self {
        Self {
            head: 0,
            bytes: 0,
            readable_bytes: 0,
            readable: GuestBuffers::new(),
            writable: GuestBuffers::new(),
        }
    }

    /// What completing this chain needs of it, and its room, for a turn with other memory.
    pub(super) fn without_buffers<'other>(self) -> Chain<'other> {
        Chain {
            head: self.head,
            bytes: self.bytes,
            readable_bytes: self.readable_bytes,
            readable: self.readable.into_room(),
            writable: self.writable.into_room(),
        }
    }

    fn has_room_to_keep(&self) -> bool {
        self.readable.room() <= MAX_SPARE_PIECES && self.writable.room() <= MAX_SPARE_PIECES
    }
}

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TurnEnd {
    /// No chain is left: the driver will tell of new ones.
    Drained,
    /// The turn was long enough; there may be more to do.
    Yielded,
    /// The handler waits for something else than the driver.
    Left,
}

/// A handler's turn on one queue.
#[derive(Debug)]
pub struct Turn<'m> {
    index: u16,
    queue: &'m mut Queue,
    memory: &'m GuestMemory,
    owner: &'m Arc<GuestMemory>,
    counters: &'m QueueCounters,
    chains_left: usize,
    bytes_left: usize,
    popped: usize,
    /// Chains at the end of those popped that go back when the turn ends.
    returned: u16,
    /// Why the last `pop` gave nothing.
    no_more: TurnEnd,
    end: TurnEnd,
    /// The used index that the driver was last told of.
    told: Wrapping<u16>,
    /// Completed chains, for their room.
    spare: Vec<Chain<'m>>,
}

/// The most chains whose room is kept: those of a turn.
const MAX_SPARE: usize = TURN_CHAINS;
/// The most pieces that a chain that is kept has room for.
const MAX_SPARE_PIECES: usize = 64;

impl<'m> Turn<'m> {
    /// A turn that uses the room of `spare` chains.
    pub(super) fn new(
        active: &'m mut ActiveQueue,
        memory: &'m Arc<GuestMemory>,
        spare: SpareChains,
    ) -> Self {
        let told = Wrapping(active.queue.next_used());
        Self {
            index: active.index,
            queue: &mut active.queue,
            memory,
            owner: memory,
            counters: &active.counters,
            chains_left: TURN_CHAINS,
            bytes_left: TURN_BYTES,
            popped: 0,
            returned: 0,
            no_more: TurnEnd::Left,
            end: TurnEnd::Left,
            told,
            spare: spare.into_chains(),
        }
    }

    /// The queue's index in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The room of the chains that are left, for the next turn.
    pub(super) fn into_spare(self) -> SpareChains {
        let kept = self.spare.into_iter().filter(Chain::has_room_to_keep);
        SpareChains::new(kept.take(MAX_SPARE))
    }

    /// The guest's RAM.
    pub fn memory(&self) -> &'m GuestMemory {
        self.memory
    }

    /// The number of descriptors in the queue.
    pub fn queue_size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next chain that the driver made available. `None` says that there is none, or
    /// that it is time to return from [`process`](crate::QueueHandler::process), which is then
    /// called again as soon as other queues had their turn.
    ///
    /// # Errors
    ///
    /// [`QueueError`] where the rings or the chain are malformed, to be returned from `process`.
    pub fn pop(&mut self) -> Result<Option<Chain<'m>>, QueueError> {
        self.take_back();
        if self.chains_left == 0 || self.bytes_left == 0 {
            self.no_more = TurnEnd::Yielded;
            self.end = TurnEnd::Yielded;
            return Ok(None);
        }
        let Some(descriptors) = self.queue.iter(self.memory)?.next() else {
            self.no_more = TurnEnd::Drained;
            self.end = TurnEnd::Drained;
            return Ok(None);
        };
        self.popped += 1;
        let mut chain = self.spare.pop().unwrap_or_else(Chain::empty);
        chain.head = descriptors.head_index();
        let size = self.queue.size();
        let Chain {
            readable, writable, ..
        } = &mut chain;
        split_chain(self.memory, descriptors, size, readable, writable)?;
        chain.readable_bytes = chain.readable.len();
        chain.bytes = chain.readable_bytes.saturating_add(chain.writable.len());
        Ok(Some(chain))
    }

    /// Gives a chain back to the driver, as used. `written` is the number of bytes that the device
    /// wrote to the chain from the beginning of its writable part on.
    ///
    /// # Errors
    ///
    /// [`QueueError`] where the used ring cannot be written, to be returned from `process`.
    pub fn complete(&mut self, chain: Chain<'m>, written: u32) -> Result<(), QueueError> {
        self.complete_all([(chain, written)])
    }

    /// Gives several chains back to the driver at once: it sees either none or all of them, as a
    /// packet in several buffers needs it (virtio 1.3, section 5.1.6.4).
    ///
    /// # Errors
    ///
    /// As [`complete`](Self::complete).
    pub fn complete_all(
        &mut self,
        chains: impl IntoIterator<Item = (Chain<'m>, u32)>,
    ) -> Result<(), QueueError> {
        let mut next = Wrapping(self.queue.next_used());
        let (mut requests, mut from_driver, mut to_driver) = (0, 0, 0);
        for (mut chain, written) in chains {
            let slot = u64::from(next.0 % self.queue.size());
            // An entry is two little-endian words: the head, and the length.
            let entry = (u64::from(written) << 32 | u64::from(chain.head)).to_le();
            self.memory
                .write_obj(entry, self.used_ring(4 + 8 * slot)?)
                .map_err(virtio_queue::Error::GuestMemory)?;
            next += 1;
            requests += 1;
            from_driver += chain.readable_bytes as u64;
            to_driver += u64::from(written);
            self.chains_left = self.chains_left.saturating_sub(1);
            self.bytes_left = self.bytes_left.saturating_sub(chain.bytes);
            chain.readable.clear();
            chain.writable.clear();
            self.spare.push(chain);
        }
        add_alone(&self.counters.requests, requests);
        add_alone(&self.counters.bytes_from_driver, from_driver);
        add_alone(&self.counters.bytes_to_driver, to_driver);
        self.queue.set_next_used(next.0);
        self.memory
            .store(next.0.to_le(), self.used_ring(2)?, Ordering::Release)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(())
    }

    /// Keeps a chain beyond this turn, for something that reads or writes its buffers and goes on by
    /// itself. A later turn on the same queue [completes](Self::complete_in_flight) it, in whatever
    /// order.
    pub fn detach(&mut self, chain: Chain<'m>) -> InFlight {
        InFlight::new(chain, self.owner)
    }

    /// Gives a chain back to the driver that was [detached](Self::detach) in this turn or one
    /// before. Nothing may use its buffers any more.
    ///
    /// # Errors
    ///
    /// As [`complete`](Self::complete).
    pub fn complete_in_flight(&mut self, chain: InFlight, written: u32) -> Result<(), QueueError> {
        self.complete(chain.into_done(), written)
    }

    /// Puts back the chain that was popped last of those not completed or put back, untouched as
    /// far as the driver can tell. The handler waits for something of its own, not for the driver.
    pub fn put_back(&mut self, mut chain: Chain<'m>) {
        chain.readable.clear();
        chain.writable.clear();
        self.spare.push(chain);
        self.returned = self.returned.wrapping_add(1);
        self.end = TurnEnd::Left;
    }

    /// Waits for the driver to make more chains available than those that were put back, of which
    /// [`pop`](Self::pop) said that there are no more.
    pub fn wait_for_more(&mut self) {
        self.end = self.no_more;
    }

    /// Says that there is more to do than is good for one turn, as with a chain that was put back
    /// half done: [`process`](crate::QueueHandler::process) is to return, and is called again as
    /// soon as other queues had their turn.
    pub fn give_way(&mut self) {
        self.end = TurnEnd::Yielded;
    }

    /// Makes chains that were put back available to `pop` again.
    pub(super) fn take_back(&mut self) {
        let next = self.queue.next_avail().wrapping_sub(self.returned);
        self.queue.set_next_avail(next);
        self.returned = 0;
    }

    fn used_ring(&self, offset: u64) -> Result<GuestAddress, virtio_queue::Error> {
        ring_address(self.queue.used_ring(), offset)
    }

    /// Whether chains were completed of which the driver wants to be told by an interrupt (virtio
    /// 1.3, section 2.7.7); asked once for all of them.
    pub(super) fn take_added(&mut self) -> Result<bool, QueueError> {
        let now = Wrapping(self.queue.next_used());
        let before = std::mem::replace(&mut self.told, now);
        if now == before {
            return Ok(false);
        }
        // The driver must see the used entries before its wish is read: it writes its wish, and
        // then looks for entries.
        fence(Ordering::SeqCst);
        let load = |offset: u64| -> Result<u16, QueueError> {
            let address = ring_address(self.queue.avail_ring(), offset)?;
            let value = self.memory.load::<u16>(address, Ordering::Relaxed);
            Ok(u16::from_le(
                value.map_err(virtio_queue::Error::GuestMemory)?,
            ))
        };
        if self.queue.event_idx_enabled() {
            let used_event = Wrapping(load(4 + 2 * u64::from(self.queue.size()))?);
            Ok(now - used_event - Wrapping(1) < now - before)
        } else {
            Ok(u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
        }
    }
}

fn ring_address(ring: u64, offset: u64) -> Result<GuestAddress, virtio_queue::Error> {
    let address = ring
        .checked_add(offset)
        .ok_or(virtio_queue::Error::AddressOverflow)?;
    Ok(GuestAddress(address))
}

/// Lets `process` work on the queue for a turn, and interrupts the driver if it wants to be.
pub(super) fn turn_on(
    queue: &mut ActiveQueue,
    memory: &Arc<GuestMemory>,
    spare: &mut SpareChains,
    interrupt: &dyn VirtioInterrupt,
    process: impl FnMut(&mut Turn<'_>) -> Result<(), QueueError>,
) -> Result<TurnEnd, QueueError> {
    let mut turn = Turn::new(queue, memory, std::mem::take(spare));
    let end = work(&mut turn, process);
    turn.take_back();
    // Also where the work ended badly: what was completed before belongs to the driver.
    if turn.take_added()? {
        interrupt.trigger(InterruptEvent::Queue(turn.index));
    }
    *spare = turn.into_spare();
    end
}

fn work(
    turn: &mut Turn<'_>,
    mut process: impl FnMut(&mut Turn<'_>) -> Result<(), QueueError>,
) -> Result<TurnEnd, QueueError> {
    let mut more = false;
    loop {
        turn.queue.disable_notification(turn.memory)?;
        turn.take_back();
        turn.end = TurnEnd::Left;
        let before = turn.popped;
        process(turn)?;
        if turn.end != TurnEnd::Drained {
            return Ok(turn.end);
        }
        if more && turn.popped == before {
            return Err(QueueError::Stuck);
        }
        // The driver may have added chains before it could see that it has to tell.
        more = turn.queue.enable_notification(turn.memory)?;
        if !more {
            return Ok(TurnEnd::Drained);
        }
    }
}
