use std::fs::File;
use std::os::unix::fs::FileExt;

use kiln_memory::{MemoryOptions, allocate};

use super::*;
use crate::file::tests::temporary;
use crate::layout::ram_regions;

const MIB: u64 = 1 << 20;
const LOAD: u64 = 16 * MIB;
const PVH_ENTRY: u64 = LOAD + 0x2010;

pub(super) fn put(bytes: &mut Vec<u8>, at: usize, value: &[u8]) {
    bytes.resize(bytes.len().max(at + value.len()), 0);
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A small bzImage, made as the kernel's build makes it: setup sectors, then the system.
pub(crate) fn bzimage() -> Vec<u8> {
    const SETUP_SECTORS: u8 = 7;
    const SYSTEM: usize = 0x5000;
    let mut image = vec![0; (usize::from(SETUP_SECTORS) + 1) * 512];
    for (at, value) in [
        (0x1f1, &[SETUP_SECTORS][..]),
        (0x1f4, &(SYSTEM as u32 / 16).to_le_bytes()),
        (0x1fe, &[0x55, 0xaa]),
        (0x200, &[0xeb, 0x6a]),
        (0x202, b"HdrS"),
        (0x206, &0x020f_u16.to_le_bytes()),
        (0x211, &[1]),
        (0x22c, &0x7fff_ffff_u32.to_le_bytes()),
        (0x230, &0x20_0000_u32.to_le_bytes()),
        (0x234, &[1, 21]),
        (0x236, &0x3f_u16.to_le_bytes()),
        (0x238, &2047_u32.to_le_bytes()),
        (0x248, &0x300_u32.to_le_bytes()),
        (0x24c, &0x4000_u32.to_le_bytes()),
        (0x258, &LOAD.to_le_bytes()),
        (0x260, &(8 * MIB as u32).to_le_bytes()),
        // Behind the header: the guest must not see this.
        (0x270, b"not a part of the header"),
    ] {
        put(&mut image, at, value);
    }
    image.extend((0..SYSTEM).map(|at| (at / 7) as u8));
    image
}

/// A bzImage with an ELF image in it that is packed by LZ4: one run of literals.
pub(crate) fn bzimage_of(elf: &[u8]) -> Vec<u8> {
    let more = elf.len() - 15;
    let mut block = vec![0xf0];
    block.extend(vec![255; more / 255]);
    block.push((more % 255) as u8);
    block.extend(elf);
    let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
    payload.extend((block.len() as u32).to_le_bytes());
    payload.extend(block);
    payload.extend((elf.len() as u32).to_le_bytes());

    let mut image = bzimage();
    let offset = image.len() - 8 * 512;
    image.extend(&payload);
    image.resize(image.len().next_multiple_of(16), 0);
    let system = image.len() - 8 * 512;
    for (at, value) in [
        (0x1f4, system as u32 / 16),
        (0x238, 1000),
        (0x248, offset as u32),
        (0x24c, payload.len() as u32),
    ] {
        put(&mut image, at, &value.to_le_bytes());
    }
    image
}

/// A program header: kind, offset in the file, physical address, sizes in file and in memory.
type Header = (u32, u64, u64, u64, u64);

/// An ELF image with its sections behind everything else, as linkers make it.
pub(super) fn elf_with(headers: &[Header], len: usize) -> Vec<u8> {
    let mut image = vec![0; 64];
    for (at, value) in [
        (0, &b"\x7fELF\x02\x01\x01"[..]),
        (16, &2_u16.to_le_bytes()),
        (18, &62_u16.to_le_bytes()),
        (20, &1_u32.to_le_bytes()),
        (24, &LOAD.to_le_bytes()),
        (32, &64_u64.to_le_bytes()),
        (40, &(len as u64 - 3 * 64).to_le_bytes()),
        (52, &64_u16.to_le_bytes()),
        (54, &56_u16.to_le_bytes()),
        (56, &(headers.len() as u16).to_le_bytes()),
        (58, &64_u16.to_le_bytes()),
        (60, &3_u16.to_le_bytes()),
    ] {
        put(&mut image, at, value);
    }
    for &(kind, offset, address, file_size, memory_size) in headers {
        image.extend(kind.to_le_bytes());
        image.extend(7_u32.to_le_bytes());
        let virtual_address = address.wrapping_add(0xffff_ffff_8000_0000);
        for field in [
            offset,
            virtual_address,
            address,
            file_size,
            memory_size,
            4096,
        ] {
            image.extend(field.to_le_bytes());
        }
    }
    image.resize(len, 0);
    image
}

fn note(name: &[u8], kind: u32, content: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for field in [name.len() as u32, content.len() as u32, kind] {
        note.extend(field.to_le_bytes());
    }
    for part in [name, content] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

const SEGMENTS: [Header; 3] = [
    (1, 0x1000, LOAD, 0x3000, 0x3000),
    (1, 0x4000, LOAD + 2 * MIB, 0x1000, MIB),
    (4, 0x5000, 0, 0x100, 0x100),
];

/// A small ELF kernel with notes that a linker put beside the one that matters.
pub(crate) fn elf(pvh: bool) -> Vec<u8> {
    let mut image = elf_with(&SEGMENTS, 0x6800);
    for (at, byte) in image[0x1000..0x5000].iter_mut().enumerate() {
        *byte = (at / 5) as u8;
    }
    let mut notes = note(b"GNU\0", 3, &[0xab; 20]);
    notes.extend(note(b"Linux\0", 18, &[1, 2, 3, 4]));
    notes.extend(note(b"Xen\0", 6, b"linux\0"));
    if pvh {
        notes.extend(note(b"Xen\0", 18, &PVH_ENTRY.to_le_bytes()));
    }
    put(&mut image, 0x5000, &notes);
    image
}

fn open(image: &[u8]) -> Result<Kernel, Error> {
    Kernel::from_file(temporary(image), "vmlinuz")
}

fn problem(image: &[u8]) -> KernelProblem {
    match open(image).unwrap_err() {
        Error::Kernel { name, problem } if name == "vmlinuz" => problem,
        other => panic!("{other}"),
    }
}

/// A change at an offset of a good image.
fn patched(mut image: Vec<u8>, at: usize, value: &[u8]) -> Vec<u8> {
    put(&mut image, at, value);
    image
}

#[test]
fn the_format_is_seen_from_the_content_and_pvh_is_chosen_where_it_is_there() {
    for (image, format, protocol) in [
        (bzimage(), KernelFormat::BzImage, BootProtocol::Linux64),
        (elf(false), KernelFormat::Elf, BootProtocol::Linux64),
        (elf(true), KernelFormat::Elf, BootProtocol::Pvh),
    ] {
        let kernel = open(&image).unwrap();
        assert_eq!((kernel.format(), kernel.protocol()), (format, protocol));
        assert_eq!(kernel.name(), "vmlinuz");
    }
}

#[test]
fn the_protocol_can_be_chosen_where_the_kernel_has_it() {
    let kernel = open(&elf(true))
        .unwrap()
        .with_protocol(BootProtocol::Linux64)
        .unwrap();
    assert_eq!(kernel.placement(64 * MIB).unwrap().entry, LOAD);
    let kernel = kernel.with_protocol(BootProtocol::Pvh).unwrap();
    assert_eq!(kernel.placement(64 * MIB).unwrap().entry, PVH_ENTRY);
    let refused = "kernel `vmlinuz` has no PVH entry";
    let pvh = |image: &[u8]| open(image).unwrap().with_protocol(BootProtocol::Pvh);
    assert_eq!(pvh(&elf(false)).unwrap_err().to_string(), refused);
    // Nobody knows before it is unpacked; its own code is not entered so.
    let packed = pvh(&bzimage()).unwrap();
    let error = packed.placement(64 * MIB).unwrap_err();
    assert_eq!(error.to_string(), refused);
    // Not a Linux kernel: its ELF entry is a virtual address.
    let other = patched(elf(true), 24, &0xffff_ffff_8100_0000_u64.to_le_bytes());
    let error = open(&other)
        .unwrap()
        .with_protocol(BootProtocol::Linux64)
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("its entry at 0xffffffff81000000"),
        "{error}"
    );
}

#[test]
fn a_program_without_a_payload_may_leave_its_last_paragraph_unfilled() {
    // As memtest86+ does.
    let image = patched(bzimage(), 0x24c, &[0; 4]);
    assert!(open(&image[..image.len() - 15]).is_ok());
    for cut in [16, 17, 512] {
        assert!(matches!(
            problem(&image[..image.len() - cut]),
            KernelProblem::Truncated { .. }
        ));
    }
}

#[test]
fn a_kernel_without_its_end_is_refused_wherever_it_was_cut() {
    for image in [bzimage(), elf(false), elf(true)] {
        assert!(open(&image).is_ok());
        for cut in (1..image.len())
            .rev()
            .step_by(512)
            .chain([1, 3, 4, 5, 63, 64, 65])
        {
            let error = open(&image[..cut]).unwrap_err();
            assert!(
                matches!(error, Error::Kernel { .. }),
                "cut at {cut}: {error}"
            );
            let text = error.to_string();
            // What is left of the first sector may not say what it was part of.
            let first = cut < 4 || cut < 0x206 && image[0] == 0;
            assert!(
                text.contains("is truncated") || first,
                "cut at {cut}: {text}"
            );
        }
        assert!(matches!(open(&[]).unwrap_err(), Error::Empty { .. }));
    }
}

#[test]
fn a_signature_behind_a_bzimage_belongs_to_it() {
    let mut image = bzimage();
    let signed = image.len();
    for (at, value) in [
        (0, &b"MZ"[..]),
        (0x3c, &0x40_u32.to_le_bytes()),
        (0x40, b"PE\0\0"),
        (0x40 + 6, &1_u16.to_le_bytes()),
        (0x40 + 20, &160_u16.to_le_bytes()),
        (0x40 + 24, &0x20b_u16.to_le_bytes()),
        (0x40 + 24 + 144, &(signed as u32).to_le_bytes()),
        (0x40 + 24 + 148, &0x600_u32.to_le_bytes()),
        (0x40 + 24 + 160 + 16, &(signed as u32 - 0x200).to_le_bytes()),
        (0x40 + 24 + 160 + 20, &0x200_u32.to_le_bytes()),
    ] {
        put(&mut image, at, value);
    }
    let needs = signed as u64 + 0x600;
    assert_eq!(
        problem(&image),
        KernelProblem::Truncated {
            has: signed as u64,
            needs
        }
    );
    image.resize(signed + 0x600, 0xcc);
    assert!(open(&image).is_ok());
    // A section that reaches further, too.
    let image = patched(image, 0x40 + 24 + 160 + 16, &0x10_0000_u32.to_le_bytes());
    assert!(matches!(
        problem(&image),
        KernelProblem::Truncated {
            needs: 0x10_0200,
            ..
        }
    ));
}

#[test]
fn what_is_not_a_kernel_is_refused() {
    for content in [
        &b"#!/bin/sh\n"[..],
        &[0; 8192],
        b"\x1f\x8b\x08",
        &[0xff; 0x300],
        b"MZ",
    ] {
        assert_eq!(problem(content), KernelProblem::NotAKernel);
    }
    let error = Kernel::open("/proc/self/no such kernel").unwrap_err();
    assert_eq!(error.to_string(), "open kernel `/proc/self/no such kernel`");
    assert!(matches!(
        Kernel::open("/").unwrap_err(),
        Error::NotAFile { .. }
    ));
    assert!(matches!(
        Kernel::from_code(&[]).unwrap_err(),
        Error::Empty { .. }
    ));
    let this = File::open(std::env::current_exe().unwrap()).unwrap();
    let error = Kernel::from_file(this, "a program").unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("kernel `a program` has a segment at"),
        "{error}"
    );
}

#[test]
fn an_elf_image_for_another_machine_is_refused() {
    assert_eq!(problem(&patched(elf(true), 4, &[1])), KernelProblem::Elf32);
    assert!(matches!(
        problem(&patched(elf(true), 4, &[3])),
        KernelProblem::BadElf(_)
    ));
    let arm = patched(elf(true), 18, &183_u16.to_le_bytes());
    assert_eq!(problem(&arm), KernelProblem::WrongMachine { machine: 183 });
    let big_endian = patched(patched(elf(true), 5, &[2]), 18, &22_u16.to_be_bytes());
    assert_eq!(
        problem(&big_endian),
        KernelProblem::WrongMachine { machine: 22 }
    );
    let object = patched(elf(true), 16, &[1]);
    assert!(
        problem(&object)
            .to_string()
            .contains("an object or a core dump")
    );
}

#[test]
fn an_elf_image_that_contradicts_itself_is_refused() {
    for count in [0, 129, 0xffff_u16] {
        let image = patched(elf(true), 56, &count.to_le_bytes());
        assert_eq!(problem(&image), KernelProblem::ProgramHeaders { count });
    }
    for (at, value) in [(54, 55_u8), (58, 63), (32, 8)] {
        assert!(matches!(
            problem(&patched(elf(true), at, &[value])),
            KernelProblem::BadElf(_)
        ));
    }
    for at in [32, 40] {
        let image = patched(elf(true), at, &u64::MAX.to_le_bytes());
        assert!(matches!(
            problem(&image),
            KernelProblem::Truncated {
                needs: u64::MAX,
                ..
            }
        ));
    }
    // The number of sections is in the first of them.
    let image = patched(elf(true), 60, &[0, 0]);
    let sections = image.len() - 3 * 64;
    assert!(open(&patched(image.clone(), sections + 32, &3_u64.to_le_bytes())).is_ok());
    let image = patched(image, sections + 32, &u64::MAX.to_le_bytes());
    assert!(matches!(
        problem(&image),
        KernelProblem::Truncated {
            needs: u64::MAX,
            ..
        }
    ));
    let outside = patched(elf(false), 24, &(LOAD + MIB).to_le_bytes());
    assert_eq!(
        problem(&outside),
        KernelProblem::EntryOutside { entry: LOAD + MIB }
    );
}

#[test]
fn segments_that_overlap_or_lie_outside_are_refused() {
    let with = |changed: Header| {
        let mut headers = SEGMENTS;
        headers[1] = changed;
        problem(&elf_with(&headers, 0x6800))
    };
    for start in [LOAD - 1, LOAD, LOAD + 0x2fff] {
        let (first, second) = (start.min(LOAD), start.max(LOAD));
        let problem = with((1, 0x4000, start, 0x1000, MIB));
        assert_eq!(problem, KernelProblem::SegmentsOverlap { first, second });
    }
    // Over the boot structures, into the device hole, past the end of all addresses.
    for (start, size) in [
        (0, 0x1000),
        (0x7000, 0x1000),
        (0xf_f000, 0x1001),
        (0xbfff_f000, 0x1001),
        (4 << 30, 0x1000),
        (u64::MAX, 2),
    ] {
        let end = start.saturating_add(size);
        let problem = with((1, 0x4000, start, 1, size));
        assert_eq!(problem, KernelProblem::SegmentOutside { start, end });
    }
    let larger = with((1, 0x4000, LOAD + 2 * MIB, 0x1000, 0xfff));
    assert!(matches!(larger, KernelProblem::BadElf(_)));
    assert!(matches!(
        with((1, u64::MAX, LOAD + 2 * MIB, 1, 1)),
        KernelProblem::Truncated {
            needs: u64::MAX,
            ..
        }
    ));
    let nothing = elf_with(&[(1, 0x1000, LOAD, 0, 0)], 0x2000);
    assert_eq!(
        problem(&nothing),
        KernelProblem::BadElf("it has no segment to load")
    );
}

#[test]
fn notes_that_make_no_sense_are_no_pvh_entry() {
    let endless = [0xff; 0x100];
    let cut = note(b"Xen\0", 18, &[0; 200])[..12].to_vec();
    let short = note(b"Xen\0", 18, &[1, 2]);
    let far = note(b"Xen\0", 18, &(1_u64 << 32).to_le_bytes());
    for notes in [&endless[..], &cut, &short, &far, &[0; 0x100]] {
        let kernel = open(&patched(elf(false), 0x5000, notes)).unwrap();
        assert_eq!(kernel.protocol(), BootProtocol::Linux64);
    }
    // One of 32 bits is what other kernels than Linux have.
    let narrow = note(b"Xen\0", 18, &(PVH_ENTRY as u32).to_le_bytes());
    let kernel = open(&patched(elf(false), 0x5000, &narrow)).unwrap();
    assert_eq!(kernel.placement(64 * MIB).unwrap().entry, PVH_ENTRY);
    let outside = note(b"Xen\0", 18, &0x10_u32.to_le_bytes());
    let problem = problem(&patched(elf(false), 0x5000, &outside));
    assert_eq!(problem, KernelProblem::EntryOutside { entry: 0x10 });
}

#[test]
fn the_pvh_note_is_found_in_any_of_the_note_segments() {
    let mut headers = [
        SEGMENTS[0],
        SEGMENTS[1],
        SEGMENTS[2],
        (4, 0x5800, 0, 0x20, 0x20),
    ];
    let pvh = note(b"Xen\0", 18, &PVH_ENTRY.to_le_bytes());
    for (at, name) in [(0x5000, "first"), (0x5800, "last")] {
        let image = patched(elf_with(&headers, 0x6800), at, &pvh);
        assert_eq!(
            open(&image).unwrap().protocol(),
            BootProtocol::Pvh,
            "{name}"
        );
    }
    headers[3].3 = 0x1_0000;
    let image = patched(elf_with(&headers, 0x6800), 0x5000, &pvh);
    assert!(matches!(problem(&image), KernelProblem::Truncated { .. }));
}

#[test]
fn a_bzimage_that_is_too_old_or_for_32_bits_is_refused() {
    let old = patched(bzimage(), 0x206, &0x020b_u16.to_le_bytes());
    assert_eq!(
        problem(&old),
        KernelProblem::OldProtocol {
            major: 2,
            minor: 11
        }
    );
    assert!(problem(&old).to_string().contains("2.11"));
    assert_eq!(
        problem(&patched(bzimage(), 0x236, &[0x3e])),
        KernelProblem::No64BitEntry
    );
    for (at, value) in [
        // A zImage; a header too short, and too long; no system; a load address below 1 MiB, and
        // in the device hole; less memory than it fills.
        (0x211, &[0][..]),
        (0x201, &[0x20]),
        (0x201, &[0xff]),
        (0x1f4, &[0; 4]),
        (0x258, &[0; 8]),
        (0x258, &0xc000_0000_u64.to_le_bytes()),
        (0x258, &u64::MAX.to_le_bytes()),
        (0x260, &0x1000_u32.to_le_bytes()),
    ] {
        let problem = problem(&patched(bzimage(), at, value));
        let bad = matches!(
            problem,
            KernelProblem::BadBzImage(_) | KernelProblem::SegmentOutside { .. }
        );
        assert!(bad, "{at:#x}: {problem}");
    }
}

#[test]
fn no_byte_of_a_header_can_make_it_panic() {
    let memory = allocate(&ram_regions(64 << 20), &MemoryOptions::default()).unwrap();
    for image in [bzimage(), elf(true)] {
        for at in (0..0x290).chain(0x5000..0x5080) {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut image = image.clone();
                image[at] = value;
                if let Ok(kernel) = open(&image) {
                    // What was found whole can also be loaded, or says why not.
                    if let Ok(placed) = kernel.placement(64 << 20) {
                        let _ = kernel.load(&memory, &placed);
                    }
                }
            }
        }
    }
}

#[test]
fn a_loaded_kernel_is_where_it_asked_to_be() {
    let memory = allocate(&ram_regions(64 << 20), &MemoryOptions::default()).unwrap();
    let read = |address: u64, len: usize| {
        let mut bytes = vec![0; len];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    };
    let load = |kernel: &Kernel| {
        let placed = kernel.placement(64 << 20).unwrap();
        kernel.load(&memory, &placed).unwrap();
        placed
    };
    let image = elf(true);
    let placed = load(&open(&image).unwrap());
    assert_eq!((placed.start, placed.end), (LOAD, LOAD + 3 * MIB));
    assert_eq!(read(LOAD, 0x3000), image[0x1000..0x4000]);
    assert_eq!(read(LOAD + 2 * MIB, 0x1000), image[0x4000..0x5000]);
    assert_eq!(read(LOAD + 2 * MIB + 0x1000, 0x1000), [0; 0x1000]);

    let image = bzimage();
    let kernel = open(&image).unwrap();
    // More than once, and from a clone that shares the file.
    for kernel in [&kernel, &kernel.clone()] {
        let placed = load(kernel);
        let expected = Loaded {
            entry: LOAD + 0x200,
            start: LOAD,
            end: LOAD + 8 * MIB,
        };
        assert_eq!(placed, expected);
        assert_eq!(read(LOAD, 0x5000), image[0x1000..]);
    }
    let placed = load(&Kernel::from_code(&[0xf4; 100]).unwrap());
    assert_eq!((placed.entry, placed.end), (MIB, MIB + 100));
    assert_eq!(read(MIB, 101), [&[0xf4; 100][..], &[0]].concat());
}

#[test]
fn a_kernel_that_does_not_fit_into_ram_says_how_much_it_needs() {
    for (image, end) in [(bzimage(), LOAD + 8 * MIB), (elf(true), LOAD + 3 * MIB)] {
        let kernel = open(&image).unwrap();
        assert!(kernel.placement(end).is_ok());
        let error = kernel.placement(end - 1).unwrap_err().to_string();
        assert!(
            error.contains(&format!("needs RAM up to {end:#x}")),
            "{error}"
        );
    }
}

#[test]
fn a_file_that_changed_its_size_since_it_was_opened_is_not_loaded() {
    let memory = allocate(&ram_regions(64 << 20), &MemoryOptions::default()).unwrap();
    for image in [bzimage(), elf(true)] {
        for len in [0x20, image.len() - 1, image.len() + 1] {
            let file = temporary(&image);
            let kernel = Kernel::from_file(file.try_clone().unwrap(), "vmlinuz").unwrap();
            let placed = kernel.placement(64 << 20).unwrap();
            file.set_len(len as u64).unwrap();
            let error = kernel.load(&memory, &placed).unwrap_err();
            assert_eq!(
                error.to_string(),
                "kernel `vmlinuz` was changed since it was opened"
            );
            assert_eq!(
                memory.read_obj::<u64>(GuestAddress(LOAD + 0x100)).unwrap(),
                0
            );
        }
    }
}

#[test]
fn a_kernel_goes_to_where_it_was_checked_to_be_whatever_its_file_says_later() {
    let memory = allocate(&ram_regions(64 << 20), &MemoryOptions::default()).unwrap();
    let file = temporary(&elf(true));
    let kernel = Kernel::from_file(file.try_clone().unwrap(), "vmlinuz").unwrap();
    let placed = kernel.placement(64 << 20).unwrap();
    let moved = elf_with(&[(1, 0x1000, 1 << 40, 0x3000, 0x3000)], elf(true).len());
    file.write_all_at(&moved, 0).unwrap();
    kernel.load(&memory, &placed).unwrap();
    let first: u64 = memory.read_obj(GuestAddress(LOAD)).unwrap();
    assert_eq!(first.to_le_bytes(), moved[0x1000..0x1008]);
}

#[test]
fn a_large_kernel_is_the_same_mapped_and_read_wherever_its_pages_are() {
    const SIZE: u64 = 0x2_5432;
    for (offset, address) in [
        (0x1000, LOAD),
        (0x1123, LOAD + 0x123),
        (0x1fff, LOAD + 0xfff),
        // Not at the same place in their pages.
        (0x1001, LOAD + 2),
    ] {
        let headers = [(1, offset, address, SIZE, MIB)];
        let mut image = elf_with(&headers, (offset + SIZE + 0x800) as usize);
        let content: Vec<_> = (0..SIZE).map(|at| (at % 251) as u8 + 1).collect();
        put(&mut image, offset as usize, &content);
        put(&mut image, 24, &address.to_le_bytes());
        for is_read in [false, true] {
            let memory = allocate(&ram_regions(64 << 20), &MemoryOptions::default()).unwrap();
            let mut kernel = open(&image).unwrap();
            if is_read {
                kernel = kernel.read();
            }
            let placed = kernel.placement(64 << 20).unwrap();
            kernel.load(&memory, &placed).unwrap();
            let mut found = vec![0xee; 0x4_0000];
            let start = GuestAddress(address - 0x200);
            memory.read_slice(&mut found, start).unwrap();
            let (before, rest) = found.split_at(0x200);
            let (loaded, behind) = rest.split_at(SIZE as usize);
            let what = format!("{offset:#x} to {address:#x}, read: {is_read}");
            assert!(loaded == content, "{what}");
            assert!(before.iter().chain(behind).all(|byte| *byte == 0), "{what}");
        }
    }
}

#[test]
fn an_unpacked_kernel_is_the_elf_image_with_what_the_bzimage_says_of_itself() {
    let folder = tempfile::tempdir().unwrap();
    let cache = KernelCache::open(folder.path().join("kernels"), 1 << 20).unwrap();
    let packed = open(&bzimage_of(&elf(true))).unwrap();
    for cache in [None, Some(&cache), Some(&cache)] {
        let kernel = packed.clone().unpacked(cache).unwrap();
        assert_eq!(kernel.name(), "vmlinuz");
        assert_eq!(kernel.format(), KernelFormat::Elf);
        assert_eq!(kernel.protocol(), BootProtocol::Linux64);
        assert_eq!(kernel.cmdline_size(), 1000);
        let placed = kernel.placement(64 * MIB).unwrap();
        assert_eq!(
            (placed.entry, placed.start, placed.end),
            (LOAD, LOAD, LOAD + 3 * MIB)
        );
        let kernel = kernel.with_protocol(BootProtocol::Pvh).unwrap();
        assert_eq!(kernel.placement(64 * MIB).unwrap().entry, PVH_ENTRY);
    }
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 1);
    // As it was chosen before.
    let pvh = packed.with_protocol(BootProtocol::Pvh).unwrap();
    let placed = pvh.unpacked(None).unwrap().placement(64 * MIB).unwrap();
    assert_eq!(placed.entry, PVH_ENTRY);
    let without = open(&bzimage_of(&elf(false))).unwrap();
    let error = without
        .with_protocol(BootProtocol::Pvh)
        .unwrap()
        .unpacked(None);
    let text = error.unwrap_err().to_string();
    assert_eq!(text, "kernel `vmlinuz` has no PVH entry");
}

#[test]
fn what_is_in_a_bzimage_is_looked_at_like_any_other_kernel() {
    let error = open(&bzimage()).unwrap().unpacked(None).unwrap_err();
    assert_eq!(error.to_string(), "unpack kernel `vmlinuz`");
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("in an unknown way"), "{source}");
    let cut = &elf(true)[..0x4800];
    let error = open(&bzimage_of(cut)).unwrap().unpacked(None).unwrap_err();
    assert!(error.to_string().contains("is truncated"), "{error}");
}

#[test]
fn what_is_not_packed_stays_as_it_is() {
    let kernel = open(&elf(true)).unwrap().unpacked(None).unwrap();
    assert_eq!(kernel.protocol(), BootProtocol::Pvh);
    assert!(kernel.bzimage().is_none());
    let code = Kernel::from_code(&[0xf4]).unwrap().unpacked(None).unwrap();
    assert_eq!(code.format(), KernelFormat::Code);
}
