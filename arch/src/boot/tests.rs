use kiln_memory::{MemoryOptions, allocate};
use vm_memory::{ByteValued, GuestMemoryBackend};

use super::*;
use crate::acpi::{self, AcpiConfig};
use crate::file::tests::temporary;
use crate::kernel::tests::{bzimage, bzimage_of, elf};
use crate::layout::{ACPI_TABLES_START, PVH_START_INFO_START, ZERO_PAGE_START, ram_regions};
use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::hvm_start_info;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry};

const MIB: u64 = 1 << 20;
const RSDP: Option<GuestAddress> = Some(GuestAddress(ACPI_TABLES_START));

fn memory(size: u64) -> GuestMemory {
    allocate(&ram_regions(size), &MemoryOptions::default()).unwrap()
}

fn kernel(image: &[u8]) -> Kernel {
    Kernel::from_file(temporary(image), "vmlinuz").unwrap()
}

fn initrd(content: &[u8]) -> Initrd {
    Initrd::from_file(temporary(content), "initrd.img").unwrap()
}

fn read(memory: &GuestMemory, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

fn object<T: ByteValued>(memory: &GuestMemory, address: u64) -> T {
    memory.read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn a_kernel_unpacked_from_a_bzimage_gets_the_header_of_that_too() {
    let memory = memory(64 * MIB);
    let (elf, mut image) = (elf(true), bzimage_of(&elf(true)));
    // The highest address of an initrd.
    image[0x22c..0x230].copy_from_slice(&(40 * MIB as u32 - 1).to_le_bytes());
    let unpacked = kernel(&image).unpacked(None).unwrap();
    let entry = prepare(&memory, &unpacked, Some(&initrd(b"initrd")), "x", RSDP).unwrap();
    assert_eq!(
        (entry.protocol, entry.address),
        (BootProtocol::Linux64, 16 * MIB)
    );
    assert_eq!(read(&memory, 16 * MIB, 0x3000), elf[0x1000..0x4000]);
    let page: boot_params = object(&memory, ZERO_PAGE_START);
    assert_eq!({ page.hdr.version }, 0x020f);
    assert_eq!({ page.hdr.cmdline_size }, 1000);
    assert_eq!({ page.hdr.init_size }, 8 * MIB as u32);
    assert_eq!({ page.hdr.ramdisk_image }, 40 * MIB as u32 - 4096);
    assert_eq!({ page.hdr.loadflags }, 1);
    let line = "y".repeat(1001);
    let error = prepare(&memory, &unpacked, None, &line, RSDP).unwrap_err();
    assert!(error.to_string().contains("the 1000 that"), "{error}");
}

#[test]
fn a_bzimage_gets_its_own_header_back_with_our_fields_filled_in() {
    let memory = memory(64 * MIB);
    let image = bzimage();
    let content: Vec<u8> = (0..10_000_u32).map(|at| (at / 3) as u8).collect();
    let line = "console=ttyS0 root=/dev/vda rw quiet=\"a b\" é";
    let entry = prepare(
        &memory,
        &kernel(&image),
        Some(&initrd(&content)),
        line,
        RSDP,
    )
    .unwrap();
    assert_eq!(
        entry,
        EntryPoint {
            protocol: BootProtocol::Linux64,
            address: 16 * MIB + 0x200
        }
    );

    let page: boot_params = object(&memory, ZERO_PAGE_START);
    let header = page.hdr;
    assert_eq!({ header.type_of_loader }, 0xff);
    assert_eq!({ header.version }, 0x020f);
    assert_eq!({ header.cmd_line_ptr }, CMDLINE_START as u32);
    assert_eq!({ header.cmdline_size }, 2047);
    assert_eq!({ page.acpi_rsdp_addr }, ACPI_TABLES_START);
    assert_eq!({ page.sentinel }, 0);
    let place = u64::from(header.ramdisk_image) | u64::from(page.ext_ramdisk_image) << 32;
    assert_eq!(place, 64 * MIB - 12288);
    assert_eq!(
        ({ header.ramdisk_size }, { page.ext_ramdisk_size }),
        (10_000, 0)
    );
    assert_eq!(read(&memory, place, 10_000), content);
    assert_eq!(
        read(&memory, CMDLINE_START, line.len() + 1),
        [line.as_bytes(), b"\0"].concat()
    );
    // All of the file's header that is not ours is as in the file, and nothing behind it came along.
    let bytes = read(&memory, ZERO_PAGE_START, 0x290);
    assert_eq!(bytes[0x22c..0x26c], image[0x22c..0x26c]);
    assert_eq!(bytes[0x26c..0x290], [0; 0x24]);
    assert_eq!(bytes[..0x70], [0; 0x70]);
}

#[test]
fn the_memory_map_is_in_the_zero_page() {
    let memory = memory(5 << 30);
    prepare(&memory, &kernel(&bzimage()), None, "", None).unwrap();
    let page: boot_params = object(&memory, ZERO_PAGE_START);
    let map = memory_map(&memory);
    assert_eq!(usize::from(page.e820_entries), map.len());
    for (index, expected) in map.iter().enumerate() {
        let entry = page.e820_table[index];
        assert_eq!(
            ({ entry.addr }, { entry.size }),
            (expected.address, expected.size)
        );
        assert_eq!({ entry.r#type }, expected.kind as u32);
    }
    assert_eq!({ page.acpi_rsdp_addr }, 0);
    assert_eq!(
        ({ page.hdr.ramdisk_image }, { page.hdr.ramdisk_size }),
        (0, 0)
    );
}

#[test]
fn an_elf_kernel_gets_a_header_made_for_it() {
    let memory = memory(64 * MIB);
    let kernel = kernel(&elf(true))
        .with_protocol(BootProtocol::Linux64)
        .unwrap();
    let entry = prepare(&memory, &kernel, Some(&initrd(b"x")), "quiet", RSDP).unwrap();
    assert_eq!(entry.address, 16 * MIB);
    let page: boot_params = object(&memory, ZERO_PAGE_START);
    assert_eq!({ page.hdr.boot_flag }, 0xaa55);
    assert_eq!(&read(&memory, ZERO_PAGE_START + 0x202, 4), b"HdrS");
    assert_eq!({ page.hdr.ramdisk_image }, (64 * MIB - 4096) as u32);
    assert_eq!({ page.hdr.ramdisk_size }, 1);
    assert_eq!({ page.hdr.type_of_loader }, 0xff);
}

#[test]
fn a_pvh_kernel_is_told_the_same_in_its_own_words() {
    let memory = memory(5 << 30);
    let entry = prepare(
        &memory,
        &kernel(&elf(true)),
        Some(&initrd(b"cpio")),
        "a=b",
        RSDP,
    )
    .unwrap();
    assert_eq!(
        entry,
        EntryPoint {
            protocol: BootProtocol::Pvh,
            address: 16 * MIB + 0x2010
        }
    );
    let info: hvm_start_info = object(&memory, PVH_START_INFO_START);
    assert_eq!(
        (info.magic, info.version, info.nr_modules),
        (0x336e_c578, 1, 1)
    );
    assert_eq!(info.rsdp_paddr, ACPI_TABLES_START);
    assert_eq!(read(&memory, info.cmdline_paddr, 4), b"a=b\0");
    let module: hvm_modlist_entry = object(&memory, info.modlist_paddr);
    assert_eq!((module.size, module.cmdline_paddr), (4, 0));
    assert_eq!(read(&memory, module.paddr, 4), b"cpio");
    let map = memory_map(&memory);
    assert_eq!(info.memmap_entries as usize, map.len());
    for (index, expected) in (0..).zip(&map) {
        let entry: hvm_memmap_table_entry = object(&memory, info.memmap_paddr + index * 24);
        assert_eq!((entry.addr, entry.size), (expected.address, expected.size));
        assert_eq!((entry.type_, entry.reserved), (expected.kind as u32, 0));
    }
    // Without an initrd there is no list.
    let memory = self::memory(64 * MIB);
    prepare(&memory, &kernel(&elf(true)), None, "", None).unwrap();
    let info: hvm_start_info = object(&memory, PVH_START_INFO_START);
    assert_eq!(
        (info.nr_modules, info.modlist_paddr, info.rsdp_paddr),
        (0, 0, 0)
    );
}

#[test]
fn each_entry_finds_the_tables_that_its_registers_point_to() {
    for protocol in [BootProtocol::Linux64, BootProtocol::Pvh] {
        let memory = memory(64 * MIB);
        let kernel = kernel(&elf(true)).with_protocol(protocol).unwrap();
        let entry = prepare(&memory, &kernel, None, "", RSDP).unwrap();
        let mut sregs = kvm_sregs::default();
        entry.set_sregs(&mut sregs);
        let descriptor: u64 = object(&memory, sregs.gdt.base + u64::from(sregs.cs.selector));
        let long = descriptor >> 53 & 1;
        assert_eq!(long, u64::from(sregs.cs.l));
        assert_eq!(sregs.cs.l == 1, protocol == BootProtocol::Linux64);
        assert_eq!(entry.regs().rip, entry.address);
        assert_eq!(entry.fpu().mxcsr, 0x1f80);
        if protocol == BootProtocol::Linux64 {
            let top: u64 = object(&memory, sregs.cr3);
            assert_eq!(top, 0xa003);
            assert_eq!(entry.regs().rsi, ZERO_PAGE_START);
        } else {
            assert_eq!(entry.regs().rbx, PVH_START_INFO_START);
        }
    }
}

#[test]
fn acpi_tables_and_boot_structures_leave_each_other_alone() {
    let memory = memory(64 * MIB);
    let config = AcpiConfig {
        apic_ids: (0..1024).collect(),
        ..Default::default()
    };
    let tables = acpi::build(&config, ACPI_TABLES_START).unwrap();
    tables.write(&memory).unwrap();
    let line = "x".repeat(2047);
    prepare(
        &memory,
        &kernel(&bzimage()),
        None,
        &line,
        Some(tables.rsdp()),
    )
    .unwrap();
    assert_eq!(
        read(&memory, ACPI_TABLES_START, tables.bytes().len()),
        tables.bytes()
    );
    assert_eq!(
        read(&memory, CMDLINE_START, 2048),
        [line.as_bytes(), b"\0"].concat()
    );
}

#[test]
fn a_command_line_that_the_kernel_would_cut_is_refused() {
    let memory = memory(64 * MIB);
    let mut image = bzimage();
    image[0x238..0x23c].copy_from_slice(&100_u32.to_le_bytes());
    let refused = |kernel: &Kernel, line: &str| prepare(&memory, kernel, None, line, None);
    assert!(refused(&kernel(&image), &"x".repeat(100)).is_ok());
    let error = refused(&kernel(&image), &"x".repeat(101)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "command line of 101 bytes is longer than the 100 that kernel `vmlinuz` takes"
    );
    assert!(refused(&kernel(&elf(true)), &"x".repeat(2047)).is_ok());
    assert!(refused(&kernel(&elf(true)), &"x".repeat(2048)).is_err());
    // A kernel that says it takes any length is given no more room than there is.
    image[0x238..0x23c].copy_from_slice(&[0xff; 4]);
    assert!(refused(&kernel(&image), &"x".repeat(0xffff)).is_ok());
    assert!(refused(&kernel(&image), &"x".repeat(0x1_0000)).is_err());
    let error = refused(&kernel(&image), "a\0b").unwrap_err();
    assert_eq!(error.to_string(), "command line has a NUL at byte 1");
}

#[test]
fn the_initrd_stays_below_what_the_kernel_says_it_can_reach() {
    let memory = memory(64 * MIB);
    let mut image = bzimage();
    image[0x22c..0x230].copy_from_slice(&(40 * MIB as u32 - 1).to_le_bytes());
    prepare(&memory, &kernel(&image), Some(&initrd(b"cpio")), "", None).unwrap();
    let page: boot_params = object(&memory, ZERO_PAGE_START);
    assert_eq!({ page.hdr.ramdisk_image }, (40 * MIB - 4096) as u32);
}

#[test]
fn an_initrd_that_does_not_fit_is_refused_before_anything_is_loaded() {
    let memory = memory(32 * MIB);
    let large = tempfile::tempfile().unwrap();
    large.set_len(16 * MIB).unwrap();
    let large = Initrd::from_file(large, "initrd.img").unwrap();
    let error = prepare(&memory, &kernel(&bzimage()), Some(&large), "", None).unwrap_err();
    assert!(matches!(error, Error::InitrdTooLarge { available, .. } if available == 15 * MIB));
    assert_eq!(read(&memory, 16 * MIB, 4096), [0; 4096]);
}

#[test]
fn an_initrd_that_changed_its_size_since_it_was_opened_is_an_error() {
    let memory = memory(64 * MIB);
    let file = temporary(&[7; 8192]);
    let initrd = Initrd::from_file(file.try_clone().unwrap(), "initrd.img").unwrap();
    file.set_len(100).unwrap();
    let error = prepare(&memory, &kernel(&bzimage()), Some(&initrd), "", None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "initrd `initrd.img` was changed since it was opened"
    );
}

#[test]
fn a_guest_with_too_little_ram_is_refused() {
    let small = allocate(&[(GuestAddress(0), 0x2_0000)], &MemoryOptions::default()).unwrap();
    assert_eq!(small.num_regions(), 1);
    for kernel in [
        kernel(&bzimage()),
        kernel(&elf(true)),
        Kernel::from_code(b"x").unwrap(),
    ] {
        let error = prepare(&small, &kernel, None, "", None).unwrap_err();
        assert!(
            error.to_string().contains("give the guest more memory"),
            "{error}"
        );
    }
    let tables = acpi::build(
        &AcpiConfig {
            apic_ids: vec![0],
            ..Default::default()
        },
        ACPI_TABLES_START,
    );
    let error = tables.unwrap().write(&small).unwrap_err();
    assert!(
        error.to_string().contains("write the ACPI tables"),
        "{error}"
    );
}
