//! From the network to the driver.
//!
//! A packet is read straight into the driver's buffers. How large it is is known only afterwards,
//! so behind the buffers there is always room of our own, large enough for any packet: what landed
//! there is copied into further buffers if the driver has them and takes packets in several
//! (`MRG_RXBUF`), and a packet is kept until then if the driver has not enough now.

use std::collections::VecDeque;
use std::io;

use kiln_memory::{GuestMemory, GuestSlice, MemoryOptions, allocate, gather_into, scatter};
use kiln_virtio_device::{Chain, QueueError, Turn};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::counters::add;
use super::device::{HEADER_BYTES, MAX_PACKET};
use super::filter::HEAD_BYTES;
use super::shared::{Shared, View};
use super::{NetBackend, NetCounters};

/// Errors in a row after which the network is left alone until the driver gives new buffers.
const MAX_ERRORS: usize = 16;
/// Where `num_buffers` is in the header, which goes to 12 bytes.
const NUM_BUFFERS: usize = 10;
/// Room for any packet, in whole pages.
const ROOM: usize = MAX_PACKET.next_multiple_of(4096);
/// By what part of the difference the expected length follows packets that are shorter.
const FORGETTING: usize = 8;

/// What the driver agreed on, as far as it matters for what it receives.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ReceiveMode {
    /// A packet may fill several buffers.
    pub(super) mergeable: bool,
    /// The flags of a packet's header mean something to the driver.
    pub(super) flags: bool,
}

/// What is to be waited for next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// Packets from the network.
    Packets,
    /// The limit to let more through.
    Limit,
    /// Buffers from the driver.
    Buffers,
    /// Nothing: there is another [`View`] to receive by.
    View,
}

/// The receiving half of a pair of queues.
pub(super) struct Receiver {
    mode: ReceiveMode,
    /// Room behind the driver's buffers: memory of our own in the shape of guest memory.
    room: GuestMemory,
    /// A packet that waits for enough buffers.
    kept: Vec<u8>,
    /// How large the next packet may be, judged by the last ones: buffers are taken for that much,
    /// so that large packets need no copy, and small ones do not cost the handling of many buffers.
    expected: usize,
}

/// The chains that were popped and not yet used, first in first out.
#[derive(Default)]
struct Ring<'m> {
    chains: VecDeque<Chain<'m>>,
    bytes: usize,
}

impl<'m> Ring<'m> {
    /// Takes chains from the queue until they have `bytes`, or there are no more.
    fn fill(
        &mut self,
        bytes: usize,
        counters: &NetCounters,
        turn: &mut Turn<'m>,
    ) -> Result<(), QueueError> {
        while self.bytes < bytes {
            let Some(chain) = turn.pop()? else {
                break;
            };
            if chain.writable.len() < HEADER_BYTES {
                // No room even for a header: of no use to anyone.
                add(&counters.rx_errors, 1);
                turn.complete(chain, 0)?;
                continue;
            }
            self.bytes += chain.writable.len();
            self.chains.push_back(chain);
        }
        Ok(())
    }

    fn slices(&self) -> impl Iterator<Item = GuestSlice<'m>> {
        self.chains
            .iter()
            .flat_map(|chain| chain.writable.slices().iter().copied())
    }

    /// Copies `bytes` into the chains.
    fn write(&self, bytes: &[u8]) {
        scatter(bytes, self.slices());
    }

    /// Copies the first `len` bytes of `from` into the chains, behind their first `skip` bytes.
    fn copy_behind(&self, mut skip: usize, from: &GuestSlice<'_>, len: usize) {
        let mut done = 0;
        for slice in self.slices() {
            let start = skip.min(slice.len());
            skip -= start;
            let count = (len - done).min(slice.len() - start);
            if count == 0 {
                continue;
            }
            if let (Ok(from), Ok(to)) = (from.subslice(done, count), slice.offset(start)) {
                from.copy_to_volatile_slice(to);
            }
            done += count;
        }
    }

    /// Appends the first `len` bytes of the chains to `bytes`.
    fn copy_to(&self, len: usize, bytes: &mut Vec<u8>) {
        let start = bytes.len();
        bytes.resize(start + len, 0);
        gather_into(&mut bytes[start..], self.slices());
    }

    /// Gives the packet of `len` bytes that the first chains hold to the driver.
    fn deliver(
        &mut self,
        len: usize,
        mode: ReceiveMode,
        turn: &mut Turn<'m>,
    ) -> Result<(), QueueError> {
        let mut number = 0;
        let mut bytes = 0;
        for chain in &self.chains {
            if bytes >= len {
                break;
            }
            bytes += chain.writable.len();
            number += 1;
        }
        if let Some(first) = self.chains.front_mut() {
            let header = &mut first.writable;
            if mode.flags {
                header.skip(NUM_BUFFERS)?;
            } else {
                // What the network says of checksums is not for this driver.
                header.write(&[0])?;
                header.skip(NUM_BUFFERS - 1)?;
            }
            header.write(&u16::try_from(number).unwrap_or(u16::MAX).to_le_bytes())?;
        }
        // Of the first chain the header is taken off already.
        let mut header = HEADER_BYTES;
        self.bytes -= bytes;
        let mut left = len;
        turn.complete_all(self.chains.drain(..number).map(|chain| {
            let count = left.min(chain.writable.len() + std::mem::take(&mut header));
            left -= count;
            // A packet's length fits.
            (chain, count as u32)
        }))
    }

    fn put_back(&mut self, turn: &mut Turn<'m>) {
        while let Some(chain) = self.chains.pop_back() {
            turn.put_back(chain);
        }
        self.bytes = 0;
    }
}

impl Receiver {
    pub(super) fn new() -> Result<Self, kiln_memory::Error> {
        let room = allocate(&[(GuestAddress(0), ROOM)], &MemoryOptions::default())?;
        Ok(Self {
            mode: ReceiveMode::default(),
            room,
            kept: Vec::new(),
            expected: 1,
        })
    }

    /// Begins anew, as the driver has agreed.
    pub(super) fn start(&mut self, mode: ReceiveMode) {
        self.mode = mode;
        self.kept.clear();
        self.expected = 1;
    }

    /// Receives packets until there are none, or no buffers for them, or `may_go_on` says no: the
    /// limit is reached.
    pub(super) fn receive(
        &mut self,
        backend: &mut dyn NetBackend,
        shared: &Shared,
        (view, generation): (&View, u32),
        turn: &mut Turn<'_>,
        mut may_go_on: impl FnMut() -> io::Result<bool>,
    ) -> Result<Wait, QueueError> {
        let room = self
            .room
            .get_slice(GuestAddress(0), ROOM)
            .map_err(io::Error::other)?;
        let mut half = Half {
            mode: self.mode,
            kept: &mut self.kept,
            expected: &mut self.expected,
            counters: &shared.counters,
            ring: Ring::default(),
            turn,
        };
        let mut slices = Vec::new();
        let mut errors = 0;
        loop {
            if shared.generation() != generation {
                half.ring.put_back(half.turn);
                return Ok(Wait::View);
            }
            if !half.kept.is_empty() && !half.deliver_kept()? {
                return Ok(half.wait_for_buffers());
            }
            let wanted = if half.mode.mergeable {
                *half.expected
            } else {
                1
            };
            half.fill(wanted)?;
            if half.ring.chains.is_empty() {
                return Ok(Wait::Buffers);
            }
            if !may_go_on()? {
                half.ring.put_back(half.turn);
                return Ok(Wait::Limit);
            }
            slices.clear();
            for slice in half.ring.slices() {
                slices.push(slice);
            }
            slices.push(room);
            match backend.receive(&slices) {
                Ok(len) if !(HEADER_BYTES..=MAX_PACKET).contains(&len) => {
                    errors = 0;
                    add(&shared.counters.rx_dropped, 1);
                }
                Ok(len) if !view.wants_all() && !is_wanted(view, len, &slices) => {
                    errors = 0;
                    add(&shared.counters.rx_filtered, 1);
                }
                Ok(len) => {
                    errors = 0;
                    shared.rate_limits.rx.charge((len - HEADER_BYTES) as u64);
                    half.take(len, &room)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    half.ring.put_back(half.turn);
                    return Ok(Wait::Packets);
                }
                Err(_) => {
                    add(&shared.counters.rx_errors, 1);
                    errors += 1;
                    if errors == MAX_ERRORS {
                        // All that there is, so that the driver tells of what comes behind it.
                        half.fill(usize::MAX)?;
                        return Ok(half.wait_for_buffers());
                    }
                }
            }
        }
    }
}

/// Whether the driver wants the packet of `len` bytes at the beginning of these pieces. The guest
/// may change what is judged, and gets then what it does not want.
fn is_wanted(view: &View, len: usize, pieces: &[GuestSlice<'_>]) -> bool {
    let mut head = [0; HEADER_BYTES + HEAD_BYTES];
    // What is behind a packet that is shorter is of an older one.
    let known = head.len().min(len);
    gather_into(&mut head[..known], pieces);
    let mut frame = [0; HEAD_BYTES];
    frame.copy_from_slice(&head[HEADER_BYTES..]);
    view.wants(&frame)
}

/// The work of one call of [`Receiver::receive`].
struct Half<'a, 'm, 't> {
    mode: ReceiveMode,
    kept: &'a mut Vec<u8>,
    expected: &'a mut usize,
    counters: &'a NetCounters,
    ring: Ring<'m>,
    turn: &'t mut Turn<'m>,
}

impl Half<'_, '_, '_> {
    fn fill(&mut self, bytes: usize) -> Result<(), QueueError> {
        self.ring.fill(bytes, self.counters, self.turn)
    }

    fn wait_for_buffers(&mut self) -> Wait {
        self.ring.put_back(self.turn);
        self.turn.wait_for_more();
        Wait::Buffers
    }

    /// Takes a packet of `len` bytes that is in the ring's chains and, where it is larger than
    /// they are, in the room behind them.
    fn take(&mut self, len: usize, room: &GuestSlice<'_>) -> Result<(), QueueError> {
        let before = *self.expected;
        *self.expected = len.max(before - before.saturating_sub(len) / FORGETTING);
        let had = self.ring.bytes;
        if len > had {
            if self.mode.mergeable {
                self.fill(len)?;
            }
            if len > self.ring.bytes {
                if self.can_have_room() {
                    self.keep(len, had, room);
                } else {
                    add(&self.counters.rx_dropped, 1);
                }
                return Ok(());
            }
            self.ring.copy_behind(had, room, len - had);
        }
        self.deliver(len)
    }

    /// Whether more buffers may come for a packet that is too large for those that there are.
    fn can_have_room(&self) -> bool {
        self.mode.mergeable && self.ring.chains.len() < usize::from(self.turn.queue_size())
    }

    /// Keeps a packet of which the first `had` bytes are in the ring. The caller delivers it before
    /// it reads the next.
    fn keep(&mut self, len: usize, had: usize, room: &GuestSlice<'_>) {
        self.ring.copy_to(had, self.kept);
        let start = self.kept.len();
        self.kept.resize(len, 0);
        room.copy_to(&mut self.kept[start..]);
    }

    fn deliver(&mut self, len: usize) -> Result<(), QueueError> {
        self.counters.received(len);
        self.ring.deliver(len, self.mode, self.turn)
    }

    /// Gives the kept packet to the driver, or drops it where no number of buffers would help;
    /// `false` says that there are not enough buffers now.
    fn deliver_kept(&mut self) -> Result<bool, QueueError> {
        let len = self.kept.len();
        if self.mode.mergeable {
            self.fill(len)?;
        }
        if len <= self.ring.bytes {
            self.ring.write(self.kept);
            self.deliver(len)?;
        } else if self.can_have_room() {
            return Ok(false);
        } else {
            add(&self.counters.rx_dropped, 1);
        }
        self.kept.clear();
        Ok(true)
    }
}
