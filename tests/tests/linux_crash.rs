//! Linux guests whose machine is killed while they write: what they have synced is on their disks,
//! and file systems and images are whole. They need KVM with hardware behind it, and are run as root
//! by `cargo xtask test`.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_tests::image;
use kiln_tests::linux::{Linux, PATIENCE};
use kiln_vmm::Transport;

/// How often the machine is killed each time, and where it is asked for.
const KILLS: u32 = 1;
const MANY_KILLS: u32 = 8;

const SIZE: u64 = 64 << 20;

/// A disk that the guest writes to while its machine is killed.
struct Disk {
    /// What the guest calls it.
    name: &'static str,
    path: PathBuf,
    format: &'static str,
    options: String,
}

/// Disks of every kind, each with an empty file system.
fn disks(folder: &Path) -> Vec<Disk> {
    let empty = folder.join("empty");
    image::create_ext4(&empty, SIZE).unwrap();
    let disk = |name, format, options: &str| Disk {
        name,
        path: folder.join(name),
        format,
        options: format!(",format={format},id={name}{options}"),
    };
    let backing = format!(",backing={}", empty.display());
    let disks = vec![
        disk("vda", "raw", ",engine=io_uring"),
        disk("vdb", "raw", ",engine=sync"),
        disk("vdc", "raw", ",cache=writethrough"),
        disk("vdd", "qcow2", ""),
        disk("vde", "qcow2", &backing),
    ];
    for disk in &disks {
        if disk.name == "vde" {
            image::create_qcow2(&disk.path, SIZE, Some((&empty, "raw"))).unwrap();
        } else {
            image::convert((&empty, "raw"), (&disk.path, disk.format)).unwrap();
        }
    }
    disks
}

/// What the guest writes into the file with this number.
fn content(number: u32) -> Vec<u8> {
    let line = format!("{number}\n").into_bytes();
    let size = 1 + number as usize * 977 % 60_000;
    line.iter().copied().cycle().take(size).collect()
}

/// Starts a guest that writes files from the number `first` on to each disk, and kills its machine
/// `delay` after it said that each has one. Gives for each disk the number of the last file that it
/// said is synced.
fn write_and_kill(disks: &[Disk], first: u32, delay: Duration) -> Vec<u32> {
    let linux = disks
        .iter()
        .fold(Linux::new("6.12", Transport::Pci), |linux, disk| {
            linux.disk(&disk.path, &disk.options)
        });
    let script = format!(
        "for disk in vda vdb vdc vdd vde; do
             mkdir -p /$disk
             mount -t ext4 /dev/$disk /$disk || exit 1
             # What was there before is checked by now.
             rm -rf /$disk/*
         done
         for disk in vda vdb vdc vdd vde; do
             number={first}
             while true; do
                 size=$((1 + number * 977 % 60000))
                 yes $number | head -c $size | dd of=/$disk/$number bs=64k conv=fsync 2>/dev/null || exit 1
                 echo synced=$disk:$number.
                 number=$((number + 1))
             done &
         done
         wait"
    );
    let program = linux.start(&script).unwrap();
    let began = disks
        .iter()
        .all(|disk| program.wait_for(&format!("synced={}:{first}.", disk.name), PATIENCE));
    std::thread::sleep(delay);
    program.signal("KILL").unwrap();
    let outcome = program.wait(PATIENCE).unwrap();
    let what = format!("{}\n{}", outcome.output, outcome.errors);
    assert!(began && outcome.code.is_none(), "{what}");
    for word in ["BUG:", "I/O error", "Call Trace", "exit status"] {
        assert!(!what.contains(word), "{what}");
    }
    let lines = outcome.lines();
    let last = |disk: &Disk| -> Option<u32> {
        let prefix = format!("synced={}:", disk.name);
        let number = |line: &&str| line.strip_prefix(&prefix)?.strip_suffix('.')?.parse().ok();
        lines.iter().rev().find_map(number)
    };
    disks.iter().map(|disk| last(disk).unwrap()).collect()
}

/// The files of a disk, whose image is whole, and whose file system is once its journal is replayed.
fn files(disk: &Disk, folder: &Path, what: &str) -> BTreeMap<u32, Vec<u8>> {
    image::wait_unlocked(&disk.path).unwrap();
    if disk.format == "qcow2" {
        // Clusters that nothing uses are no harm.
        image::check_qcow2(&disk.path, true).expect(what);
    }
    let copy = folder.join("copy");
    image::convert((&disk.path, disk.format), (&copy, "raw")).unwrap();
    image::check_ext4(&copy).expect(what);
    let dump = image::fresh_folder(folder, "dump").unwrap();
    image::dump_ext4(&copy, &dump).unwrap();
    fs::remove_file(copy).unwrap();
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(&dump).unwrap() {
        let entry = entry.unwrap();
        if let Ok(number) = entry.file_name().to_str().unwrap().parse() {
            files.insert(number, fs::read(entry.path()).unwrap());
        }
    }
    files
}

fn survive(kills: u32) {
    let folder = tempfile::tempdir().unwrap();
    let disks = disks(folder.path());
    let mut synced = 0;
    for round in 0..kills {
        let first = 1 + round * 100_000;
        let delay = Duration::from_millis(800 + u64::from(round) * 1619 % 3500);
        let last = write_and_kill(&disks, first, delay);
        for (disk, last) in disks.iter().zip(last) {
            let what = format!("{}, kill {round}, files {first} to {last}", disk.options);
            let files = files(disk, folder.path(), &what);
            for number in first..=last {
                let found = files.get(&number);
                assert!(found == Some(&content(number)), "{what}: file {number}");
            }
            synced += last - first + 1;
            println!("{what}: all there");
        }
    }
    println!("{kills} kills, {synced} synced files, all there");
}

#[test]
#[ignore = "needs hardware KVM: run by cargo xtask test"]
fn disks_have_what_was_synced_when_the_machine_is_killed() {
    survive(KILLS);
}

#[test]
#[ignore = "needs hardware KVM: run by cargo xtask test"]
fn disks_have_what_was_synced_when_the_machine_is_killed_in_full() {
    survive(MANY_KILLS);
}
