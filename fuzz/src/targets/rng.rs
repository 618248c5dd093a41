//! The entropy device.

use std::io::{self, Read};
use std::num::NonZeroU64;

use arbitrary::{Result, Unstructured};
use kiln_devices::rate_limit::RateLimit;
use kiln_devices::virtio::rng::{Rng, RngOptions};
use kiln_virtio_device::VirtioDevice;
use kiln_virtio_device::testing::{Buffer, MockDriver};

use crate::guest::{DATA, Subject, attack};

/// Does to an entropy device what the bytes say.
pub fn rng(data: &[u8]) {
    attack(
        data,
        Entropy {
            limited: data.len() % 2 == 1,
        },
    );
}

struct Entropy {
    limited: bool,
}

/// Numbers that are the same each time.
struct Sevens;

impl Read for Sevens {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        buffer.fill(7);
        Ok(buffer.len())
    }
}

impl Subject for Entropy {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        // So fast that it is never waited for, and slower than a guest that asks for all.
        let limit =
            RateLimit::per_second(NonZeroU64::MAX).with_burst(NonZeroU64::new(4096).unwrap());
        let options = RngOptions {
            rate_limit: self.limited.then_some(limit),
        };
        Box::new(Rng::from_reader(Sevens, options).unwrap())
    }

    fn host(&mut self, _: &mut Unstructured<'_>) -> Result<()> {
        Ok(())
    }

    fn check(&mut self, driver: &mut MockDriver) {
        assert_eq!(driver.request(0, &[Buffer::writable(DATA, 8)]), 8);
        assert_eq!(driver.bytes(DATA, 9), [7, 7, 7, 7, 7, 7, 7, 7, 0]);
    }
}
