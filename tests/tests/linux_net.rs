//! Networks of Linux guests: several queues, offloads, large frames, namespaces, and the cable. They
//! need KVM with hardware behind it, and are run as root by `cargo xtask test`.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kiln_tests::linux::{Linux, PATIENCE, guest_assets};
use kiln_vmm::{
    Console, ConsoleInput, ConsoleOutput, Kernel, MemorySize, Net, Transport, VmBuilder, VmExit,
};
use kiln_xtask::initrd;

kiln_tests::over_every_transport!(
    ; over mmio when asked:
    a_guest_uses_several_queues_large_frames_and_offloads;
    when asked:
    streams_of_a_guest_go_both_ways,
);

/// A tap with several queues and room for large frames, removed when dropped.
struct WideTap(&'static str);

impl WideTap {
    fn new(name: &'static str, address: &str) -> Self {
        for words in [
            format!("tuntap add {name} mode tap multi_queue vnet_hdr"),
            format!("address add {address} dev {name}"),
            format!("link set {name} mtu 9000 up"),
        ] {
            let status = Command::new("ip").args(words.split(' ')).status().unwrap();
            assert!(status.success(), "ip {words}");
        }
        Self(name)
    }
}

impl Drop for WideTap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", self.0]).status();
    }
}

fn with_queues(transport: Transport, tap: &str, address: &str) -> Linux {
    Linux::new("6.12", transport)
        .tools()
        .arg("--cpus")
        .arg("2")
        .arg("--io-threads")
        .arg("queue")
        .arg("--net")
        .arg(format!("tap={tap},queues=2"))
        .cmdline(&format!("kiln.ip=eth0:{address}"))
}

fn a_guest_uses_several_queues_large_frames_and_offloads(transport: Transport) {
    let _tap = WideTap::new("kilnnet0", "192.168.160.1/24");
    let outcome = with_queues(transport, "kilnnet0", "192.168.160.2/24")
        .run(
            r#"
            . kiln-tools
            echo "queues=$(ls /sys/class/net/eth0/queues | tr '\n' ' ')"
            echo "combined=$(ethtool -l eth0 | grep Combined | tail -n 1 | tr -d '\t ')"
            echo "mtu=$(cat /sys/class/net/eth0/mtu)"
            # Linux leaves it off, and turns it on where the device has it.
            ethtool -K eth0 tx-udp-segmentation on
            ethtool -k eth0 | sed 's/^/offload /'
            ping -c 3 -q -s 8972 -M do 192.168.160.1 | sed 's/^/large /'
            ping -f -c 500 -q 192.168.160.1 | sed 's/^/flood /'
            ethtool -L eth0 combined 1 && echo "one=$(ethtool -l eth0 | grep Combined | tail -n 1 | tr -d '\t ')"
            ping -c 3 -q 192.168.160.1 | sed 's/^/one-queue /'
            ethtool -L eth0 combined 2
            unshare -n sleep 600 &
            sleep 1
            ip link set eth0 netns $! && echo "moved=yes"
            inside="nsenter -t $! -n"
            $inside ip address add 192.168.160.2/24 dev eth0
            $inside ip link set eth0 up
            sleep 1
            $inside ping -c 3 -q 192.168.160.1 | sed 's/^/namespace /'
            kill $!
            sleep 1
            echo "back=$(ls /sys/class/net | tr '\n' ' ')"
            "#,
        )
        .unwrap();
    let said = &outcome.output;
    assert_eq!(
        outcome.value("queues"),
        Some("rx-0 rx-1 tx-0 tx-1"),
        "{said}"
    );
    assert_eq!(outcome.value("combined"), Some("Combined:2"), "{said}");
    assert_eq!(outcome.value("mtu"), Some("9000"), "{said}");
    for offload in [
        "tx-checksumming: on",
        "scatter-gather: on",
        "tx-tcp-segmentation: on",
        "tx-tcp6-segmentation: on",
        "tx-udp-segmentation: on",
        "rx-vlan-filter: on",
    ] {
        let line = said.lines().find(|line| {
            let line = line.strip_prefix("offload ");
            line.is_some_and(|line| line.trim().starts_with(offload))
        });
        assert!(line.is_some(), "{offload}: {said}");
    }
    for (kind, received) in [
        ("large", "3 received, 0% packet loss"),
        ("flood", "500 received, 0% packet loss"),
        ("one-queue", "3 received, 0% packet loss"),
        ("namespace", "3 packets received, 0% packet loss"),
    ] {
        let line = said
            .lines()
            .find(|line| line.starts_with(kind) && line.contains(received));
        assert!(line.is_some(), "{kind}: {said}");
    }
    assert_eq!(outcome.value("one"), Some("Combined:1"), "{said}");
    assert_eq!(outcome.value("moved"), Some("yes"), "{said}");
    assert!(outcome.value("back").unwrap().contains("eth0"), "{said}");
}

/// The other end of the guest's iperf3. Dropping it ends it.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// It takes iperf3 on the host, too.
fn streams_of_a_guest_go_both_ways(transport: Transport) {
    let _tap = WideTap::new("kilnnet1", "192.168.161.1/24");
    let server = Command::new("iperf3")
        .args(["--server", "--bind", "192.168.161.1"])
        .stdout(Stdio::null())
        .spawn();
    let _server = Server(server.expect("iperf3 is installed"));
    let outcome = with_queues(transport, "kilnnet1", "192.168.161.2/24")
        .run(
            "
            . kiln-tools
            for streams in 1 8; do
                for way in '' -R; do
                    iperf3 -c 192.168.161.1 -t 1 -P $streams $way >/tmp/said 2>&1 && \
                        echo \"streams$streams$way=done\"
                    grep -E 'SUM|receiver' /tmp/said | tail -n 1
                done
            done
            ",
        )
        .unwrap();
    for name in ["streams1", "streams1-R", "streams8", "streams8-R"] {
        assert_eq!(outcome.value(name), Some("done"), "{}", outcome.output);
    }
}

#[test]
#[ignore = "needs hardware KVM: run by cargo xtask test"]
fn a_guest_sees_its_cable_plugged_out_and_in() {
    let _tap = WideTap::new("kilnnet2", "192.168.162.1/24");
    let folder = tempfile::tempdir().unwrap();
    let kernel = guest_assets().kernel("6.12").unwrap();
    let initrd = folder.path().join("initrd");
    // Each change of the carrier is a line.
    let script = "
        last=
        while [ \"$changes\" != xxx ]; do
            now=$(cat /sys/class/net/eth0/carrier)
            if [ \"$now\" != \"$last\" ]; then
                echo \"carrier:$now\"
                last=$now
                changes=x$changes
            fi
        done
        ping -c 3 192.168.162.1 | grep received";
    initrd::with_script(&kernel.initrd, &initrd, script).unwrap();
    let (output, printed) = ConsoleOutput::capture(1 << 20);
    let vm = VmBuilder::new()
        .memory(MemorySize::mib(192))
        .kernel(Kernel::open(&kernel.bzimage).unwrap())
        .initrd(initrd)
        .cmdline("console=ttyS0 quiet panic=-1 kiln.ip=eth0:192.168.162.2/24")
        .net(Net::tap("kilnnet2").unwrap())
        .serial(Console::new(ConsoleInput::null(), output))
        .build()
        .unwrap();
    let handle = vm.start().unwrap();
    let net = handle.net(0).unwrap();
    assert!(handle.net(1).is_none());
    let wait_for = |lines: &[&str]| {
        let since = Instant::now();
        loop {
            let text = printed.text();
            let seen: Vec<_> = text
                .lines()
                .map(str::trim_end)
                .filter(|line| line.starts_with("carrier:"))
                .collect();
            if seen == lines {
                return;
            }
            assert!(since.elapsed() < PATIENCE, "{lines:?}: {text}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    wait_for(&["carrier:1"]);
    net.set_link(false);
    assert!(!net.is_link_up());
    wait_for(&["carrier:1", "carrier:0"]);
    net.set_link(true);
    wait_for(&["carrier:1", "carrier:0", "carrier:1"]);
    assert_eq!(handle.wait().unwrap(), VmExit::Shutdown);
    let text = printed.text();
    assert!(text.contains("3 packets received"), "{text}");
}
