//! Machines that are hard to stop, for the test that it is done soon and for the benchmark of how
//! soon.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::any::Any;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kiln_vmm::{
    BlockBackend, Console, ConsoleInput, ConsoleOutput, Disk, GuestSlice, Host, VmHandle,
};

use crate::guests;
use crate::machines::{builder, start};
use crate::scripted::{DATA, Guest};

/// A machine that is at what makes it hard to stop, and what has to live as long.
pub type Stubborn = (VmHandle, Box<dyn Any>);

/// Starts a machine.
pub type Start = fn(&Arc<Host>) -> Stubborn;

/// What makes a machine hard to stop, and how to start one.
pub const STUBBORN: [(&str, Start); 5] = [
    ("busy loop", |host| at_it(start(host, guests::busy()))),
    ("HLT, interrupts off", |host| {
        at_it(start(host, guests::halted()))
    }),
    ("storm of exits", |host| {
        at_it(start(host, guests::exit_storm()))
    }),
    ("blocked console", blocked_console),
    ("slow block backend", slow_backend),
];

/// Gives the guest time to get to its loop.
fn at_it(handle: VmHandle) -> Stubborn {
    std::thread::sleep(Duration::from_millis(5));
    (handle, Box::new(()))
}

fn blocked_console(host: &Arc<Host>) -> Stubborn {
    let (reader, writer) = io::pipe().unwrap();
    let console = Console::new(ConsoleInput::null(), ConsoleOutput::fd(writer.into()));
    let vm = builder(host, guests::chatter()).serial(console);
    let handle = vm.build().unwrap().start().unwrap();
    // More than the pipe and the port's own buffer hold.
    while handle.exit_counts()[0].pio_out < 200_000 {
        std::thread::sleep(Duration::from_millis(5));
    }
    (handle, Box::new(reader))
}

/// How long the slow backend takes for a request.
pub const SLOW: Duration = Duration::from_millis(300);

struct SlowDisk(Arc<AtomicBool>);

impl BlockBackend for SlowDisk {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read_at(&mut self, _offset: u64, _buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        self.0.store(true, Ordering::SeqCst);
        std::thread::sleep(SLOW);
        Ok(())
    }

    fn write_at(&mut self, _offset: u64, _buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn slow_backend(host: &Arc<Host>) -> Stubborn {
    let is_reading = Arc::new(AtomicBool::new(false));
    let guest = Guest::new().start_virtio(0, 1).read_disk(0, 0, DATA, 512);
    let vm = guest
        .machine()
        .unwrap()
        .host(Arc::clone(host))
        .disk(Disk::new(SlowDisk(Arc::clone(&is_reading))));
    let handle = vm.build().unwrap().start().unwrap();
    while !is_reading.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    (handle, Box::new(()))
}
