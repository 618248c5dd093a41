//! The sections of an ELF image: they say what of a segment is empty, and what of it a kernel
//! changes when it starts.

use std::ops::Range;

use super::field::{u32_at, u64_at};

/// Bytes of a section header.
pub(super) const HEADER_SIZE: u16 = 64;

/// Fields of a section header.
const KIND: usize = 4;
const FLAGS: usize = 8;
const ADDRESS: usize = 16;
/// The size, which in the first one counts the sections where `e_shnum` cannot.
pub(super) const SIZE: usize = 32;

/// `SHT_NOBITS`: it has addresses and no content, so it is all zeros.
const NO_BITS: u32 = 8;
const WRITE: u64 = 1;
const ALLOCATED: u64 = 1 << 1;
const EXECUTABLE: u64 = 1 << 2;
/// `SHF_TLS`: the addresses are those of what follows, if it is without content.
const THREAD_LOCAL: u64 = 1 << 10;

/// A section that is in memory when the program runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Section {
    /// Virtual addresses.
    start: u64,
    end: u64,
    pub(super) is_empty: bool,
    pub(super) is_writable: bool,
    pub(super) is_code: bool,
}

impl Section {
    fn parse(header: &[u8]) -> Option<Self> {
        let (flags, start, size) = (
            u64_at(header, FLAGS),
            u64_at(header, ADDRESS),
            u64_at(header, SIZE),
        );
        let section = Self {
            start,
            end: start.checked_add(size)?,
            is_empty: u32_at(header, KIND) == NO_BITS,
            is_writable: flags & WRITE != 0,
            is_code: flags & EXECUTABLE != 0,
        };
        (flags & (ALLOCATED | THREAD_LOCAL) == ALLOCATED && size > 0).then_some(section)
    }

    /// What of it is in a segment that begins at a virtual address and has `size` bytes, counted
    /// from the segment's beginning.
    pub(super) fn within(&self, address: u64, size: u64) -> Option<Range<u64>> {
        let start = self.start.checked_sub(address)?;
        let end = self.end - address;
        (end <= size).then_some(start..end)
    }
}

/// Reads a table of sections. Those without content that share addresses with others are left out:
/// what is there is not known.
pub(super) fn parse(table: &[u8]) -> Vec<Section> {
    let headers = table.chunks_exact(HEADER_SIZE.into());
    let mut sections: Vec<_> = headers.filter_map(Section::parse).collect();
    sections.sort_unstable_by_key(|section| (section.start, section.end));
    let mut reached = 0;
    let mut is_shared = vec![false; sections.len()];
    for (index, section) in sections.iter().enumerate() {
        if section.start < reached {
            is_shared[index] = true;
            is_shared[index - 1] = true;
        }
        reached = reached.max(section.end);
    }
    // One that reaches over several others is the first of them, whose neighbour it is.
    let mut index = 0;
    sections.retain(|section| {
        index += 1;
        !(section.is_empty && is_shared[index - 1])
    });
    sections
}

#[cfg(test)]
mod tests {
    use kiln_memory::{MemoryOptions, allocate};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::Kernel;
    use crate::file::tests::temporary;
    use crate::kernel::tests::{elf_with, put};
    use crate::layout::ram_regions;

    const LOAD: u64 = 16 << 20;
    const OFFSET: u64 = 0x1000;
    const LEN: u64 = 0x10_0000;
    const CODE: u64 = ALLOCATED | EXECUTABLE;
    const DATA: u64 = ALLOCATED | WRITE;

    /// A section header: kind, flags, address, size.
    fn header((kind, flags, address, size): (u32, u64, u64, u64)) -> Vec<u8> {
        let mut header = vec![0; HEADER_SIZE.into()];
        put(&mut header, KIND, &kind.to_le_bytes());
        for (at, value) in [(FLAGS, flags), (ADDRESS, address), (SIZE, size)] {
            put(&mut header, at, &value.to_le_bytes());
        }
        header
    }

    /// A kernel of one segment without a zero in it, and these sections, by their place in it.
    fn kernel(sections: &[(u32, u64, u64, u64)]) -> Kernel {
        let end = OFFSET + LEN;
        let headers = [(1, OFFSET, LOAD, LEN, LEN)];
        let mut image = elf_with(&headers, end as usize);
        let content: Vec<_> = (0..LEN).map(|at| (at % 251) as u8 + 1).collect();
        put(&mut image, OFFSET as usize, &content);
        put(&mut image, 40, &end.to_le_bytes());
        put(&mut image, 60, &(sections.len() as u16).to_le_bytes());
        for &(kind, flags, at, size) in sections {
            let address = 0xffff_ffff_8000_0000 + LOAD + at;
            image.extend(header((kind, flags, address, size)));
        }
        Kernel::from_file(temporary(&image), "vmlinux").unwrap()
    }

    /// What is in memory of the segment: for each page whether it is empty or the file's.
    fn loaded(kernel: &Kernel) -> Vec<bool> {
        let memory = allocate(&ram_regions(64 << 20), &MemoryOptions::default()).unwrap();
        kernel
            .load(&memory, &kernel.placement(64 << 20).unwrap())
            .unwrap();
        let mut bytes = vec![0; LEN as usize];
        memory.read_slice(&mut bytes, GuestAddress(LOAD)).unwrap();
        let is_empty = |page: &[u8]| page.iter().all(|byte| *byte == 0);
        let is_whole = |page: &[u8]| page.iter().all(|byte| *byte != 0);
        bytes
            .chunks(0x1000)
            .map(|page| {
                assert!(is_empty(page) || is_whole(page));
                is_empty(page)
            })
            .collect()
    }

    #[test]
    fn what_has_no_content_is_left_empty_whatever_the_file_has_there() {
        let kernel = kernel(&[
            (0, 0, 0, 0),
            (1, CODE, 0, 0x2_0000),
            (NO_BITS, DATA, 0x2_0800, 0x3_0000),
            (1, ALLOCATED, 0x5_0800, 0x1_0000),
            (NO_BITS, DATA, 0xf_0000, 0x1_0000),
        ]);
        for kernel in [kernel.clone(), kernel.read()] {
            let empty = loaded(&kernel);
            let expected = |page: usize| (0x21..0x50).contains(&page) || page >= 0xf0;
            for (page, is_empty) in empty.into_iter().enumerate() {
                assert_eq!(is_empty, expected(page), "{page:#x}");
            }
        }
    }

    #[test]
    fn sections_that_make_no_sense_empty_nothing() {
        let shared = kernel(&[
            (NO_BITS, DATA, 0, 0x8_0000),
            (1, CODE, 0x1_0000, 0x1000),
            (1, CODE, 0x4_0000, 0x1000),
            // Too short to be worth it, with the addresses of what follows, not in memory, partly
            // behind the segment, and behind the last address.
            (NO_BITS, DATA, 0x8_0000, 0x8000),
            (NO_BITS, DATA | THREAD_LOCAL, 0x9_0000, 0x2_0000),
            (NO_BITS, WRITE, 0x9_0000, 0x2_0000),
            (NO_BITS, DATA, 0xe_0000, 0x4_0000),
            (NO_BITS, DATA, 0xb_0000, u64::MAX),
        ]);
        assert!(loaded(&shared).iter().all(|is_empty| !is_empty));
    }

    #[test]
    fn code_and_data_will_change() {
        let sections = [
            (1, CODE, 0, 0x2_0000),
            (1, ALLOCATED, 0x2_0000, 0x1_0000),
            (1, DATA, 0x3_0010, 0x1_8000),
            (1, CODE, 0x4_8010, 0x8000),
            (1, DATA, 0x7_0000, 0x1000),
            (NO_BITS, DATA, 0x8_0000, 0x1_0000),
        ];
        let part = |from, to| (GuestAddress(LOAD + from), to - from);
        let kernel = kernel(&sections);
        let parts = [part(0, 0x2_0000), part(0x3_0000, 0x5_1000)];
        assert_eq!(kernel.changing_parts(), parts);
        // What is read is there already.
        assert_eq!(kernel.read().changing_parts(), []);
    }
}
