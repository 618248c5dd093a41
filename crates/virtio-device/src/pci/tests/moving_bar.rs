//! Moving the BAR while the device is used.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::{driver, echo};
use crate::testing::Buffer;

const PLACES: [u32; 3] = [0xe000_0000, 0xe020_0000, 0xe0fe_0000];

#[test]
fn the_bar_moves_while_notifications_and_interrupts_run() {
    let (mut driver, controls) = driver();
    driver.start(0, 8);
    let stop = AtomicBool::new(false);
    let transport = &driver.transport;
    let (memory, queue) = (&driver.memory, &mut driver.queues[0]);
    thread::scope(|scope| {
        scope.spawn(|| {
            for place in PLACES.iter().cycle() {
                transport.pci().move_bar(*place);
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        scope.spawn(|| {
            let mut data = [0xff; 2];
            while !stop.load(Ordering::Relaxed) {
                for place in PLACES {
                    data = [0xff; 2];
                    transport
                        .pci()
                        .read_memory(u64::from(place) + 0x12, &mut data);
                    assert!([[2, 0], [0xff; 2]].contains(&data), "{data:?}");
                }
            }
            data
        });
        let pci = transport.pci();
        let notify = pci.notify(0);
        for _ in 0..500 {
            let buffers = [Buffer::readable(0x1000, 5), Buffer::writable(0x2000, 8)];
            queue.add(memory, &buffers);
            // Wherever the BAR is at the time; it may be missed, as it may on a real bus.
            while queue.used(memory).is_none() {
                for place in PLACES {
                    pci.write_memory(u64::from(place) + notify, &[0, 0]);
                }
                thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(controls.calls.load(Ordering::SeqCst) > 0);
    echo(&mut driver);
    // It answers at its last place only.
    let pci = driver.transport.pci();
    pci.move_bar(PLACES[1]);
    for place in PLACES {
        let mut data = [0xff; 2];
        pci.read_memory(u64::from(place) + 0x12, &mut data);
        let expected = if place == PLACES[1] {
            [2, 0]
        } else {
            [0xff; 2]
        };
        assert_eq!(data, expected);
    }
    echo(&mut driver);
    driver.line.wait_for(1);
}
