use std::sync::Arc;
use std::sync::atomic::Ordering;

use kiln_device_api::{BusDevice, InterruptLine};
use kiln_io_thread::IoThread;

use crate::test_device::{Controls, EchoDevice, FEATURE, QUEUE_SIZES};
use crate::testing::{
    Buffer, DriverQueue, InterruptRecorder, MockDriver, register, status, wait_until,
};
use crate::{InterruptEvent, MmioState, MmioTransport, TransportError};

const READY: u32 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;

fn driver() -> (MockDriver, Arc<Controls>) {
    let (device, controls) = EchoDevice::boxed();
    (MockDriver::new(device), controls)
}

/// One request over queue 0: it must be answered rightly.
fn echo(driver: &mut MockDriver) {
    driver.fill(0x1000, b"hello");
    driver.fill(0x2000, &[0; 5]);
    let buffers = [Buffer::readable(0x1000, 5), Buffer::writable(0x2000, 8)];
    assert_eq!(driver.request(0, &buffers), 5);
    assert_eq!(driver.bytes(0x2000, 5), b"hello");
}

#[test]
fn a_driver_finds_a_device_of_this_type() {
    let (driver, _) = driver();
    assert_eq!(driver.read(0x000), u32::from_le_bytes(*b"virt"));
    assert_eq!(driver.read(0x004), 2);
    assert_eq!(driver.read(0x008), 42);
    assert_eq!(driver.read(0x00c), u32::from_le_bytes(*b"KILN"));
    assert_eq!(driver.status(), 0);
    // There is no shared memory: each length reads as -1.
    for at in 0..4 {
        assert_eq!(driver.read(register::SHM_LEN_LOW + 4 * at), u32::MAX);
    }
    // Registers that are only written, and those that do not exist.
    for offset in [
        register::QUEUE_SEL,
        register::QUEUE_NOTIFY,
        0x0c0,
        0x01c,
        0x0f8,
    ] {
        assert_eq!(driver.read(offset), 0);
    }
}

#[test]
fn control_registers_answer_aligned_accesses_of_32_bits_only() {
    let (driver, _) = driver();
    for offset in 0..register::CONFIG {
        for len in [1, 2, 4, 8] {
            let mut data = vec![0xff; len];
            driver.transport.read(offset, &mut data);
            let untouched = data.iter().all(|byte| *byte == 0xff);
            if len != 4 || offset % 4 != 0 {
                assert!(untouched, "{len} bytes at {offset:#x}");
                assert!(
                    driver
                        .transport
                        .write(offset, &vec![0xff; len])
                        .is_continue()
                );
            }
        }
    }
    assert_eq!(driver.status(), 0);
}

#[test]
fn features_are_seen_through_two_windows() {
    let (driver, _) = driver();
    let rings = MockDriver::VERSION_1 | MockDriver::EVENT_IDX | 1 << 28;
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

#[test]
fn features_ok_stays_clear_unless_all_agree() {
    let (driver, controls) = driver();
    assert!(driver.negotiate(FEATURE));
    assert!(driver.negotiate(0));
    for not_offered in [1, 1 << 24, 1 << 34, 1 << 63, 1 << 40] {
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

#[test]
fn features_are_frozen_once_agreed_on() {
    let (mut driver, controls) = driver();
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

#[test]
fn several_status_bits_may_come_at_once_and_none_goes_but_by_reset() {
    let (driver, _) = driver();
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

#[test]
fn queues_that_do_not_exist_read_as_zero_and_take_nothing() {
    let (driver, _) = driver();
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

#[test]
fn a_queue_takes_only_sizes_that_a_queue_can_have() {
    let (driver, _) = driver();
    let state = |driver: &MockDriver| driver.transport.state().unwrap().core.queues;
    driver.write(register::QUEUE_SEL, 0);
    assert_eq!(state(&driver)[0].size, 64);
    driver.write(register::QUEUE_SIZE, 8);
    for size in [0, 3, 65, 128, 0x1_0000, 0x1_0010, u32::MAX] {
        driver.write(register::QUEUE_SIZE, size);
        assert_eq!(state(&driver)[0].size, 8);
    }
    assert_eq!(state(&driver)[1].size, 16);
}

#[test]
fn the_registers_of_a_ready_queue_do_not_change() {
    let (mut driver, _) = driver();
    let queue = DriverQueue::new(&driver.memory, MockDriver::QUEUES, 8);
    assert!(driver.negotiate(0));
    driver.enable_queue(0, &queue);
    let ready = driver.transport.state().unwrap().core.queues;
    let change = |driver: &MockDriver| {
        for register in 0x80..0xa8 {
            driver.write(register & !3, 0xdead_0000);
        }
        driver.write(register::QUEUE_SIZE, 4);
    };
    change(&driver);
    assert_eq!(driver.transport.state().unwrap().core.queues, ready);
    // Before the device starts the driver can take a queue back, and then change it.
    driver.write(register::QUEUE_READY, 0);
    assert_eq!(driver.read(register::QUEUE_READY), 0);
    change(&driver);
    assert_ne!(driver.transport.state().unwrap().core.queues, ready);

    driver.start(0, 8);
    driver.write(register::QUEUE_SEL, 0);
    change(&driver);
    driver.write(register::QUEUE_READY, 0);
    assert_eq!(driver.read(register::QUEUE_READY), 1);
    echo(&mut driver);
}

#[test]
fn reset_puts_everything_back_at_any_step() {
    let (mut driver, controls) = driver();
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
        state.core.config_generation -= generation;
        assert_eq!(state, fresh, "after {steps} steps");
        assert_eq!(driver.read(register::INTERRUPT_STATUS), 0);
    }
    assert_eq!(*controls.given_back.lock().unwrap(), [0, 1]);
    driver.start(0, 8);
    echo(&mut driver);
}

#[test]
fn a_device_that_cannot_start_says_so_and_can_be_reset() {
    let (mut driver, controls) = driver();
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

#[test]
fn a_queue_that_is_not_in_ram_is_refused_when_the_driver_is_ready() {
    let (mut driver, controls) = driver();
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

#[test]
fn an_interrupt_stays_pending_until_it_is_acknowledged() {
    let (mut driver, controls) = driver();
    driver.start(0, 8);
    echo(&mut driver);
    driver.line.wait_for(1);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), 1);
    let interrupt = controls.interrupt.lock().unwrap().clone().unwrap();
    let generation = driver.read(register::CONFIG_GENERATION);
    interrupt.trigger(InterruptEvent::Config);
    assert_ne!(driver.read(register::CONFIG_GENERATION), generation);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), 3);
    driver.write(register::INTERRUPT_ACK, 1);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), 2);
    driver.write(register::INTERRUPT_ACK, 0xffff_fffd);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), 2);
    driver.write(register::INTERRUPT_ACK, 2);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), 0);
    assert!(interrupt.notifier(InterruptEvent::Queue(0)).is_none());
}

#[test]
fn the_configuration_is_read_and_written_at_any_width() {
    let (driver, _) = driver();
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
    driver.config(MmioTransport::SIZE - register::CONFIG - 4, &mut data);
    assert_eq!(data, [0; 4]);
}

#[test]
fn a_paused_device_goes_on_where_it_was() {
    let (mut driver, _) = driver();
    driver.start(MockDriver::EVENT_IDX, 8);
    echo(&mut driver);
    assert!(matches!(
        driver.transport.state(),
        Err(TransportError::NotPaused { .. })
    ));
    driver.transport.pause();
    driver.transport.pause();
    let state = driver.transport.state().unwrap();
    assert_eq!(state.core.queues[0].next_avail, 1);
    assert_eq!(state.core.queues[0].next_used, 1);
    // What is asked for meanwhile waits, even where the notification was lost.
    driver.fill(0x1000, b"later");
    let buffers = [Buffer::readable(0x1000, 5), Buffer::writable(0x2000, 5)];
    driver.queues[0].add(&driver.memory, &buffers);
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert_eq!(driver.queues[0].used(&driver.memory), None);
    driver.transport.resume();
    driver.transport.resume();
    assert_eq!(driver.queues[0].wait_used(&driver.memory).1, 5);
    assert_eq!(driver.bytes(0x2000, 5), b"later");
}

#[test]
fn a_driver_that_gets_ready_while_paused_is_served_afterwards() {
    let (mut driver, controls) = driver();
    driver.transport.pause();
    driver.start(0, 8);
    assert_eq!(controls.calls.load(Ordering::SeqCst), 0);
    driver.transport.resume();
    echo(&mut driver);
    // And one that resets the device while it is paused finds it reset.
    driver.transport.pause();
    driver.write(register::STATUS, 0);
    driver.transport.resume();
    assert_eq!(driver.status(), 0);
    driver.start(0, 8);
    echo(&mut driver);
}

fn restore(driver: &mut MockDriver, state: &MmioState) -> Result<(), TransportError> {
    let (device, _) = EchoDevice::boxed();
    let io = IoThread::spawn("test-io", |_| ()).unwrap();
    let line = Arc::new(InterruptRecorder::default());
    driver.transport = MmioTransport::restore(
        device,
        Arc::clone(&driver.memory),
        io.handle().clone(),
        Arc::clone(&line) as Arc<dyn InterruptLine>,
        state,
    )?;
    driver.io = io;
    driver.line = line;
    Ok(())
}

#[test]
fn state_survives_being_stored_at_every_step() {
    let (mut driver, _) = driver();
    for step in 0..4 {
        match step {
            0 => {}
            1 => assert!(driver.negotiate(FEATURE)),
            2 => driver.start(MockDriver::EVENT_IDX | FEATURE, 8),
            _ => {
                for _ in 0..3 {
                    echo(&mut driver);
                }
                driver.queues[0].set_avail_index(&driver.memory, 100);
                driver.notify(0);
                driver.wait_needs_reset();
            }
        }
        if step == 2 {
            echo(&mut driver);
            driver.line.wait_for(1);
        }
        driver.write(register::QUEUE_SEL, 1);
        driver.transport.pause();
        let state = driver.transport.state().unwrap();
        let stored = serde_json::to_string(&state).unwrap();
        restore(&mut driver, &serde_json::from_str(&stored).unwrap()).unwrap();
        assert_eq!(driver.transport.state().unwrap(), state, "step {step}");
        driver.transport.resume();
        assert_eq!(
            driver.line.count(),
            usize::from(step >= 2),
            "a pending interrupt is told again"
        );
        if step == 2 {
            echo(&mut driver);
        }
    }
    assert_ne!(driver.status() & status::NEEDS_RESET, 0);
    driver.start(0, 8);
    echo(&mut driver);
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let (mut driver, _) = driver();
    driver.start(0, 8);
    driver.transport.pause();
    let good = driver.transport.state().unwrap();
    let bad: [fn(&mut MmioState); 9] = [
        |state| state.core.queues.truncate(1),
        |state| state.core.queues.push(state.core.queues[0]),
        |state| state.core.queues[0].size = 0,
        |state| state.core.queues[1].size = 32,
        |state| state.core.queues[0].desc_table = MockDriver::HOLE,
        |state| state.core.queues[0].used_ring += 1,
        |state| state.core.driver_features |= 1 << 63,
        |state| state.core.driver_features = 0,
        |state| state.core.status &= !(status::FEATURES_OK as u8),
    ];
    for (at, spoil) in bad.into_iter().enumerate() {
        let mut state = good.clone();
        spoil(&mut state);
        let error = restore(&mut driver, &state).unwrap_err();
        assert!(
            matches!(
                error,
                TransportError::State {
                    device_type: 42,
                    ..
                }
            ),
            "{at}: {error}"
        );
    }
    restore(&mut driver, &good).unwrap();
    driver.transport.resume();
    echo(&mut driver);
}

#[test]
fn an_ended_io_thread_makes_the_device_need_a_reset() {
    let (mut driver, _) = driver();
    driver.start(0, 8);
    driver.io = IoThread::spawn("other", |_| ()).unwrap();
    driver.transport.pause();
    assert_ne!(driver.status() & status::NEEDS_RESET, 0);
    driver.transport.resume();
    driver.write(register::STATUS, 0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn no_sequence_of_register_accesses_breaks_the_device() {
    let (mut driver, _) = driver();
    let mut random = 0x1234_5678_9abc_def1_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for _ in 0..200 {
        driver.start(0, 8);
        for _ in 0..100 {
            let offset = next() % 0x120;
            let value = match next() % 4 {
                0 => next() % 4,
                1 => next() % 256,
                2 => MockDriver::QUEUES + next() % 0x4000,
                _ => next(),
            };
            let len = [4, 4, 4, 4, 1, 2, 8][(next() % 7) as usize];
            let offset = if len == 4 { offset & !3 } else { offset };
            let _ = driver.transport.write(offset, &value.to_le_bytes()[..len]);
            driver.transport.read(offset, &mut [0xff; 8][..len]);
            if next() % 16 == 0 {
                driver.transport.pause();
                let _ = driver.transport.state().unwrap();
                driver.transport.resume();
            }
        }
    }
    driver.start(0, 8);
    echo(&mut driver);
}

#[test]
fn accesses_from_several_vcpus_and_a_worker_do_not_block_each_other() {
    let (mut driver, controls) = driver();
    driver.start(0, 8);
    let interrupt = controls.interrupt.lock().unwrap().clone().unwrap();
    let transport = &driver.transport;
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..500 {
                    let mut data = [0; 4];
                    transport.read(register::STATUS, &mut data);
                    let _ = transport.write(register::STATUS, &0_u32.to_le_bytes());
                    let _ = transport.write(register::STATUS, &READY.to_le_bytes());
                    let _ = transport.write(register::QUEUE_NOTIFY, &[0; 4]);
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..500 {
                interrupt.trigger(InterruptEvent::Queue(0));
                interrupt.needs_reset(&"as the test asked");
            }
        });
    });
    wait_until("a reset", || {
        driver.write(register::STATUS, 0);
        driver.status() == 0
    });
    driver.start(0, 8);
    echo(&mut driver);
}
