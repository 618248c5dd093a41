//! Whose a message is: the spans that machines and devices log in. One test in a process of its
//! own, since who listens to messages is a thing of the process. Needs `/dev/kvm`, and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "../../vmm/examples/guests/mod.rs"]
mod writer;

use std::io;
use std::sync::{Arc, Mutex};

use kiln_tests::host;
use kiln_tests::machines::{LONG, end};
use kiln_vmm::virtio::{QueueError, QueueHandler, Registrar, SimpleDevice, Turn};
use kiln_vmm::{BlockBackend, Disk, GuestSlice, VmBuilder, VmExit};
use tracing_subscriber::EnvFilter;
use writer::{Buffer, DATA, Guest};

/// Where messages go.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// The messages since the last call.
    fn take(&self) -> Vec<String> {
        let bytes = std::mem::take(&mut *self.0.lock().unwrap());
        let text = String::from_utf8(bytes).unwrap();
        text.lines().map(|line| line.trim().to_owned()).collect()
    }

    fn install(&self, filter: &str) {
        let log = self.clone();
        tracing_subscriber::fmt()
            .with_env_filter(EnvFilter::new(filter))
            .with_writer(move || log.clone())
            .with_ansi(false)
            .with_target(false)
            .without_time()
            .init();
    }
}

impl io::Write for Log {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Broken;

impl BlockBackend for Broken {
    fn size(&self) -> u64 {
        64 << 10
    }
    fn is_read_only(&self) -> bool {
        true
    }
    fn read_at(&mut self, _: u64, _: &[GuestSlice<'_>]) -> io::Result<()> {
        Err(io::Error::other("as the test asked"))
    }
    fn write_at(&mut self, _: u64, _: &[GuestSlice<'_>]) -> io::Result<()> {
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A device that says that it starts, and lets its driver make a mistake.
struct Talker;

impl QueueHandler for Talker {
    fn process(&mut self, turn: &mut Turn, _: &mut Registrar) -> Result<(), QueueError> {
        while let Some(mut chain) = turn.pop()? {
            chain.readable.read(&mut [0; 8])?;
            turn.complete(chain, 0)?;
        }
        Ok(())
    }

    fn start(&mut self, features: u64, _: &mut Registrar) -> io::Result<()> {
        tracing::warn!("started with features {features:#x}");
        Ok(())
    }
}

/// A machine whose first device is a broken disk, and whose second one needs a reset.
fn machine() -> VmBuilder {
    let guest = Guest::new()
        .start_virtio(0, 1)
        .read_disk(0, 0, DATA, 512)
        .start_virtio(1, 1)
        .offer(1, 0, &[Buffer::Readable(DATA, 4)])
        .spin();
    guest
        .machine()
        .unwrap()
        .disk(Disk::new(Broken))
        .virtio_device("talker", SimpleDevice::new(4, [16], Talker))
}

/// Runs it until its second device needs the reset.
fn run(builder: VmBuilder) {
    let handle = builder.build().unwrap().start().unwrap();
    let begun = std::time::Instant::now();
    while handle.metrics().devices[1].needs_reset == 0 {
        assert!(begun.elapsed() < LONG);
        std::thread::yield_now();
    }
    handle.stop();
    assert_eq!(end(&handle), VmExit::Stopped);
}

#[test]
fn a_message_says_which_machine_and_which_device_it_is_about() {
    let _host = host!();
    run(machine());
    assert!(
        !tracing::dispatcher::has_been_set(),
        "the library has installed a logger"
    );

    let log = Log::default();
    // Warnings alone, as `kiln` has it: the spans have to be there all the same.
    log.install("warn");
    let expected = |vm: &str| {
        [
            format!(
                "WARN {vm}:device{{name=\"disk 0\"}}: read from a disk (told once): as the test asked"
            ),
            format!("WARN {vm}:device{{name=\"talker\"}}: started with features 0x100000000"),
            format!(
                "WARN {vm}:device{{name=\"talker\"}}: a virtio device needs to be reset by its \
                 driver (told once): queue 0: use a buffer of a request"
            ),
        ]
    };
    let check = |lines: &[String], vm: &str| {
        for line in expected(vm) {
            let found = lines
                .iter()
                .filter(|found| found.starts_with(&line))
                .count();
            assert_eq!(found, 1, "{line}\n{lines:#?}");
        }
    };
    run(machine());
    let lines = log.take();
    assert_eq!(lines.len(), 3, "{lines:#?}");
    check(&lines, "vm");

    // Several machines at once.
    let names = ["a", "b", "c"];
    std::thread::scope(|scope| {
        for name in names {
            scope.spawn(move || run(machine().name(name)));
        }
    });
    let lines = log.take();
    assert_eq!(lines.len(), 9, "{lines:#?}");
    for name in names {
        check(&lines, &format!("vm{{name=\"{name}\"}}"));
    }
}
