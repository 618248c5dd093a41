//! Accesses to registers, configuration, interrupts and BARs that make no sense.

use kiln_device_api::BusDevice;
use kiln_virtio_device::testing::{
    Buffer, MockDriver, TransportKind, over_each_transport, register, status,
};

use crate::ram::{DATA, HIGH_END, Ram};
use crate::trial::{SIZE, Trial};
use crate::victims;

over_each_transport!(
    a_notification_for_no_queue_does_nothing,
    every_byte_of_the_configuration_can_be_written,
    registers_written_while_the_device_works_leave_its_rings,
    a_reset_at_any_step_gives_a_device_as_new,
    a_queue_that_is_reset_can_be_placed_anywhere,
);

/// Something that the device has to do, in each of its queues.
fn busy(driver: &mut MockDriver) {
    for queue in 0..driver.queues.len() {
        let buffers = [Buffer::readable(DATA, 600), Buffer::writable(DATA, 600)];
        driver.queues[queue].add(&driver.memory, &buffers);
        driver.notify(queue as u32);
    }
}

fn a_notification_for_no_queue_does_nothing(kind: TransportKind) {
    let ram = Ram::new();
    for (device, mut victim) in victims::all() {
        let mut trial = Trial::new(kind, &mut *victim, &ram);
        trial.restart(0);
        let queues = trial.driver.queues.len() as u32;
        for queue in [
            queues,
            queues + 1,
            0x7fff,
            0xffff,
            0x1_0000,
            0x8000_0000,
            u32::MAX,
        ] {
            trial.what = format!("{device}, queue {queue:#x}");
            let before = trial.driver.status();
            trial.attack(|driver| driver.notify(queue));
            assert_eq!(trial.driver.status(), before, "{}", trial.what);
        }
        // And before there is any.
        for status in [0, 1, 3, 0xb] {
            trial.attack(|driver| {
                driver.write(register::STATUS, 0);
                driver.write(register::STATUS, status);
                (0..4).for_each(|queue| driver.notify(queue));
            });
        }
        trial.recover();
    }
}

fn every_byte_of_the_configuration_can_be_written(kind: TransportKind) {
    let ram = Ram::new();
    for (device, mut victim) in victims::all() {
        let mut trial = Trial::new(kind, &mut *victim, &ram);
        trial.restart(0);
        for offset in (0..0x48).chain([0xf8, 0xff, 0x100, 0xeff, 0x1000]) {
            for width in [1, 2, 4, 8] {
                for byte in [0, 1, 2, 0x7f, 0xff] {
                    trial.what = format!("{device}, {width} bytes at {offset:#x}");
                    trial.attack(|driver| {
                        let offset = register::CONFIG + offset;
                        let data = [byte; 8];
                        assert!(driver.transport.write(offset, &data[..width]).is_continue());
                        driver.transport.read(offset, &mut [0xff; 8][..width]);
                    });
                }
            }
        }
        trial.recover();
    }
}

fn registers_written_while_the_device_works_leave_its_rings(kind: TransportKind) {
    let ram = Ram::new();
    for (device, mut victim) in victims::all() {
        for features in [0, MockDriver::RING_RESET] {
            let mut trial = Trial::new(kind, &mut *victim, &ram);
            trial.restart(features);
            trial.what = format!("{device}, features {features:#x}");
            let queues = trial.driver.queues.len() as u32;
            for queue in 0..queues {
                for place in [0, 0x2000, HIGH_END, u64::MAX] {
                    trial.attack(|driver| {
                        busy(driver);
                        Trial::place_rings(driver, queue, 4, [place; 3]);
                        driver.write(register::QUEUE_READY, 0);
                        driver.write(register::DRIVER_FEATURES, 0xffff_ffff);
                        driver.write(register::STATUS, 0xf);
                        busy(driver);
                    });
                }
            }
            // The rings are where they were: they are used.
            let queue = trial.victim.eager()[0];
            let driver = &trial.driver;
            let well = driver.status() & status::NEEDS_RESET == 0;
            let used = driver.queues[queue].used_index(&driver.memory);
            assert!(
                !well || used > 0 || device == "net" || device == "console",
                "{}",
                trial.what
            );
            trial.recover();
        }
    }
}

fn a_reset_at_any_step_gives_a_device_as_new(kind: TransportKind) {
    let ram = Ram::new();
    for (device, mut victim) in victims::all() {
        let mut trial = Trial::new(kind, &mut *victim, &ram);
        for step in 0..8 {
            trial.what = format!("{device}, step {step}");
            trial.attack(|driver| {
                for value in [1, 3, 0xb].into_iter().take(step) {
                    driver.write(register::STATUS, value);
                }
                match step {
                    4.. => driver.start(0, SIZE),
                    _ => return,
                }
                if step > 4 {
                    busy(driver);
                }
                if step > 5 {
                    driver.settle(1);
                }
                if step > 6 {
                    driver.transport.pause();
                }
            });
            trial.driver.write(register::STATUS, 0);
            assert_eq!(trial.driver.status(), 0, "{}", trial.what);
            trial.driver.write(register::QUEUE_SEL, 0);
            assert_eq!(trial.driver.read(register::QUEUE_READY), 0);
            // It does not touch what it had.
            let before = trial.ram.copy();
            trial.attack(|driver| (0..4).for_each(|queue| driver.notify(queue)));
            trial.ram.check_only_written(&before, &[]);
            trial.recover();
        }
    }
}

fn a_queue_that_is_reset_can_be_placed_anywhere(kind: TransportKind) {
    let ram = Ram::new();
    for (device, mut victim) in victims::all() {
        let mut trial = Trial::new(kind, &mut *victim, &ram);
        trial.restart(MockDriver::RING_RESET);
        for queue in 0..trial.driver.queues.len() as u32 {
            for place in [
                0,
                0x2000,
                MockDriver::HIGH - 0x800,
                HIGH_END - 0x100,
                HIGH_END,
                u64::MAX - 0xfff,
            ] {
                trial.what = format!("{device}, queue {queue} at {place:#x}");
                trial.restart(MockDriver::RING_RESET);
                trial.attack(|driver| {
                    busy(driver);
                    driver.write(register::QUEUE_SEL, queue);
                    driver.write(register::QUEUE_RESET, 1);
                    let areas = [place, place.wrapping_add(0x400), place.wrapping_add(0x600)];
                    Trial::place_rings(driver, queue, 32, areas);
                    (0..4).for_each(|queue| driver.notify(queue));
                });
            }
        }
        trial.recover();
    }
}

/// Everything that a function has on a PCI bus, one after the other.
#[test]
fn every_register_of_a_function_can_be_written_while_it_works() {
    let ram = Ram::new();
    for (device, mut victim) in victims::all() {
        let mut trial = Trial::new(TransportKind::Pci, &mut *victim, &ram);
        trial.restart(0);
        for offset in (0..0x100_u16).chain([0x100, 0xffc, 0xfff]) {
            trial.what = format!("{device}, configuration space at {offset:#x}");
            for value in [0_u32, 1, 0x7f, 0x8000, u32::MAX] {
                trial.attack(|driver| {
                    let pci = driver.transport.pci();
                    for width in [1, 2, 4] {
                        pci.set_config(offset, &value.to_le_bytes()[..width]);
                        pci.config::<4>(offset);
                    }
                });
            }
            trial.attack(|driver| {
                // As it was, for the next.
                let pci = driver.transport.pci();
                pci.move_bar(0xe000_0000);
                pci.enable_memory();
                busy(driver);
            });
        }
        trial.recover();
    }
}

#[test]
fn the_window_in_configuration_space_leads_into_the_bar_only() {
    let ram = Ram::new();
    for (device, mut victim) in victims::all() {
        let mut trial = Trial::new(TransportKind::Pci, &mut *victim, &ram);
        trial.restart(0);
        for bar in [0_u8, 1, 5, 6, 0xff] {
            for offset in [
                0,
                1,
                0x14,
                0x38,
                0x1000,
                0x8000,
                0x8030,
                0x9000,
                0x1_0000,
                0x7fff_fffc,
                u32::MAX,
            ] {
                for length in [0_u32, 1, 2, 3, 4, 8, u32::MAX] {
                    trial.what = format!("{device}, BAR {bar}, {length} bytes at {offset:#x}");
                    trial.attack(|driver| {
                        let pci = driver.transport.pci();
                        let window = pci.pci_capability();
                        pci.set_config(window + 4, &[bar]);
                        pci.set_config(window + 8, &offset.to_le_bytes());
                        pci.set_config(window + 12, &length.to_le_bytes());
                        for at in 16..20 {
                            pci.config::<1>(window + at);
                            pci.set_config(window + at, &[0x81]);
                        }
                        pci.config::<4>(window + 16);
                        pci.set_config(window + 16, &[0xff; 4]);
                    });
                }
            }
            trial.restart(0);
        }
        trial.recover();
    }
}

#[test]
fn the_interrupt_table_and_the_bar_can_change_at_any_time() {
    let ram = Ram::new();
    for (device, mut victim) in victims::all() {
        let mut trial = Trial::new(TransportKind::Pci, &mut *victim, &ram);
        trial.restart(0);
        let table = u64::from(u32::from_le_bytes({
            let pci = trial.driver.transport.pci();
            pci.config(pci.msix_capability() + 4)
        }));
        for (round, at) in (0..0x60).chain([0x800, 0xff0, 0x1000, 0x1004]).enumerate() {
            trial.what = format!("{device}, MSI-X table at {at:#x}");
            trial.attack(|driver| {
                let pci = driver.transport.pci();
                for width in [1, 2, 4, 8] {
                    for byte in [0xff, 0, 1] {
                        pci.write(table + at, &[byte; 8][..width]);
                        pci.read(table + at, &mut [0; 8][..width]);
                    }
                }
                let control = [0_u16, 0x8000, 0x4000, 0xc000][round % 4];
                pci.set_config(pci.msix_capability() + 2, &control.to_le_bytes());
                busy(driver);
            });
        }
        for address in [
            0xe010_0000,
            0xe0ff_0000,
            0xe0ff_fff0,
            0,
            0xffff_fff0,
            0xdfff_f000,
            0xe000_0000,
        ] {
            trial.what = format!("{device}, the BAR at {address:#x}");
            trial.attack(|driver| {
                // What it has to do is notified where the BAR was.
                busy(driver);
                let pci = driver.transport.pci();
                pci.move_bar(address);
                pci.set_config(4, &[0, 0]);
                pci.enable_memory();
            });
            trial.driver.transport.pci().move_bar(0xe000_0000);
        }
        trial.recover();
    }
}
