//! The library with Debian's kernels as guests, several in one process. They need KVM with hardware
//! behind it, and are run as root by `cargo xtask test`.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use kiln_tests::linux::{PATIENCE, guest_assets};
use kiln_tests::tap::Tap;
use kiln_vmm::{
    Captured, Console, ConsoleInput, ConsoleOutput, Disk, Events, Kernel, MemorySize, Net,
    VmBuilder, VmEvent, VmExit, VmHandle,
};
use kiln_xtask::initrd;

struct Machine {
    handle: VmHandle,
    events: Events,
    printed: Captured,
    disk: PathBuf,
    _tap: Tap,
    _folder: tempfile::TempDir,
}

/// Starts a guest that writes `text` to its disk, pings the host, prints `working`, and goes on
/// with `last`.
fn start(number: u8, tap: &'static str, last: &str) -> Machine {
    let folder = tempfile::tempdir().unwrap();
    let kernel = guest_assets().kernel("6.12").unwrap();
    let (network, disk) = (
        format!("192.168.{}", 120 + number),
        folder.path().join("disk"),
    );
    let tap_of_host = Tap::new(tap, &format!("{network}.1/24"));
    fs::write(&disk, vec![0; 4 << 20]).unwrap();
    let script = format!(
        "ping -c 1 {network}.1 | grep received
         echo written by {number} | dd of=/dev/vda bs=512 seek=7 conv=sync,fsync 2>/dev/null
         echo working
         {last}"
    );
    let initrd = folder.path().join("initrd");
    initrd::with_script(&kernel.initrd, &initrd, &script).unwrap();
    let (output, printed) = ConsoleOutput::capture(1 << 20);
    let vm = VmBuilder::new()
        .memory(MemorySize::mib(192))
        .kernel(Kernel::open(&kernel.bzimage).unwrap())
        .initrd(initrd)
        .cmdline(format!(
            "console=ttyS0 quiet panic=-1 kiln.ip=eth0:{network}.2/24"
        ))
        .disk(Disk::open(&disk).unwrap())
        .net(Net::tap(tap).unwrap())
        .serial(Console::new(ConsoleInput::null(), output))
        .build()
        .unwrap();
    let events = vm.events().unwrap();
    Machine {
        handle: vm.start().unwrap(),
        events,
        printed,
        disk,
        _tap: tap_of_host,
        _folder: folder,
    }
}

#[test]
#[ignore = "needs hardware KVM: run by cargo xtask test"]
fn four_guests_in_one_process_end_each_in_its_own_way() {
    let panic = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger";
    let machines = [
        (start(0, "kilnlib0", "poweroff -f"), VmExit::Shutdown),
        (start(1, "kilnlib1", "reboot -f"), VmExit::Reset),
        (start(2, "kilnlib2", panic), VmExit::GuestPanic),
        (
            start(3, "kilnlib3", "while true; do :; done"),
            VmExit::Stopped,
        ),
    ];
    let since = Instant::now();
    for (number, (machine, exit)) in machines.iter().enumerate() {
        let text = || machine.printed.text();
        while !text().contains("working") && since.elapsed() < 2 * PATIENCE {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        assert!(text().contains("working"), "{}", text());
        assert!(text().contains("1 packets received"), "{}", text());
        if *exit == VmExit::Stopped {
            // The one that goes on, through a pause, until it is stopped.
            machine.handle.pause().unwrap();
            machine.handle.resume().unwrap();
            assert_eq!(machine.handle.try_wait().unwrap(), None);
            machine.handle.stop();
        }
        let ended = machine.handle.wait_timeout(PATIENCE).unwrap();
        assert_eq!(ended.as_ref(), Some(exit), "{}", text());
        let mut told = Vec::new();
        while let Some(event) = machine.events.recv() {
            told.push(event);
        }
        assert_eq!(told.first(), Some(&VmEvent::Started));
        assert_eq!(
            told.contains(&VmEvent::GuestPanic),
            *exit == VmExit::GuestPanic
        );
        assert_eq!(told.last(), Some(&VmEvent::Ended(exit.clone())));
        let disk = fs::read(&machine.disk).unwrap();
        let expected = format!("written by {number}\n");
        assert!(
            disk[7 * 512..].starts_with(expected.as_bytes()),
            "guest {number}"
        );
    }
}
