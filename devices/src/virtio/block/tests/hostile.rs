//! Drivers that mean harm.

use kiln_virtio_device::testing::{status, wait_until};

use super::*;
use crate::virtio::hostile::{descriptor, storm};

#[test]
fn no_driver_breaks_a_disk() {
    let (mut driver, image) = disk(SECTORS);
    let mut random = Random::new(2);
    for _ in 0..150 {
        driver.start(
            FLUSH_FEATURE | random.one_of(&[0, MockDriver::EVENT_IDX]),
            8,
        );
        set_header(&driver, random.below(5) as u32, random.below(SECTORS + 2));
        let steps = random.below(40) as usize;
        storm(&mut driver, &mut random, steps);
        driver.start(FLUSH_FEATURE, 64);
        assert_eq!(request(&mut driver, READ, 0, 512), (OK, 513));
        assert_eq!(driver.bytes(DATA, 512), contents(image.path())[..512]);
    }
    assert_eq!(contents(image.path()).len() as u64, SECTORS * 512);
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
