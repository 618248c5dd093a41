//! Machines with a guest of a few bytes, and what a process has because of them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::time::Duration;

use kiln_vmm::{Host, Kernel, MemorySize, VmBuilder, VmExit, VmHandle};

/// How long a test waits for what must come.
pub const LONG: Duration = Duration::from_secs(60);

/// This host's KVM; leaves the test where there is none.
#[macro_export]
macro_rules! host {
    () => {
        match kiln_vmm::Host::open() {
            Ok(host) => std::sync::Arc::new(host),
            Err(error) => {
                eprintln!("skipped: {error}");
                return;
            }
        }
    };
}

/// A machine of 16 MiB with this guest.
pub fn builder(host: &Arc<Host>, code: &[u8]) -> VmBuilder {
    VmBuilder::new()
        .host(Arc::clone(host))
        .memory(MemorySize::mib(16))
        .kernel(Kernel::from_code(code).unwrap())
}

/// Starts this guest.
#[must_use]
pub fn start(host: &Arc<Host>, code: &[u8]) -> VmHandle {
    builder(host, code).build().unwrap().start().unwrap()
}

/// Waits for the guest's end.
#[must_use]
pub fn end(handle: &VmHandle) -> VmExit {
    handle
        .wait_timeout(LONG)
        .unwrap()
        .expect("the guest goes on")
}

/// The threads, file descriptors and mappings of guests that this process has.
#[must_use]
pub fn belongings() -> (usize, usize, usize) {
    let count = |folder| std::fs::read_dir(folder).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    // Guest RAM is the one kind of mapping here of 16 MiB; a thread's stack and the allocator's
    // heaps come and go by rules of their own.
    let ram = maps
        .lines()
        .filter(|line| length(line) >= 16 << 20 && !line.contains("---p"));
    let kvm = maps.lines().filter(|line| line.contains("kvm"));
    let mappings = ram.count() + kvm.count();
    (count("/proc/self/task"), count("/proc/self/fd"), mappings)
}

/// What this process has when the threads that were joined have left the system's list.
#[must_use]
pub fn settled_belongings() -> (usize, usize, usize) {
    std::thread::sleep(Duration::from_millis(300));
    belongings()
}

/// Asserts that this process has again what it had before. A thread that was joined stays in the
/// system's list for a moment longer.
pub fn assert_belongings(before: (usize, usize, usize), when: &str) {
    let since = std::time::Instant::now();
    while belongings() != before && since.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(belongings(), before, "{when}");
}

/// The length in bytes of a mapping, from its line in the list of them.
fn length(line: &str) -> u64 {
    let range = line.split(' ').next().unwrap();
    let (start, end) = range.split_once('-').unwrap();
    let number = |text| u64::from_str_radix(text, 16).unwrap();
    number(end) - number(start)
}

/// Runs `test` of this file again, in a process of its own, since other tests have threads and
/// files too; says whether this is that process.
#[must_use]
pub fn is_alone(test: &str) -> bool {
    if std::env::var_os("KILN_TEST_ALONE").is_some() {
        return true;
    }
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test])
        .env("KILN_TEST_ALONE", "1")
        .status()
        .unwrap();
    assert!(status.success());
    false
}
