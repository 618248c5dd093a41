//! The memory map that the guest is given (E820; ACPI 6.5 section 15.4).

use kiln_memory::GuestMemory;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout::{
    ACPI_TABLES_START, EBDA_START, KERNEL_MIN_START, KVM_IDENTITY_MAP_START, KVM_TSS_START,
    PCI_CONFIG_SIZE, PCI_CONFIG_START,
};

/// The pages of KVM's task state segment.
const KVM_TSS_SIZE: u64 = 0x3000;
/// Where the gap for VGA of a PC begins.
const VGA_START: u64 = 0xa_0000;

/// What a range of addresses is, with its E820 number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum MemoryKind {
    /// For the guest to use.
    Ram = 1,
    /// Not for the guest to use.
    Reserved = 2,
    /// ACPI tables.
    AcpiTables = 3,
}

/// A range of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MemoryMapEntry {
    /// Its first address.
    pub(super) address: u64,
    /// Its bytes.
    pub(super) size: u64,
    /// What it is.
    pub(super) kind: MemoryKind,
}

/// The memory map of a guest, sorted by address and without overlaps.
pub(super) fn memory_map(memory: &GuestMemory) -> Vec<MemoryMapEntry> {
    let mut map = Vec::new();
    let mut add = |address: u64, end: u64, kind| {
        if end > address {
            map.push(MemoryMapEntry {
                address,
                size: end - address,
                kind,
            });
        }
    };
    for region in memory.iter() {
        let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        // Below a megabyte there are holes in RAM, as on every PC.
        add(start, end.min(EBDA_START), MemoryKind::Ram);
        add(
            start.max(EBDA_START),
            end.min(VGA_START),
            MemoryKind::Reserved,
        );
        let tables_end = end.min(KERNEL_MIN_START);
        add(
            start.max(ACPI_TABLES_START),
            tables_end,
            MemoryKind::AcpiTables,
        );
        add(start.max(KERNEL_MIN_START), end, MemoryKind::Ram);
    }
    // A guest believes that configuration space is there only where the map agrees. It is kept free
    // in a machine without PCI as well.
    add(
        PCI_CONFIG_START,
        PCI_CONFIG_START + PCI_CONFIG_SIZE,
        MemoryKind::Reserved,
    );
    add(
        KVM_IDENTITY_MAP_START,
        KVM_TSS_START + KVM_TSS_SIZE,
        MemoryKind::Reserved,
    );
    map.sort_unstable_by_key(|entry| entry.address);
    map
}

/// Where the RAM that begins at address 0 ends.
pub(super) fn low_ram_end(memory: &GuestMemory) -> u64 {
    memory
        .find_region(GuestAddress(0))
        .map_or(0, |region| region.len())
}

#[cfg(test)]
mod tests {
    use kiln_memory::{MemoryOptions, allocate};

    use super::*;
    use crate::layout::ram_regions;

    fn map_of(size: u64) -> Vec<(u64, u64, MemoryKind)> {
        let memory = allocate(&ram_regions(size), &MemoryOptions::default()).unwrap();
        memory_map(&memory)
            .iter()
            .map(|e| (e.address, e.address + e.size, e.kind))
            .collect()
    }

    #[test]
    fn all_ram_but_the_holes_below_a_megabyte_is_for_the_guest() {
        use MemoryKind::{AcpiTables, Ram, Reserved};
        let low = [
            (0, 0x9_fc00, Ram),
            (0x9_fc00, 0xa_0000, Reserved),
            (0xe_0000, 0x10_0000, AcpiTables),
        ];
        let hole = [
            (0xf000_0000, 0xf010_0000, Reserved),
            (0xfffb_c000, 0xfffc_0000, Reserved),
        ];
        let small = [&[(0x10_0000, 64 << 20, Ram)], &hole[..]].concat();
        assert_eq!(map_of(64 << 20), [&low[..], &small].concat());
        let high = (4 << 30, 6 << 30, Ram);
        let large = [&[(0x10_0000, 3 << 30, Ram)], &hole[..], &[high]].concat();
        assert_eq!(map_of(5 << 30), [&low[..], &large].concat());
    }

    #[test]
    fn a_machine_of_one_page_has_a_map_too() {
        assert_eq!(map_of(4096)[0], (0, 4096, MemoryKind::Ram));
        assert_eq!(map_of(4096).len(), 3);
    }
}
