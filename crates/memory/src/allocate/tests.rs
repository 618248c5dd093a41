use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

use super::*;

const HIGH: u64 = 1 << 32;

/// Tests here look at the whole process's mappings, so they run one after the other.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn mib(n: usize) -> usize {
    n << 20
}

/// What /proc/self/smaps says of a region: kilobytes in memory, and the flags.
fn smaps(region: &GuestRegionMmap<DirtyBitmap>) -> (u64, String) {
    let mapping = region.get_mmap();
    let (start, end) = (
        mapping.as_ptr() as usize,
        mapping.as_ptr() as usize + mapping.size(),
    );
    let (mut rss, mut flags, mut covered) = (0, String::new(), 0);
    let mut inside = 0;
    for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-') {
            let from = usize::from_str_radix(from, 16).unwrap();
            let to = usize::from_str_radix(to, 16).unwrap();
            // The kernel may have merged it with a neighbour of the same kind.
            inside = to.min(end).saturating_sub(from.max(start));
            covered += inside;
        } else if inside > 0 && first == "Rss:" {
            rss += line
                .split_whitespace()
                .nth(1)
                .unwrap()
                .parse::<u64>()
                .unwrap();
        } else if inside > 0 && first == "VmFlags:" {
            flags.push_str(line);
        }
    }
    assert_eq!(
        covered,
        mapping.size(),
        "the mapping is not whole in /proc/self/smaps"
    );
    (rss, flags)
}

fn region_of(memory: &GuestMemory, address: u64) -> &GuestRegionMmap<DirtyBitmap> {
    memory.find_region(GuestAddress(address)).unwrap()
}

#[test]
fn ram_of_every_size_is_mapped_and_takes_no_host_memory() {
    let _alone = alone();
    for backing in [Backing::Anonymous, Backing::Memfd] {
        for huge_pages in [HugePages::None, HugePages::Transparent] {
            for regions in [
                vec![(GuestAddress(0), mib(64))],
                vec![(GuestAddress(0), mib(3072))],
                vec![
                    (GuestAddress(0), mib(3072)),
                    (GuestAddress(HIGH), mib(2048)),
                ],
            ] {
                let options = MemoryOptions {
                    backing,
                    huge_pages,
                    ..Default::default()
                };
                let memory = allocate(&regions, &options).unwrap();
                assert_eq!(memory.num_regions(), regions.len());
                for region in memory.iter() {
                    let (rss, flags) = smaps(region);
                    assert_eq!(rss, 0, "{options:?}");
                    assert!(flags.contains(" dd"), "not kept from core dumps: {flags}");
                    assert!(region.get_mmap().bitmap().is_none());
                }
                memory
                    .write_obj(0xa5_u8, GuestAddress(mib(63) as u64))
                    .unwrap();
                let (rss, _) = smaps(region_of(&memory, 0));
                assert!((1..=2048).contains(&rss), "one write took {rss} kB");
            }
        }
    }
}

#[test]
fn transparent_huge_pages_are_asked_for_on_aligned_mappings() {
    let _alone = alone();
    let options = MemoryOptions {
        huge_pages: HugePages::Transparent,
        ..Default::default()
    };
    let memory = allocate(&[(GuestAddress(0), mib(64) + PAGE_SIZE)], &options).unwrap();
    let region = region_of(&memory, 0);
    assert!(is_aligned(&region.get_mmap()));
    assert!(smaps(region).1.contains(" hg"));
}

#[test]
fn a_hole_is_aligned_and_kept_from_both_sides() {
    let _alone = alone();
    let size = mib(4) + PAGE_SIZE;
    let (before, behind) = Reservation::new(size + THP_SIZE)
        .unwrap()
        .hole(size)
        .unwrap();
    let hole = before.start + before.size;
    assert_eq!(hole.next_multiple_of(THP_SIZE), hole);
    assert_eq!(behind.start, hole + size);
    assert_eq!(before.size + behind.size, THP_SIZE);
}

#[test]
fn prefaulted_ram_is_in_memory_at_once() {
    let _alone = alone();
    let options = MemoryOptions {
        prefault: true,
        ..Default::default()
    };
    let memory = allocate(&[(GuestAddress(0), mib(8))], &options).unwrap();
    assert!(smaps(region_of(&memory, 0)).0 >= 8 * 1024);
}

#[test]
fn a_memfd_is_shared_with_whoever_has_its_descriptor() {
    let _alone = alone();
    let options = MemoryOptions {
        backing: Backing::Memfd,
        ..Default::default()
    };
    let regions = [(GuestAddress(0), mib(4)), (GuestAddress(HIGH), mib(4))];
    let memory = allocate(&regions, &options).unwrap();
    let file = region_of(&memory, HIGH).file_offset().unwrap().clone();
    assert_eq!(file.start(), mib(4) as u64);

    let second = MmapRegionBuilder::<()>::new(mib(4))
        .with_file_offset(file.clone())
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED)
        .build()
        .unwrap();
    let second = GuestRegionMmap::new(second, GuestAddress(HIGH)).unwrap();
    let second = vm_memory::GuestMemoryMmap::from_regions(vec![second]).unwrap();

    memory
        .write_slice(b"from the guest", GuestAddress(HIGH + 0x1000))
        .unwrap();
    let mut seen = [0; 14];
    second
        .read_slice(&mut seen, GuestAddress(HIGH + 0x1000))
        .unwrap();
    assert_eq!(&seen, b"from the guest");
    second
        .write_slice(b"and back", GuestAddress(HIGH + 0x2000))
        .unwrap();
    let mut seen = [0; 8];
    memory
        .read_slice(&mut seen, GuestAddress(HIGH + 0x2000))
        .unwrap();
    assert_eq!(&seen, b"and back");
    // And the two regions do not share a byte.
    assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 0);
    file.file()
        .read_exact_at(&mut seen, file.start() + 0x2000)
        .unwrap();
    assert_eq!(&seen, b"and back");
}

#[test]
fn a_memfd_cannot_be_shrunk_under_the_guest() {
    let _alone = alone();
    let options = MemoryOptions {
        backing: Backing::Memfd,
        ..Default::default()
    };
    let memory = allocate(&[(GuestAddress(0), mib(4))], &options).unwrap();
    let file = region_of(&memory, 0).file_offset().unwrap();
    assert_eq!(
        file.file().set_len(0).unwrap_err().raw_os_error(),
        Some(libc::EPERM)
    );
    assert_eq!(file.file().metadata().unwrap().len(), mib(4) as u64);
}

#[test]
fn the_log_of_dirty_pages_sees_what_the_vmm_writes() {
    let _alone = alone();
    let options = MemoryOptions {
        dirty_log: true,
        ..Default::default()
    };
    let memory = allocate(&[(GuestAddress(0), mib(4))], &options).unwrap();
    memory.write_obj(1_u32, GuestAddress(0x5000)).unwrap();
    let mapping = region_of(&memory, 0).get_mmap();
    let dirty: Vec<_> = (0..8)
        .filter(|page| mapping.bitmap().dirty_at(page * 4096))
        .collect();
    assert_eq!(dirty, [5]);
}

#[test]
fn more_than_the_host_can_map_is_refused_and_leaves_nothing_behind() {
    let _alone = alone();
    let absurd = 1_usize << 50;
    for backing in [Backing::Anonymous, Backing::Memfd] {
        for dirty_log in [false, true] {
            for huge_pages in [HugePages::None, HugePages::Transparent] {
                let options = MemoryOptions {
                    backing,
                    dirty_log,
                    huge_pages,
                    prefault: false,
                };
                let before = mapped_kib();
                let fds = fs::read_dir("/proc/self/fd").unwrap().count();
                let regions = [(GuestAddress(0), mib(3072)), (GuestAddress(HIGH), absurd)];
                let error = allocate(&regions, &options).unwrap_err();
                assert!(error.to_string().contains("1024T"), "{error}");
                assert!(std::error::Error::source(&error).is_some());
                let after = mapped_kib();
                assert!(
                    after < before + (1 << 20),
                    "{before} kB mapped, then {after} kB"
                );
                assert_eq!(fs::read_dir("/proc/self/fd").unwrap().count(), fds);
            }
        }
    }
}

/// The kilobytes of address space that the process has mapped.
fn mapped_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmSize:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_layout_that_makes_no_sense_is_refused() {
    let refused = |regions: &[(u64, usize)]| {
        let regions: Vec<_> = regions
            .iter()
            .map(|&(at, size)| (GuestAddress(at), size))
            .collect();
        allocate(&regions, &MemoryOptions::default()).unwrap_err()
    };
    assert!(matches!(refused(&[]), Error::NoRegions));
    for not_pages in [(0, 0), (0, 4097), (7, 4096)] {
        assert!(
            matches!(refused(&[not_pages]), Error::NotWholePages { .. }),
            "{not_pages:?}"
        );
    }
    assert!(matches!(
        refused(&[(0, 8192), (4096, 4096)]),
        Error::BadLayout { .. }
    ));
    assert!(matches!(
        refused(&[(8192, 4096), (0, 4096)]),
        Error::BadLayout { .. }
    ));
    assert!(matches!(
        refused(&[(u64::MAX - 4095, 8192)]),
        Error::BadLayout { .. }
    ));
}

#[test]
fn a_missing_pool_of_huge_pages_says_how_many_to_reserve_and_where() {
    let _alone = alone();
    // 64 TiB of pool: no host has that.
    for (huge_pages, page) in [
        (HugePages::Size2M, "2048kB"),
        (HugePages::Size1G, "1048576kB"),
    ] {
        let options = MemoryOptions {
            huge_pages,
            ..Default::default()
        };
        let error = allocate(&[(GuestAddress(0), 1 << 46)], &options)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(&format!("hugepages-{page}/nr_hugepages")),
            "{error}"
        );
        assert!(error.contains("64T"), "{error}");
    }
    let options = MemoryOptions {
        huge_pages: HugePages::Size2M,
        ..Default::default()
    };
    let error = allocate(&[(GuestAddress(0), mib(1))], &options).unwrap_err();
    assert!(matches!(error, Error::NotWholePages { unit, .. } if unit == MemorySize::mib(2)));
}
