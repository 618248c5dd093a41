use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;
use crate::{Backing, HugePages, MemoryOptions, allocate};

const MIB: u64 = 1 << 20;
/// Where RAM ends, and where it goes on.
const HOLE: u64 = 16 * MIB;
const HIGH: u64 = 64 * MIB;
const END: u64 = 72 * MIB;
const SIZE: u64 = HOLE + END - HIGH;

fn kinds() -> Vec<MemoryOptions> {
    let mut kinds = Vec::new();
    for backing in [Backing::Anonymous, Backing::Memfd] {
        for huge_pages in [HugePages::None, HugePages::Transparent] {
            for dirty_log in [false, true] {
                kinds.push(MemoryOptions {
                    backing,
                    huge_pages,
                    dirty_log,
                    ..Default::default()
                });
            }
        }
    }
    kinds
}

/// RAM in two regions, every byte of it written.
fn full(options: &MemoryOptions) -> GuestMemory {
    let regions = [
        (GuestAddress(0), HOLE as usize),
        (GuestAddress(HIGH), (END - HIGH) as usize),
    ];
    let memory = allocate(&regions, options).unwrap();
    for region in memory.iter() {
        let bytes = vec![0xa5; region.len() as usize];
        memory.write_slice(&bytes, region.start_addr()).unwrap();
    }
    assert_eq!(resident(&memory).unwrap().as_bytes(), SIZE);
    memory
}

fn byte(memory: &GuestMemory, address: u64) -> u8 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn pages_given_back_are_the_hosts_and_read_as_zeros() {
    for options in kinds() {
        let memory = full(&options);
        let given = discard(&memory, GuestAddress(2 * MIB), 10 * MIB).unwrap();
        assert_eq!(given, 10 * MIB, "{options:?}");
        let held = resident(&memory).unwrap().as_bytes();
        assert_eq!(held, SIZE - 10 * MIB, "{options:?}");
        for address in [0, 2 * MIB - 1, 12 * MIB, HIGH] {
            assert_eq!(byte(&memory, address), 0xa5, "{address:#x} {options:?}");
        }
        for address in [2 * MIB, 7 * MIB + 123, 12 * MIB - 1] {
            assert_eq!(byte(&memory, address), 0, "{address:#x} {options:?}");
        }
        // And they can be had again.
        memory.write_obj(7_u8, GuestAddress(3 * MIB)).unwrap();
        assert_eq!(byte(&memory, 3 * MIB), 7);
    }
}

#[test]
fn a_file_loses_the_pages_for_all_who_map_it() {
    let options = MemoryOptions {
        backing: Backing::Memfd,
        ..Default::default()
    };
    let memory = full(&options);
    let region = memory.find_region(GuestAddress(HIGH)).unwrap();
    let file = region.file_offset().unwrap();
    let blocks = || {
        use std::os::unix::fs::MetadataExt;
        file.file().metadata().unwrap().blocks() * 512
    };
    let before = blocks();
    let given = discard(&memory, GuestAddress(HIGH + MIB), 4 * MIB).unwrap();
    assert_eq!((given, blocks()), (4 * MIB, before - 4 * MIB));
}

#[test]
fn any_range_may_be_given_and_only_whole_pages_of_ram_are_taken() {
    let memory = full(&MemoryOptions::default());
    let mut held = SIZE;
    for (start, len, expected) in [
        (HOLE, HIGH - HOLE, 0),
        (END, u64::MAX, 0),
        (u64::MAX, u64::MAX, 0),
        (u64::MAX - 4095, 4096, 0),
        (0x1001, 0x1ffe, 0),
        (0x1001, 0x1fff, 0x1000),
        (0x3000, 0, 0),
        (0x3000, 0xfff, 0),
        // Across the end of RAM, and over the hole.
        (HOLE - 0x2800, 0x10_0000, 0x2000),
        (HOLE - 0x4000, HIGH - HOLE + 0x6000, 0x6000),
        (END - 0x1000, u64::MAX, 0x1000),
    ] {
        let given = discard(&memory, GuestAddress(start), len).unwrap();
        assert_eq!(given, expected, "{len:#x} from {start:#x}");
    }
    held -= 0x1000 + 0x6000 + 0x1000;
    assert_eq!(resident(&memory).unwrap().as_bytes(), held);
    assert_eq!(discard(&memory, GuestAddress(0), u64::MAX).unwrap(), SIZE);
    assert_eq!(resident(&memory).unwrap().as_bytes(), 0);
}

#[test]
fn a_slice_gives_back_what_it_covers() {
    for options in kinds() {
        let memory = full(&options);
        let slice = memory.get_slice(GuestAddress(HIGH + 0x800), 0x2800);
        let given = discard_slice(&memory, &slice.unwrap()).unwrap();
        assert_eq!(given, 0x2000);
        assert_eq!(resident(&memory).unwrap().as_bytes(), SIZE - 0x2000);
        assert_eq!(byte(&memory, HIGH + 0xfff), 0xa5);
        assert_eq!(byte(&memory, HIGH + 0x1000), 0);
        assert_eq!(byte(&memory, HIGH + 0x3000), 0xa5);
    }
}

#[test]
fn a_slice_of_another_memory_is_nothing_of_this_one() {
    let (memory, other) = (
        full(&MemoryOptions::default()),
        full(&MemoryOptions::default()),
    );
    let slice = other.get_slice(GuestAddress(0), 2 * MIB as usize).unwrap();
    assert_eq!(discard_slice(&memory, &slice).unwrap(), 0);
    for memory in [memory, other] {
        assert_eq!(resident(&memory).unwrap().as_bytes(), SIZE);
    }
}

#[test]
fn what_is_given_back_counts_as_written() {
    let options = MemoryOptions {
        dirty_log: true,
        ..Default::default()
    };
    let memory = full(&options);
    let dirty = |address: u64| {
        let region = memory.find_region(GuestAddress(address)).unwrap();
        let offset = (address - region.start_addr().0) as usize;
        MmapRegion::bitmap(region).dirty_at(offset)
    };
    for region in memory.iter() {
        let bitmap = MmapRegion::bitmap(region).as_ref();
        bitmap.unwrap().get_and_reset();
    }
    discard(&memory, GuestAddress(HIGH + 0x2000), 0x2000).unwrap();
    let found: Vec<bool> = (1..5).map(|page| dirty(HIGH + 0x1000 * page)).collect();
    assert_eq!(found, [false, true, true, false]);
}

#[test]
fn memory_that_is_locked_is_refused() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let options = MemoryOptions {
            backing,
            ..Default::default()
        };
        let memory = allocate(&[(GuestAddress(0), 0x4000)], &options).unwrap();
        let region = memory.find_region(GuestAddress(0)).unwrap();
        // SAFETY: the range is a whole mapping, of which the call changes nothing but where its
        // pages may be.
        let locked = unsafe { libc::mlock(region.as_ptr().cast(), 0x1000) };
        if locked != 0 {
            eprintln!("skipped: nothing may be locked here");
            return;
        }
        memory.write_obj(0xa5_u8, GuestAddress(0)).unwrap();
        let error = discard(&memory, GuestAddress(0), 0x1000).unwrap_err();
        assert_eq!(
            error.to_string(),
            "give 4K of guest memory at 0x0 back to the host"
        );
        assert_eq!(byte(&memory, 0), 0xa5);
        assert_eq!(
            discard(&memory, GuestAddress(0x1000), 0x1000).unwrap(),
            0x1000
        );
    }
}

#[test]
fn pages_of_a_reserved_pool_stay() {
    let options = MemoryOptions {
        huge_pages: HugePages::Size2M,
        ..Default::default()
    };
    let Ok(memory) = allocate(&[(GuestAddress(0), 4 * MIB as usize)], &options) else {
        eprintln!("skipped: no huge pages are reserved here");
        return;
    };
    memory.write_obj(0xa5_u8, GuestAddress(0)).unwrap();
    assert_eq!(discard(&memory, GuestAddress(0), 4 * MIB).unwrap(), 0);
    assert_eq!(byte(&memory, 0), 0xa5);
}

#[test]
fn a_file_that_is_mapped_into_memory_is_there_again() {
    use std::io::Write;

    let memory = full(&MemoryOptions::default());
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[7; 0x1000]).unwrap();
    assert!(crate::map_file(&memory, GuestAddress(0x1000), &file, 0, 0x1000).unwrap());
    memory.write_slice(&[8; 0x3000], GuestAddress(0)).unwrap();
    assert_eq!(discard(&memory, GuestAddress(0), 0x3000).unwrap(), 0x3000);
    let found = [0, 0x1000, 0x2000].map(|address| byte(&memory, address));
    assert_eq!(found, [0, 7, 0]);
}
