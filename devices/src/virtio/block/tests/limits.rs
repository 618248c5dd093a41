//! Disks of which no more may be asked in a time.

use std::num::NonZeroU64;
use std::time::Instant;

use super::*;
use crate::rate_limit::{RateLimit, RateLimits};

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(30);

fn limit(per_second: u64, burst: u64) -> Option<RateLimit> {
    Some(RateLimit {
        per_second: NonZeroU64::new(per_second).unwrap(),
        burst: NonZeroU64::new(burst).unwrap(),
    })
}

/// A byte in a second: the first request is let through, and what it took too much is hours of
/// waiting.
fn closed() -> RateLimits {
    RateLimits {
        bandwidth: limit(1, 1),
        ops: None,
    }
}

struct Limited {
    driver: MockDriver,
    control: BlockControl,
    _image: NamedTempFile,
}

fn limited(rate_limits: BlockRateLimits, queues: u16) -> Limited {
    let image = image(SECTORS);
    let file = RawFile::open(image.path(), false).unwrap();
    let options = BlockOptions {
        rate_limits,
        queues: Some(queues),
        ..BlockOptions::default()
    };
    let block = Block::new(file, options).unwrap();
    let control = block.control();
    let mut driver = MockDriver::new(Box::new(block));
    let several = u64::from(queues > 1) << 12;
    driver.start(FLUSH_FEATURE | several, 64);
    Limited {
        driver,
        control,
        _image: image,
    }
}

impl Limited {
    /// Makes a request of a queue available; the status of several goes to different places.
    fn ask(&mut self, queue: usize, kind: u32, number: u64) {
        let at = number * 0x40;
        self.driver.fill(HEADER + at, &kind.to_le_bytes());
        self.driver.fill(HEADER + at + 4, &[0; 12]);
        self.driver.fill(STATUS + number, &[NO_STATUS]);
        let data = Buffer {
            address: DATA,
            len: 4096,
            writable: kind == READ,
        };
        let mut buffers = vec![Buffer::readable(HEADER + at, 16)];
        if kind != FLUSH {
            buffers.push(data);
        }
        buffers.push(Buffer::writable(STATUS + number, 1));
        self.driver.queues[queue].add(&self.driver.memory, &buffers);
        self.driver.notify(queue as u32);
    }

    fn status(&self, number: u64) -> u8 {
        self.driver.bytes(STATUS + number, 1)[0]
    }

    /// Waits until this request is answered.
    fn wait(&self, number: u64) {
        let since = Instant::now();
        while self.status(number) == NO_STATUS {
            assert!(since.elapsed() < LONG, "no answer to request {number}");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.status(number), OK);
    }

    /// The request is not answered soon.
    fn assert_waits(&self, number: u64) {
        std::thread::sleep(SHORT);
        assert_eq!(self.status(number), NO_STATUS, "request {number}");
    }

    fn throttled(&self) -> (u64, u64) {
        let counters = self.control.counters();
        let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        (
            get(&counters.reads_throttled),
            get(&counters.writes_throttled),
        )
    }
}

#[test]
fn what_waits_goes_on_as_soon_as_there_is_no_limit() {
    let total = BlockRateLimits {
        total: closed(),
        ..BlockRateLimits::default()
    };
    let mut disk = limited(total, 1);
    assert_eq!(disk.control.rate_limits(), total);
    disk.ask(0, READ, 0);
    disk.wait(0);
    disk.ask(0, WRITE, 1);
    disk.assert_waits(1);
    // Notifications change nothing, and what waits is counted once.
    disk.driver.notify(0);
    disk.assert_waits(1);
    assert_eq!(disk.throttled(), (0, 1));
    let none = BlockRateLimits::default();
    disk.control.set_rate_limits(none).unwrap();
    disk.wait(1);
    disk.ask(0, READ, 2);
    disk.wait(2);
    assert_eq!(disk.throttled(), (0, 1));
    // And the other way round.
    disk.control.set_rate_limits(total).unwrap();
    disk.ask(0, READ, 3);
    disk.wait(3);
    disk.ask(0, READ, 4);
    disk.assert_waits(4);
    assert_eq!(disk.throttled(), (1, 1));
}

#[test]
fn each_direction_has_a_limit_of_its_own() {
    let limits = BlockRateLimits {
        read: closed(),
        ..BlockRateLimits::default()
    };
    let mut disk = limited(limits, 2);
    disk.ask(0, READ, 0);
    disk.wait(0);
    disk.ask(1, READ, 1);
    for number in 2..10 {
        disk.ask(0, if number % 2 == 0 { WRITE } else { FLUSH }, number);
        disk.wait(number);
    }
    disk.assert_waits(1);
    assert_eq!(disk.throttled(), (1, 0));
    // A wait for the limit of one direction ends when it becomes one for both.
    let total = BlockRateLimits {
        total: RateLimits {
            bandwidth: None,
            ops: limit(1000, 1000),
        },
        ..BlockRateLimits::default()
    };
    disk.control.set_rate_limits(total).unwrap();
    disk.wait(1);
    let both = BlockRateLimits {
        read: closed(),
        ..total
    };
    let error = disk.control.set_rate_limits(both).unwrap_err();
    assert!(error.to_string().contains("not both"), "{error}");
    assert_eq!(disk.control.rate_limits(), total);
    let options = BlockOptions {
        rate_limits: both,
        ..BlockOptions::default()
    };
    assert!(Block::new(Faulty::default(), options).is_err());
}

#[test]
fn a_wait_does_not_hold_up_a_pause_or_a_reset() {
    let mut disk = limited(
        BlockRateLimits {
            total: closed(),
            ..BlockRateLimits::default()
        },
        1,
    );
    disk.ask(0, READ, 0);
    disk.wait(0);
    disk.ask(0, READ, 1);
    disk.assert_waits(1);
    disk.driver.transport.pause();
    disk.driver.transport.resume();
    disk.assert_waits(1);
    disk.driver.transport.pause();
    disk.control
        .set_rate_limits(BlockRateLimits::default())
        .unwrap();
    disk.assert_waits(1);
    disk.driver.transport.resume();
    disk.wait(1);

    disk.control
        .set_rate_limits(BlockRateLimits {
            write: closed(),
            ..BlockRateLimits::default()
        })
        .unwrap();
    disk.ask(0, WRITE, 2);
    disk.wait(2);
    disk.ask(0, WRITE, 3);
    disk.assert_waits(3);
    disk.driver.start(FLUSH_FEATURE, 64);
    // The driver has begun anew: that request is forgotten.
    disk.ask(0, READ, 4);
    disk.wait(4);
    assert_eq!(disk.status(3), NO_STATUS);
    disk.ask(0, WRITE, 5);
    disk.assert_waits(5);
}

#[test]
fn queues_share_a_limit_and_all_get_on() {
    let limits = BlockRateLimits {
        total: RateLimits {
            bandwidth: limit(2 << 20, 4096),
            ops: None,
        },
        ..BlockRateLimits::default()
    };
    let mut disk = limited(limits, 3);
    let since = Instant::now();
    for number in 0..30 {
        disk.ask(number as usize % 3, READ, number);
    }
    for number in 0..30 {
        disk.wait(number);
    }
    // All but the first have to come.
    let least = Duration::from_secs(29 * 4096) / (2 << 20);
    assert!(since.elapsed() >= least, "{:?}", since.elapsed());
    assert!(disk.throttled().0 >= 3);
}

#[test]
fn operations_are_counted_whatever_their_size() {
    let limits = BlockRateLimits {
        total: RateLimits {
            bandwidth: None,
            ops: limit(50, 2),
        },
        ..BlockRateLimits::default()
    };
    let mut disk = limited(limits, 1);
    let since = Instant::now();
    for number in 0..12 {
        disk.ask(0, [READ, WRITE, FLUSH][number as usize % 3], number);
    }
    for number in 0..12 {
        disk.wait(number);
    }
    let least = Duration::from_millis(10 * 20);
    assert!(since.elapsed() >= least, "{:?}", since.elapsed());
}
