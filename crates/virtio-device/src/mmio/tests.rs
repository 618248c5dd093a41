use std::sync::Arc;

use kiln_device_api::BusDevice;

use crate::InterruptEvent;
use crate::test_device::{Controls, EchoDevice};
use crate::testing::{Buffer, MockDriver, register};

fn driver() -> (MockDriver, Arc<Controls>) {
    let (device, controls) = EchoDevice::boxed();
    (MockDriver::new(device), controls)
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
        register::QUEUE_RESET,
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
fn an_interrupt_stays_pending_until_it_is_acknowledged() {
    let (mut driver, controls) = driver();
    driver.start(0, 8);
    let buffers = [Buffer::readable(0x1000, 5), Buffer::writable(0x2000, 8)];
    driver.request(0, &buffers);
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
