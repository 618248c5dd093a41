//! From the network to the driver.
//!
//! A packet is read straight into the driver's buffers. How large it is is known only afterwards,
//! so behind the buffers there is always room of our own, large enough for any packet: what landed
//! there is copied into further buffers if the driver has them and takes packets in several
//! (`MRG_RXBUF`), and a packet is kept until then if the driver has not enough now.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering;

use kiln_memory::{GuestMemory, GuestSlice, MemoryOptions, allocate, gather_into, scatter};
use kiln_virtio_device::{Chain, QueueError, Turn};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::NetBackend;
use super::device::{HEADER_BYTES, MAX_PACKET, NetCounters};

/// Errors in a row after which the network is left alone until the driver gives new buffers.
const MAX_ERRORS: usize = 16;
/// Where `num_buffers` is in the header, which goes to 12 bytes.
const NUM_BUFFERS: usize = 10;
/// Room for any packet, in whole pages.
const ROOM: usize = MAX_PACKET.next_multiple_of(4096);

/// What the driver agreed on, as far as it matters for what it receives.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ReceiveMode {
    /// A packet may fill several buffers.
    pub(super) mergeable: bool,
    /// Packets may be larger than the MTU.
    pub(super) large: bool,
    /// The flags of a packet's header mean something to the driver.
    pub(super) flags: bool,
}

/// What is to be waited for next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// Packets from the network.
    Packets,
    /// Buffers from the driver.
    Buffers,
}

/// The receiving half of the device.
pub(super) struct Receiver {
    pub(super) mode: ReceiveMode,
    /// Room behind the driver's buffers: memory of our own in the shape of guest memory.
    room: GuestMemory,
    /// A packet that waits for enough buffers.
    kept: Vec<u8>,
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
                counters.rx_errors.fetch_add(1, Ordering::Relaxed);
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

    /// Appends the first `len` bytes of the chains to `bytes`.
    fn copy_to(&self, len: usize, bytes: &mut Vec<u8>) {
        let start = bytes.len();
        bytes.resize(start + len, 0);
        let copied = gather_into(&mut bytes[start..], self.slices());
        bytes.truncate(start + copied);
    }

    /// Gives the packet of `len` bytes that the first chains hold to the driver.
    fn deliver(
        &mut self,
        len: usize,
        mode: ReceiveMode,
        turn: &mut Turn<'m>,
    ) -> Result<(), QueueError> {
        let mut used = Vec::with_capacity(1);
        let mut left = len;
        while left > 0 {
            let Some(chain) = self.chains.pop_front() else {
                break;
            };
            let count = left.min(chain.writable.len());
            self.bytes -= chain.writable.len();
            left -= count;
            used.push((chain, count as u32));
        }
        let number = u16::try_from(used.len()).unwrap_or(u16::MAX);
        if let Some((first, _)) = used.first_mut() {
            let header = &mut first.writable;
            if mode.flags {
                header.skip(NUM_BUFFERS)?;
            } else {
                header.write(&[0])?;
                header.skip(NUM_BUFFERS - 1)?;
            }
            header.write(&number.to_le_bytes())?;
        }
        turn.complete_all(used)
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
        })
    }

    /// Begins anew, as the driver has agreed.
    pub(super) fn start(&mut self, mode: ReceiveMode) {
        self.mode = mode;
        self.kept.clear();
    }

    /// Receives packets until there are none, or no buffers for them.
    pub(super) fn receive(
        &mut self,
        backend: &mut dyn NetBackend,
        counters: &NetCounters,
        turn: &mut Turn<'_>,
    ) -> Result<Wait, QueueError> {
        let mut ring = Ring::default();
        let mut errors = 0;
        // Where packets may be large, buffers for the largest, to spare the copy.
        let wanted = if self.mode.mergeable && self.mode.large {
            MAX_PACKET
        } else {
            1
        };
        loop {
            if !self.kept.is_empty() && !self.deliver_kept(&mut ring, counters, turn)? {
                ring.put_back(turn);
                turn.wait_for_more();
                return Ok(Wait::Buffers);
            }
            ring.fill(wanted, counters, turn)?;
            if ring.chains.is_empty() {
                return Ok(Wait::Buffers);
            }
            match self.read(backend, &ring) {
                Ok(len) => {
                    errors = 0;
                    self.take(len, &mut ring, counters, turn)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ring.put_back(turn);
                    return Ok(Wait::Packets);
                }
                Err(_) => {
                    counters.rx_errors.fetch_add(1, Ordering::Relaxed);
                    errors += 1;
                    if errors == MAX_ERRORS {
                        // All that there is, so that the driver tells of what comes behind it.
                        ring.fill(usize::MAX, counters, turn)?;
                        ring.put_back(turn);
                        turn.wait_for_more();
                        return Ok(Wait::Buffers);
                    }
                }
            }
        }
    }

    /// Reads a packet into the buffers that a packet may fill, and the room behind them.
    fn read(&self, backend: &mut dyn NetBackend, ring: &Ring<'_>) -> io::Result<usize> {
        let room = self
            .room
            .get_slice(GuestAddress(0), ROOM)
            .map_err(io::Error::other)?;
        let mut slices = Vec::with_capacity(ring.chains.len() + 1);
        for slice in ring.slices() {
            slices.push(slice);
        }
        slices.push(room);
        backend.receive(&slices)
    }

    /// Takes a packet of `len` bytes that is in the ring's chains and, where it is larger than
    /// they are, in the room behind them.
    fn take<'m>(
        &mut self,
        len: usize,
        ring: &mut Ring<'m>,
        counters: &NetCounters,
        turn: &mut Turn<'m>,
    ) -> Result<(), QueueError> {
        if !(HEADER_BYTES..=MAX_PACKET).contains(&len) {
            counters.rx_dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        if len > ring.bytes {
            ring.copy_to(ring.bytes, &mut self.kept);
            let start = self.kept.len();
            self.kept.resize(len, 0);
            if let Ok(room) = self.room.get_slice(GuestAddress(0), ROOM) {
                room.copy_to(&mut self.kept[start..]);
            }
            // The caller delivers it before it reads the next.
            return Ok(());
        }
        count_received(len, counters);
        ring.deliver(len, self.mode, turn)
    }

    /// Gives the kept packet to the driver, or drops it where no number of buffers would help;
    /// `false` says that there are not enough buffers now.
    fn deliver_kept<'m>(
        &mut self,
        ring: &mut Ring<'m>,
        counters: &NetCounters,
        turn: &mut Turn<'m>,
    ) -> Result<bool, QueueError> {
        let len = self.kept.len();
        if self.mode.mergeable {
            ring.fill(len, counters, turn)?;
        }
        if len <= ring.bytes {
            ring.write(&self.kept);
            count_received(len, counters);
            ring.deliver(len, self.mode, turn)?;
        } else if self.mode.mergeable && ring.chains.len() < usize::from(turn.queue_size()) {
            return Ok(false);
        } else {
            counters.rx_dropped.fetch_add(1, Ordering::Relaxed);
        }
        self.kept.clear();
        Ok(true)
    }
}

fn count_received(len: usize, counters: &NetCounters) {
    counters.rx_packets.fetch_add(1, Ordering::Relaxed);
    let bytes = (len - HEADER_BYTES) as u64;
    counters.rx_bytes.fetch_add(bytes, Ordering::Relaxed);
}
