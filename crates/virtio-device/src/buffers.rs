//! The buffers of a request as pieces of guest RAM, to be read and written without a copy.

use kiln_memory::{GuestMemory, GuestSlice, gather_into, scatter};
use virtio_queue::DescriptorChain;
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend};

/// The most descriptors that a chain may have, where the queue itself is not larger. A chain with
/// an indirect table can have more than its queue (Linux makes such), but not without limit.
const MAX_DESCRIPTORS: usize = 1024;

/// What is wrong with a descriptor chain.
///
/// No driver that follows the specification makes such a chain, so it ends the device's work until
/// the driver resets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// It has no byte to read or to write.
    #[error("the descriptor chain has no bytes")]
    Empty,
    /// It does not end: it is a loop, leaves its table, passes 4 GiB, or has an indirect table
    /// that is malformed or inside another.
    #[error("the descriptor chain is broken after {descriptors} descriptors")]
    Broken {
        /// The descriptors before the break.
        descriptors: usize,
    },
    /// It has more descriptors than any device takes.
    #[error("the descriptor chain has more than {limit} descriptors")]
    TooLong {
        /// How many it may have.
        limit: usize,
    },
    /// A descriptor for the device to read follows one for it to write (virtio 1.3, section
    /// 2.7.4.2).
    #[error("the descriptor chain has a readable buffer behind a writable one")]
    Order,
    /// A descriptor points to what is not RAM.
    #[error("the descriptor chain has a buffer of {len} bytes at {address:#x}, not all of it RAM")]
    Address {
        /// Where the buffer begins.
        address: u64,
        /// The buffer's length in bytes.
        len: u32,
    },
}

/// More bytes were asked for than the buffers have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("need {wanted} bytes of a buffer that has {available}")]
pub struct ShortBuffer {
    /// The bytes that were asked for.
    pub wanted: usize,
    /// The bytes that there are.
    pub available: usize,
}

/// Pieces of guest RAM, one behind the other, such as the readable part of a descriptor chain.
///
/// A driver may cut a request into descriptors at any byte; the methods here do not care where.
/// What is read, written or skipped is taken off the front, and [`slices`](Self::slices) gives the
/// rest for an operation such as `preadv`.
///
/// The guest can change its RAM at any time: read a value once, and judge what was read.
#[derive(Debug, Default)]
pub struct GuestBuffers<'m> {
    slices: Vec<GuestSlice<'m>>,
    /// How many of the slices have been taken off the front.
    taken: usize,
    len: usize,
}

impl<'m> GuestBuffers<'m> {
    /// Buffers without a byte.
    pub fn new() -> Self {
        Self::default()
    }

    /// The bytes that are left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces that are left. None of them is empty.
    pub fn slices(&self) -> &[GuestSlice<'m>] {
        self.slices.get(self.taken..).unwrap_or_default()
    }

    /// Adds a piece at the end.
    pub fn push(&mut self, slice: GuestSlice<'m>) {
        if !slice.is_empty() {
            self.len += slice.len();
            self.slices.push(slice);
        }
    }

    /// Takes all bytes off, and keeps the room for pieces.
    pub fn clear(&mut self) {
        self.slices.clear();
        self.taken = 0;
        self.len = 0;
    }

    /// Fills `data` from the front.
    ///
    /// # Errors
    ///
    /// [`ShortBuffer`] where there are not that many bytes; nothing is taken then.
    pub fn read(&mut self, data: &mut [u8]) -> Result<(), ShortBuffer> {
        self.check(data.len())?;
        gather_into(data, self.slices());
        self.skip(data.len())
    }

    /// Writes `data` to the front.
    ///
    /// # Errors
    ///
    /// [`ShortBuffer`] where there are not that many bytes; nothing is written or taken then.
    pub fn write(&mut self, data: &[u8]) -> Result<(), ShortBuffer> {
        self.check(data.len())?;
        scatter(data, self.slices());
        self.skip(data.len())
    }

    /// Reads a plain value from the front, in the byte order of the host.
    ///
    /// # Errors
    ///
    /// [`ShortBuffer`] where there are not that many bytes.
    pub fn read_obj<T: ByteValued>(&mut self) -> Result<T, ShortBuffer> {
        let mut value = T::zeroed();
        self.read(value.as_mut_slice())?;
        Ok(value)
    }

    /// Writes a plain value to the front, in the byte order of the host.
    ///
    /// # Errors
    ///
    /// [`ShortBuffer`] where there are not that many bytes.
    pub fn write_obj<T: ByteValued>(&mut self, value: &T) -> Result<(), ShortBuffer> {
        self.write(value.as_slice())
    }

    /// Takes `count` bytes off the front.
    ///
    /// # Errors
    ///
    /// [`ShortBuffer`] where there are not that many bytes.
    pub fn skip(&mut self, count: usize) -> Result<(), ShortBuffer> {
        self.check(count)?;
        self.len -= count;
        let mut rest = count;
        while let Some(slice) = self.slices.get_mut(self.taken) {
            if rest < slice.len() {
                if let Ok(behind) = slice.offset(rest) {
                    *slice = behind;
                }
                break;
            }
            rest -= slice.len();
            self.taken += 1;
        }
        Ok(())
    }

    /// Cuts off all but the first `count` bytes, and gives what was cut off.
    ///
    /// # Errors
    ///
    /// [`ShortBuffer`] where there are not that many bytes.
    pub fn split_off(&mut self, count: usize) -> Result<Self, ShortBuffer> {
        self.check(count)?;
        let mut tail = Self::new();
        let mut rest = count;
        let mut keep = self.taken;
        for at in self.taken..self.slices.len() {
            let slice = self.slices[at];
            if rest >= slice.len() {
                rest -= slice.len();
                keep = at + 1;
            } else if rest == 0 {
                tail.push(slice);
            } else if let Ok((front, back)) = slice.split_at(rest) {
                self.slices[at] = front;
                keep = at + 1;
                rest = 0;
                tail.push(back);
            }
        }
        self.slices.truncate(keep);
        self.len = count;
        Ok(tail)
    }

    /// Cuts off the last byte, and gives it; `None` where there is none.
    pub fn split_last_byte(&mut self) -> Option<GuestSlice<'m>> {
        let last = self.slices.get_mut(self.taken..)?.last_mut()?;
        let at = last.len().checked_sub(1)?;
        let (front, byte) = last.split_at(at).ok()?;
        *last = front;
        if at == 0 {
            self.slices.pop();
        }
        self.len -= 1;
        Some(byte)
    }

    /// How many pieces there is room for.
    pub(crate) fn room(&self) -> usize {
        self.slices.capacity()
    }

    /// The same room for pieces without a piece, for buffers of other RAM.
    #[allow(
        clippy::unnecessary_filter_map,
        reason = "the lifetimes differ, so a filter does not do"
    )]
    pub(crate) fn into_room<'other>(mut self) -> GuestBuffers<'other> {
        self.slices.clear();
        GuestBuffers {
            // The standard library uses the allocation again for what has the same layout.
            slices: self.slices.into_iter().filter_map(|_| None).collect(),
            taken: 0,
            len: 0,
        }
    }

    fn check(&self, wanted: usize) -> Result<(), ShortBuffer> {
        if wanted > self.len {
            return Err(ShortBuffer {
                wanted,
                available: self.len,
            });
        }
        Ok(())
    }
}

/// Adds the buffers of `chain` to `readable` and `writable`, which are empty.
pub(crate) fn split_chain<'m>(
    memory: &'m GuestMemory,
    chain: DescriptorChain<&GuestMemory>,
    queue_size: u16,
    readable: &mut GuestBuffers<'m>,
    writable: &mut GuestBuffers<'m>,
) -> Result<(), ChainError> {
    let limit = usize::from(queue_size).max(MAX_DESCRIPTORS);
    let mut descriptors = 0;
    let mut goes_on = true;
    for descriptor in chain {
        descriptors += 1;
        if descriptors > limit {
            return Err(ChainError::TooLong { limit });
        }
        goes_on = descriptor.has_next();
        if !descriptor.is_write_only() && !writable.is_empty() {
            return Err(ChainError::Order);
        }
        let side = if descriptor.is_write_only() {
            &mut *writable
        } else {
            &mut *readable
        };
        let (GuestAddress(address), len) = (descriptor.addr(), descriptor.len());
        for slice in memory.get_slices(descriptor.addr(), len as usize) {
            side.push(slice.map_err(|_| ChainError::Address { address, len })?);
        }
    }
    // The iterator ends without a word at whatever it cannot follow.
    if goes_on {
        return Err(ChainError::Broken { descriptors });
    }
    if readable.is_empty() && writable.is_empty() {
        return Err(ChainError::Empty);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
