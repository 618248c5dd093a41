//! What the tests of qcow2 images share: a guest's RAM, images of our own, and what is wrong with an
//! image. Those of QEMU's images are in `tests/qcow2`, as a program that starts others must not be
//! one that tests locks.

mod format;
mod hostile;
mod locks;
mod order;
#[path = "../../../../../tests/qcow2/ram.rs"]
mod ram;
mod refused;

use std::fs::File;
use std::path::Path;

use super::{Qcow2Error, Qcow2File};
use crate::virtio::block::{BackingFiles, BlockBackend};
use crate::virtio::hostile::Random;
use format::{empty_image, problem};
use ram::Ram;

fn open(path: &Path, read_only: bool) -> Result<Qcow2File, Qcow2Error> {
    Qcow2File::open(path, read_only, &BackingFiles::Refuse)
}

fn message(error: Qcow2Error) -> String {
    let text = error.to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

/// Bytes that are not the same at any two places, nor zero.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..len).map(|_| random.next() as u8 | 1).collect()
}

/// The clusters of [`small_image`].
const CLUSTER: usize = 512;
/// The size of the disk in it.
const SMALL: u64 = 32 << 10;

/// An image that has a bit of everything: two blocks of refcounts, an L2 table, a cluster of data,
/// one of zeros, a compressed one, header extensions, and free clusters.
fn small_image() -> Vec<u8> {
    let mut image = vec![0; 16 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let cluster = |number: u64| number * CLUSTER as u64;
    put(0, b"QFI\xfb");
    put(4, &3_u32.to_be_bytes());
    put(20, &9_u32.to_be_bytes());
    put(24, &SMALL.to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &cluster(3).to_be_bytes());
    put(48, &cluster(1).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    // A table of feature names with one entry.
    put(104, &0x6803_f857_u32.to_be_bytes());
    put(108, &48_u32.to_be_bytes());
    put(114, b"dirty bit");
    // The refcount table, and a block that says of nine clusters that they are in use.
    put(CLUSTER, &cluster(2).to_be_bytes());
    for number in 0..9 {
        put(2 * CLUSTER + 2 * number, &1_u16.to_be_bytes());
    }
    // L1 and L2 tables.
    let copied = 1 << 63;
    put(3 * CLUSTER, &(copied | cluster(4)).to_be_bytes());
    put(4 * CLUSTER, &(copied | cluster(5)).to_be_bytes());
    put(4 * CLUSTER + 8, &1_u64.to_be_bytes());
    // 512 bytes in one stored block, which begins in the middle of a cluster and ends in the next.
    let place = cluster(6) + 100;
    let sectors = 1_u64;
    put(
        4 * CLUSTER + 16,
        &(1 << 62 | sectors << 61 | place).to_be_bytes(),
    );
    put(4 * CLUSTER + 24, &(copied | cluster(8)).to_be_bytes());
    put(5 * CLUSTER, &pattern(5, CLUSTER));
    put(place as usize, &[1, 0, 2, 0xff, 0xfd]);
    put(place as usize + 5, &pattern(6, CLUSTER));
    put(8 * CLUSTER, &pattern(8, CLUSTER));
    image
}

/// What the disk in it holds.
fn small_contents() -> Vec<u8> {
    let mut disk = pattern(5, CLUSTER);
    disk.extend([0; CLUSTER]);
    disk.extend(pattern(6, CLUSTER));
    disk.extend(pattern(8, CLUSTER));
    disk.resize(SMALL as usize, 0);
    disk
}

fn file_with(bytes: &[u8]) -> File {
    use std::os::unix::fs::FileExt;
    let file = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(file);
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn open_bytes(bytes: &[u8], read_only: bool) -> Result<Qcow2File, Qcow2Error> {
    Qcow2File::from_file(file_with(bytes), "image", read_only, &BackingFiles::Refuse)
}

#[test]
fn the_small_image_is_one() {
    let ram = Ram::new();
    let mut disk = open_bytes(&small_image(), true).unwrap();
    assert!(ram.contents(&mut disk) == small_contents());
    assert_eq!(problem(&small_image()), None);
}
