//! What the core does, seen by a driver over each of the transports.

mod ring_reset;
mod state;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kiln_device_api::BusDevice;

use crate::test_device::{Controls, EchoDevice, FEATURE, QUEUE_SIZES};
use crate::testing::{
    Buffer, DriverQueue, MockDriver, TransportKind, over_each_transport, register, status,
};

const READY: u32 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;

fn driver(kind: TransportKind) -> (MockDriver, Arc<Controls>) {
    let (device, controls) = EchoDevice::boxed();
    (MockDriver::over(kind, device), controls)
}

/// One request over this queue: it must be answered rightly.
fn echo_over(driver: &mut MockDriver, queue: usize) {
    driver.fill(0x1000, b"hello");
    driver.fill(0x2000, &[0; 5]);
    let buffers = [Buffer::readable(0x1000, 5), Buffer::writable(0x2000, 8)];
    assert_eq!(driver.request(queue, &buffers), 5);
    assert_eq!(driver.bytes(0x2000, 5), b"hello");
}

fn echo(driver: &mut MockDriver) {
    echo_over(driver, 0);
}

over_each_transport!(
    features_are_seen_through_two_windows,
    features_ok_stays_clear_unless_all_agree,
    features_are_frozen_once_agreed_on,
    several_status_bits_may_come_at_once_and_none_goes_but_by_reset,
    queues_that_do_not_exist_read_as_zero_and_take_nothing,
    a_queue_takes_only_sizes_that_a_queue_can_have,
    the_registers_of_a_ready_queue_do_not_change,
    reset_puts_everything_back_at_any_step,
    a_device_that_cannot_start_says_so_and_can_be_reset,
    a_queue_that_is_not_in_ram_is_refused_when_the_driver_is_ready,
    the_configuration_is_read_and_written_at_any_width,
);

fn features_are_seen_through_two_windows(kind: TransportKind) {
    let (driver, _) = driver(kind);
    let rings = MockDriver::VERSION_1 | MockDriver::EVENT_IDX | MockDriver::RING_RESET | 1 << 28;
    assert_eq!(driver.offered(), FEATURE | 1 << 50 | rings);
    for select in [2, 3, 0x8000_0000, u32::MAX] {
        driver.write(register::DEVICE_FEATURES_SEL, select);
        assert_eq!(driver.read(register::DEVICE_FEATURES), 0);
        // Writes there change nothing.
        driver.write(register::DRIVER_FEATURES_SEL, select);
        driver.write(register::DRIVER_FEATURES, u32::MAX);
    }
    driver.write(register::DRIVER_FEATURES_SEL, 1);
    driver.write(register::DRIVER_FEATURES, 1);
    driver.write(register::STATUS, 0xb);
    assert_eq!(driver.status(), 0xb);
}

fn features_ok_stays_clear_unless_all_agree(kind: TransportKind) {
    let (driver, controls) = driver(kind);
    assert!(driver.negotiate(FEATURE));
    assert!(driver.negotiate(0));
    for not_offered in [1, 1 << 24, 1 << 34, 1 << 63, 1 << 41] {
        assert!(!driver.negotiate(FEATURE | not_offered));
    }
    // Not without VERSION_1.
    driver.write(register::STATUS, 0);
    driver.write(register::STATUS, READY);
    assert_eq!(driver.status(), status::ACKNOWLEDGE | status::DRIVER);
    controls.refuse_features.store(true, Ordering::SeqCst);
    assert!(!driver.negotiate(FEATURE));
    controls.refuse_features.store(false, Ordering::SeqCst);
    // A driver may try again with other features, without a reset.
    driver.write(register::STATUS, status::FEATURES_OK);
    assert_eq!(driver.status() & status::FEATURES_OK, status::FEATURES_OK);
}

fn features_are_frozen_once_agreed_on(kind: TransportKind) {
    let (mut driver, controls) = driver(kind);
    assert!(driver.negotiate(FEATURE));
    driver.write(register::DRIVER_FEATURES_SEL, 0);
    driver.write(register::DRIVER_FEATURES, 0);
    driver.write(register::STATUS, READY);
    assert_eq!(driver.status(), READY);
    assert_eq!(
        *controls.features.lock().unwrap(),
        FEATURE | MockDriver::VERSION_1
    );
    driver.start(0, 8);
    assert_eq!(*controls.features.lock().unwrap(), MockDriver::VERSION_1);
}

fn several_status_bits_may_come_at_once_and_none_goes_but_by_reset(kind: TransportKind) {
    let (driver, _) = driver(kind);
    driver.write(register::DRIVER_FEATURES_SEL, 1);
    driver.write(register::DRIVER_FEATURES, 1);
    driver.write(register::STATUS, status::DRIVER_OK);
    assert_eq!(driver.status(), 0, "DRIVER_OK before FEATURES_OK");
    driver.write(register::STATUS, 3);
    assert_eq!(driver.status(), 3);
    driver.write(register::STATUS, 1);
    assert_eq!(driver.status(), 3);
    driver.write(register::STATUS, READY);
    assert_eq!(driver.status(), READY);
    // Not zero, though its low byte is; and bits that a driver does not have.
    driver.write(register::STATUS, 0xffff_ff00);
    driver.write(register::STATUS, status::NEEDS_RESET | 0x30);
    assert_eq!(driver.status(), READY);
    driver.write(register::STATUS, status::FAILED);
    assert_eq!(driver.status(), READY | status::FAILED);
    driver.write(register::STATUS, 0);
    assert_eq!(driver.status(), 0);
    // A driver that has given up does not start the device.
    driver.write(register::DRIVER_FEATURES_SEL, 1);
    driver.write(register::DRIVER_FEATURES, 1);
    driver.write(register::STATUS, READY | status::FAILED);
    assert_eq!(
        driver.status(),
        (READY | status::FAILED) & !status::DRIVER_OK
    );
}

fn queues_that_do_not_exist_read_as_zero_and_take_nothing(kind: TransportKind) {
    let (driver, _) = driver(kind);
    for (index, size) in (0..).zip(QUEUE_SIZES) {
        driver.write(register::QUEUE_SEL, index);
        assert_eq!(driver.read(register::QUEUE_SIZE_MAX), u32::from(size));
    }
    for index in [2, 0xffff, 0x1_0000, 0x1_0001, u32::MAX] {
        driver.write(register::QUEUE_SEL, index);
        assert_eq!(driver.read(register::QUEUE_SIZE_MAX), 0);
        driver.write(register::QUEUE_READY, 1);
        assert_eq!(driver.read(register::QUEUE_READY), 0);
    }
    for index in 0..2 {
        driver.write(register::QUEUE_SEL, index);
        assert_eq!(driver.read(register::QUEUE_READY), 0);
    }
    for index in [2, 0x1_0000, u32::MAX] {
        driver.notify(index);
    }
    for kick in driver.transport.kicks() {
        assert!(
            kick.read().is_err(),
            "a queue that does not exist was notified"
        );
    }
    driver.notify(1);
    assert_eq!(driver.transport.kicks()[1].read().unwrap(), 1);
}

fn a_queue_takes_only_sizes_that_a_queue_can_have(kind: TransportKind) {
    let (driver, _) = driver(kind);
    let state = |driver: &MockDriver| driver.transport.state().unwrap().core().queues.clone();
    driver.write(register::QUEUE_SEL, 0);
    assert_eq!(state(&driver)[0].size, 64);
    driver.write(register::QUEUE_SIZE, 8);
    for size in [0, 3, 65, 128, 0x1_0000, 0x1_0010, u32::MAX] {
        driver.write(register::QUEUE_SIZE, size);
        assert_eq!(state(&driver)[0].size, 8);
    }
    assert_eq!(state(&driver)[1].size, 16);
}

fn the_registers_of_a_ready_queue_do_not_change(kind: TransportKind) {
    let (mut driver, _) = driver(kind);
    let queue = DriverQueue::new(&driver.memory, MockDriver::QUEUES, 8);
    assert!(driver.negotiate(0));
    driver.enable_queue(0, &queue);
    let ready = driver.transport.state().unwrap().core().queues.clone();
    let change = |driver: &MockDriver| {
        for register in 0x80..0xa8 {
            driver.write(register & !3, 0xdead_0000);
        }
        driver.write(register::QUEUE_SIZE, 4);
    };
    change(&driver);
    assert_eq!(driver.transport.state().unwrap().core().queues, ready);
    // Before the device starts the driver can take a queue back, and then change it.
    driver.write(register::QUEUE_READY, 0);
    assert_eq!(driver.read(register::QUEUE_READY), 0);
    change(&driver);
    assert_ne!(driver.transport.state().unwrap().core().queues, ready);

    driver.start(0, 8);
    driver.write(register::QUEUE_SEL, 0);
    change(&driver);
    driver.write(register::QUEUE_READY, 0);
    assert_eq!(driver.read(register::QUEUE_READY), 1);
    echo(&mut driver);
}

fn reset_puts_everything_back_at_any_step(kind: TransportKind) {
    let (mut driver, controls) = driver(kind);
    let fresh = driver.transport.state().unwrap();
    for steps in 0..7 {
        match steps {
            0 => driver.write(register::STATUS, status::ACKNOWLEDGE),
            1 => driver.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER),
            2 => assert!(driver.negotiate(FEATURE)),
            3 => {
                assert!(driver.negotiate(FEATURE));
                let queue = DriverQueue::new(&driver.memory, MockDriver::QUEUES, 8);
                driver.enable_queue(1, &queue);
            }
            4 => driver.start(FEATURE, 8),
            5 => {
                driver.start(FEATURE, 8);
                echo(&mut driver);
                driver.line.wait_for(1);
            }
            _ => {
                driver.start(FEATURE, 8);
                driver.queues[0].set_avail_index(&driver.memory, 1000);
                driver.notify(0);
                driver.wait_needs_reset();
            }
        }
        driver.write(register::DEVICE_FEATURES_SEL, 1);
        driver.write(register::QUEUE_SEL, 1);
        driver.write(register::STATUS, 0);
        assert_eq!(driver.status(), 0);
        let generation = driver.read(register::CONFIG_GENERATION);
        let mut state = driver.transport.state().unwrap();
        state.core_mut().config_generation -= generation;
        assert_eq!(state, fresh, "after {steps} steps");
        assert_eq!(driver.read(register::INTERRUPT_STATUS), 0);
    }
    assert_eq!(*controls.given_back.lock().unwrap(), [0, 1]);
    driver.start(0, 8);
    echo(&mut driver);
}

fn a_device_that_cannot_start_says_so_and_can_be_reset(kind: TransportKind) {
    let (mut driver, controls) = driver(kind);
    controls.refuse_start.store(true, Ordering::SeqCst);
    assert!(driver.negotiate(0));
    let queue = DriverQueue::new(&driver.memory, MockDriver::QUEUES, 8);
    driver.enable_queue(1, &queue);
    driver.write(register::STATUS, READY);
    assert_eq!(driver.status(), READY | status::NEEDS_RESET);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), 2);
    assert_eq!(driver.line.count(), 1);
    // The queue was not lost with the failure.
    driver.write(register::STATUS, 0);
    assert_eq!(*controls.given_back.lock().unwrap(), [1]);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), 0);
    controls.refuse_start.store(false, Ordering::SeqCst);
    driver.start(0, 8);
    echo(&mut driver);
}

fn a_queue_that_is_not_in_ram_is_refused_when_the_driver_is_ready(kind: TransportKind) {
    let (mut driver, controls) = driver(kind);
    let good = MockDriver::QUEUES;
    let registers = [
        (register::QUEUE_DESC_LOW, 16 * 8, 16),
        (register::QUEUE_DRIVER_LOW, 6 + 2 * 8, 2),
        (register::QUEUE_DEVICE_LOW, 6 + 8 * 8, 4),
    ];
    for (register, bytes, align) in registers {
        let bad = [
            good + align / 2,
            MockDriver::HOLE - bytes + align,
            MockDriver::HOLE,
            MockDriver::HIGH - align,
            MockDriver::END - bytes + align,
            MockDriver::END,
            !15,
            0x8000_0000_0000_0000,
        ];
        for address in bad {
            assert!(driver.negotiate(0));
            let queue = DriverQueue::new(&driver.memory, good, 8);
            driver.enable_queue(0, &queue);
            driver.write(register::QUEUE_READY, 0);
            driver.write_address(register, address);
            driver.write(register::QUEUE_READY, 1);
            let interrupts = driver.line.count();
            driver.write(register::STATUS, READY);
            assert_eq!(
                driver.status(),
                READY | status::NEEDS_RESET,
                "{register:#x} {address:#x}"
            );
            assert_eq!(driver.line.count(), interrupts + 1);
        }
        // The last place where it fits is fine.
        assert!(driver.negotiate(0));
        let queue = DriverQueue::new(&driver.memory, good, 8);
        driver.enable_queue(0, &queue);
        driver.write(register::QUEUE_READY, 0);
        driver.write_address(register, (MockDriver::HOLE - bytes) & !(align - 1));
        driver.write(register::QUEUE_READY, 1);
        driver.write(register::STATUS, READY);
        assert_eq!(driver.status(), READY);
    }
    assert_eq!(
        controls.drained.load(Ordering::SeqCst),
        2,
        "only what was active was stopped"
    );
    driver.start(0, 8);
    echo(&mut driver);
}

fn the_configuration_is_read_and_written_at_any_width(kind: TransportKind) {
    let (driver, _) = driver(kind);
    let mut all = [0xff; 12];
    driver.config(0, &mut all);
    assert_eq!(&all, b"configur\0\0\0\0");
    for (offset, len) in [(0, 1), (3, 2), (1, 4), (0, 8), (7, 1)] {
        let mut data = vec![0xff; len];
        driver.config(offset, &mut data);
        assert_eq!(data, all[offset as usize..offset as usize + len]);
    }
    let _ = driver.transport.write(register::CONFIG + 6, b"ABCD");
    let mut data = [0xff; 4];
    driver.config(6, &mut data);
    assert_eq!(&data, b"AB\0\0");
    driver.config(0xefc, &mut data);
    assert_eq!(data, [0; 4]);
}
