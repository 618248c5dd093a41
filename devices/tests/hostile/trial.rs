//! A device under attack, and what must hold whatever happens to it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_virtio_device::testing::{Buffer, MockDriver, TransportKind, register, status};

use crate::allocations::peak;
use crate::ram::{DATA, Ram};
use crate::victims::{Request, Victim};

/// The queue sizes that devices are started with.
pub(crate) const SIZE: u16 = 64;
/// No attack of these tests takes more turns of a device: each of them does a bounded part of it.
const TURNS: usize = 200;
/// Nor does a turn take longer, however slow the machine: what a turn may do takes milliseconds.
const TURN: Duration = Duration::from_secs(5);
/// Nor do they make a device keep or take for a while more than so many bytes.
const MEMORY: usize = 1 << 20;

/// Where a request's readable and writable bytes lie.
pub(crate) const READABLE: u64 = DATA;
pub(crate) const WRITABLE: u64 = DATA + 0x1_0000;

pub(crate) struct Trial<'a> {
    pub(crate) driver: MockDriver,
    pub(crate) victim: &'a mut dyn Victim,
    pub(crate) ram: &'a Ram,
    /// What is being tried, for messages.
    pub(crate) what: String,
}

impl<'a> Trial<'a> {
    pub(crate) fn new(kind: TransportKind, victim: &'a mut dyn Victim, ram: &'a Ram) -> Self {
        let driver = MockDriver::local(kind, victim.device(), Arc::clone(&ram.memory));
        Self {
            driver,
            victim,
            ram,
            what: String::new(),
        }
    }

    /// Resets the device and starts it anew, on RAM that is all zeros.
    pub(crate) fn restart(&mut self, features: u64) {
        self.ram.clear();
        self.driver.start(features, SIZE);
        self.victim.effect();
    }

    /// Does something to the device, and lets it work: in bounded time and memory.
    pub(crate) fn attack(&mut self, attack: impl FnOnce(&mut MockDriver)) {
        let what = &self.what;
        let driver = &mut self.driver;
        let most = peak(|| {
            attack(driver);
            let mut turns = 0;
            loop {
                let begun = Instant::now();
                if driver.settle(1) == 0 {
                    break;
                }
                turns += 1;
                assert!(begun.elapsed() < TURN, "{what}: a turn takes too long");
                assert!(turns < TURNS, "{what}: the device does not come to rest");
            }
        });
        assert!(most < MEMORY, "{what}: the device takes {most} bytes");
        self.ram.check_guards();
    }

    /// The device says that it needs a reset.
    pub(crate) fn assert_needs_reset(&self) {
        let needs = self.driver.status() & status::NEEDS_RESET != 0;
        assert!(needs, "{}: the device goes on", self.what);
    }

    /// Whatever was done to it: after a reset the device serves every request.
    pub(crate) fn recover(&mut self) {
        self.driver.transport.resume();
        // As a kernel finds a device that another one has used.
        if self.driver.kind() == TransportKind::Pci {
            let pci = self.driver.transport.pci();
            pci.set_config(0x0c, &[0; 4]);
            pci.move_bar(0xe000_0000);
            pci.enable_memory();
            pci.enable_msix(8);
        }
        for request in self.victim.requests() {
            self.restart(request.features);
            self.victim.prepare(&request);
            let mut buffers = Vec::new();
            if !request.readable.is_empty() {
                self.driver.fill(READABLE, &request.readable);
                buffers.push(Buffer::readable(READABLE, request.readable.len() as u32));
            }
            if request.writable > 0 {
                buffers.push(Buffer::writable(WRITABLE, request.writable));
            }
            self.driver.request(request.queue, &buffers);
            let status = self.driver.status();
            assert_eq!(status & status::NEEDS_RESET, 0, "{}", self.what);
            self.victim.effect();
        }
        self.ram.check_guards();
    }

    /// Some features that all requests of a queue need.
    pub(crate) fn features_for(&self, queue: usize) -> u64 {
        let requests = self.victim.requests();
        let of_queue = |request: &&Request| request.queue == queue;
        requests.iter().find(of_queue).map_or(0, |it| it.features)
    }

    /// Writes the registers that say where the rings of a queue are, and enables it, without a look
    /// at what comes of it.
    pub(crate) fn place_rings(driver: &MockDriver, queue: u32, size: u32, areas: [u64; 3]) {
        driver.write(register::QUEUE_SEL, queue);
        driver.write(register::QUEUE_SIZE, size);
        driver.write_address(register::QUEUE_DESC_LOW, areas[0]);
        driver.write_address(register::QUEUE_DRIVER_LOW, areas[1]);
        driver.write_address(register::QUEUE_DEVICE_LOW, areas[2]);
        driver.write(register::QUEUE_READY, 1);
    }
}
