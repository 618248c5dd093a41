//! Drivers that mean harm.

use kiln_virtio_device::testing::{status, wait_until};

use super::*;
use crate::virtio::hostile::{descriptor, storm};

/// A disk with this engine and so many queues.
fn disk_with(engine: IoEngine, queues: u16) -> (MockDriver, NamedTempFile) {
    let image = image(SECTORS);
    let options = BlockOptions {
        engine,
        queues: Some(queues),
        ..BlockOptions::default()
    };
    let block = Block::new(RawFile::open(image.path(), false).unwrap(), options).unwrap();
    (MockDriver::new(Box::new(block)), image)
}

#[test]
fn no_driver_breaks_a_disk() {
    for (engine, queues) in [
        (IoEngine::Auto, 1),
        (IoEngine::IoUring, 1),
        (IoEngine::IoUring, 3),
        (IoEngine::Sync, 3),
    ] {
        let (mut driver, image) = disk_with(engine, queues);
        let several = u64::from(queues > 1) << 12;
        let mut random = Random::new(2 + u64::from(queues));
        for _ in 0..60 {
            let features = random.one_of(&[0, MockDriver::EVENT_IDX, MockDriver::RING_RESET]);
            driver.start(FLUSH_FEATURE | several | features, 8);
            let kind = random.one_of(&[0, 1, 2, 3, 4, 8, 11, 11, 13, 13]);
            set_header(&driver, kind, random.below(SECTORS + 2));
            // What storms point to is the header, and whatever comes behind it.
            driver.fill(HEADER + 16, &random.below(SECTORS).to_le_bytes());
            driver.fill(HEADER + 24, &random.below(9).to_le_bytes());
            let steps = random.below(60) as usize;
            storm(&mut driver, &mut random, steps);
            driver.start(FLUSH_FEATURE, 64);
            assert_eq!(request(&mut driver, READ, 0, 512), (OK, 513));
            assert_eq!(driver.bytes(DATA, 512), contents(image.path())[..512]);
        }
        assert_eq!(contents(image.path()).len() as u64, SECTORS * 512);
    }
}

#[test]
fn lists_of_ranges_of_any_kind_are_answered() {
    for engine in [IoEngine::IoUring, IoEngine::Sync] {
        let (mut driver, image) = disk_with(engine, 1);
        driver.start(FLUSH_FEATURE, 64);
        let mut random = Random::new(4);
        let mut answers = [0; 3];
        for _ in 0..400 {
            let kind = random.one_of(&[11, 13]);
            set_header(&driver, kind, random.next());
            let len = random.one_of(&[0, 1, 16, 16, 16, 32, 48, 255, 256, 272, 4096, 1 << 20]);
            for at in 0..u64::from(len / 16).min(32) {
                let sector = random.one_of(&[0, 1, SECTORS - 1, SECTORS, u64::MAX, 1 << 55]);
                let sectors = random.one_of(&[0, 1, 8, SECTORS, 0xffff_ffff]);
                let flags = random.one_of(&[0, 0, 0, 1, 1, 2, 0x8000_0000]);
                driver.fill(DATA + 16 * at, &sector.to_le_bytes());
                driver.fill(DATA + 16 * at + 8, &(sectors | flags << 32).to_le_bytes());
            }
            // Cut anywhere.
            let cut = random.below(u64::from(len) + 1) as u32;
            let data = [
                Buffer::readable(DATA, cut),
                Buffer::readable(DATA + u64::from(cut), len - cut),
            ];
            let mut buffers = vec![Buffer::readable(HEADER, 16)];
            buffers.extend(data);
            buffers.push(Buffer::writable(STATUS, 1));
            let (status, used) = send(&mut driver, &buffers);
            assert_eq!(used, 1);
            answers[usize::from(status)] += 1;
        }
        assert!(answers.iter().all(|count| *count > 10), "{answers:?}");
        assert_eq!(contents(image.path()).len() as u64, SECTORS * 512);
    }
}

#[test]
fn every_chain_is_answered_or_the_device_needs_a_reset() {
    let (mut driver, _image) = disk(SECTORS);
    let mut random = Random::new(3);
    let mut answered = 0;
    let mut refused = 0;
    for _ in 0..600 {
        for index in 0..4 {
            let descriptor = descriptor(&mut random, 64);
            driver.queues[0].write_descriptor(&driver.memory, index, descriptor);
        }
        let head = random.below(4) as u16;
        driver.queues[0].make_available(&driver.memory, head);
        driver.notify(0);
        wait_until("an answer", || {
            if let Some((used, _)) = driver.queues[0].used(&driver.memory) {
                assert_eq!(used, u32::from(head));
                answered += 1;
                return true;
            }
            let stopped = driver.status() & status::NEEDS_RESET != 0;
            refused += usize::from(stopped);
            stopped
        });
        if driver.status() & status::NEEDS_RESET != 0 {
            driver.start(FLUSH_FEATURE, 64);
        }
    }
    assert!(
        answered > 20 && refused > 20,
        "{answered} answered, {refused} refused"
    );
}
