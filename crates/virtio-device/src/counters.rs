//! What a device has done, as far as its transport and its queues can tell.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::{InterruptEvent, VirtioInterrupt};

/// What was done on one queue since the device was made.
///
/// A driver that sees a request used, or takes an interrupt, finds it counted.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Requests completed: descriptor chains given back to the driver as used.
    pub requests: AtomicU64,
    /// Bytes that these requests had for the device to read.
    pub bytes_from_driver: AtomicU64,
    /// Bytes that the device wrote to these requests.
    pub bytes_to_driver: AtomicU64,
    /// Interrupts sent because of used buffers.
    pub interrupts: AtomicU64,
}

/// The bytes that count as a request.
const REQUEST_BYTES: u64 = 4096;

impl QueueCounters {
    /// What was done, in requests: large ones count as several.
    pub(crate) fn work(&self) -> u64 {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let bytes = load(&self.bytes_from_driver).wrapping_add(load(&self.bytes_to_driver));
        load(&self.requests).wrapping_add(bytes / REQUEST_BYTES)
    }
}

/// What a device has done since it was made, whatever type of device it is.
///
/// Interrupts that a worker sends by a [`notifier`](VirtioInterrupt::notifier) of its own are not
/// seen here, and requests of a device that does without a [`Worker`](crate::Worker) neither.
#[derive(Debug, Default)]
pub struct DeviceCounters {
    /// The queues, in the order of their indices.
    pub queues: Vec<Arc<QueueCounters>>,
    /// Interrupts sent because the configuration has changed.
    pub config_interrupts: AtomicU64,
    /// How often the device asked for a reset by its driver (`DEVICE_NEEDS_RESET`).
    pub needs_reset: AtomicU64,
}

impl DeviceCounters {
    pub(crate) fn new(queues: usize) -> Self {
        Self {
            queues: (0..queues).map(|_| Arc::default()).collect(),
            ..Self::default()
        }
    }
}

/// Adds to a counter that only this thread writes, so no locked instruction is needed.
pub(crate) fn add_alone(counter: &AtomicU64, count: u64) {
    let sum = counter.load(Ordering::Relaxed).wrapping_add(count);
    counter.store(sum, Ordering::Relaxed);
}

/// A transport's interrupt, counted.
pub(crate) struct Counted {
    interrupt: Arc<dyn VirtioInterrupt>,
    counters: Arc<DeviceCounters>,
}

impl Counted {
    pub(crate) fn new(interrupt: Arc<dyn VirtioInterrupt>, counters: Arc<DeviceCounters>) -> Self {
        Self {
            interrupt,
            counters,
        }
    }
}

impl VirtioInterrupt for Counted {
    fn trigger(&self, event: InterruptEvent) {
        let counter = match event {
            InterruptEvent::Config => Some(&self.counters.config_interrupts),
            InterruptEvent::Queue(index) => {
                let queue = self.counters.queues.get(usize::from(index));
                queue.map(|queue| &queue.interrupts)
            }
        };
        if let Some(counter) = counter {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        self.interrupt.trigger(event);
    }

    fn notifier(&self, event: InterruptEvent) -> Option<EventFd> {
        self.interrupt.notifier(event)
    }

    fn needs_reset(&self, reason: &dyn fmt::Display) {
        self.counters.needs_reset.fetch_add(1, Ordering::Relaxed);
        self.interrupt.needs_reset(reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_device::{Controls, EchoDevice};
    use crate::testing::{Buffer, MockDriver};

    fn driver() -> (MockDriver, Arc<Controls>, Arc<DeviceCounters>) {
        let (device, controls) = EchoDevice::boxed();
        let mut driver = MockDriver::new(device);
        driver.start(0, 16);
        let counters = driver.transport.counters();
        (driver, controls, counters)
    }

    fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }

    #[test]
    fn a_driver_that_sees_a_request_used_finds_it_counted() {
        let (mut driver, _, counters) = driver();
        for count in 1..=50 {
            let buffers = [Buffer::readable(0x1000, 100), Buffer::writable(0x2000, 30)];
            assert_eq!(driver.request(0, &buffers), 30);
            let queue = &counters.queues[0];
            assert_eq!(get(&queue.requests), count);
            assert_eq!(get(&queue.bytes_from_driver), 100 * count);
            assert_eq!(get(&queue.bytes_to_driver), 30 * count);
        }
        assert!(
            counters.queues[1..]
                .iter()
                .all(|queue| get(&queue.requests) == 0)
        );
    }

    #[test]
    fn the_interrupts_counted_are_those_that_were_sent() {
        let (mut driver, controls, counters) = driver();
        for _ in 0..10 {
            driver.request(
                0,
                &[Buffer::readable(0x1000, 4), Buffer::writable(0x2000, 4)],
            );
        }
        let interrupt = Arc::clone(controls.interrupt.lock().unwrap().as_ref().unwrap());
        interrupt.trigger(InterruptEvent::Config);
        interrupt.trigger(InterruptEvent::Queue(1));
        interrupt.trigger(InterruptEvent::Queue(u16::MAX)); // counted nowhere, and harmless
        driver.transport.pause();
        let first = get(&counters.queues[0].interrupts);
        assert!((1..=10).contains(&first), "{first}");
        assert_eq!(get(&counters.queues[1].interrupts), 1);
        assert_eq!(get(&counters.config_interrupts), 1);
        assert_eq!(driver.line.count() as u64, first + 3);
    }

    #[test]
    fn counters_outlive_a_reset_and_count_it_where_the_device_asked() {
        let (mut driver, _, counters) = driver();
        driver.request(
            0,
            &[Buffer::readable(0x1000, 4), Buffer::writable(0x2000, 4)],
        );
        // More chains than the queue has.
        let queue = &mut driver.queues[0];
        queue.set_avail_index(&driver.memory, queue.avail_index().wrapping_add(1000));
        driver.notify(0);
        driver.wait_needs_reset();
        assert_eq!(get(&counters.needs_reset), 1);
        driver.start(0, 16);
        driver.request(
            0,
            &[Buffer::readable(0x1000, 4), Buffer::writable(0x2000, 4)],
        );
        assert_eq!(get(&counters.queues[0].requests), 2);
        assert_eq!(get(&counters.needs_reset), 1);
    }
}
