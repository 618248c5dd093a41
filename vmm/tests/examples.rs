//! Runs each example, as `cargo run --example` would, and checks what it prints. The guests need
//! `/dev/kvm`, and nothing else.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kiln_vmm::Host;

const LONG: Duration = Duration::from_secs(120);

/// `cargo test` builds the examples beside the tests: `debug/examples`, where this is in
/// `debug/deps`.
fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let target = test.parent().and_then(|deps| deps.parent()).unwrap();
    target.join("examples").join(name)
}

/// Runs an example to its end and returns what it printed; `None` where there is no KVM.
fn run(name: &str) -> Option<String> {
    if let Err(error) = Host::open() {
        eprintln!("skipped: {error}");
        return None;
    }
    let program = program(name);
    let mut child = Command::new(&program)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("run {}: {error}", program.display()));
    let start = Instant::now();
    // What an example prints fits in a pipe, so it can be read when it has ended.
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > LONG {
            child.kill().unwrap();
            let output = child.wait_with_output().unwrap();
            panic!("{name} does not end; so far: {output:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{name}: {output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{name}");
    Some(String::from_utf8(output.stdout).unwrap())
}

/// A test that an example prints exactly these lines.
macro_rules! prints {
    ($test:ident, $example:literal, $($line:literal),+ $(,)?) => {
        #[test]
        fn $test() {
            if let Some(printed) = run($example) {
                assert_eq!(printed.lines().collect::<Vec<_>>(), [$($line),+]);
            }
        }
    };
}

prints!(
    what_a_guest_writes_to_the_debug_port_is_printed,
    "debug_port",
    "debug port: hello from the guest",
    "debug port: and good bye",
    "the guest powered off, having written 34 bytes",
);

prints!(
    a_guest_reads_and_writes_the_disk_in_memory,
    "memory_disk",
    "the guest read: this is sector 3",
    "the guest powered off",
    "sector 4 holds: the guest was here",
);

prints!(
    a_guest_goes_on_after_the_faults_of_a_disk,
    "faulty_disk",
    "write of 2 sectors from 0: status 0",
    "write of 2 sectors from 2: status 1",
    "write of 2 sectors from 4: status 1",
    "write of 2 sectors from 6: status 0",
    "write of 2 sectors from 8: status 0",
    "the guest powered off",
    "written (n) or not (.), by sector: nn..n.nnnn",
);

prints!(
    a_packet_of_the_forbidden_kind_does_not_arrive,
    "packet_filter",
    "the guest powered off, having received: hello",
    "the guest powered off, having received: hello to you",
    "dropped by the filter: 1",
);

prints!(
    a_guest_is_answered_by_a_virtio_device_of_ones_own,
    "virtio_device",
    "the guest got: 44444444",
    "the guest powered off",
);

prints!(
    a_guest_is_answered_by_a_service_of_the_host,
    "vsock",
    "the service said: 42",
    "the guest powered off",
    "the guest asked: what is the answer?",
    "a socket is left: false",
);

#[test]
fn each_machine_of_a_process_has_its_own_end() {
    let Some(printed) = run("lifecycle") else {
        return;
    };
    let lines: Vec<_> = printed.lines().collect();
    let (crash, others): (Vec<_>, Vec<_>) = lines
        .into_iter()
        .partition(|line| line.starts_with("crashing: "));
    assert_eq!(
        others,
        [
            "polite is Paused",
            "polite is Running",
            "polite: the guest powered off",
            "polite printed: waiting for the power button",
            "polite printed: powering off",
            "stubborn: the machine was stopped",
            "rebooting: the guest asked for a reset",
            "dropped: nothing of it is left",
        ]
    );
    let [crash] = crash[..] else {
        panic!("{crash:?}");
    };
    // What follows depends on the host's KVM.
    assert!(
        crash.starts_with("crashing: the guest crashed: vCPU 0: triple fault"),
        "{crash}"
    );
}

#[test]
fn each_example_has_a_test_and_is_short() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/examples");
    let tests = include_str!("examples.rs");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let name = path.file_stem().unwrap().to_str().unwrap();
        assert!(tests.contains(&format!("\"{name}\"")), "{name}");
        let lines = std::fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines < 120, "{name} has {lines} lines");
        seen += 1;
    }
    assert_eq!(seen, 7);
}
