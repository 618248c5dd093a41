//! Pausing, storing and restoring, and drivers that do what they like.

use std::sync::atomic::Ordering;

use kiln_device_api::BusDevice;
use kiln_io_thread::IoThread;

use super::{READY, driver, echo};
use crate::test_device::{EchoDevice, FEATURE};
use crate::testing::{
    Buffer, MockDriver, TestIo, TestState, TransportKind, over_each_transport, register, status,
    wait_until,
};
use crate::{InterruptEvent, TransportError};

over_each_transport!(
    a_paused_device_goes_on_where_it_was,
    a_driver_that_gets_ready_while_paused_is_served_afterwards,
    state_survives_being_stored_at_every_step,
    a_state_that_does_not_fit_is_refused,
    an_ended_io_thread_makes_the_device_need_a_reset,
    no_sequence_of_register_accesses_breaks_the_device,
    accesses_from_several_vcpus_and_a_worker_do_not_block_each_other,
);

fn a_paused_device_goes_on_where_it_was(kind: TransportKind) {
    let (mut driver, _) = driver(kind);
    driver.start(MockDriver::EVENT_IDX, 8);
    echo(&mut driver);
    assert!(matches!(
        driver.transport.state(),
        Err(TransportError::NotPaused { .. })
    ));
    driver.transport.pause();
    driver.transport.pause();
    let state = driver.transport.state().unwrap();
    assert_eq!(state.core().queues[0].next_avail, 1);
    assert_eq!(state.core().queues[0].next_used, 1);
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

fn a_driver_that_gets_ready_while_paused_is_served_afterwards(kind: TransportKind) {
    let (mut driver, controls) = driver(kind);
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

fn state_survives_being_stored_at_every_step(kind: TransportKind) {
    let (mut driver, _) = driver(kind);
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
        let stored: TestState = serde_json::from_str(&stored).unwrap();
        driver.restore(EchoDevice::boxed().0, &stored).unwrap();
        assert_eq!(driver.transport.state().unwrap(), state, "step {step}");
        driver.transport.resume();
        assert_eq!(
            driver.line.count(),
            usize::from(step >= 2 && kind == TransportKind::Mmio),
            "a pending interrupt is told again, where neither table nor pin keeps it"
        );
        if step == 2 {
            echo(&mut driver);
        }
    }
    assert_ne!(driver.status() & status::NEEDS_RESET, 0);
    driver.start(0, 8);
    echo(&mut driver);
}

fn a_state_that_does_not_fit_is_refused(kind: TransportKind) {
    let (mut driver, _) = driver(kind);
    driver.start(0, 8);
    driver.transport.pause();
    let good = driver.transport.state().unwrap();
    let bad: [fn(&mut TestState); 9] = [
        |state| state.core_mut().queues.truncate(1),
        |state| {
            let queue = state.core().queues[0];
            state.core_mut().queues.push(queue);
        },
        |state| state.core_mut().queues[0].size = 0,
        |state| state.core_mut().queues[1].size = 32,
        |state| state.core_mut().queues[0].desc_table = MockDriver::HOLE,
        |state| state.core_mut().queues[0].used_ring += 1,
        |state| state.core_mut().driver_features |= 1 << 63,
        |state| state.core_mut().driver_features = 0,
        |state| state.core_mut().status &= !(status::FEATURES_OK as u8),
    ];
    for (at, spoil) in bad.into_iter().enumerate() {
        let mut state = good.clone();
        spoil(&mut state);
        let error = driver.restore(EchoDevice::boxed().0, &state).unwrap_err();
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
    driver.restore(EchoDevice::boxed().0, &good).unwrap();
    driver.transport.resume();
    echo(&mut driver);
}

fn an_ended_io_thread_makes_the_device_need_a_reset(kind: TransportKind) {
    let (mut driver, _) = driver(kind);
    driver.start(0, 8);
    driver.io = TestIo::Thread(IoThread::spawn("other", |_| ()).unwrap());
    driver.transport.pause();
    assert_ne!(driver.status() & status::NEEDS_RESET, 0);
    driver.transport.resume();
    driver.write(register::STATUS, 0);
    assert_eq!(driver.status(), 0);
}

fn no_sequence_of_register_accesses_breaks_the_device(kind: TransportKind) {
    let (mut driver, _) = driver(kind);
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

fn accesses_from_several_vcpus_and_a_worker_do_not_block_each_other(kind: TransportKind) {
    let (mut driver, controls) = driver(kind);
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
