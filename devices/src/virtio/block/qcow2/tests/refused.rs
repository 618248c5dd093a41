//! Images that are not taken, and what is said about them.

use super::*;

fn refused(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut image = small_image();
    change(&mut image);
    let error = open_bytes(&image, false).map(drop).unwrap_err();
    let read_only = open_bytes(&image, true).err();
    let message = message(error);
    if let Some(other) = read_only {
        assert_eq!(message, other.to_string());
    }
    message
}

fn with_u32(at: usize, value: u32) -> String {
    refused(|image| image[at..at + 4].copy_from_slice(&value.to_be_bytes()))
}

fn with_u64(at: usize, value: u64) -> String {
    refused(|image| image[at..at + 8].copy_from_slice(&value.to_be_bytes()))
}

#[track_caller]
fn assert_says(message: &str, part: &str) {
    assert!(message.contains(part), "{message}");
}

#[test]
fn what_kiln_cannot_use_is_named() {
    assert_says(&with_u32(0, 0), "does not begin like one");
    assert_says(
        &refused(|image| image.truncate(3)),
        "does not begin like one",
    );
    for version in [0, 1, 4, u32::MAX] {
        assert_says(&with_u32(4, version), &format!("version {version}"));
    }
    for method in [1, 2, 3] {
        assert_says(&with_u32(32, method), "it has encryption");
    }
    assert_says(&with_u64(72, 1 << 2), "an external data file");
    assert_says(&with_u64(72, 1 << 3), "a compression other than zlib");
    assert_says(&with_u64(72, 1 << 4), "extended L2 entries");
    assert_says(&with_u64(72, 1 << 5), "unknown features (0x20)");
    assert_says(&with_u64(72, 1 << 63), "unknown features");
}

#[test]
fn an_image_that_needs_a_repair_gets_one_first() {
    assert_says(&with_u64(72, 1), "not closed by the last program");
    assert_says(&with_u64(72, 1), "`qemu-img check -r all`");
    assert_says(&with_u64(72, 2), "marked as corrupt");
    let free = refused(|image| image[2 * CLUSTER..2 * CLUSTER + 2].fill(0));
    assert_says(&free, "its refcounts are wrong");
    assert_says(&with_u64(CLUSTER, 0), "its refcounts are wrong");
}

#[test]
fn a_header_that_cannot_be_is_refused() {
    for bits in [0, 8, 22, 31, 64, u32::MAX] {
        assert_says(&with_u32(20, bits), "its clusters are of 2^");
    }
    assert_says(&with_u32(96, 7), "its refcounts are of 2^7");
    for length in [0, 72, 103, 105, 513, u32::MAX] {
        assert_says(&with_u32(100, length), "its header is of");
    }
    assert_says(&with_u32(108, 47), "table of feature names");
    assert_says(&with_u32(108, 1), "table of feature names");
    assert_says(
        &with_u32(108, u32::MAX),
        "does not end in the first cluster",
    );
    // The disk.
    assert_says(&with_u64(24, 0), "its size of 0 bytes");
    assert_says(&with_u64(24, 513), "its size of 513 bytes");
    for size in [SMALL + 1, 1 << 40, 1 << 63, u64::MAX] {
        assert_says(&with_u64(24, size), "its L1 table is too small");
    }
    // The tables.
    for offset in [0, 1, 513, 16 * CLUSTER as u64, 1 << 56, u64::MAX - 511] {
        assert_says(&with_u64(40, offset), "its L1 table is at");
        assert_says(&with_u64(48, offset), "its refcount table is at");
    }
    assert_says(&with_u32(36, (4 << 20) + 1), "its L1 table is of");
    assert_says(&with_u32(36, u32::MAX), "its L1 table is of");
    assert_says(&with_u32(56, u32::MAX), "its refcount table is of");
    assert_says(&with_u32(56, 0), "no refcount table");
    // The name of a backing file.
    for (offset, len) in [
        (600, 5),
        (500, 13),
        (1, 0),
        (1, 1024),
        (u64::MAX, 5),
        (1, u32::MAX),
    ] {
        let message = refused(|image| {
            image[8..16].copy_from_slice(&offset.to_be_bytes());
            image[16..20].copy_from_slice(&len.to_be_bytes());
        });
        assert_says(&message, "backing file's name");
    }
}

#[test]
fn refcounts_that_describe_more_than_the_file_are_refused() {
    for (entry, part) in [
        ((5, 2 * CLUSTER as u64), "block 5 of its refcounts"),
        ((1, 2 * CLUSTER as u64), "two blocks of its refcounts"),
        ((1, 1 << 40), "block 1 of its refcounts is at 0x10000000000"),
        ((0, 2 * CLUSTER as u64 + 8), "block 0 of its refcounts"),
    ] {
        let mut image = small_image();
        let (index, value): (usize, u64) = entry;
        let at = CLUSTER + 8 * index;
        image[at..at + 8].copy_from_slice(&value.to_be_bytes());
        let error = open_bytes(&image, false).unwrap_err();
        assert_says(&message(error), part);
        // They do not matter where nothing is written.
        open_bytes(&image, true).unwrap();
    }
}

#[test]
fn what_an_image_says_cannot_forge_a_message() {
    let name = "a\nkiln: all is well\u{1b}[2J";
    let message = refused(|image| {
        image[8..16].copy_from_slice(&300_u64.to_be_bytes());
        image[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        image[300..300 + name.len()].copy_from_slice(name.as_bytes());
    });
    assert_says(&message, r"a\nkiln: all is well\u{1b}[2J");
}

#[test]
fn a_backing_file_without_a_format_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    std::fs::write(&base, small_image()).unwrap();
    let mut image = small_image();
    image[8..16].copy_from_slice(&300_u64.to_be_bytes());
    image[16..20].copy_from_slice(&4_u32.to_be_bytes());
    image[300..304].copy_from_slice(b"base");
    let path = folder.path().join("top");
    std::fs::write(&path, image).unwrap();
    let error = message(Qcow2File::open(&path, true, &BackingFiles::Only(vec![base])).unwrap_err());
    assert!(error.contains("does not say the format"), "{error}");
}
