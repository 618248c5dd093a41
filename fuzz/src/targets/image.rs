//! The block device over an image in memory, by each engine and under limits.
//!
//! The limits let next to nothing through once they are used up, so that the time that passes makes
//! no difference. The kernel reads and writes a file in memory when it is asked to; what it does
//! beside us, to flush or to discard, may end sooner or later.

use std::fs::File;
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;

use arbitrary::{Result, Unstructured};
use kiln_devices::rate_limit::{RateLimit, RateLimits};
use kiln_devices::virtio::block::{
    Block, BlockControl, BlockOptions, BlockRateLimits, IoEngine, RawFile,
};
use kiln_virtio_device::VirtioDevice;
use kiln_virtio_device::testing::{Buffer, MockDriver};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::guest::{DATA, Subject, attack};

const SECTORS: u64 = 64;

/// Does to a block device what the bytes behind the first one say; that says which engine it has,
/// and which limits.
pub fn image(data: &[u8]) {
    let Some((&options, data)) = data.split_first() else {
        return;
    };
    let memory = memfd_create("image", MemfdFlags::CLOEXEC).unwrap();
    let memory = File::from(memory);
    memory.set_len(SECTORS * 512).unwrap();
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    let host = Host {
        file: RawFile::open(path, options & 1 != 0).unwrap(),
        memory,
        read_only: options & 1 != 0,
        engine: match options & 2 {
            0 => IoEngine::IoUring,
            _ => IoEngine::Sync,
        },
        limits: limits(options >> 2),
        control: None,
    };
    attack(data, host);
}

/// The host's side: the image, and the device's control.
struct Host {
    memory: File,
    file: RawFile,
    read_only: bool,
    engine: IoEngine,
    limits: BlockRateLimits,
    control: Option<BlockControl>,
}

/// Limits by three bits for each of two directions.
fn limits(bits: u8) -> BlockRateLimits {
    let limit = |burst: u64| {
        // A second and more for each byte or operation behind the first ones.
        let burst = NonZeroU64::new(burst)?;
        Some(RateLimit::per_second(NonZeroU64::MIN).with_burst(burst))
    };
    let direction = |bits: u8| RateLimits {
        bandwidth: limit(u64::from(bits & 3) * 700),
        ops: limit(u64::from(bits >> 2 & 1) * 3),
    };
    let (read, write) = (direction(bits), direction(bits >> 3));
    match bits & 0x20 != 0 && write.bandwidth.is_none() {
        true => BlockRateLimits {
            total: read,
            ..BlockRateLimits::default()
        },
        false => BlockRateLimits {
            read,
            write,
            ..BlockRateLimits::default()
        },
    }
}

/// Makes a request, and waits until it is served.
fn request(driver: &mut MockDriver, buffers: &[Buffer]) {
    let head = driver.queues[0].add(&driver.memory, buffers);
    driver.notify(0);
    // libFuzzer says so where it takes too long.
    let used = loop {
        driver.settle(64);
        if let Some((used, _)) = driver.queues[0].used(&driver.memory) {
            break used;
        }
        std::thread::yield_now();
    };
    assert_eq!(used, u32::from(head));
}

impl Subject for Host {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let options = BlockOptions {
            queues: Some(2),
            engine: self.engine,
            rate_limits: self.limits,
            ..BlockOptions::default()
        };
        let block = Block::new(self.file.clone(), options).unwrap();
        self.control = Some(block.control());
        Box::new(block)
    }

    fn host(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let byte: u8 = u.arbitrary()?;
        let Some(control) = &self.control else {
            return Ok(());
        };
        if byte < 64 {
            let _ = control.set_rate_limits(limits(byte));
        } else {
            // Also to less than what a request under way is for.
            let sectors = 1 + u64::from(byte) % SECTORS;
            self.memory.set_len(sectors * 512).unwrap();
            if byte >= 128 {
                let _ = control.refresh_size();
            }
        }
        Ok(())
    }

    fn check(&mut self, driver: &mut MockDriver) {
        self.memory.set_len(SECTORS * 512).unwrap();
        let control = self.control.as_ref().unwrap();
        assert_eq!(control.refresh_size().unwrap(), SECTORS * 512);
        control.set_rate_limits(BlockRateLimits::default()).unwrap();
        // Writes sector 1 (type 1), and reads it again (type 0).
        let header = |kind: u8| [kind, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        let (status, out, back) = (DATA + 0x100, DATA + 0x200, DATA + 0x400);
        driver.fill(out, &[0x5a; 512]);
        for (kind, data) in [
            (1, Buffer::readable(out, 512)),
            (0, Buffer::writable(back, 512)),
        ] {
            driver.fill(status, &[0xff]);
            driver.fill(DATA, &header(kind));
            let buffers = [
                Buffer::readable(DATA, 16),
                data,
                Buffer::writable(status, 1),
            ];
            request(driver, &buffers);
            let expected = u8::from(kind == 1 && self.read_only);
            assert_eq!(driver.bytes(status, 1), [expected]);
        }
        if !self.read_only {
            assert_eq!(driver.bytes(back, 512), [0x5a; 512]);
        }
    }
}
