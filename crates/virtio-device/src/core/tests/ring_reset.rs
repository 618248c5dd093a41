//! Resetting single queues (virtio 1.3, section 2.6.1).

use std::sync::atomic::Ordering;

use super::{READY, driver, echo, echo_over};
use crate::testing::{
    Buffer, DriverQueue, MockDriver, TransportKind, over_each_transport, register, status,
};

over_each_transport!(
    a_queue_that_is_reset_starts_anew_and_the_others_go_on,
    what_a_reset_queue_had_left_is_not_served,
    a_queue_can_be_reset_while_the_device_is_paused,
    the_last_queue_can_be_reset_too,
    a_queue_comes_back_elsewhere_and_smaller,
    without_the_feature_a_queue_is_not_reset,
    a_queue_that_comes_back_outside_ram_makes_the_device_need_a_reset,
    a_broken_device_is_not_started_by_a_reset_of_its_queue,
    a_device_reset_undoes_a_queue_reset,
    a_queue_reset_is_stored_with_the_state,
    queues_are_reset_while_others_work,
);

fn started(kind: TransportKind) -> (MockDriver, std::sync::Arc<crate::test_device::Controls>) {
    let (mut driver, controls) = driver(kind);
    driver.start(MockDriver::RING_RESET, 8);
    echo(&mut driver);
    echo_over(&mut driver, 1);
    (driver, controls)
}

fn reset_queue(driver: &MockDriver, index: u32) {
    driver.write(register::QUEUE_SEL, index);
    driver.write(register::QUEUE_RESET, 1);
    // A driver waits for these.
    assert_eq!(driver.read(register::QUEUE_RESET), 0);
    assert_eq!(driver.read(register::QUEUE_READY), 0);
}

/// Makes the driver's side of a queue anew, and enables it.
fn enable(driver: &mut MockDriver, index: usize, size: u16) {
    let at = driver.queues[index].desc_table;
    driver.queues[index] = DriverQueue::new(&driver.memory, at, size);
    driver.enable_queue(index as u32, &driver.queues[index]);
    assert_eq!(driver.read(register::QUEUE_READY), 1);
}

fn a_queue_that_is_reset_starts_anew_and_the_others_go_on(kind: TransportKind) {
    let (mut driver, controls) = started(kind);
    for round in 0..3 {
        reset_queue(&driver, 0);
        assert_eq!(*controls.given_back.lock().unwrap(), [0, 1]);
        assert_eq!(driver.read(register::QUEUE_SIZE_MAX), 64);
        for _ in 0..round {
            echo_over(&mut driver, 1);
        }
        assert_eq!(driver.status(), READY);
        enable(&mut driver, 0, 8);
        // The device had queue 1 alone meanwhile.
        assert_eq!(*controls.given_back.lock().unwrap(), [1]);
        echo(&mut driver);
        echo_over(&mut driver, 1);
    }
}

fn what_a_reset_queue_had_left_is_not_served(kind: TransportKind) {
    let (mut driver, controls) = started(kind);
    controls.hold.store(true, Ordering::SeqCst);
    let buffers = [Buffer::readable(0x1000, 5), Buffer::writable(0x3000, 5)];
    let used = driver.queues[0].used_index(&driver.memory);
    driver.queues[0].add(&driver.memory, &buffers);
    driver.notify(0);
    reset_queue(&driver, 0);
    controls.hold.store(false, Ordering::SeqCst);
    driver.notify(0);
    echo_over(&mut driver, 1);
    driver.transport.pause();
    assert_eq!(driver.queues[0].used_index(&driver.memory), used);
    assert_eq!(driver.bytes(0x3000, 5), [0; 5]);
    driver.transport.resume();
}

fn a_queue_can_be_reset_while_the_device_is_paused(kind: TransportKind) {
    let (mut driver, controls) = started(kind);
    driver.transport.pause();
    let calls = controls.calls.load(Ordering::SeqCst);
    reset_queue(&driver, 0);
    let state = driver.transport.state().unwrap();
    assert_eq!(state.core().queues[0].next_avail, 0);
    assert_eq!(state.core().queues[1].next_avail, 1);
    enable(&mut driver, 0, 4);
    reset_queue(&driver, 1);
    assert_eq!(controls.calls.load(Ordering::SeqCst), calls);
    driver.transport.resume();
    echo(&mut driver);
    enable(&mut driver, 1, 8);
    echo_over(&mut driver, 1);
    echo(&mut driver);
}

fn the_last_queue_can_be_reset_too(kind: TransportKind) {
    let (mut driver, controls) = started(kind);
    reset_queue(&driver, 0);
    reset_queue(&driver, 1);
    driver.notify(0);
    driver.notify(1);
    driver.transport.pause();
    assert!(controls.given_back.lock().unwrap().is_empty());
    driver.transport.resume();
    enable(&mut driver, 1, 8);
    echo_over(&mut driver, 1);
    enable(&mut driver, 0, 8);
    echo(&mut driver);
    assert_eq!(driver.status(), READY);
}

fn a_queue_comes_back_elsewhere_and_smaller(kind: TransportKind) {
    let (mut driver, _) = started(kind);
    reset_queue(&driver, 0);
    let old = driver.queues[0].used_index(&driver.memory);
    let old_place = driver.queues[0].used_ring;
    driver.queues[0] = DriverQueue::new(&driver.memory, MockDriver::HIGH, 2);
    driver.enable_queue(0, &driver.queues[0]);
    for _ in 0..5 {
        echo(&mut driver);
    }
    assert_eq!(
        driver.bytes(old_place + 2, 2),
        old.to_le_bytes(),
        "the old ring is left alone"
    );
}

fn without_the_feature_a_queue_is_not_reset(kind: TransportKind) {
    let (mut driver, _) = driver(kind);
    driver.start(0, 8);
    driver.write(register::QUEUE_SEL, 0);
    driver.write(register::QUEUE_RESET, 1);
    assert_eq!(driver.read(register::QUEUE_RESET), 0);
    assert_eq!(driver.read(register::QUEUE_READY), 1);
    echo(&mut driver);
    // Nor before driver and device have agreed on it, nor where there is none, nor by another
    // value.
    assert!(driver.negotiate(MockDriver::RING_RESET));
    driver.write(register::QUEUE_SEL, 1);
    driver.write(register::QUEUE_RESET, 1);
    driver.start(MockDriver::RING_RESET, 8);
    for (queue, value) in [(0, 0), (0, 2), (2, 1), (0xffff, 1)] {
        driver.write(register::QUEUE_SEL, queue);
        driver.write(register::QUEUE_RESET, value);
    }
    echo(&mut driver);
    echo_over(&mut driver, 1);
}

fn a_queue_that_comes_back_outside_ram_makes_the_device_need_a_reset(kind: TransportKind) {
    let (mut driver, _) = started(kind);
    reset_queue(&driver, 0);
    driver.queues[0].used_ring = MockDriver::HOLE;
    driver.enable_queue(0, &driver.queues[0]);
    assert_eq!(driver.status(), READY | status::NEEDS_RESET);
    assert_eq!(driver.read(register::INTERRUPT_STATUS) & 2, 2);
    driver.start(MockDriver::RING_RESET, 8);
    echo(&mut driver);
}

fn a_broken_device_is_not_started_by_a_reset_of_its_queue(kind: TransportKind) {
    let (mut driver, controls) = started(kind);
    driver.queues[0].set_avail_index(&driver.memory, 1000);
    driver.notify(0);
    driver.wait_needs_reset();
    let calls = controls.calls.load(Ordering::SeqCst);
    reset_queue(&driver, 0);
    enable(&mut driver, 0, 8);
    driver.notify(0);
    driver.notify(1);
    driver.transport.pause();
    driver.transport.resume();
    assert_eq!(controls.calls.load(Ordering::SeqCst), calls);
    driver.start(MockDriver::RING_RESET, 8);
    echo(&mut driver);
}

fn a_device_reset_undoes_a_queue_reset(kind: TransportKind) {
    let (mut driver, _) = driver(kind);
    let fresh = driver.transport.state().unwrap();
    driver.start(MockDriver::RING_RESET, 8);
    reset_queue(&driver, 1);
    driver.write(register::STATUS, 0);
    assert_eq!(driver.transport.state().unwrap().core(), fresh.core());
    driver.start(0, 8);
    echo_over(&mut driver, 1);
    // Without the feature a queue's registers are fixed again.
    driver.write(register::QUEUE_SEL, 1);
    driver.write(register::QUEUE_SIZE, 4);
    driver.transport.pause();
    let state = driver.transport.state().unwrap();
    assert_eq!(state.core().queues[1].size, 8);
}

fn a_queue_reset_is_stored_with_the_state(kind: TransportKind) {
    let (mut driver, _) = started(kind);
    reset_queue(&driver, 0);
    driver.transport.pause();
    let state = driver.transport.state().unwrap();
    let (device, controls) = crate::test_device::EchoDevice::boxed();
    driver.restore(device, &state).unwrap();
    assert_eq!(driver.transport.state().unwrap(), state);
    driver.transport.resume();
    echo_over(&mut driver, 1);
    enable(&mut driver, 0, 8);
    assert_eq!(*controls.given_back.lock().unwrap(), [1]);
    echo(&mut driver);
    echo_over(&mut driver, 1);
}

fn queues_are_reset_while_others_work(kind: TransportKind) {
    let (mut driver, _) = started(kind);
    let buffers = [Buffer::readable(0x1000, 5), Buffer::writable(0x2000, 8)];
    for _ in 0..200 {
        for _ in 0..4 {
            driver.queues[1].add(&driver.memory, &buffers);
        }
        driver.notify(1);
        reset_queue(&driver, 0);
        enable(&mut driver, 0, 8);
        for _ in 0..4 {
            driver.queues[1].wait_used(&driver.memory);
        }
        echo(&mut driver);
    }
    assert_eq!(driver.status(), READY);
}
