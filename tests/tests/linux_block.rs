//! Linux guests and their disks: room that they give back, sizes that change, queues, caches, and
//! data that is what was written. They need KVM with hardware behind it, and are run as root by
//! `cargo xtask test`.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use kiln_tests::linux::{Linux, PATIENCE, guest_assets};
use kiln_tests::program::Outcome;
use kiln_vmm::{
    Captured, Console, ConsoleInput, ConsoleOutput, Disk, Kernel, Transport, VmBuilder, VmExit,
    VmHandle,
};
use kiln_xtask::initrd;

kiln_tests::over_every_transport!(
    ; over mmio when asked:
    a_guest_gives_room_back_and_chooses_when_writes_last,
    a_guest_sees_that_its_disk_is_larger,
    what_fio_writes_is_what_it_reads,
);

const MIB: u64 = 1 << 20;

/// An empty image, on a file system with holes.
fn image(folder: &Path, name: &str, mib: u64) -> PathBuf {
    let path = folder.join(name);
    File::create(&path).unwrap().set_len(mib * MIB).unwrap();
    path
}

/// The room that a file takes, in bytes.
fn room(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

fn assert_passed(outcome: &Outcome) {
    let what = format!("{}\n{}", outcome.output, outcome.errors);
    assert_eq!(outcome.code, Some(0), "{what}");
    assert!(
        outcome.lines().contains(&"kiln-test: exit status 0"),
        "{what}"
    );
    for word in ["BUG:", "Oops", "I/O error", "Call Trace"] {
        assert!(!what.contains(word), "{what}");
    }
}

fn a_guest_gives_room_back_and_chooses_when_writes_last(transport: Transport) {
    let linux = Linux::new("6.12", transport);
    let disk = image(linux.folder.path(), "disk", 96);
    let raw = image(linux.folder.path(), "raw", 32);
    let through = image(linux.folder.path(), "through", 1);
    let large = image(linux.folder.path(), "large", 1);
    std::fs::write(&raw, vec![7; 32 * MIB as usize]).unwrap();
    let linux = linux
        .disk(&disk, ",id=disk")
        .disk(&raw, ",id=raw,engine=io_uring,queues=1")
        .disk(&through, ",id=through,cache=writethrough")
        .disk(&large, ",id=large,logical-block-size=4096,queues=2")
        .tools()
        .arg("--cpus")
        .arg("3");
    let outcome = linux
        .run(
            "set -e
             . kiln-tools
             mkfs.ext4 -q -E nodiscard /dev/vda
             mkdir -p /mnt
             mount -t ext4 /dev/vda /mnt
             dd if=/dev/urandom of=/mnt/file bs=1M count=64 conv=fsync 2>/dev/null
             rm /mnt/file
             sync
             fstrim /mnt
             umount /mnt
             blkdiscard -z /dev/vdb
             cmp -n 33554432 /dev/vdb /dev/zero && echo raw=zero
             dd if=/dev/urandom of=/dev/vdb bs=1M count=1 conv=fsync 2>/dev/null
             blkdiscard -o 0 -l 524288 /dev/vdb
             for disk in vda vdb vdc vdd; do
                 echo queues_$disk=$(ls /sys/block/$disk/mq | wc -l)
                 echo cache_$disk=$(cat /sys/block/$disk/queue/write_cache)
                 echo block_$disk=$(cat /sys/block/$disk/queue/logical_block_size)
                 echo segments_$disk=$(cat /sys/block/$disk/queue/max_segments)
             done
             echo 'write through' >/sys/block/vda/cache_type
             echo turned=$(cat /sys/block/vda/queue/write_cache)
             dd if=/dev/zero of=/dev/vda bs=4k count=8 oflag=direct 2>/dev/null
             echo 'write back' >/sys/block/vda/cache_type
             echo back=$(cat /sys/block/vda/queue/write_cache)",
        )
        .unwrap();
    assert_passed(&outcome);
    let value = |name: &str| outcome.value(name).unwrap_or("none").to_owned();
    assert_eq!(value("raw"), "zero", "{}", outcome.output);
    // A queue for each vCPU where nothing else was said.
    let queues = ["vda", "vdb", "vdc", "vdd"].map(|disk| value(&format!("queues_{disk}")));
    assert_eq!(queues, ["3", "1", "3", "2"]);
    assert_eq!(value("cache_vda"), "write back");
    assert_eq!(value("cache_vdc"), "write through");
    assert_eq!(
        (value("turned"), value("back")),
        ("write through".into(), "write back".into())
    );
    assert_eq!(
        (value("block_vda"), value("block_vdd")),
        ("512".into(), "4096".into())
    );
    assert_eq!(value("segments_vda"), "254");
    let (disk, raw) = (room(&disk), room(&raw));
    println!(
        "room that the disks take: {} and {} KiB",
        disk >> 10,
        raw >> 10
    );
    // The file of 64 MiB is gone. Zeros keep their room where Linux does not allow to unmap them, as
    // for `blkdiscard -z`; what was discarded does not.
    assert!(disk < 32 * MIB, "{disk}");
    let discarded = MIB / 2;
    assert!((31 * MIB..=32 * MIB - discarded).contains(&raw), "{raw}");
}

/// A guest that says how large its disk is, whenever that changes.
fn start_watching(transport: Transport, disk: &Path) -> (VmHandle, Captured, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let kernel = guest_assets().kernel("6.12").unwrap();
    let script = "
        last=
        (while true; do
            now=$(cat /sys/block/vda/size)
            [ \"$now\" = \"$last\" ] || echo \"sectors $now\"
            last=$now
            usleep 20000
        done) &
        kiln-wait-power-button
        dd if=/dev/vda bs=1M skip=15 count=1 iflag=direct 2>/dev/null | cmp -n 1048576 - /dev/zero \\
            && echo read the end";
    let initrd = folder.path().join("initrd");
    initrd::with_script(&kernel.initrd, &initrd, script).unwrap();
    let (output, printed) = ConsoleOutput::capture(1 << 20);
    let vm = VmBuilder::new()
        .kernel(Kernel::open(&kernel.bzimage).unwrap())
        .initrd(initrd)
        .cmdline("console=ttyS0 quiet panic=-1")
        .serial(Console::new(ConsoleInput::null(), output))
        .transport(transport)
        .disk(Disk::open(disk).unwrap())
        .build()
        .unwrap();
    (vm.start().unwrap(), printed, folder)
}

fn wait_for(printed: &Captured, text: &str) {
    let since = Instant::now();
    while !printed.text().contains(text) {
        assert!(
            since.elapsed() < PATIENCE,
            "no `{text}`: {}",
            printed.text()
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

fn a_guest_sees_that_its_disk_is_larger(transport: Transport) {
    let folder = tempfile::tempdir().unwrap();
    let disk = image(folder.path(), "disk", 8);
    let (handle, printed, _folder) = start_watching(transport, &disk);
    wait_for(&printed, "kiln-power-button: ready");
    wait_for(&printed, "sectors 16384");
    let control = handle.disk(0).unwrap();
    assert!(handle.disk(1).is_none());
    assert_eq!(control.refresh_size().unwrap(), 8 * MIB);
    File::options()
        .write(true)
        .open(&disk)
        .unwrap()
        .set_len(16 * MIB)
        .unwrap();
    assert_eq!(control.refresh_size().unwrap(), 16 * MIB);
    wait_for(&printed, "sectors 32768");
    handle.power_button();
    let exit = handle.wait_timeout(PATIENCE).unwrap();
    assert_eq!(exit, Some(VmExit::Shutdown), "{}", printed.text());
    assert!(
        printed.text().contains("read the end"),
        "{}",
        printed.text()
    );
}

/// A disk of `format=` in its options, or a raw one.
fn image_of(folder: &Path, name: &str, options: &str, mib: u64) -> PathBuf {
    let path = folder.join(name);
    let backing = options
        .split(',')
        .find_map(|it| it.strip_prefix("backing="));
    if options.contains("format=qcow2") {
        if let Some(backing) = backing {
            // The guest's own data is what it finds in there, too.
            let base = File::create(backing).unwrap();
            base.set_len(mib * MIB).unwrap();
        }
        let backing = backing.map(|path| (Path::new(path), "raw"));
        kiln_tests::image::create_qcow2(&path, mib * MIB, backing).unwrap();
        path
    } else {
        image(folder, name, mib)
    }
}

/// Random sizes and depths on every queue of disks with these options, each block verified.
fn verify(transport: Transport, disks: &[&str], mib: u64) {
    let mut linux = Linux::new("6.12", transport).arg("--cpus").arg("2");
    let folder = linux.folder.path().to_owned();
    let mut jobs = String::new();
    let mut images = Vec::new();
    for (options, name) in disks.iter().zip(["vda", "vdb", "vdc"]) {
        let backing = format!("backing={}", folder.join(format!("base-{name}")).display());
        let options = options.replace("backing", &backing);
        let path = image_of(&folder, name, &options, 48);
        linux = linux.disk(&path, &format!(",id={name}{options}"));
        images.push((path, options));
        jobs += &format!(
            " --name=deep --filename=/dev/{name} --size=24M --io_size={mib}M --rw=randrw \
                 --bsrange=4k-256k --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c \
                 --verify_fatal=1 --cpus_allowed=0 --fsync=16 --thread \
                 --name=wide --filename=/dev/{name} --offset=24M --size=24M --io_size={mib}M \
                 --rw=randwrite --bsrange=512-64k --ioengine=libaio --iodepth=3 --direct=1 \
                 --verify=crc32c --verify_fatal=1 --cpus_allowed=1 --trim_percentage=5 --thread"
        );
    }
    let linux = linux.tools();
    let outcome = linux
        .run(&format!(
            ". kiln-tools
             fio --output-format=terse {jobs} >/tmp/fio 2>&1
             status=$?
             [ $status = 0 ] || cat /tmp/fio
             echo fio=$status"
        ))
        .unwrap();
    assert_passed(&outcome);
    let output = &outcome.output;
    assert_eq!(outcome.value("fio"), Some("0"), "{disks:?}: {output}");
    for (path, options) in images {
        if options.contains("format=qcow2") {
            kiln_tests::image::check_qcow2(&path, true).unwrap();
        }
    }
}

fn what_fio_writes_is_what_it_reads(transport: Transport) {
    let disks = [",engine=io_uring", ",engine=sync", ",format=qcow2"];
    verify(transport, &disks, 4);
}

#[test]
#[ignore = "needs hardware KVM: run by cargo xtask test"]
fn what_fio_writes_is_what_it_reads_in_full() {
    for transport in [Transport::Pci, Transport::Mmio] {
        for disks in [
            [",engine=auto", ",engine=io_uring", ",engine=sync"],
            [",direct", ",direct,engine=sync", ",cache=writethrough"],
            [
                ",queues=1",
                ",engine=io_uring,queues=3",
                ",io-threads=queue,engine=io_uring",
            ],
            [
                ",format=qcow2",
                ",format=qcow2,backing",
                ",format=qcow2,cache=writethrough",
            ],
        ] {
            verify(transport, &disks, 24);
        }
    }
}
