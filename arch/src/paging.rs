//! The page tables that the boot vCPU starts with: the first 4 GiB, each address mapped to itself.
//!
//! The 64-bit Linux protocol wants the kernel, the zero page and the command line mapped so; all of
//! them lie below 4 GiB.

use crate::layout::PAGE_TABLES_START;

const PAGE: u64 = 4096;
const ENTRIES: usize = 512;
/// The gigabytes that are mapped; each needs a page directory.
const GIB: usize = 4;
/// The bytes of all tables: a PML4, a page directory pointer table and the page directories.
#[cfg(test)]
pub(crate) const SIZE: usize = (2 + GIB) * PAGE as usize;

/// Bits of an entry (Intel SDM volume 3, section 4.5.4).
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;

/// The tables, each with its address, from [`PAGE_TABLES_START`] on. One at a time: nobody has to
/// find memory for all of them.
pub(crate) fn identity_map() -> impl Iterator<Item = (u64, [u8; PAGE as usize])> {
    let pointers = PAGE_TABLES_START + PAGE;
    let directories = pointers + PAGE;
    let address_of = move |gib: usize| directories + gib as u64 * PAGE;
    let top = table(|index| (index == 0).then_some(pointers | PRESENT | WRITABLE));
    let gibs = table(|index| (index < GIB).then(|| address_of(index) | PRESENT | WRITABLE));
    let directory = |gib: usize| {
        table(move |index| {
            let page = (gib * ENTRIES + index) as u64;
            Some(page << 21 | PRESENT | WRITABLE | LARGE)
        })
    };
    [(PAGE_TABLES_START, top), (pointers, gibs)]
        .into_iter()
        .chain((0..GIB).map(move |gib| (address_of(gib), directory(gib))))
}

/// A table with these entries; those that are `None` map nothing.
fn table(entry: impl Fn(usize) -> Option<u64>) -> [u8; PAGE as usize] {
    let mut table = [0; PAGE as usize];
    for (index, bytes) in table.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&entry(index).unwrap_or(0).to_le_bytes());
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as a processor does.
    fn walk(tables: &[u8], address: u64) -> Option<u64> {
        let entry = |table: u64, index: u64| {
            let at = usize::try_from(table - PAGE_TABLES_START + index % 512 * 8).unwrap();
            let entry = u64::from_le_bytes(tables[at..at + 8].try_into().unwrap());
            (entry & 0b11 == 0b11).then_some(entry)
        };
        let pointers = entry(PAGE_TABLES_START, address >> 39)? & !0xfff;
        let directory = entry(pointers, address >> 30)? & !0xfff;
        let page = entry(directory, address >> 21)?;
        assert_ne!(page & LARGE, 0);
        Some(page & !0x1f_ffff | address & 0x1f_ffff)
    }

    #[test]
    fn the_first_4_gib_are_mapped_to_themselves_and_nothing_else_is() {
        let mut tables = Vec::new();
        for (address, table) in identity_map() {
            assert_eq!(address, PAGE_TABLES_START + tables.len() as u64);
            tables.extend_from_slice(&table);
        }
        assert_eq!(tables.len(), SIZE);
        for address in (0..4 << 30).step_by(0x10_1000) {
            assert_eq!(walk(&tables, address), Some(address));
        }
        assert_eq!(walk(&tables, (4 << 30) - 1), Some((4 << 30) - 1));
        assert_eq!(walk(&tables, 4 << 30), None);
        assert_eq!(walk(&tables, 1 << 39), None);
    }
}
