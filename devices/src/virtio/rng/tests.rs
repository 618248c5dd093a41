use std::collections::VecDeque;
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_virtio_device::testing::{
    Buffer, MockDriver, TransportKind, over_each_transport, wait_until,
};

use super::*;
use crate::rate_limit::RateLimit;
use crate::virtio::hostile::{Random, storm};

const DATA: u64 = 0x40_0000;

over_each_transport!(
    a_buffer_is_filled_with_numbers_that_differ,
    a_hostile_driver_gets_nowhere,
);

fn a_buffer_is_filled_with_numbers_that_differ(kind: TransportKind) {
    let mut driver = MockDriver::over(kind, Box::new(Rng::new(RngOptions::default()).unwrap()));
    driver.start(0, 16);
    let mut seen = std::collections::BTreeSet::new();
    for round in 0..50_u64 {
        // In pieces, and not a byte beyond them.
        let buffers = [
            Buffer::writable(DATA, 5),
            Buffer::writable(DATA + 0x100, 27),
        ];
        driver.fill(DATA, &[0; 0x200]);
        assert_eq!(driver.request(0, &buffers), 32);
        assert!(seen.insert(driver.bytes(DATA + 0x100, 27)), "{round}");
        assert_eq!(driver.bytes(DATA + 5, 0xfb), [0; 0xfb]);
        assert_eq!(driver.bytes(DATA + 0x11b, 0xe5), [0; 0xe5]);
    }
}

fn a_hostile_driver_gets_nowhere(kind: TransportKind) {
    let limits = [
        None,
        Some(RateLimit::per_second(NonZeroU64::new(10_000).unwrap())),
    ];
    for seed in 0..60 {
        let options = RngOptions {
            rate_limit: limits[seed as usize % 2],
        };
        let mut driver = MockDriver::over(kind, Box::new(Rng::new(options).unwrap()));
        let mut random = Random::new(seed);
        driver.start(0, 16);
        storm(&mut driver, &mut random, 100);
        // It still works for one that behaves.
        driver.start(0, 16);
        assert_eq!(driver.request(0, &[Buffer::writable(DATA, 8)]), 8);
    }
}

/// A source that counts up, and does what a script says first.
struct Script {
    steps: Arc<Mutex<VecDeque<io::Result<usize>>>>,
    next: u8,
}

impl Read for Script {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let step = self.steps.lock().unwrap().pop_front();
        let count = step.unwrap_or(Ok(usize::MAX))?.min(buffer.len());
        for byte in &mut buffer[..count] {
            *byte = self.next;
            self.next = self.next.wrapping_add(1);
        }
        Ok(count)
    }
}

fn scripted(steps: Vec<io::Result<usize>>, options: RngOptions) -> MockDriver {
    let script = Script {
        steps: Arc::new(Mutex::new(steps.into())),
        next: 1,
    };
    let mut driver = MockDriver::new(Box::new(Rng::from_reader(script, options).unwrap()));
    driver.start(0, 16);
    driver
}

#[test]
fn a_large_buffer_gets_a_part_and_the_rest_is_left_alone() {
    let mut driver = scripted(Vec::new(), RngOptions::default());
    let written = driver.request(0, &[Buffer::writable(DATA, 1 << 20)]);
    assert_eq!(written, 4096);
    let bytes = driver.bytes(DATA, 4097);
    assert!((1_u16..=4096).zip(&bytes).all(|(n, b)| n as u8 == *b));
    assert_eq!(bytes[4096], 0);
    // A source may have less than that.
    let mut driver = scripted(vec![Ok(3)], RngOptions::default());
    assert_eq!(driver.request(0, &[Buffer::writable(DATA, 8)]), 3);
    assert_eq!(driver.bytes(DATA, 4), [1, 2, 3, 0]);
}

#[test]
fn a_source_that_has_nothing_is_asked_again() {
    let steps = vec![
        Err(io::ErrorKind::WouldBlock.into()),
        Err(io::ErrorKind::Interrupted.into()),
        Ok(0),
        Err(io::Error::other("broken")),
    ];
    let mut driver = scripted(steps, RngOptions::default());
    assert_eq!(driver.request(0, &[Buffer::writable(DATA, 4)]), 4);
    assert_eq!(driver.bytes(DATA, 4), [1, 2, 3, 4]);
}

#[test]
fn a_request_without_room_is_used_and_empty() {
    let mut driver = scripted(Vec::new(), RngOptions::default());
    assert_eq!(driver.request(0, &[Buffer::readable(DATA, 64)]), 0);
    assert_eq!(driver.request(0, &[Buffer::writable(DATA, 64)]), 64);
}

#[test]
fn a_limit_lets_so_much_through_and_no_more() {
    let limit = RateLimit::per_second(NonZeroU64::new(1000).unwrap());
    let limit = limit.with_burst(NonZeroU64::new(100).unwrap());
    let options = RngOptions {
        rate_limit: Some(limit),
    };
    let mut driver = scripted(Vec::new(), options);
    let start = Instant::now();
    // A request gets no more than the burst.
    let mut sum = u64::from(driver.request(0, &[Buffer::writable(DATA, 1000)]));
    assert_eq!(sum, 100);
    for _ in 0..6 {
        sum += u64::from(driver.request(0, &[Buffer::writable(DATA, 50)]));
    }
    assert_eq!(sum, 400);
    assert!(start.elapsed() >= Duration::from_millis(300));
}

#[test]
fn a_request_that_waits_outlives_a_pause_and_not_a_reset() {
    let one = NonZeroU64::new(1).unwrap();
    let options = RngOptions {
        rate_limit: Some(RateLimit::per_second(one).with_burst(one)),
    };
    let mut driver = scripted(Vec::new(), options);
    driver.request(0, &[Buffer::writable(DATA, 1)]);
    let buffers = [Buffer::writable(DATA, 1)];
    driver.queues[0].add(&driver.memory, &buffers);
    driver.notify(0);
    driver.transport.pause();
    assert_eq!(driver.queues[0].used_index(&driver.memory), 1);
    driver.transport.resume();
    driver.queues[0].wait_used(&driver.memory);
    wait_until("used", || driver.queues[0].used_index(&driver.memory) == 2);
    assert_eq!(driver.bytes(DATA, 1), [2]);

    driver.queues[0].add(&driver.memory, &buffers);
    driver.notify(0);
    driver.start(0, 16);
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(driver.queues[0].used_index(&driver.memory), 0);
    assert_eq!(driver.request(0, &buffers), 1);
}
