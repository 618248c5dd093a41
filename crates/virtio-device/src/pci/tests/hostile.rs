//! A driver that does what it likes: whatever it is, the device can be used again afterwards.

use std::thread;

use super::{driver, echo};
use crate::testing::{MockDriver, TestPci};

/// A small generator of numbers that are the same in each run (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn once_in(&mut self, times: u64) -> bool {
        self.next().is_multiple_of(times)
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[(self.next() % choices.len() as u64) as usize]
    }
}

/// An access to the BAR or to configuration space.
fn access(pci: &TestPci, random: &mut Random) {
    let value = match random.next() % 5 {
        0 => random.next() % 4,
        1 => random.next() % 256,
        2 => MockDriver::QUEUES + random.next() % 0x4000,
        3 => u64::MAX,
        _ => random.next(),
    };
    let len = random.one_of(&[1, 2, 4, 8]);
    let data = value.to_le_bytes();
    if random.once_in(4) {
        let window = pci.pci_capability() + random.one_of(&[0, 4, 8, 12, 16, 17, 18]);
        let msix = pci.msix_capability() + random.one_of(&[0, 2, 3, 4]);
        let any = (random.next() % 0x1000) as u16;
        let offset = random.one_of(&[window, window, window, msix, any, 4]);
        // BARs are at 0x10; memory stays enabled for most of the time.
        let data = match offset {
            4 => [0x06, 0, 0, 0, 0, 0, 0, 0],
            0x0c..0x28 if !random.once_in(16) => return,
            _ => data,
        };
        pci.set_config(offset, &data[..len]);
        pci.config::<8>(offset);
        return;
    }
    let field = random.next() % 0x48;
    let device = pci.device() + random.next() % 0x10;
    let notify = pci.notify(0) + random.next() % 0x10;
    let table = 0x8000 + random.next() % 0x40;
    let any = random.next() % 0x2_0008;
    let offset = random.one_of(&[field, field, field, device, notify, table, pci.isr(), any]);
    let offset = if random.once_in(4) {
        offset
    } else {
        offset & !(len as u64 - 1)
    };
    pci.write(offset, &data[..len]);
    pci.read(offset, &mut [0xff; 8][..len]);
}

/// What a kernel does with a device that it finds in any state.
fn recover(driver: &mut MockDriver) {
    let pci = driver.transport.pci();
    pci.set_config(0x0c, &[0; 4]);
    pci.move_bar(0xe000_0000);
    pci.enable_memory();
    pci.enable_msix(3);
    driver.start(MockDriver::RING_RESET, 8);
    echo(driver);
}

#[test]
fn no_sequence_of_accesses_breaks_the_device() {
    let (mut driver, _) = driver();
    let mut random = Random(0x0123_4567_89ab_cdef);
    for _ in 0..150 {
        recover(&mut driver);
        for _ in 0..200 {
            access(driver.transport.pci(), &mut random);
            if random.once_in(32) {
                driver.transport.pause();
                let state = driver.transport.state().unwrap();
                if random.once_in(4) {
                    // What a guest can bring about can be stored and restored.
                    let (device, _) = crate::test_device::EchoDevice::boxed();
                    driver.restore(device, &state).unwrap();
                    assert_eq!(driver.transport.state().unwrap(), state);
                }
                driver.transport.resume();
            }
        }
    }
    driver.transport.pci().bus.reset();
    recover(&mut driver);
}

#[test]
fn accesses_from_several_vcpus_do_not_break_the_device() {
    let (mut driver, _) = driver();
    recover(&mut driver);
    let pci = driver.transport.pci();
    thread::scope(|scope| {
        for seed in 1..4 {
            scope.spawn(move || {
                let mut random = Random(seed << 40 | 0x9e37_79b9);
                for _ in 0..3000 {
                    access(pci, &mut random);
                }
            });
        }
    });
    recover(&mut driver);
}
