//! What the tests of several devices share.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};

use kiln_device_api::{BusDevice, ExitRequest, InterruptLine};

/// An interrupt line that counts.
#[derive(Debug, Default)]
pub(crate) struct Recorder(AtomicUsize);

impl Recorder {
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl InterruptLine for Recorder {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Random numbers that are the same in every run (xorshift64).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Reads and writes a device of `size` bytes at every offset with every width, the writes with
/// every byte value and with random ones; `check` is told what each write came to.
pub(crate) fn every_access(
    device: &dyn BusDevice,
    size: u64,
    mut check: impl FnMut(u64, &[u8], ControlFlow<ExitRequest>),
) {
    let mut random = Random::new(0x5eed);
    // An access that crosses the end is not delivered by a bus, but must do no harm either.
    for offset in 0..size {
        for width in [1, 2, 4, 8] {
            for round in 0..512u64 {
                let mut data = random.next().to_le_bytes();
                if round < 256 {
                    data = [round as u8; 8];
                }
                let end = device.write(offset, &data[..width]);
                check(offset, &data[..width], end);
                let mut answer = [0xff; 8];
                device.read(offset, &mut answer[..width]);
            }
        }
    }
}
