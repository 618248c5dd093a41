//! 64-bit ELF kernels (System V ABI, chapters 4 and 5), and the note with their PVH entry.

use std::ops::Range;

use kiln_memory::GuestMemory;

use super::field::{u16_at, u32_at, u64_at};
use super::sections::{self, Section};
use super::{BootProtocol, KernelProblem};
use crate::Error;
use crate::file::ImageFile;
use crate::layout::{KERNEL_MIN_START, MMIO_HOLE_START};

const HEADER_SIZE: usize = 64;
const MAGIC: &[u8; 4] = b"\x7fELF";
/// Bytes of `e_ident`.
const IDENT_CLASS: usize = 4;
const IDENT_DATA: usize = 5;
const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
/// Fields of the header, as offsets.
const TYPE: usize = 16;
const MACHINE: usize = 18;
const ENTRY: usize = 24;
const PHOFF: usize = 32;
const SHOFF: usize = 40;
const PHENTSIZE: usize = 54;
const PHNUM: usize = 56;
const SHENTSIZE: usize = 58;
const SHNUM: usize = 60;

const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PROGRAM_HEADER_SIZE: u16 = 56;
/// Tables of more sections are not looked at; a kernel has some fifty.
const MAX_SECTIONS: u64 = 1024;
/// A kernel has about five.
const MAX_PROGRAM_HEADERS: u16 = 128;

const PT_LOAD: u32 = 1;
/// A segment that can be written to.
const PF_W: u32 = 1 << 1;
const PT_NOTE: u32 = 4;
/// Notes that are longer are not looked at to their end; those of Linux take some hundred bytes.
const MAX_NOTES_SIZE: u64 = 0x1_0000;
const NOTE_HEADER_SIZE: usize = 12;
const PVH_NOTE_NAME: &[u8] = b"Xen\0";
/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const PVH_NOTE_TYPE: u32 = 18;

/// What is known of an ELF kernel.
#[derive(Clone, Debug)]
pub(super) struct Elf {
    entry: u64,
    pvh_entry: Option<u64>,
    /// What is loaded, sorted by address: none is empty, and no two overlap.
    segments: Vec<Segment>,
    /// Guest physical addresses of what the kernel changes when it starts, whole pages.
    changing: Vec<Range<u64>>,
}

/// A segment, or a part of one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    start: u64,
    end: u64,
    /// Where its content is in the file, and how much of it: the rest of it is zeros.
    offset: u64,
    file_size: u64,
}

/// Less than this is read rather than mapped: a mapping costs more.
const MIN_MAPPED: u64 = 0x1_0000;
const PAGE: u64 = 0x1000;

impl Segment {
    /// The part of the segment that can be mapped: guest physical addresses, whole pages both there
    /// and in the file. It may be empty.
    fn pages(&self) -> (u64, u64) {
        let content_end = self.start + self.file_size;
        let (first, last) = (self.start.next_multiple_of(PAGE), content_end / PAGE * PAGE);
        let congruent = self.start % PAGE == self.offset % PAGE;
        if congruent && last.saturating_sub(first) >= MIN_MAPPED {
            (first, last)
        } else {
            (content_end, content_end)
        }
    }

    /// Gives the parts of the segment, of which some are empty whatever the file has there. They are
    /// sorted, and where the file has something.
    fn split_at(mut self, empty: &[Range<u64>], parts: &mut Vec<Self>) {
        for hole in empty {
            let size = hole.start - self.start;
            parts.push(Self {
                end: hole.end,
                file_size: size,
                ..self
            });
            let taken = hole.end - self.start;
            self = Self {
                start: hole.end,
                end: self.end,
                offset: self.offset + taken,
                file_size: self.file_size - taken,
            };
        }
        if self.start < self.end {
            parts.push(self);
        }
    }

    /// Where the byte for an address of the segment is in the file.
    fn offset_of(&self, address: u64) -> u64 {
        self.offset + (address - self.start)
    }
}

/// A program header, as far as it matters.
struct ProgramHeader {
    kind: u32,
    flags: u32,
    offset: u64,
    virtual_address: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
    align: u64,
}

impl Elf {
    /// Looks at a file; `None` where it is no ELF image.
    pub(super) fn inspect(file: &ImageFile) -> Result<Option<Self>, Error> {
        let header = file.read(0, HEADER_SIZE)?;
        if !header.starts_with(MAGIC) {
            return Ok(None);
        }
        match Self::read(file, &header) {
            Ok(elf) => Ok(Some(elf)),
            Err(Failure::Host(error)) => Err(error),
            Err(Failure::Image(problem)) => Err(problem.of(file.name())),
        }
    }

    fn read(file: &ImageFile, header: &[u8]) -> Result<Self, Failure> {
        check_header(header, file.len())?;
        let count = u16_at(header, PHNUM);
        let table = file.read(
            u64_at(header, PHOFF),
            usize::from(count) * usize::from(PROGRAM_HEADER_SIZE),
        )?;
        let headers: Vec<_> = table
            .chunks_exact(PROGRAM_HEADER_SIZE.into())
            .map(ProgramHeader::parse)
            .collect();
        for header in &headers {
            // Also of kinds that are not loaded: a file that lacks them lost its end.
            within(file.len(), header.offset, header.file_size)?;
        }
        let sections = read_sections(file, header)?;
        let segments = segments(&headers, &sections)?;
        let mut pvh_entry = None;
        for header in headers.iter().filter(|header| header.kind == PT_NOTE) {
            let size = header.file_size.min(MAX_NOTES_SIZE) as usize;
            let notes = file.read(header.offset, size)?;
            pvh_entry = pvh_entry.or(find_pvh_note(&notes, header.align));
        }
        let elf = Self {
            entry: u64_at(header, ENTRY),
            pvh_entry,
            segments,
            changing: changing(&headers, &sections),
        };
        elf.entry(elf.default_protocol())?;
        Ok(elf)
    }

    /// PVH wherever there is a PVH entry: what an image expects at its ELF entry is not written in
    /// it, and for other kernels than Linux it is mostly not the Linux boot protocol.
    pub(super) fn default_protocol(&self) -> BootProtocol {
        match self.pvh_entry {
            Some(_) => BootProtocol::Pvh,
            None => BootProtocol::Linux64,
        }
    }

    /// Where it is entered by a protocol.
    pub(super) fn entry(&self, protocol: BootProtocol) -> Result<u64, KernelProblem> {
        let entry = match protocol {
            BootProtocol::Linux64 => self.entry,
            BootProtocol::Pvh => self.pvh_entry.ok_or(KernelProblem::NoPvhEntry)?,
        };
        let inside = |segment: &Segment| (segment.start..segment.end).contains(&entry);
        if self.segments.iter().any(inside) {
            Ok(entry)
        } else {
            Err(KernelProblem::EntryOutside { entry })
        }
    }

    /// Puts the segments where they belong: maps whole pages of the file there where it may, and
    /// reads the rest.
    pub(super) fn load(
        &self,
        memory: &GuestMemory,
        file: &ImageFile,
        may_map: bool,
    ) -> Result<(), Error> {
        for segment in &self.segments {
            let (mut first, last) = segment.pages();
            let is_mapped = may_map
                && first < last
                && file.map(segment.offset_of(first), last - first, memory, first)?;
            if !is_mapped {
                first = last;
            }
            let content_end = segment.start + segment.file_size;
            for (from, to) in [(segment.start, first), (last, content_end)] {
                file.read_into(segment.offset_of(from), to - from, memory, from)?;
            }
        }
        Ok(())
    }

    /// Guest physical addresses of what the kernel will surely change when it starts: its code, which
    /// it fits to the processor, and its data.
    pub(super) fn changing(&self) -> &[Range<u64>] {
        &self.changing
    }

    /// From the first byte of the first segment to the one behind the last.
    pub(super) fn extent(&self) -> (u64, u64) {
        let start = self.segments.first().map_or(0, |segment| segment.start);
        (start, self.segments.last().map_or(0, |segment| segment.end))
    }
}

/// Why an image could not be read.
enum Failure {
    Host(Error),
    Image(KernelProblem),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Host(error)
    }
}

impl From<KernelProblem> for Failure {
    fn from(problem: KernelProblem) -> Self {
        Self::Image(problem)
    }
}

impl ProgramHeader {
    fn parse(bytes: &[u8]) -> Self {
        Self {
            kind: u32_at(bytes, 0),
            flags: u32_at(bytes, 4),
            offset: u64_at(bytes, 8),
            virtual_address: u64_at(bytes, 16),
            address: u64_at(bytes, 24),
            file_size: u64_at(bytes, 32),
            memory_size: u64_at(bytes, 40),
            align: u64_at(bytes, 48),
        }
    }
}

fn check_header(header: &[u8], len: u64) -> Result<(), KernelProblem> {
    match header.get(IDENT_CLASS) {
        Some(&CLASS_32) => return Err(KernelProblem::Elf32),
        Some(&CLASS_64) => {}
        Some(_) => return Err(KernelProblem::BadElf("its class is unknown")),
        None => {
            return Err(KernelProblem::Truncated {
                has: len,
                needs: HEADER_SIZE as u64,
            });
        }
    }
    if header.len() < HEADER_SIZE {
        return Err(KernelProblem::Truncated {
            has: len,
            needs: HEADER_SIZE as u64,
        });
    }
    if header[IDENT_DATA] != LITTLE_ENDIAN {
        let machine = u16_at(header, MACHINE).swap_bytes();
        return Err(KernelProblem::WrongMachine { machine });
    }
    let machine = u16_at(header, MACHINE);
    if machine != MACHINE_X86_64 {
        return Err(KernelProblem::WrongMachine { machine });
    }
    if !matches!(u16_at(header, TYPE), TYPE_EXECUTABLE | TYPE_SHARED) {
        return Err(KernelProblem::BadElf(
            "it is an object or a core dump, not an executable",
        ));
    }
    let count = u16_at(header, PHNUM);
    if count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(KernelProblem::ProgramHeaders { count });
    }
    if u16_at(header, PHENTSIZE) != PROGRAM_HEADER_SIZE {
        return Err(KernelProblem::BadElf(
            "its program headers have the wrong size",
        ));
    }
    if u64_at(header, PHOFF) < HEADER_SIZE as u64 {
        return Err(KernelProblem::BadElf(
            "its program headers overlap its header",
        ));
    }
    let size = u64::from(count) * u64::from(PROGRAM_HEADER_SIZE);
    within(len, u64_at(header, PHOFF), size)
}

/// Checks that the table of sections is all there, and reads it. It is not needed to boot, but it is
/// the last thing in most files, and so tells one that lost its end.
fn read_sections(file: &ImageFile, header: &[u8]) -> Result<Vec<Section>, Failure> {
    let offset = u64_at(header, SHOFF);
    if offset == 0 {
        return Ok(Vec::new());
    }
    if u16_at(header, SHENTSIZE) != sections::HEADER_SIZE {
        return Err(KernelProblem::BadElf("its section headers have the wrong size").into());
    }
    let entry = u64::from(sections::HEADER_SIZE);
    within(file.len(), offset, entry)?;
    let count = match u16_at(header, SHNUM) {
        0 => u64_at(&file.read(offset + sections::SIZE as u64, 8)?, 0),
        count => u64::from(count),
    };
    let size = count.saturating_mul(entry);
    within(file.len(), offset, size)?;
    if count > MAX_SECTIONS {
        return Ok(Vec::new());
    }
    // At most 64 KiB.
    Ok(sections::parse(&file.read(offset, size as usize)?))
}

/// The segments that are loaded, sorted.
fn segments(
    headers: &[ProgramHeader],
    sections: &[Section],
) -> Result<Vec<Segment>, KernelProblem> {
    let mut segments = Vec::new();
    for header in headers.iter().filter(|header| header.kind == PT_LOAD) {
        if header.file_size > header.memory_size {
            return Err(KernelProblem::BadElf(
                "a segment is larger in the file than in memory",
            ));
        }
        if header.memory_size == 0 {
            continue;
        }
        let (start, end) = (
            header.address,
            header.address.saturating_add(header.memory_size),
        );
        if start < KERNEL_MIN_START || end > MMIO_HOLE_START {
            return Err(KernelProblem::SegmentOutside { start, end });
        }
        let whole = Segment {
            start,
            end,
            offset: header.offset,
            file_size: header.file_size,
        };
        whole.split_at(&empty_parts(header, sections), &mut segments);
    }
    segments.sort_unstable_by_key(|segment| segment.start);
    for pair in segments.windows(2) {
        if pair[0].end > pair[1].start {
            let (first, second) = (pair[0].start, pair[1].start);
            return Err(KernelProblem::SegmentsOverlap { first, second });
        }
    }
    if segments.is_empty() {
        return Err(KernelProblem::BadElf("it has no segment to load"));
    }
    Ok(segments)
}

/// What of a segment is all zeros though the file has something there, as it does in kernels whose
/// last section is not empty for the linker: whole pages, guest physical addresses. To map or read
/// them would cost what memory that nobody touched does not.
fn empty_parts(header: &ProgramHeader, sections: &[Section]) -> Vec<Range<u64>> {
    let empty = sections.iter().filter(|section| section.is_empty);
    empty
        .filter_map(|section| section.within(header.virtual_address, header.file_size))
        .filter_map(|part| {
            let start = (header.address + part.start).checked_next_multiple_of(PAGE)?;
            let end = (header.address + part.end) / PAGE * PAGE;
            (end.saturating_sub(start) >= MIN_MAPPED).then_some(start..end)
        })
        .collect()
}

/// What a kernel changes when it starts: its code, and what is not constant in segments that can be
/// written to. Whole pages, guest physical addresses.
fn changing(headers: &[ProgramHeader], sections: &[Section]) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for header in headers.iter().filter(|header| header.kind == PT_LOAD) {
        let is_writable = header.flags & PF_W != 0;
        let parts = sections
            .iter()
            .filter(|section| !section.is_empty)
            .filter(|section| section.is_code || is_writable && section.is_writable)
            .filter_map(|section| section.within(header.virtual_address, header.file_size));
        for part in parts {
            // The sum was found to be in RAM's reach.
            let start = (header.address + part.start) / PAGE * PAGE;
            let end = (header.address + part.end).next_multiple_of(PAGE);
            match ranges.last_mut() {
                Some(last) if last.end == start || last.contains(&start) => {
                    last.end = last.end.max(end);
                }
                _ => ranges.push(start..end),
            }
        }
    }
    ranges.retain(|range| range.end - range.start >= MIN_MAPPED);
    ranges
}

/// The PVH entry, if one of the notes has it. Notes that make no sense end the search.
fn find_pvh_note(mut notes: &[u8], align: u64) -> Option<u64> {
    let align = if align == 8 { 8 } else { 4 };
    while notes.len() >= NOTE_HEADER_SIZE {
        let (name_size, size) = (u32_at(notes, 0) as usize, u32_at(notes, 4) as usize);
        let kind = u32_at(notes, 8);
        // 32-bit sizes cannot overflow 64-bit sums.
        let at = (NOTE_HEADER_SIZE + name_size).next_multiple_of(align);
        let end = (at + size).next_multiple_of(align);
        let name = notes.get(NOTE_HEADER_SIZE..NOTE_HEADER_SIZE + name_size)?;
        let content = notes.get(at..at + size)?;
        if kind == PVH_NOTE_TYPE && name == PVH_NOTE_NAME {
            // Linux gives a 64-bit number, others one of 32 bits.
            return match size {
                4 => Some(u32_at(content, 0).into()),
                8 => Some(u64_at(content, 0)).filter(|&entry| entry <= u32::MAX.into()),
                _ => None,
            };
        }
        notes = notes.get(end..)?;
    }
    None
}

/// Checks that a piece of the file is there.
fn within(len: u64, offset: u64, size: u64) -> Result<(), KernelProblem> {
    let needs = offset.saturating_add(size);
    if size > 0 && needs > len {
        return Err(KernelProblem::Truncated { has: len, needs });
    }
    Ok(())
}
