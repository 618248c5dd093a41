//! Linux guests whose packets the host's kernel carries (vhost-net). They need KVM with hardware
//! behind it, and are run as root by `cargo xtask test`.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kiln_tests::bytes::{noise, sha256};
use kiln_tests::linux::{PATIENCE, guest_assets};
use kiln_vmm::{
    Captured, Console, ConsoleInput, ConsoleOutput, Kernel, MemorySize, Net, Transport, VmBuilder,
    VmExit,
};
use kiln_xtask::initrd;

kiln_tests::over_every_transport!(
    ; over mmio when asked:
    the_kernel_carries_the_packets_through_every_change,
);

const TAP: &str = "kilnvhost0";
const HOST: &str = "192.168.163.1";
const BYTES: usize = 1 << 20;

/// A tap with two queues, removed when dropped.
struct WideTap;

impl WideTap {
    fn new() -> Self {
        for words in [
            format!("tuntap add {TAP} mode tap multi_queue vnet_hdr"),
            format!("address add {HOST}/24 dev {TAP}"),
            format!("link set {TAP} up"),
        ] {
            let status = Command::new("ip").args(words.split(' ')).status().unwrap();
            assert!(status.success(), "ip {words}");
        }
        Self
    }
}

impl Drop for WideTap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", TAP]).status();
    }
}

/// The kernel's threads for vhost-net in this process, where they are since Linux 6.4.
fn kernel_threads() -> Vec<String> {
    let threads = fs::read_dir("/proc/self/task").unwrap().flatten();
    threads
        .filter_map(|entry| fs::read_to_string(entry.path().join("comm")).ok())
        .filter(|name| name.starts_with("vhost-"))
        .collect()
}

/// The open descriptors of `/dev/vhost-net`.
fn open_instances() -> usize {
    let links = fs::read_dir("/proc/self/fd").unwrap().flatten();
    links
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .filter(|target| target.ends_with("vhost-net"))
        .count()
}

/// Gives these bytes to the first that connects, and takes those of the second.
fn carry(bytes: &[u8]) -> JoinHandle<Vec<u8>> {
    let listener = TcpListener::bind((HOST, 7201)).unwrap();
    let given = bytes.to_vec();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&given).unwrap();
        drop(stream);
        let (mut stream, _) = listener.accept().unwrap();
        let mut taken = Vec::new();
        stream.read_to_end(&mut taken).unwrap();
        taken
    })
}

/// What the guest does; it waits for the host where it says so.
const SCRIPT: &str = "
    host=192.168.163.1
    mount -t tmpfs tmpfs /tmp
    say_ping() { echo \"$1=$(ping -c 3 -q -W 10 $host | grep -c '3 packets received')\"; }
    carrier() { until [ \"$(cat /sys/class/net/eth0/carrier)\" = $1 ]; do sleep 0.05; done; }
    device=$(basename $(readlink -f /sys/class/net/eth0/device))
    bits=$(cat /sys/bus/virtio/devices/$device/features)
    echo bits=$(echo $bits | cut -c16)$(echo $bits | cut -c18,19,21)
    echo queues=$(ls /sys/class/net/eth0/queues | wc -l)
    say_ping first
    timeout 100 nc $host 7201 </dev/null >/tmp/got
    echo got=$(sha256sum </tmp/got | cut -d' ' -f1)
    timeout 100 nc $host 7201 </tmp/got

    # Another driver begins anew.
    cd /sys/bus/virtio/drivers/virtio_net
    echo $device >unbind
    echo $device >bind
    ip address add 192.168.163.2/24 dev eth0
    ip link set eth0 up
    say_ping rebound

    echo please:pause
    carrier 0
    echo no-link=$(ping -c 1 -W 1 $host | grep -c '1 packets received')
    echo please:plug
    carrier 1
    say_ping plugged";

fn the_kernel_carries_the_packets_through_every_change(transport: Transport) {
    assert_eq!((open_instances(), kernel_threads().len()), (0, 0));
    let _tap = WideTap::new();
    let folder = tempfile::tempdir().unwrap();
    let kernel = guest_assets().kernel("6.12").unwrap();
    let initrd = folder.path().join("initrd");
    initrd::with_script(&kernel.initrd, &initrd, SCRIPT).unwrap();
    let noise = noise(BYTES);
    let carried = carry(&noise);
    let (output, printed) = ConsoleOutput::capture(1 << 20);
    let vm = VmBuilder::new()
        .vcpus(2)
        .memory(MemorySize::mib(192))
        .kernel(Kernel::open(&kernel.bzimage).unwrap())
        .initrd(initrd)
        .cmdline("console=ttyS0 quiet panic=-1 kiln.ip=eth0:192.168.163.2/24")
        .transport(transport)
        .net(Net::tap(TAP).unwrap().queues(2).vhost(true))
        .serial(Console::new(ConsoleInput::null(), output))
        .build()
        .unwrap();
    let handle = vm.start().unwrap();
    let net = handle.net(0).unwrap();
    wait_for(&printed, "please:pause");
    assert_eq!(open_instances(), 2, "one for each pair of queues");
    assert_eq!(net.queue_pairs(), 2);
    handle.pause().unwrap();
    handle.resume().unwrap();
    net.set_link(false);
    wait_for(&printed, "please:plug");
    net.set_link(true);
    assert_eq!(handle.wait().unwrap(), VmExit::Shutdown);
    drop(handle);
    let text = printed.text();
    assert!(carried.join().unwrap() == noise, "what the guest sent");
    for (name, value) in [
        // Mergeable buffers, and a control queue with neither of the filters.
        ("bits", "1100"),
        ("queues", "4"),
        ("first", "1"),
        ("got", &sha256(&noise)),
        ("rebound", "1"),
        ("no-link", "0"),
        ("plugged", "1"),
    ] {
        let line = format!("{name}={value}");
        let found = text.lines().any(|found| found.trim_end() == line);
        assert!(found, "{line}: {text}");
    }
    // The kernel's threads have a moment to end.
    let since = Instant::now();
    while !kernel_threads().is_empty() {
        assert!(since.elapsed() < PATIENCE, "{:?}", kernel_threads());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(open_instances(), 0);
}

fn wait_for(printed: &Captured, what: &str) {
    let since = Instant::now();
    while !printed.text().contains(what) {
        assert!(since.elapsed() < PATIENCE, "{what}: {}", printed.text());
        std::thread::sleep(Duration::from_millis(20));
    }
}
