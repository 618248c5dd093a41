//! A driver that means harm: what it does is random, but the same at each run.

use kiln_device_api::BusDevice;
use kiln_virtio_device::testing::{MockDriver, RawDescriptor, register};

/// A small deterministic generator (xorshift).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

/// Addresses at, across and beyond every edge of RAM, some in the queues themselves.
const ADDRESSES: [u64; 14] = [
    0,
    1,
    0x1000,
    0x20_0000,
    MockDriver::QUEUES,
    MockDriver::QUEUES + 0x1000,
    MockDriver::HOLE - 1,
    MockDriver::HOLE,
    MockDriver::HIGH - 1,
    MockDriver::HIGH,
    MockDriver::END - 16,
    MockDriver::END,
    u64::MAX - 7,
    u64::MAX,
];
const LENGTHS: [u32; 12] = [
    0,
    1,
    2,
    12,
    16,
    17,
    512,
    513,
    4096,
    1 << 20,
    0x7fff_ffff,
    u32::MAX,
];

pub(crate) fn descriptor(random: &mut Random, size: u16) -> RawDescriptor {
    RawDescriptor {
        address: random.one_of(&ADDRESSES),
        len: random.one_of(&LENGTHS),
        // Next, write, indirect, and bits that mean nothing.
        flags: random.one_of(&[0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 0xffff]),
        next: random.one_of(&[0, 1, 2, size - 1, size, 0xffff]),
    }
}

/// Does `steps` random things to the device behind `driver`.
pub(crate) fn storm(driver: &mut MockDriver, random: &mut Random, steps: usize) {
    for _ in 0..steps {
        let queue = random.below(driver.queues.len() as u64) as usize;
        let size = driver.queues[queue].size;
        match random.below(12) {
            0..=3 => {
                let index = random.below(u64::from(size)) as u16;
                let descriptor = descriptor(random, size);
                driver.queues[queue].write_descriptor(&driver.memory, index, descriptor);
                // And one into what indirect tables point to.
                let mut bytes = [0; 16];
                bytes[..8].copy_from_slice(&random.one_of(&ADDRESSES).to_le_bytes());
                bytes[8..12].copy_from_slice(&random.one_of(&LENGTHS).to_le_bytes());
                bytes[12] = random.below(8) as u8;
                bytes[14] = random.below(9) as u8;
                driver.fill(0x1000 + 16 * random.below(8), &bytes);
            }
            4..=6 => {
                let head = random.one_of(&[0, 1, 2, 3, size - 1, size, 0xffff]);
                driver.queues[queue].make_available(&driver.memory, head);
                driver.notify(queue as u32);
            }
            7 => {
                let jump = random.one_of(&[1, 2, size, size + 1, 0x8000, 0xffff]);
                let index = driver.queues[queue].avail_index().wrapping_add(jump);
                driver.queues[queue].set_avail_index(&driver.memory, index);
                driver.notify(queue as u32);
            }
            8 => driver.notify(random.one_of(&[0, 1, 2, 3, 0xffff, 0x1_0000, u32::MAX])),
            9 => {
                let offset = register::CONFIG + random.below(0x100);
                let len = random.one_of(&[1, 2, 4, 8]);
                let value = random.next().to_le_bytes();
                let _ = driver.transport.write(offset, &value[..len]);
                driver.transport.read(offset, &mut [0xff; 8][..len]);
            }
            10 => {
                let offset = random.below(0x40) * 4;
                driver.write(offset, random.next() as u32 >> random.below(32));
                driver.read(offset);
            }
            _ => {
                driver.transport.pause();
                driver.transport.state().unwrap();
                driver.transport.resume();
            }
        }
    }
}
