//! Networks that carry no more than so much in a time.

use std::num::NonZeroU64;
use std::time::Instant;

use super::*;
use crate::rate_limit::{RateLimit, RateLimits};

/// A byte in a second: the first packet is let through, and the next one waits for a minute.
fn closed() -> RateLimits {
    RateLimits {
        bandwidth: Some(RateLimit::per_second(NonZeroU64::MIN)),
        ops: None,
    }
}

fn setup(limits: NetRateLimits) -> Setup {
    let setup = Setup::new(Offloads::default(), MRG_RXBUF, 16);
    setup.control.set_rate_limits(limits);
    setup
}

impl Setup {
    fn send(&mut self) {
        self.driver.fill(TX_DATA, &packet(100, 9));
        let buffers = [Buffer::readable(TX_DATA, 100)];
        self.driver.queues[TX].add(&self.driver.memory, &buffers);
        self.driver.notify(TX as u32);
    }

    /// Nothing comes of what was last done.
    fn assert_waits(&mut self, queue: usize) {
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(self.driver.queues[queue].used(&self.driver.memory), None);
    }
}

#[test]
fn what_the_driver_receives_waits_in_the_network() {
    let mut setup = setup(NetRateLimits {
        rx: closed(),
        ..NetRateLimits::default()
    });
    for _ in 0..3 {
        setup.give(&[(DATA, 2048)]);
        setup.send_from_network(&packet(100, 3));
    }
    assert_eq!(setup.used().1, 100);
    setup.assert_waits(RX);
    // The network is not even asked while the limit is reached, however often the driver tells.
    let asked = setup.controls.receives.load(Ordering::SeqCst);
    setup.driver.notify(RX as u32);
    setup.assert_waits(RX);
    assert_eq!(setup.controls.receives.load(Ordering::SeqCst), asked);
    assert_eq!(setup.count(|c| &c.rx_throttled), 1);
    // Nothing holds up the other direction, nor a pause.
    setup.send();
    assert_eq!(setup.received().len(), 100);
    let memory = Arc::clone(&setup.driver.memory);
    setup.driver.queues[TX].wait_used(&memory);
    setup.driver.transport.pause();
    setup.driver.transport.resume();
    setup.assert_waits(RX);
    setup.control.set_rate_limits(NetRateLimits::default());
    assert_eq!(setup.used().1, 100);
    assert_eq!(setup.used().1, 100);
    setup.check_both_ways();
}

#[test]
fn what_the_driver_sends_waits_in_its_queue() {
    let limits = NetRateLimits {
        tx: closed(),
        ..NetRateLimits::default()
    };
    let mut setup = setup(limits);
    assert_eq!(setup.control.rate_limits(), limits);
    setup.send();
    setup.send();
    assert_eq!(setup.received().len(), 100);
    let memory = Arc::clone(&setup.driver.memory);
    setup.driver.queues[TX].wait_used(&memory);
    setup.assert_waits(TX);
    assert_eq!(setup.count(|c| &c.tx_throttled), 1);
    assert_eq!(setup.count(|c| &c.tx_packets), 1);
    setup.give(&[(DATA, 2048)]);
    setup.send_from_network(&packet(100, 3));
    assert_eq!(setup.used().1, 100);
    // A driver that begins anew forgets what waits.
    setup.driver.start(MRG_RXBUF, 16);
    setup.send();
    setup.assert_waits(TX);
    setup.control.set_rate_limits(NetRateLimits::default());
    setup.driver.queues[TX].wait_used(&memory);
    assert_eq!(setup.received().len(), 100);
    assert_eq!(setup.count(|c| &c.tx_packets), 2);
    assert_eq!(setup.count(|c| &c.tx_dropped), 0);
}

#[test]
fn packets_are_counted_where_there_are_some_and_not_where_there_are_none() {
    let ops = |per_second, burst| RateLimits {
        bandwidth: None,
        ops: Some(RateLimit {
            per_second: NonZeroU64::new(per_second).unwrap(),
            burst: NonZeroU64::new(burst).unwrap(),
        }),
    };
    let mut setup = setup(NetRateLimits {
        rx: ops(20, 2),
        tx: ops(20, 2),
    });
    // To look for packets in vain costs nothing.
    for _ in 0..10 {
        setup.driver.notify(RX as u32);
    }
    let since = Instant::now();
    for _ in 0..6 {
        setup.check_both_ways();
    }
    // Two at once, and the others as they come.
    let least = Duration::from_millis(4 * 50);
    assert!(since.elapsed() >= least, "{:?}", since.elapsed());
}
