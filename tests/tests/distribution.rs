//! All that Debian ships for a machine to boot, over PCI: every kernel, the installer, memtest86+, and
//! a whole system with systemd.
//!
//! They need KVM with hardware behind it and take long, so only `cargo xtask test --only
//! distribution` runs them. docs/guests.md tells what came of it.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use kiln_tests::linux::{Linux, PATIENCE};
use kiln_tests::program::{self, Outcome, Program};
use kiln_tests::tap::Tap;
use kiln_vmm::Transport;
use kiln_xtask::assets::{self, Distribution};

/// How long the installer and a whole system may take to where a person could go on.
const LONG_PATIENCE: Duration = Duration::from_secs(400);

/// What no kernel should print.
const COMPLAINTS: [&str; 8] = [
    "BUG:",
    "Oops",
    "Call Trace",
    "nobody cared",
    "stall",
    "FW bug",
    "Firmware Bug",
    "ACPI Error",
];

fn distribution() -> &'static Distribution {
    static DISTRIBUTION: OnceLock<Distribution> = OnceLock::new();
    DISTRIBUTION.get_or_init(|| assets::distribution().unwrap())
}

fn kiln(arguments: &[(&str, &str)]) -> Program {
    let mut words = vec!["run"];
    for (name, value) in arguments {
        words.extend([*name, *value]);
    }
    Program::start(program::kiln(), &words).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn everything(outcome: &Outcome) -> String {
    format!("{}\n{}", outcome.output, outcome.errors)
}

/// Stops a program that does not end by itself, and returns what it has written.
fn end(program: Program) -> Outcome {
    program.signal("TERM").unwrap();
    program.signal("TERM").unwrap();
    program.wait(PATIENCE).unwrap()
}

/// Says how long something took, in the output of tests that pass too: for docs/guests.md.
fn report(what: &str, begun: Instant) {
    let seconds = begun.elapsed().as_secs_f64();
    let _ = std::io::stderr().write_all(format!("{seconds:6.1} s: {what}\n").as_bytes());
}

/// Boots a kernel with a root disk and a network, uses both, and compares.
fn boots_to_a_root_disk_with_a_network(series: &str, flavour: &str) {
    let _tap = Tap::new("kilndist0", "192.168.149.1/24");
    let kernel = distribution().kernel(series, flavour).unwrap();
    let linux = Linux::of(kernel, Transport::Pci);
    let root = linux.root_disk().unwrap();
    let linux = linux
        .disk(&root, ",id=root")
        .arg("--net")
        .arg("tap=kilndist0")
        .arg("--cpus")
        .arg("2")
        .cmdline("root=/dev/vda rw kiln.ip=eth0:192.168.149.2/24");
    let begun = Instant::now();
    let outcome = linux
        .run(
            "echo release=$(uname -r)
             echo root=$(awk '$2 == \"/\" {print $1, $3}' /proc/mounts)
             echo drivers=$(ls /sys/bus/pci/drivers/virtio-pci | grep -c 0000:)
             echo realtime=$(cat /sys/kernel/realtime 2>/dev/null)
             dd if=/dev/zero of=/tmp/file bs=64k count=64 conv=fsync 2>/dev/null
             ping -c 3 -i 0.2 192.168.149.1 | grep received
             cat /proc/interrupts
             dmesg | grep -iE 'pci|acpi|bug'; true",
        )
        .unwrap();
    report(&format!("{} to userspace and off", kernel.release), begun);
    let what = everything(&outcome);
    assert_eq!(outcome.code, Some(0), "{what}");
    assert!(
        outcome.lines().contains(&"kiln-test: exit status 0"),
        "{what}"
    );
    assert_eq!(outcome.value("release"), Some(kernel.release.as_str()));
    assert_eq!(outcome.value("root"), Some("/dev/vda ext4"), "{what}");
    assert_eq!(outcome.value("drivers"), Some("2"), "{what}");
    let realtime = if flavour.starts_with("rt") { "1" } else { "" };
    assert_eq!(outcome.value("realtime"), Some(realtime), "{what}");
    assert!(outcome.output.contains("3 packets received"), "{what}");
    for name in ["virtio0-req.0", "virtio1-input.0", "virtio1-output.0"] {
        assert_eq!(vectors(&outcome.output, name), 1, "{name}: {what}");
    }
    for complaint in COMPLAINTS {
        assert!(!what.contains(complaint), "{complaint}: {what}");
    }
}

/// How many MSI vectors in `/proc/interrupts` have this name.
fn vectors(output: &str, name: &str) -> usize {
    let is_vector = |line: &&str| line.contains("PCI-MSI") && line.trim_end().ends_with(name);
    output.lines().filter(is_vector).count()
}

macro_rules! kernels {
    ($($name:ident: $series:literal $flavour:literal,)+) => { $(
        #[test]
        #[ignore = "takes long: run by cargo xtask test --only distribution"]
        fn $name() {
            boots_to_a_root_disk_with_a_network($series, $flavour);
        }
    )+ };
}

kernels! {
    kernel_6_1_boots: "6.1" "amd64",
    kernel_6_1_for_clouds_boots: "6.1" "cloud-amd64",
    kernel_6_1_for_real_time_boots: "6.1" "rt-amd64",
    kernel_6_12_boots: "6.12" "amd64",
    kernel_6_12_for_clouds_boots: "6.12" "cloud-amd64",
    kernel_6_12_for_real_time_boots: "6.12" "rt-amd64",
}

#[test]
#[ignore = "takes long: run by cargo xtask test --only distribution"]
fn the_installer_shows_its_first_menu_on_the_serial_port() {
    let installer = &distribution().installer;
    let begun = Instant::now();
    let program = kiln(&[
        ("--kernel", text(&installer.kernel)),
        ("--initrd", text(&installer.initrd)),
        ("--cmdline", "console=ttyS0 quiet TERM=linux"),
        ("--memory", "1G"),
    ]);
    let is_there = program.wait_for("Select a language", LONG_PATIENCE)
        && program.wait_for("English", PATIENCE);
    report("the installer to its first menu", begun);
    let outcome = end(program);
    assert!(is_there, "{}", everything(&outcome));
}

#[test]
#[ignore = "takes long: run by cargo xtask test --only distribution"]
fn memtest_tests_the_memory_on_every_vcpu() {
    let begun = Instant::now();
    let program = kiln(&[
        ("--kernel", text(&distribution().memtest)),
        ("--cmdline", "console=ttyS0,115200 nopause"),
        ("--memory", "64M"),
        ("--cpus", "2"),
    ]);
    let is_there = program.wait_for("Memtest86+ v", PATIENCE);
    report("memtest86+ to its first screen", begun);
    let is_testing = is_there && program.wait_for("Address test, walking ones", PATIENCE);
    let outcome = end(program);
    assert!(is_testing, "{}", everything(&outcome));
    for expected in [
        "Memory  :   64MB",
        "2 Cores 2 Threads",
        "SMP: 2T",
        "Errors: 0",
    ] {
        assert!(
            outcome.output.contains(expected),
            "{expected}: {}",
            outcome.output
        );
    }
}

/// What is typed at the system's shell. Its answers begin lines of their own.
const QUESTIONS: &str = "
echo state=$(systemctl is-system-running --wait)
systemctl --failed --no-legend --plain | sed 's/^/failed=/'
echo address=$(ip -4 -o address show scope global | awk '{print $2, $4}')
echo online=$(networkctl --no-pager status 2>/dev/null | grep -c 'State: routable')
ping -c 3 -i 0.2 192.168.150.1 | grep received
lspci -vv | sed 's/^/pci:/'
lsblk --pairs --output NAME,SIZE,SERIAL,MOUNTPOINT | sed 's/^/lsblk:/'
cat /proc/interrupts
for i in /proc/irq/*/virtio*; do echo \"irq:${i##*/} $(cat ${i%/*}/effective_affinity_list)\"; done
systemd-analyze | cat
journalctl -b -p warning --no-pager -o cat | sed 's/^/journal:/'
echo questions: answered $((6 * 7))
";

#[test]
#[ignore = "takes long: run by cargo xtask test --only distribution"]
fn a_whole_debian_starts_cleanly_and_powers_off() {
    let _tap = Tap::new("kilndist1", "192.168.150.1/24");
    let system = &distribution().system;
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk.ext4");
    let mut copy = Command::new("cp");
    let status = copy
        .arg("--sparse=always")
        .arg(&system.disk)
        .arg(&disk)
        .status();
    assert!(status.unwrap().success());

    let begun = Instant::now();
    let mut program = kiln(&[
        ("--kernel", text(&system.kernel)),
        ("--initrd", text(&system.initrd)),
        ("--cmdline", "console=ttyS0 root=/dev/vda rw"),
        ("--disk", &format!("{},id=system", text(&disk))),
        ("--net", "tap=kilndist1"),
        ("--cpus", "2"),
        ("--memory", "1G"),
    ]);
    let mut is_answering = program.wait_for("kiln login: ", LONG_PATIENCE);
    report("the whole system to its login prompt", begun);
    // A plain shell without a prompt, which does not repeat what is typed: what it answers is then
    // on lines of its own.
    for (typed, answer) in [
        ("root\n", "root@kiln:~#"),
        ("stty -echo; PS1= exec sh\n", "exec sh"),
        ("echo kiln-shell: $((6 * 7))\n", "kiln-shell: 42"),
        (QUESTIONS, "questions: answered 42"),
    ] {
        is_answering = is_answering && {
            program.type_in(typed).unwrap();
            program.wait_for(answer, LONG_PATIENCE)
        };
    }
    report("and until it has started", begun);
    if is_answering {
        program.type_in("systemctl poweroff\n").unwrap();
    } else {
        program.signal("TERM").unwrap();
        program.signal("TERM").unwrap();
    }
    let outcome = program.wait(LONG_PATIENCE).unwrap();
    report("and is off", begun);
    println!("{}", outcome.output);
    let what = everything(&outcome);
    assert_eq!(outcome.code, Some(0), "{what}");
    assert_eq!(outcome.value("state"), Some("running"), "{what}");
    assert_eq!(outcome.value("failed"), None);
    assert_eq!(outcome.value("address"), Some("enp0s2 192.168.150.2/24"));
    assert_eq!(outcome.value("online"), Some("1"));
    assert!(outcome.output.contains("3 received"), "{what}");
    assert_devices_are_as_configured(&outcome);
}

fn assert_devices_are_as_configured(outcome: &Outcome) {
    let what = &outcome.output;
    let lines = outcome.lines();
    let is_there = |line: &str| lines.contains(&line);
    assert!(
        is_there(r#"lsblk:NAME="vda" SIZE="1G" SERIAL="system" MOUNTPOINT="/""#),
        "{what}"
    );
    for (count, name) in [(2, "Count=2"), (3, "Count=3")] {
        let capability = format!("MSI-X: Enable+ {name} Masked-");
        let found = lines.iter().filter(|line| line.contains(&capability));
        assert_eq!(found.count(), 1, "{count} vectors: {what}");
    }
    assert!(!what.contains("MSI-X: Enable-"), "{what}");
    for name in [
        "virtio0-config",
        "virtio0-req.0",
        "virtio1-config",
        "virtio1-input.0",
        "virtio1-output.0",
    ] {
        assert_eq!(vectors(what, name), 1, "{name}: {what}");
    }
    // The kernel spreads them over the vCPUs.
    let vcpus = lines.iter().filter_map(|line| line.strip_prefix("irq:"));
    let vcpus: BTreeSet<_> = vcpus.filter_map(|line| line.split(' ').nth(1)).collect();
    assert_eq!(vcpus, BTreeSet::from(["0", "1"]), "{what}");
}
