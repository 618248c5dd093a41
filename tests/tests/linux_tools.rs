//! The disk of tools in Linux guests. They need KVM with hardware behind it, and are run as root by
//! `cargo xtask test`.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs::File;

use kiln_tests::linux::Linux;
use kiln_vmm::Transport;

kiln_tests::over_every_transport!(; over mmio when asked: ; when asked: the_tools_run_in_a_guest);

const SCRIPT: &str = r#"
    . kiln-tools
    fio --name=x --filename=/dev/vdb --rw=randwrite --bs=4k --size=4m --direct=1 --ioengine=libaio \
        --iodepth=8 --verify=crc32c --output-format=terse >/tmp/fio && echo "fio=verified"
    mkfs.ext4 -q -F /dev/vdb && e2fsck -fn /dev/vdb >/dev/null 2>&1 && echo "e2fsprogs=clean"
    iperf3 --server --one-off --daemon && sleep 1
    iperf3 --client 127.0.0.1 --bytes 1M >/tmp/iperf && echo "iperf3=sent"
    echo "ethtool=$(ethtool --version)"
    echo "ip=$(ip -Version)"
    echo "lsblk=$(lsblk --noheadings --nodeps --output SIZE /dev/vdb)"
    ping -c 1 -q 127.0.0.1 >/dev/null && echo "ping=answered"
    echo "fstrim=$(fstrim --version)"
"#;

fn the_tools_run_in_a_guest(transport: Transport) {
    let linux = Linux::new("6.12", transport).tools();
    let disk = linux.folder.path().join("disk");
    File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    let outcome = linux.disk(&disk, "").run(SCRIPT).unwrap();
    for (name, value) in [
        ("fio", "verified"),
        ("e2fsprogs", "clean"),
        ("iperf3", "sent"),
        ("ping", "answered"),
    ] {
        assert_eq!(outcome.value(name), Some(value), "{outcome:?}");
    }
    for (name, part) in [
        ("ethtool", "ethtool version"),
        ("ip", "iproute2"),
        ("lsblk", "16M"),
        // Busybox has commands of this name too, which say something else.
        ("fstrim", "util-linux"),
    ] {
        assert!(outcome.value(name).unwrap().contains(part), "{outcome:?}");
    }
}
