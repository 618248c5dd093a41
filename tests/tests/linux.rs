//! Debian's kernels as guests, with disks and networks.
//!
//! They need KVM with hardware behind it, and are run as root by `cargo xtask test`, in a nested
//! machine where this one has no such KVM.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kiln_tests::linux::{Linux, PATIENCE};
use kiln_tests::program::{self, Outcome, Program};
use kiln_tests::tap::Tap;
use kiln_vmm::Transport;
use kiln_xtask::initrd;

kiln_tests::over_every_transport!(
    what_a_guest_has_synced_is_on_its_disk;
    over mmio when asked:
    a_network_carries_pings_and_streams_both_ways,
    a_read_only_disk_stays_as_it_is,
    disks_keep_their_order_their_ids_and_their_bytes,
    two_network_interfaces_keep_their_addresses,
    the_login_prompt_takes_what_is_typed,
    a_bzimage_boots_in_128_mib,
    a_bzimage_boots_with_4_vcpus_and_5_gib,
    a_vmlinux_boots_by_the_64_bit_protocol,
    a_vmlinux_boots_by_pvh,
    an_initrd_is_delivered_exactly,
    each_end_of_a_linux_guest_is_told_apart,
    a_signal_presses_the_power_button_that_the_guest_sees,
    a_second_signal_stops_a_guest_that_does_not_care,
);

const READY: &str = "kiln-power-button: ready";

fn assert_powered_off(outcome: &Outcome) {
    let what = format!("{}\n{}", outcome.output, outcome.errors);
    assert_eq!(outcome.code, Some(0), "{what}");
    assert!(
        outcome.errors.contains("kiln: the guest powered off"),
        "{what}"
    );
    assert!(
        outcome.lines().contains(&"kiln-test: exit status 0"),
        "{what}"
    );
}

/// Bytes that do not repeat, the same for the same seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..length / 8).flat_map(|_| next().to_le_bytes()).collect()
}

fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().next().unwrap().to_owned()
}

/// Boots, and compares what the guest sees with what it was given.
fn assert_boots(linux: Linux, cpus: u32, memory_mib: u64) {
    let linux = linux
        .arg("--cpus")
        .arg(cpus.to_string())
        .arg("--memory")
        .arg(format!("{memory_mib}M"))
        .cmdline("kiln.words=\"a  b\" kiln.last=x");
    let outcome = linux
        .run(
            "echo release=$(uname -r); echo online=$(cat /sys/devices/system/cpu/online)
             echo processors=$(grep -c ^processor /proc/cpuinfo)
             echo total=$(awk '/MemTotal/ {print $2}' /proc/meminfo)
             echo cmdline=$(cat /proc/cmdline | od -An -v -tx1 | tr -d ' \\n')
             echo hypervisor=$(dmesg | grep -c 'Hypervisor detected: KVM')
             echo clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
             dmesg | grep -E 'BUG:|Oops|rcu.*stall'; true",
        )
        .unwrap();
    assert_powered_off(&outcome);
    assert_eq!(
        outcome.value("release"),
        Some(linux.kernel.release.as_str())
    );
    let online = if cpus == 1 {
        "0".to_owned()
    } else {
        format!("0-{}", cpus - 1)
    };
    assert_eq!(
        outcome.value("online"),
        Some(online.as_str()),
        "{}",
        outcome.output
    );
    assert_eq!(outcome.value("processors"), Some(cpus.to_string().as_str()));
    assert_eq!(outcome.value("hypervisor"), Some("1"), "{}", outcome.output);
    assert_eq!(outcome.value("clock"), Some("kvm-clock"));
    let total: u64 = outcome.value("total").unwrap().parse().unwrap();
    let given = memory_mib * 1024;
    // The kernel keeps its own code and its page structures for itself.
    assert!(
        total < given && total + given / 20 + 65_536 > given,
        "{total} KiB of {given} KiB"
    );
    let expected: String = format!("{}\n", linux.whole_cmdline())
        .bytes()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(outcome.value("cmdline"), Some(expected.as_str()));
    for word in ["BUG:", "Oops", "stall"] {
        assert!(!outcome.output.contains(word), "{}", outcome.output);
    }
}

fn a_bzimage_boots_in_128_mib(transport: Transport) {
    assert_boots(Linux::new("6.1", transport), 1, 128);
}

fn a_bzimage_boots_with_4_vcpus_and_5_gib(transport: Transport) {
    assert_boots(Linux::new("6.12", transport), 4, 5120);
}

fn a_vmlinux_boots_by_the_64_bit_protocol(transport: Transport) {
    assert_boots(Linux::new("6.1", transport).vmlinux("linux64"), 2, 256);
    assert_boots(Linux::new("6.12", transport).vmlinux("linux64"), 1, 256);
}

fn a_vmlinux_boots_by_pvh(transport: Transport) {
    assert_boots(Linux::new("6.1", transport).vmlinux("pvh"), 4, 256);
    assert_boots(Linux::new("6.12", transport).vmlinux("pvh"), 2, 4096);
}

fn an_initrd_is_delivered_exactly(transport: Transport) {
    let linux = Linux::new("6.12", transport).cmdline("kiln.x=1");
    let content = noise(7, 3 << 20);
    let file = linux.folder.path().join("noise");
    fs::write(&file, &content).unwrap();
    let whole = linux.folder.path().join("whole");
    initrd::extend(
        &linux.kernel.initrd,
        &whole,
        &[
            ("noise", 0o644, &content),
            (
                initrd::SCRIPT,
                0o755,
                b"echo sum=$(sha256sum < /noise | cut -d' ' -f1)",
            ),
        ],
    )
    .unwrap();
    // Given after the other, and so taken instead of it.
    let mut args: Vec<std::ffi::OsString> = vec!["run".into(), "--kernel".into()];
    args.push(linux.kernel.bzimage.clone().into());
    args.extend(["--transport".into(), transport.to_string().into()]);
    args.push("--initrd".into());
    args.push(whole.into());
    args.push("--cmdline".into());
    args.push(linux.whole_cmdline().into());
    let outcome = Program::start(program::kiln(), &args)
        .unwrap()
        .wait(PATIENCE)
        .unwrap();
    assert_powered_off(&outcome);
    assert_eq!(outcome.value("sum"), Some(sha256(&file).as_str()));
}

fn what_a_guest_has_synced_is_on_its_disk(transport: Transport) {
    let linux = Linux::new("6.12", transport);
    let disk = linux.root_disk().unwrap();
    let linux = linux
        .cmdline("root=/dev/vda rw")
        .disk(&disk, ",id=root")
        .arg("--cpus")
        .arg("2");
    let outcome = linux
        .run(
            "mount | grep ' on / '
             dd if=/dev/urandom of=/written bs=1M count=64 2>/dev/null
             sync
             echo sum=$(sha256sum < /written | cut -d' ' -f1)
             kiln-disks",
        )
        .unwrap();
    assert_powered_off(&outcome);
    assert!(outcome.output.contains("id=root"), "{}", outcome.output);
    let check = Command::new("e2fsck")
        .arg("-fn")
        .arg(&disk)
        .output()
        .unwrap();
    assert!(
        check.status.success(),
        "{}",
        String::from_utf8_lossy(&check.stdout)
    );
    let copy = linux.folder.path().join("written");
    let dump = format!("dump /written {}", copy.display());
    Command::new("debugfs")
        .args(["-R", &dump])
        .arg(&disk)
        .output()
        .unwrap();
    assert_eq!(fs::metadata(&copy).unwrap().len(), 64 << 20);
    assert_eq!(outcome.value("sum"), Some(sha256(&copy).as_str()));
}

fn a_read_only_disk_stays_as_it_is(transport: Transport) {
    let linux = Linux::new("6.1", transport);
    let disk = linux.root_disk().unwrap();
    let before = sha256(&disk);
    let linux = linux.disk(&disk, ",readonly");
    let outcome = linux
        .run(
            "kiln-disks
             dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync 2>&1 && echo written
             mount -t ext4 -o ro /dev/vda /root && ls /root && umount /root",
        )
        .unwrap();
    assert_powered_off(&outcome);
    assert!(outcome.output.contains("readonly=1"), "{}", outcome.output);
    assert!(!outcome.lines().contains(&"written"), "{}", outcome.output);
    assert_eq!(sha256(&disk), before);
}

fn disks_keep_their_order_their_ids_and_their_bytes(transport: Transport) {
    let linux = Linux::new("6.12", transport);
    let make = |name: &str, mib: u64| {
        let path = linux.folder.path().join(name);
        let file = File::create(&path).unwrap();
        file.set_len(mib << 20).unwrap();
        path
    };
    let (first, second) = (make("first", 8), make("second", 16));
    let pattern = noise(3, 1 << 20);
    let mut file = File::options().write(true).open(&second).unwrap();
    file.seek(SeekFrom::Start(5 << 20)).unwrap();
    file.write_all(&pattern).unwrap();
    let linux = linux
        .disk(&first, ",id=the-first")
        .disk(&second, ",id=the-second");
    let outcome = linux
        .run(
            "kiln-disks
             dd if=/dev/vdb of=/dev/vda bs=1M skip=5 seek=2 count=1 conv=fsync 2>/dev/null
             cat /sys/block/vda/queue/max_segments",
        )
        .unwrap();
    assert_powered_off(&outcome);
    let lines = outcome.lines();
    assert!(
        lines.contains(&"vda bytes=8388608 id=the-first readonly=0"),
        "{lines:?}"
    );
    assert!(
        lines.contains(&"vdb bytes=16777216 id=the-second readonly=0"),
        "{lines:?}"
    );
    let mut copied = vec![0; 1 << 20];
    let mut file = File::open(&first).unwrap();
    file.seek(SeekFrom::Start(2 << 20)).unwrap();
    file.read_exact(&mut copied).unwrap();
    assert!(copied == pattern);
    assert_eq!(fs::metadata(&first).unwrap().len(), 8 << 20);
}

fn a_network_carries_pings_and_streams_both_ways(transport: Transport) {
    let _tap = Tap::new("kilntest0", "192.168.101.1/24");
    let linux = Linux::new("6.12", transport)
        .arg("--net")
        .arg("tap=kilntest0,mac=06:00:00:00:01:01")
        .cmdline("kiln.ip=eth0:192.168.101.2/24");
    let sent = linux.folder.path().join("sent");
    fs::write(&sent, noise(11, 16 << 20)).unwrap();
    let received = linux.folder.path().join("received");

    // One server gives 16 MiB, the other takes them.
    let give = std::net::TcpListener::bind("192.168.101.1:7001").unwrap();
    let take = std::net::TcpListener::bind("192.168.101.1:7002").unwrap();
    let (from, to) = (sent.clone(), received.clone());
    let giver = std::thread::spawn(move || {
        let (mut stream, _) = give.accept().unwrap();
        std::io::copy(&mut File::open(from).unwrap(), &mut stream).unwrap();
    });
    let taker = std::thread::spawn(move || {
        let (mut stream, _) = take.accept().unwrap();
        std::io::copy(&mut stream, &mut File::create(to).unwrap()).unwrap();
    });
    let outcome = linux
        .run(
            "ping -c 3 192.168.101.1 | grep received
             echo features=$(cat /sys/class/net/eth0/device/features)
             echo mac=$(cat /sys/class/net/eth0/address)
             mount -t tmpfs -o size=100m tmpfs /tmp
             nc 192.168.101.1 7001 > /tmp/got </dev/null
             echo got=$(sha256sum < /tmp/got | cut -d' ' -f1)
             nc 192.168.101.1 7002 < /tmp/got",
        )
        .unwrap();
    assert_powered_off(&outcome);
    giver.join().unwrap();
    taker.join().unwrap();
    assert!(
        outcome.output.contains("3 packets received"),
        "{}",
        outcome.output
    );
    assert_eq!(outcome.value("mac"), Some("06:00:00:00:01:01"));
    assert_eq!(outcome.value("got"), Some(sha256(&sent).as_str()));
    assert_eq!(sha256(&received), sha256(&sent));
    // Bit n of the features is character n: checksums both ways, segmentation both ways.
    let features = outcome.value("features").unwrap().as_bytes();
    for bit in [0, 1, 7, 8, 11, 12] {
        assert_eq!(features[bit], b'1', "feature {bit}: {}", outcome.output);
    }
}

fn two_network_interfaces_keep_their_addresses(transport: Transport) {
    let _taps = (
        Tap::new("kilntest1", "192.168.111.1/24"),
        Tap::new("kilntest2", "192.168.112.1/24"),
    );
    let linux = Linux::new("6.1", transport)
        .arg("--net")
        .arg("tap=kilntest1,mac=06:00:00:00:02:01")
        .arg("--net")
        .arg("tap=kilntest2,mac=06:00:00:00:02:02")
        .cmdline("kiln.ip=eth0:192.168.111.2/24,eth1:192.168.112.2/24");
    let outcome = linux
        .run(
            "echo first=$(cat /sys/class/net/eth0/address)
             echo second=$(cat /sys/class/net/eth1/address)
             ping -c 1 192.168.111.1 | grep received
             ping -c 1 192.168.112.1 | grep received",
        )
        .unwrap();
    assert_powered_off(&outcome);
    assert_eq!(outcome.value("first"), Some("06:00:00:00:02:01"));
    assert_eq!(outcome.value("second"), Some("06:00:00:00:02:02"));
    assert_eq!(
        outcome.output.matches("1 packets received").count(),
        2,
        "{}",
        outcome.output
    );
}

/// Runs the guest until it prints `last` and asserts that the program ends soon after, so.
fn assert_ends(linux: &Linux, script: &str, last: &str, code: i32, message: &str) {
    let program = linux.start(script).unwrap();
    assert!(program.wait_for(last, PATIENCE), "no `{last}`");
    let since = Instant::now();
    let outcome = program.wait(PATIENCE).unwrap();
    let took = since.elapsed();
    assert_eq!(
        outcome.code,
        Some(code),
        "{}\n{}",
        outcome.output,
        outcome.errors
    );
    assert!(outcome.errors.contains(message), "{}", outcome.errors);
    // It is a matter of milliseconds; the guest's own way down is what takes time.
    eprintln!("{message}: ended {took:?} after `{last}`");
    assert!(took < Duration::from_secs(30), "{took:?}");
}

fn each_end_of_a_linux_guest_is_told_apart(transport: Transport) {
    let linux = Linux::new("6.12", transport).cmdline("oops=panic");
    assert_ends(
        &linux,
        "echo going; poweroff -f",
        "going",
        0,
        "the guest powered off",
    );
    assert_ends(
        &linux,
        "echo going; reboot -f",
        "going",
        3,
        "the guest asked for a reset",
    );
    let crash = "echo 1 > /proc/sys/kernel/sysrq; echo going; echo c > /proc/sysrq-trigger";
    assert_ends(&linux, crash, "going", 4, "the guest's kernel panicked");
    let linux = Linux::new("6.1", transport).cmdline("reboot=t");
    assert_ends(&linux, "echo going; reboot -f", "going", 5, "triple fault");
}

fn a_signal_presses_the_power_button_that_the_guest_sees(transport: Transport) {
    let linux = Linux::new("6.12", transport);
    let program = linux.start("kiln-wait-power-button").unwrap();
    assert!(program.wait_for(READY, PATIENCE));
    program.signal("TERM").unwrap();
    let outcome = program.wait(PATIENCE).unwrap();
    assert_powered_off(&outcome);
    assert!(
        outcome.output.contains("kiln-power-button: pressed"),
        "{}",
        outcome.output
    );
}

fn a_second_signal_stops_a_guest_that_does_not_care(transport: Transport) {
    let linux = Linux::new("6.1", transport);
    let program = linux.start("echo going; while true; do :; done").unwrap();
    assert!(program.wait_for("going", PATIENCE));
    program.signal("TERM").unwrap();
    assert!(program.wait_for("pressing the power button", PATIENCE));
    program.signal("TERM").unwrap();
    let outcome = program.wait(PATIENCE).unwrap();
    assert_eq!(outcome.code, Some(7), "{}", outcome.errors);
}

fn the_login_prompt_takes_what_is_typed(transport: Transport) {
    let linux = Linux::new("6.12", transport);
    let disk = linux.root_disk().unwrap();
    let mut args: Vec<std::ffi::OsString> = vec!["run".into(), "--kernel".into()];
    args.push(linux.kernel.bzimage.clone().into());
    args.extend(["--transport".into(), transport.to_string().into()]);
    args.push("--initrd".into());
    args.push(linux.kernel.initrd.clone().into());
    args.extend([
        "--cmdline".into(),
        "console=ttyS0 quiet root=/dev/vda rw".into(),
    ]);
    args.extend(["--disk".into(), disk.into()]);
    let mut program = Program::start(program::kiln(), &args).unwrap();
    assert!(program.wait_for("login:", PATIENCE));
    program.type_in("root\n").unwrap();
    assert!(program.wait_for("# ", PATIENCE));
    program.type_in("echo sum $((40 + 2))\npoweroff\n").unwrap();
    assert!(program.wait_for("sum 42", PATIENCE));
    let outcome = program.wait(PATIENCE).unwrap();
    assert_eq!(
        outcome.code,
        Some(0),
        "{}\n{}",
        outcome.output,
        outcome.errors
    );
}

#[test]
#[ignore = "needs hardware KVM: run by cargo xtask test"]
fn check_says_that_all_is_well() {
    let output = Command::new(program::kiln())
        .arg("check")
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("run by the processor"), "{text}");
}
