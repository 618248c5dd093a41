//! Machines without an I/O thread, whose devices work on a loop of the program's own: needs
//! `/dev/kvm`, and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kiln_tests::machines::{LONG, assert_belongings, builder, is_alone, settled_belongings, start};
use kiln_tests::{guests, host};
use kiln_vmm::{
    Console, ConsoleInput, ConsoleOutput, Host, IoLoop, Transport, Vm, VmExit, VmHandle, VmState,
};

fn own_loop() -> IoLoop {
    IoLoop::new(|panic| panic!("{panic}")).unwrap()
}

/// A machine on this loop whose driver sets a device up, and then runs for ever.
fn driver(host: &Arc<Host>, own: &IoLoop) -> Vm {
    builder(host, guests::virtio_driver_ok())
        .rng(kiln_vmm::Rng::new().transport(Transport::Mmio))
        .io_loop(own)
        .build()
        .unwrap()
}

/// Waits, and so turns the loop, until the driver has done it: the device is on the loop then.
fn wait_for_driver(handle: &VmHandle) {
    let since = Instant::now();
    while handle.exit_counts()[0].pio_out == 0 {
        assert!(since.elapsed() < LONG);
        let ended = handle.wait_timeout(Duration::from_millis(1)).unwrap();
        assert_eq!(ended, None);
    }
}

#[test]
fn a_guest_runs_to_its_end_while_it_is_waited_for() {
    let host = host!();
    let own = own_loop();
    let (output, captured) = ConsoleOutput::capture(1024);
    let vm = builder(&host, guests::hello())
        .serial(Console::new(ConsoleInput::null(), output))
        .io_loop(&own)
        .build()
        .unwrap();
    let handle = vm.start().unwrap();
    assert_eq!(handle.wait().unwrap(), VmExit::Shutdown);
    assert!(!captured.bytes().is_empty());
    // It is known from now on, and the loop is free for another machine.
    assert_eq!(handle.try_wait().unwrap(), Some(VmExit::Shutdown));
    drop(handle);
    let vm = driver(&host, &own);
    let handle = vm.start().unwrap();
    wait_for_driver(&handle);
    assert_eq!(handle.try_wait().unwrap(), None);
}

#[test]
fn all_that_waits_for_the_machine_serves_its_devices_and_nothing_is_left() {
    if !is_alone("all_that_waits_for_the_machine_serves_its_devices_and_nothing_is_left") {
        return;
    }
    let host = host!();
    let own = own_loop();
    start(&host, guests::power_off()).wait().unwrap();
    let before = settled_belongings();

    drop(driver(&host, &own));
    assert_belongings(before, "not started");

    let handle = driver(&host, &own).start().unwrap();
    wait_for_driver(&handle);
    assert!(handle.pause().is_ok() && handle.state() == VmState::Paused);
    assert!(handle.resume().is_ok() && handle.state() == VmState::Running);
    handle.stop();
    assert_eq!(handle.wait().unwrap(), VmExit::Stopped);
    drop(handle);
    assert_belongings(before, "stopped");

    let handle = driver(&host, &own).start().unwrap();
    wait_for_driver(&handle);
    drop(handle);
    assert_belongings(before, "dropped with a device at work");

    // The guest may be anywhere on its way to the device.
    drop(driver(&host, &own).start().unwrap());
    assert_belongings(before, "dropped at once");

    let handle = driver(&host, &own).start().unwrap();
    let stopper = handle.clone();
    let other = thread::spawn(move || stopper.stop());
    assert_eq!(handle.wait().unwrap(), VmExit::Stopped);
    other.join().unwrap();
    drop(handle);
    assert_belongings(before, "stopped by another thread");
}

#[test]
fn the_last_handle_can_be_dropped_elsewhere_while_the_loop_is_turned() {
    let host = host!();
    let own = own_loop();
    let handle = driver(&host, &own).start().unwrap();
    wait_for_driver(&handle);
    let is_over = Arc::new(AtomicBool::new(false));
    let over = Arc::clone(&is_over);
    let other = thread::spawn(move || {
        drop(handle);
        over.store(true, Ordering::Release);
    });
    while !is_over.load(Ordering::Acquire) {
        own.turn(Some(Duration::from_millis(10))).unwrap();
    }
    other.join().unwrap();
}
