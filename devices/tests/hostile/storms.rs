//! Everything at random, but the same in each run: on the test's own thread, where each step is
//! looked at, and against a device that works on its thread meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_device_api::BusDevice;
use kiln_virtio_device::testing::{
    Buffer, MockDriver, RawDescriptor, TransportKind, over_each_transport, register,
};
use vm_memory::{Bytes, GuestAddress};

use crate::ram::{DATA, HIGH_END, LOW_END, Ram, TABLE};
use crate::trial::{READABLE, SIZE, Trial, WRITABLE};
use crate::victims::{self, Victim};

over_each_transport!(
    a_storm_leaves_a_device_that_works,
    a_storm_leaves_a_device_that_works_while_it_has_a_thread,
);

/// A small deterministic generator (xorshift).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    fn address(&mut self) -> u64 {
        let rings = MockDriver::QUEUES + self.below(0x8000);
        let data = DATA + self.below(0x4_0000);
        self.one_of(&[
            data,
            data,
            data,
            data,
            rings,
            TABLE,
            0,
            1,
            LOW_END - 16,
            LOW_END - 1,
            LOW_END,
            MockDriver::HIGH - 1,
            MockDriver::HIGH,
            HIGH_END - 16,
            HIGH_END,
            u64::MAX - 7,
            u64::MAX,
        ])
    }

    fn length(&mut self) -> u32 {
        let any = self.next() as u32;
        let small = self.below(600) as u32;
        self.one_of(&[
            small,
            small,
            small,
            0,
            1,
            12,
            16,
            44,
            513,
            4096,
            0x7fff_ffff,
            u32::MAX,
            any,
        ])
    }
}

fn descriptor(random: &mut Random) -> RawDescriptor {
    RawDescriptor {
        address: random.address(),
        len: random.length(),
        flags: random.one_of(&[0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 0xffff]),
        next: random.one_of(&[0, 1, 2, 3, SIZE - 1, SIZE, 0xffff]),
    }
}

/// Does something to the device.
fn step(driver: &mut MockDriver, random: &mut Random, headers: &[Vec<u8>]) {
    let queue = random.below(driver.queues.len() as u64) as usize;
    match random.below(16) {
        0..=1 => {
            let index = random.below(u64::from(SIZE)) as u16 % driver.queues[queue].size;
            driver.queues[queue].write_descriptor(&driver.memory, index, descriptor(random));
            let entry = descriptor(random);
            let mut bytes = entry.address.to_le_bytes().to_vec();
            bytes.extend(entry.len.to_le_bytes());
            bytes.extend(entry.flags.to_le_bytes());
            bytes.extend((entry.next % 9).to_le_bytes());
            driver.fill(TABLE + 16 * random.below(8), &bytes);
        }
        2..=3 => {
            let head = random.one_of(&[0, 1, 2, 3, SIZE - 1, SIZE, 0xffff]);
            driver.queues[queue].make_available(&driver.memory, head);
            driver.notify(queue as u32);
        }
        4..=8 => chain(driver, random, queue, headers),
        9 => {
            let jump = random.one_of(&[1, 2, SIZE, SIZE + 1, 0x8000, 0xffff]);
            let index = driver.queues[queue].avail_index().wrapping_add(jump);
            driver.queues[queue].set_avail_index(&driver.memory, index);
            driver.notify(queue as u32);
        }
        10 => driver.notify(random.one_of(&[0, 1, 2, 3, 0xffff, 0x1_0000, u32::MAX])),
        11 => {
            let offset = register::CONFIG + random.below(0x100);
            let len = random.one_of(&[1, 2, 4, 8]);
            let value = random.next().to_le_bytes();
            let _ = driver.transport.write(offset, &value[..len]);
            driver.transport.read(offset, &mut [0xff; 8][..len]);
        }
        12 => {
            let offset = random.below(0x40) * 4;
            let shift = random.below(32);
            driver.write(offset, random.next() as u32 >> shift);
            driver.read(offset);
        }
        13 => {
            driver.transport.pause();
            driver.transport.state().unwrap();
            driver.transport.resume();
        }
        14 => {
            // The rings, and what is in them.
            let at = MockDriver::QUEUES + random.below(0x4000);
            driver.fill(at, &random.next().to_le_bytes()[..2]);
        }
        _ => {
            driver.write(register::QUEUE_SEL, queue as u32);
            driver.write(register::QUEUE_RESET, 1);
            let base = random.address() & !0xfff;
            Trial::place_rings(driver, queue as u32, 16, [base, base + 0x400, base + 0x800]);
        }
    }
}

/// A chain that begins as an ordinary one does.
fn chain(driver: &mut MockDriver, random: &mut Random, queue: usize, headers: &[Vec<u8>]) {
    let mut header = headers[random.below(headers.len() as u64) as usize].clone();
    if !header.is_empty() && random.below(2) == 0 {
        let at = random.below(header.len() as u64) as usize;
        header[at] = random.next() as u8;
    }
    driver.fill(READABLE, &header);
    let mut buffers = Vec::new();
    let cut = random.below(header.len() as u64 + 1);
    for (at, len) in [(0, cut), (cut, header.len() as u64 - cut)] {
        if len > 0 {
            buffers.push(Buffer::readable(READABLE + at, len as u32));
        }
    }
    for _ in 0..random.below(3) {
        buffers.push(Buffer::writable(random.address(), random.length()));
    }
    if buffers.is_empty() {
        buffers.push(Buffer::writable(WRITABLE, 64));
    }
    let target = &mut driver.queues[queue];
    let head = if random.below(4) == 0 {
        target.indirect(&driver.memory, TABLE, &buffers)
    } else {
        target.chain(&driver.memory, &buffers)
    };
    target.make_available(&driver.memory, head);
    driver.notify(queue as u32);
}

fn headers(victim: &dyn Victim) -> Vec<Vec<u8>> {
    victim
        .requests()
        .into_iter()
        .map(|request| request.readable)
        .collect()
}

fn a_storm_leaves_a_device_that_works(kind: TransportKind) {
    let ram = Ram::new();
    for (device, mut victim) in victims::all() {
        let headers = headers(&*victim);
        let mut trial = Trial::new(kind, &mut *victim, &ram);
        for seed in 0..40 {
            let mut random = Random::new(seed);
            let features = random.next() & trial.driver.offered();
            let features = if trial.driver.negotiate(features) {
                features
            } else {
                0
            };
            trial.restart(features);
            for at in 0..60 {
                trial.what = format!("{device}, seed {seed}, step {at}");
                if at % 8 == 0 {
                    for request in trial.victim.requests() {
                        trial.victim.prepare(&request);
                    }
                }
                trial.attack(|driver| step(driver, &mut random, &headers));
                trial.victim.effect();
            }
            trial.recover();
        }
    }
}

/// As the guest's other processors do: they write the rings and the buffers while the device reads
/// them.
fn a_storm_leaves_a_device_that_works_while_it_has_a_thread(kind: TransportKind) {
    let ram = Ram::new();
    for (device, mut victim) in victims::all() {
        let headers = headers(&*victim);
        let memory = Arc::clone(&ram.memory);
        let mut driver = MockDriver::over_memory(kind, victim.device(), Arc::clone(&memory));
        for seed in 0..6 {
            let mut random = Random::new(seed);
            ram.clear();
            driver.start(0, SIZE);
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut random = Random::new(seed + 1000);
                    while !stop.load(Ordering::Relaxed) {
                        let place = random.one_of(&[MockDriver::QUEUES, TABLE, READABLE]);
                        let at = GuestAddress(place + random.below(0x1000));
                        let value = random.next() >> random.below(64);
                        memory.write_slice(&value.to_le_bytes(), at).unwrap();
                    }
                });
                for _ in 0..150 {
                    step(&mut driver, &mut random, &headers);
                    victim.effect();
                }
                stop.store(true, Ordering::Relaxed);
            });
            ram.check_guards();
            // It still works for one that behaves.
            ram.clear();
            driver.start(0, SIZE);
            victim.effect();
            let requests = victim.requests();
            let request = &requests[0];
            victim.prepare(request);
            let mut buffers = Vec::new();
            if !request.readable.is_empty() {
                driver.fill(READABLE, &request.readable);
                buffers.push(Buffer::readable(READABLE, request.readable.len() as u32));
            }
            if request.writable > 0 {
                buffers.push(Buffer::writable(WRITABLE, request.writable));
            }
            let _ = device;
            driver.request(request.queue, &buffers);
        }
        drop(driver);
    }
}
