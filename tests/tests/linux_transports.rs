//! Linux guests and how they reach their virtio devices: interrupts of each kind, many devices, and
//! drivers that come and go. They need KVM with hardware behind it, and are run as root by `cargo
//! xtask test`.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};

use kiln_tests::linux::Linux;
use kiln_tests::program::Outcome;
use kiln_tests::tap::Tap;
use kiln_vmm::Transport;

kiln_tests::over_every_transport!(
    ; over mmio when asked:
    modules_are_removed_and_loaded_under_load;
    when asked:
    drivers_come_and_go_a_hundred_times,
    drivers_of_small_devices_come_and_go_a_hundred_times,
);

const BLOCK: usize = 1 << 20;

/// A disk of a mebibyte that says in each of its blocks which one it is.
fn numbered_disk(folder: &Path, number: usize) -> PathBuf {
    let path = folder.join(format!("disk{number}"));
    let text = format!("this is disk {number:04}\n");
    let block = format!("{text:\0<512}");
    fs::write(&path, block.repeat(BLOCK / 512)).unwrap();
    path
}

fn assert_passed(outcome: &Outcome) {
    let what = format!("{}\n{}", outcome.output, outcome.errors);
    assert_eq!(outcome.code, Some(0), "{what}");
    assert!(
        outcome.lines().contains(&"kiln-test: exit status 0"),
        "{what}"
    );
    for word in ["BUG:", "Oops", "nobody cared", "stall", "Call Trace"] {
        assert!(!what.contains(word), "{what}");
    }
}

/// A guest with a disk and a network.
fn with_disk_and_net(series: &str, transport: Transport, tap: &str) -> Linux {
    let linux = Linux::new(series, transport);
    let disk = numbered_disk(linux.folder.path(), 1);
    linux
        .disk(&disk, "")
        .arg("--net")
        .arg(format!("tap={tap}"))
        .arg("--cpus")
        .arg("2")
        .cmdline("kiln.ip=eth0:192.168.140.2/24")
}

/// Uses both devices, and prints how often each interrupt came.
const USE: &str = "
    set -e
    dd if=/dev/vda iflag=direct bs=64k of=/tmp/read 2>/dev/null
    dd if=/tmp/read of=/dev/vda bs=64k conv=fsync 2>/dev/null
    ping -c 5 -i 0.2 192.168.140.1 | grep received
    cat /proc/interrupts
";

/// The interrupts with this in their description: how often they came, on all vCPUs together.
fn interrupts<'a>(outcome: &'a Outcome, words: &[&str]) -> Vec<(&'a str, u64)> {
    let lines = outcome.output.lines().filter(|line| {
        let name = line.trim_start().split(':').next().unwrap_or_default();
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit())
    });
    lines
        .filter(|line| words.iter().all(|word| line.contains(word)))
        .map(|line| {
            let counts = line.split_whitespace().skip(1).take(2);
            (
                line,
                counts.map(|count| count.parse::<u64>().unwrap()).sum(),
            )
        })
        .collect()
}

#[test]
#[ignore = "needs hardware KVM: run by cargo xtask test"]
fn each_queue_has_a_message_interrupt_of_its_own() {
    let _tap = Tap::new("kilntest5", "192.168.140.1/24");
    for series in ["6.1", "6.12"] {
        let linux = with_disk_and_net(series, Transport::Pci, "kilntest5");
        let outcome = linux
            .run(&format!("{USE} dmesg | grep -i pci; true"))
            .unwrap();
        assert_passed(&outcome);
        assert!(outcome.output.contains("5 packets received"));
        for (name, is_used) in [
            ("virtio0-config", false),
            ("virtio0-req.0", true),
            ("virtio1-config", false),
            ("virtio1-input.0", true),
            ("virtio1-output.0", false),
        ] {
            let found = interrupts(&outcome, &["PCI-MSI", name]);
            assert_eq!(found.len(), 1, "{name}: {}", outcome.output);
            assert!(!is_used || found[0].1 > 0, "{found:?}");
        }
        for complaint in ["Fatal", "not using", "failed", "FW bug", "Firmware Bug"] {
            assert!(!outcome.output.contains(complaint), "{}", outcome.output);
        }
    }
}

#[test]
#[ignore = "needs hardware KVM: run by cargo xtask test"]
fn without_message_interrupts_devices_use_the_lines() {
    let _tap = Tap::new("kilntest6", "192.168.140.1/24");
    for series in ["6.1", "6.12"] {
        let linux = with_disk_and_net(series, Transport::Pci, "kilntest6").cmdline("pci=nomsi");
        let outcome = linux.run(USE).unwrap();
        assert_passed(&outcome);
        assert!(outcome.output.contains("5 packets received"));
        assert!(interrupts(&outcome, &["PCI-MSI"]).is_empty());
        for name in ["virtio0", "virtio1"] {
            let found = interrupts(&outcome, &["IO-APIC", "fasteoi", name]);
            assert_eq!(found.len(), 1, "{name}: {}", outcome.output);
            assert!(found[0].1 > 0, "{found:?}");
        }
    }
}

#[test]
#[ignore = "needs hardware KVM: run by cargo xtask test"]
fn forty_devices_all_work() {
    // And on lines, which several share, with both transports at once.
    for (words, on_mmio) in [("", 0), ("pci=nomsi", 14)] {
        let mut linux = Linux::new("6.12", Transport::Pci).cmdline(words);
        for number in 0..40 {
            let disk = numbered_disk(linux.folder.path(), number);
            let transport = if number < on_mmio { "mmio" } else { "pci" };
            linux = linux.disk(&disk, &format!(",id={number},transport={transport}"));
        }
        let outcome = linux
            .run(
                "for disk in /sys/block/vd*; do
                     name=${disk##*/}
                     text=$(dd if=/dev/$name bs=512 skip=100 count=1 2>/dev/null | head -n 1)
                     echo \"found $(cat $disk/serial) $text\"
                     dd if=/dev/zero of=/dev/$name bs=512 seek=200 count=1 conv=fsync 2>/dev/null
                 done
                 grep -c virtio /proc/interrupts",
            )
            .unwrap();
        assert_passed(&outcome);
        for number in 0..40 {
            let line = format!("found {number} this is disk {number:04}");
            assert!(
                outcome.lines().contains(&line.as_str()),
                "{line}: {}",
                outcome.output
            );
            let disk = fs::read(linux.folder.path().join(format!("disk{number}"))).unwrap();
            assert_eq!(disk[200 * 512..201 * 512], [0; 512], "disk {number}");
            assert_ne!(disk[201 * 512..202 * 512], [0; 512], "disk {number}");
        }
    }
}

/// Where a transport's own devices are, their driver, and the pattern of their names.
fn bus_of(transport: Transport) -> (&'static str, &'static str) {
    match transport {
        Transport::Pci => ("/sys/bus/pci/drivers/virtio-pci", "0000:*"),
        _ => ("/sys/bus/platform/drivers/virtio-mmio", "LNRO0005:*"),
    }
}

fn drivers_come_and_go_a_hundred_times(transport: Transport) {
    let _tap = Tap::new("kilntest7", "192.168.140.1/24");
    let linux = with_disk_and_net("6.12", transport, "kilntest7");
    let (driver, devices) = bus_of(transport);
    let outcome = linux
        .run(&format!(
            "rebind() {{
                 cd $1
                 for device in $2; do
                     [ -e $device ] || continue
                     echo $device >unbind && echo $device >bind || exit 1
                 done
             }}
             round=0
             while [ $round -lt 100 ]; do
                 (rebind {driver} '{devices}') || exit 1
                 (rebind /sys/bus/virtio/drivers/virtio_blk 'virtio*') || exit 1
                 (rebind /sys/bus/virtio/drivers/virtio_net 'virtio*') || exit 1
                 round=$((round + 1))
             done
             cd /
             kiln-net
             dd if=/dev/vda bs=512 skip=7 count=1 2>/dev/null | head -n 1
             {USE}"
        ))
        .unwrap();
    assert_passed(&outcome);
    assert!(outcome.lines().contains(&"this is disk 0001"));
    assert!(outcome.output.contains("5 packets received"));
}

fn drivers_of_small_devices_come_and_go_a_hundred_times(transport: Transport) {
    let linux = Linux::new("6.12", transport);
    let socket = |name: &str| linux.folder.path().join(name).display().to_string();
    let (vsock, port) = (socket("vsock"), socket("port"));
    let linux = linux
        .arg("--rng")
        .arg("--balloon")
        .arg("--vsock")
        .arg(format!("cid=5,socket={vsock}"))
        .arg("--console=virtio,null")
        .arg("--virtio-port")
        .arg(format!("name=port,socket={port}"));
    let outcome = linux
        .run(
            "cd /sys/bus/virtio/drivers
             for driver in virtio_rng virtio_balloon vmw_vsock_virtio_transport virtio_console; do
                 count=0
                 for device in $driver/virtio*; do
                     device=${device##*/}
                     while [ $count -lt 100 ]; do
                         echo $device >$driver/unbind && echo $device >$driver/bind || exit 1
                         count=$((count + 1))
                     done
                 done
                 echo $driver=$count
             done
             head -c 64 /dev/hwrng | wc -c",
        )
        .unwrap();
    assert_passed(&outcome);
    for driver in ["rng", "balloon", "console"] {
        assert_eq!(outcome.value(&format!("virtio_{driver}")), Some("100"));
    }
    assert_eq!(outcome.value("vmw_vsock_virtio_transport"), Some("100"));
    assert!(outcome.lines().contains(&"64"), "{}", outcome.output);
}

fn modules_are_removed_and_loaded_under_load(transport: Transport) {
    let _tap = Tap::new("kilntest8", "192.168.140.1/24");
    let linux = with_disk_and_net("6.12", transport, "kilntest8");
    let module = match transport {
        Transport::Pci => "virtio_pci",
        _ => "virtio_mmio",
    };
    let outcome = linux
        .run(&format!(
            "[ -e /modules/virtio_blk.ko ] && [ -e /modules/virtio_net.ko ] || exit 1
             (while [ ! -e /tmp/end ]; do
                 dd if=/dev/vda iflag=direct bs=16k of=/dev/null
                 dd if=/dev/zero of=/dev/vda oflag=direct bs=4k seek=64 count=64
                 usleep 5000
             done) >/dev/null 2>&1 &
             (while [ ! -e /tmp/end ]; do
                 kiln-net; ping -f -c 20 192.168.140.1; usleep 5000
             done) >/dev/null 2>&1 &
             remove() {{
                 tries=0
                 # A disk that is open keeps its module.
                 until rmmod $1 2>/dev/null; do
                     tries=$((tries + 1))
                     [ $tries -lt 2000 ] || {{ echo cannot remove $1; exit 1; }}
                     usleep 2000
                 done
             }}
             round=0
             while [ $round -lt 10 ]; do
                 usleep 100000
                 # The disk goes while it is read or written; its module when it is closed.
                 (cd /sys/bus/virtio/drivers/virtio_blk && echo virtio* >unbind) || exit 1
                 remove virtio_blk
                 remove virtio_net
                 if [ -e /modules/{module}.ko ]; then
                     remove {module}
                     insmod /modules/{module}.ko || exit 1
                 fi
                 insmod /modules/virtio_blk.ko || exit 1
                 insmod /modules/virtio_net.ko || exit 1
                 round=$((round + 1))
             done
             touch /tmp/end
             wait
             echo removed $round times
             kiln-net 2>/dev/null
             {USE}"
        ))
        .unwrap();
    assert_passed(&outcome);
    assert!(outcome.lines().contains(&"removed 10 times"));
    assert!(outcome.output.contains("5 packets received"));
}
