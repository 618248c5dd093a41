//! The driver's side of a split virtqueue (virtio 1.3, section 2.7).

use kiln_memory::GuestMemory;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::recorder::wait_until;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// A descriptor as it lies in guest memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct RawDescriptor {
    /// The guest physical address.
    pub address: u64,
    /// The length in bytes.
    pub len: u32,
    /// Bits: 1 goes on at `next`, 2 writable by the device, 4 an indirect table.
    pub flags: u16,
    /// The next descriptor of the chain.
    pub next: u16,
}

impl RawDescriptor {
    fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// The guest physical address.
    pub address: u64,
    /// The length in bytes.
    pub len: u32,
    /// Whether the device is to write it.
    pub writable: bool,
}

impl Buffer {
    /// A buffer that the device reads.
    pub fn readable(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            writable: false,
        }
    }

    /// A buffer that the device writes.
    pub fn writable(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            writable: true,
        }
    }
}

/// The driver's side of one queue, with its three areas in guest memory.
#[derive(Debug)]
pub struct DriverQueue {
    /// The number of descriptors.
    pub size: u16,
    /// Where the descriptor table lies.
    pub desc_table: u64,
    /// Where the available ring lies.
    pub avail_ring: u64,
    /// Where the used ring lies.
    pub used_ring: u64,
    next_descriptor: u16,
    avail_index: u16,
    used_seen: u16,
}

impl DriverQueue {
    /// The bytes that a queue of this size takes.
    pub const fn bytes(size: u16) -> u64 {
        // Descriptors, available ring, and used ring, each from its own 16-byte boundary on.
        16 * size as u64 + (6 + 2 * size as u64).next_multiple_of(16) + 6 + 8 * size as u64
    }

    /// A queue with its areas from `at` on, which is a multiple of 16; all of them zeroed.
    pub fn new(memory: &GuestMemory, at: u64, size: u16) -> Self {
        let zeros = vec![0; Self::bytes(size) as usize];
        memory.write_slice(&zeros, GuestAddress(at)).unwrap();
        let avail_ring = at + 16 * u64::from(size);
        Self {
            size,
            desc_table: at,
            avail_ring,
            used_ring: avail_ring + (6 + 2 * u64::from(size)).next_multiple_of(16),
            next_descriptor: 0,
            avail_index: 0,
            used_seen: 0,
        }
    }

    /// Writes a descriptor into the table.
    pub fn write_descriptor(&self, memory: &GuestMemory, index: u16, descriptor: RawDescriptor) {
        let at = self.desc_table + 16 * u64::from(index);
        memory
            .write_slice(&descriptor.bytes(), GuestAddress(at))
            .unwrap();
    }

    /// Makes a chain of the next descriptors, without making it available; gives its head. The
    /// table is used round and round: a test keeps less in flight than it has.
    pub fn chain(&mut self, memory: &GuestMemory, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (at, buffer) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let more = at + 1 < buffers.len();
            let descriptor = raw(buffer, more, self.next_descriptor);
            self.write_descriptor(memory, index, descriptor);
        }
        head
    }

    /// Makes a chain of one descriptor, which points to a table at `table` with these buffers.
    pub fn indirect(&mut self, memory: &GuestMemory, table: u64, buffers: &[Buffer]) -> u16 {
        for (at, buffer) in (0_u16..).zip(buffers) {
            let more = usize::from(at) + 1 < buffers.len();
            let bytes = raw(buffer, more, at + 1).bytes();
            memory
                .write_slice(&bytes, GuestAddress(table + 16 * u64::from(at)))
                .unwrap();
        }
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) % self.size;
        let len = 16 * buffers.len() as u32;
        let descriptor = RawDescriptor {
            address: table,
            len,
            flags: F_INDIRECT,
            next: 0,
        };
        self.write_descriptor(memory, head, descriptor);
        head
    }

    /// Puts a head into the available ring and makes it visible.
    pub fn make_available(&mut self, memory: &GuestMemory, head: u16) {
        let slot = u64::from(self.avail_index % self.size);
        write(memory, self.avail_ring + 4 + 2 * slot, head);
        self.set_avail_index(memory, self.avail_index.wrapping_add(1));
    }

    /// Writes the index of the available ring, whatever is in the ring.
    pub fn set_avail_index(&mut self, memory: &GuestMemory, index: u16) {
        self.avail_index = index;
        let at = GuestAddress(self.avail_ring + 2);
        memory
            .store(index.to_le(), at, std::sync::atomic::Ordering::Release)
            .unwrap();
    }

    /// The index of the available ring.
    pub fn avail_index(&self) -> u16 {
        self.avail_index
    }

    /// Makes a chain available; gives its head.
    pub fn add(&mut self, memory: &GuestMemory, buffers: &[Buffer]) -> u16 {
        let head = self.chain(memory, buffers);
        self.make_available(memory, head);
        head
    }

    /// Writes the available ring's flags (1: no interrupt).
    pub fn set_flags(&self, memory: &GuestMemory, flags: u16) {
        write(memory, self.avail_ring, flags);
    }

    /// Writes `used_event`: the used index that the driver wants an interrupt behind.
    pub fn set_used_event(&self, memory: &GuestMemory, index: u16) {
        write(
            memory,
            self.avail_ring + 4 + 2 * u64::from(self.size),
            index,
        );
    }

    /// Reads `avail_event`: the available index that the device wants a notification behind.
    pub fn avail_event(&self, memory: &GuestMemory) -> u16 {
        read(memory, self.used_ring + 4 + 8 * u64::from(self.size))
    }

    /// Reads the used ring's flags (1: no notification).
    pub fn used_flags(&self, memory: &GuestMemory) -> u16 {
        read(memory, self.used_ring)
    }

    /// Reads the used index.
    pub fn used_index(&self, memory: &GuestMemory) -> u16 {
        read(memory, self.used_ring + 2)
    }

    /// The next used entry: head and length.
    pub fn used(&mut self, memory: &GuestMemory) -> Option<(u32, u32)> {
        if self.used_index(memory) == self.used_seen {
            return None;
        }
        let at = self.used_ring + 4 + 8 * u64::from(self.used_seen % self.size);
        self.used_seen = self.used_seen.wrapping_add(1);
        let entry: [u32; 2] = [
            memory.read_obj(GuestAddress(at)).unwrap(),
            memory.read_obj(GuestAddress(at + 4)).unwrap(),
        ];
        Some((u32::from_le(entry[0]), u32::from_le(entry[1])))
    }

    /// Waits for the next used entry: head and length.
    pub fn wait_used(&mut self, memory: &GuestMemory) -> (u32, u32) {
        let mut found = None;
        wait_until("a used buffer", || {
            found = self.used(memory);
            found.is_some()
        });
        found.unwrap()
    }
}

fn raw(buffer: &Buffer, more: bool, next: u16) -> RawDescriptor {
    let mut flags = 0;
    if buffer.writable {
        flags |= F_WRITE;
    }
    if more {
        flags |= F_NEXT;
    }
    let next = if more { next } else { 0 };
    RawDescriptor {
        address: buffer.address,
        len: buffer.len,
        flags,
        next,
    }
}

fn write(memory: &GuestMemory, at: u64, value: u16) {
    memory
        .write_slice(value.to_le().as_slice(), GuestAddress(at))
        .unwrap();
}

fn read(memory: &GuestMemory, at: u64) -> u16 {
    let order = std::sync::atomic::Ordering::Acquire;
    u16::from_le(memory.load(GuestAddress(at), order).unwrap())
}
