//! RAM of a guest with guard pages around each part of it, and what was written to it.

use std::ops::Range;
use std::sync::Arc;

use kiln_memory::{DirtyBitmap, GuestMemory};
use kiln_virtio_device::testing::MockDriver;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    VolatileMemory,
};

/// RAM is small, so that it can be compared as a whole: a part for what a driver sends and
/// receives, and for indirect tables, one where every [`MockDriver`] has its queues, and one where
/// it has RAM behind the hole.
pub(crate) const LOW_END: u64 = 0x4_0000;
pub(crate) const HIGH_END: u64 = MockDriver::HIGH + 0x1_0000;
pub(crate) const DATA: u64 = 0x1_0000;
pub(crate) const TABLE: u64 = 0x3_0000;

const PARTS: [Range<u64>; 3] = [
    0..LOW_END,
    MockDriver::QUEUES..MockDriver::QUEUES + 0x2_0000,
    MockDriver::HIGH..HIGH_END,
];
const GUARD: usize = 0x8000;
const GUARD_BYTE: u8 = 0xc5;

/// RAM, and the mapping that it is a part of.
pub(crate) struct Ram {
    pub(crate) memory: Arc<GuestMemory>,
    guards: Vec<Range<usize>>,
    // Behind `memory`, which points into it.
    whole: MmapRegion<()>,
}

fn len(part: &Range<u64>) -> usize {
    (part.end - part.start) as usize
}

impl Ram {
    pub(crate) fn new() -> Self {
        let size = PARTS.iter().map(|part| len(part) + GUARD).sum::<usize>() + GUARD;
        let whole = MmapRegion::<()>::new(size).unwrap();
        let mut guards = Vec::new();
        let mut regions = Vec::new();
        let mut at = 0;
        for part in &PARTS {
            guards.push(at..at + GUARD);
            at += GUARD;
            let pointer = whole.get_slice(at, len(part)).unwrap();
            let builder = MmapRegionBuilder::<DirtyBitmap>::new_with_bitmap(len(part), None)
                .with_mmap_prot(whole.prot())
                .with_mmap_flags(whole.flags());
            // SAFETY: the slice lies in the mapping `whole`, which lives as long as the `Ram`. The
            // memory is used by what a test holds beside it and drops before.
            let builder =
                unsafe { builder.with_raw_mmap_pointer(pointer.ptr_guard_mut().as_ptr()) };
            let region = builder.build().unwrap();
            regions.push(GuestRegionMmap::new(region, GuestAddress(part.start)).unwrap());
            at += len(part);
        }
        guards.push(at..at + GUARD);
        let ram = Self {
            memory: Arc::new(GuestMemory::from_regions(regions).unwrap()),
            guards,
            whole,
        };
        for guard in &ram.guards {
            let bytes = vec![GUARD_BYTE; guard.len()];
            let slice = ram.whole.get_slice(guard.start, guard.len()).unwrap();
            slice.copy_from(&bytes);
        }
        ram
    }

    /// Nothing outside of RAM was written.
    pub(crate) fn check_guards(&self) {
        for guard in &self.guards {
            let slice = self.whole.get_slice(guard.start, guard.len()).unwrap();
            let mut bytes = vec![0; guard.len()];
            slice.copy_to(&mut bytes);
            let whole = bytes == vec![GUARD_BYTE; guard.len()];
            assert!(whole, "memory beside the guest's RAM was written");
        }
    }

    /// Zeroes all of it.
    pub(crate) fn clear(&self) {
        for part in &PARTS {
            let zeros = vec![0; len(part)];
            self.memory
                .write_slice(&zeros, GuestAddress(part.start))
                .unwrap();
        }
    }

    /// All that is in it.
    pub(crate) fn copy(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for part in &PARTS {
            let start = bytes.len();
            bytes.resize(start + len(part), 0);
            let to = &mut bytes[start..];
            self.memory
                .read_slice(to, GuestAddress(part.start))
                .unwrap();
        }
        bytes
    }

    /// Says that only these ranges differ from what there was.
    pub(crate) fn check_only_written(&self, before: &[u8], allowed: &[Range<u64>]) {
        const PAGE: usize = 0x1000;
        let now = self.copy();
        let pages = PARTS.iter().flat_map(|part| part.clone().step_by(PAGE));
        for (page, (now, before)) in pages.zip(now.chunks(PAGE).zip(before.chunks(PAGE))) {
            if now == before {
                continue;
            }
            for (address, (now, before)) in (page..).zip(now.iter().zip(before)) {
                let may = || allowed.iter().any(|range| range.contains(&address));
                assert!(now == before || may(), "{address:#x} was written");
            }
        }
    }
}

impl std::fmt::Debug for Ram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let regions = self.memory.iter().map(|region| region.start_addr());
        f.debug_list().entries(regions).finish()
    }
}

#[test]
fn guards_and_ram_are_looked_at() {
    let ram = Ram::new();
    ram.check_guards();
    let before = ram.copy();
    ram.memory.write_slice(&[1; 4], GuestAddress(DATA)).unwrap();
    ram.check_only_written(&before, std::slice::from_ref(&(DATA..DATA + 4)));
    let narrow = DATA..DATA + 3;
    let check = || ram.check_only_written(&before, std::slice::from_ref(&narrow));
    assert!(std::panic::catch_unwind(check).is_err());
    assert!(
        ram.memory
            .write_slice(&[1; 2], GuestAddress(LOW_END - 1))
            .is_err()
    );
    let guard = ram.guards[1].clone();
    let slice = ram.whole.get_slice(guard.start, 1).unwrap();
    slice.copy_from(&[0_u8]);
    assert!(std::panic::catch_unwind(|| ram.check_guards()).is_err());
}
