//! Linux guests whose memory gets back to the host. They need KVM with hardware behind it, and are
//! run as root by `cargo xtask test`.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::time::{Duration, Instant};

use kiln_tests::linux::{Linux, PATIENCE, guest_assets};
use kiln_tests::program::Program;
use kiln_vmm::{
    Backing, Balloon, Captured, Console, ConsoleInput, ConsoleOutput, Kernel, MemoryOptions,
    MemorySize, Transport, VmBuilder, VmExit, VmHandle,
};
use kiln_xtask::initrd;

kiln_tests::over_every_transport!(
    ; over mmio when asked: ;
    when asked:
    free_memory_of_a_guest_gets_back_to_the_host,
    a_balloon_takes_memory_and_lets_the_guest_have_it_again,
);

const MIB: u64 = 1 << 20;

/// The memory that a process has of the host, in bytes.
fn rss(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number.unwrap().parse::<u64>().unwrap() * 1024
}

/// Waits until the process has at most this much of the host's memory, and gives what it has.
fn wait_rss(process: u32, most: u64) -> u64 {
    let since = Instant::now();
    loop {
        let now = rss(process);
        if now <= most || since.elapsed() > PATIENCE {
            return now;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A file in memory, filled, removed, and filled again.
const FILL_TWICE: &str = "
    mkdir /fill && mount -t tmpfs -o size=560m tmpfs /fill
    dd if=/dev/zero of=/fill/file bs=1M count=512 2>/dev/null
    echo balloon: filled
    read line
    rm /fill/file
    echo balloon: freed
    read line
    dd if=/dev/urandom of=/fill/a bs=1M count=64 2>/dev/null
    cp /fill/a /fill/b
    cmp /fill/a /fill/b && echo balloon: used again
    dmesg | grep -E 'BUG:|Oops|Bad page'; true";

fn free_memory_of_a_guest_gets_back_to_the_host(transport: Transport) {
    // A boot takes its time: what the transport has no part in is tried over one.
    let series: &[&str] = match transport {
        Transport::Pci => &["6.1", "6.12"],
        _ => &["6.12"],
    };
    for series in series {
        let linux = Linux::new(series, transport)
            .arg("--memory")
            .arg("768M")
            .arg("--balloon");
        let mut program = linux.start(FILL_TWICE).unwrap();
        let next = |program: &mut Program, text: &str| {
            assert!(program.wait_for(text, PATIENCE), "no `{text}`");
            rss(program.id())
        };
        let filled = next(&mut program, "balloon: filled");
        assert!(filled > 512 * MIB, "{filled}");
        program.type_in("\n").unwrap();
        next(&mut program, "balloon: freed");
        let freed = wait_rss(program.id(), filled - 512 * MIB * 9 / 10);
        let back = filled.saturating_sub(freed);
        println!(
            "{series} over {transport}: {} MiB with 512 MiB filled, {} MiB after they were freed",
            filled / MIB,
            freed / MIB
        );
        assert!(back >= 512 * MIB * 9 / 10, "{back} of {}", 512 * MIB);
        program.type_in("\n").unwrap();
        let outcome = program.wait(PATIENCE).unwrap();
        assert_eq!(outcome.code, Some(0), "{}", outcome.output);
        assert!(outcome.output.contains("balloon: used again"));
        for word in ["BUG:", "Oops", "Bad page"] {
            assert!(!outcome.output.contains(word), "{}", outcome.output);
        }
    }
}

/// A machine of 384 MiB whose guest has touched 256 MiB of them.
fn start(transport: Transport, backing: Backing) -> (VmHandle, Captured, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let kernel = guest_assets().kernel("6.12").unwrap();
    let script = "
        mkdir /fill && mount -t tmpfs -o size=256m tmpfs /fill
        dd if=/dev/zero of=/fill/file bs=1M count=255 2>/dev/null
        rm /fill/file
        kiln-wait-power-button";
    let initrd = folder.path().join("initrd");
    initrd::with_script(&kernel.initrd, &initrd, script).unwrap();
    let (output, printed) = ConsoleOutput::capture(1 << 20);
    let vm = VmBuilder::new()
        .memory(MemorySize::mib(384))
        .memory_options(MemoryOptions {
            backing,
            ..MemoryOptions::default()
        })
        .kernel(Kernel::open(&kernel.bzimage).unwrap())
        .initrd(initrd)
        .cmdline("console=ttyS0 quiet panic=-1")
        .serial(Console::new(ConsoleInput::null(), output))
        .transport(transport)
        .balloon(Balloon::new().free_page_reporting(false))
        .build()
        .unwrap();
    (vm.start().unwrap(), printed, folder)
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn a_balloon_takes_memory_and_lets_the_guest_have_it_again(transport: Transport) {
    let backings: &[Backing] = match transport {
        Transport::Pci => &[Backing::Anonymous, Backing::Memfd],
        _ => &[Backing::Memfd],
    };
    for &backing in backings {
        let (handle, printed, _folder) = start(transport, backing);
        wait_until("a guest that is ready", || {
            printed.text().contains("kiln-power-button: ready")
        });
        let balloon = handle.balloon().unwrap();
        let statistics = || balloon.wait_for_statistics(PATIENCE).unwrap();
        let before = statistics();
        let total = before.total.unwrap();
        assert!((256 * MIB..=384 * MIB).contains(&total), "{before:?}");
        assert!(before.free.unwrap() > 192 * MIB, "{before:?}");

        let process = std::process::id();
        let full = rss(process);
        let target = MemorySize::mib(192);
        balloon.set_target(target).unwrap();
        wait_until("a full balloon", || balloon.actual() == target);
        let empty = rss(process);
        println!(
            "{backing:?} over {transport}: {} MiB before, {} MiB with 192 MiB in the balloon",
            full / MIB,
            empty / MIB
        );
        // At most 128 MiB of what is in the balloon was never touched.
        assert!(full - empty > 50 * MIB, "{full} {empty}");
        let inside = statistics();
        let taken = before.free.unwrap() - inside.free.unwrap();
        assert!(taken > 180 * MIB, "{before:?} {inside:?}");

        balloon.set_target(MemorySize::bytes(0)).unwrap();
        wait_until("an empty balloon", || {
            balloon.actual() == MemorySize::bytes(0)
        });
        // Linux keeps some of what was freed aside, for each processor, and does not count it.
        let after = statistics();
        let returned = after.free.unwrap() - inside.free.unwrap();
        assert!(returned > 96 * MIB, "{inside:?} {after:?}");
        handle.power_button();
        let exit = handle.wait_timeout(PATIENCE).unwrap();
        assert_eq!(exit, Some(VmExit::Shutdown), "{}", printed.text());
        assert_eq!(balloon.wait_for_statistics(Duration::ZERO), None);
    }
}
