//! The 64-bit Linux boot protocol (Linux: Documentation/arch/x86/boot.rst and zero-page.rst).

use kiln_memory::GuestMemory;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::ByteValued;

use super::{MemoryMapEntry, Parameters, write};
use crate::Error;
use crate::kernel::{Kernel, SETUP_HEADER_OFFSET};
use crate::layout::{CMDLINE_START, ZERO_PAGE_START};

/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The version that an ELF kernel, which has no header, is told.
const VERSION: u16 = 0x020c;
/// The protected-mode code is above 1 MiB.
const LOADED_HIGH: u8 = 1;
const KERNEL_ALIGNMENT: u32 = 0x20_0000;

/// Writes the zero page.
pub(super) fn write_parameters(
    memory: &GuestMemory,
    kernel: &Kernel,
    parameters: &Parameters,
) -> Result<(), Error> {
    let mut page = boot_params::default();
    if let Some(bzimage) = kernel.bzimage() {
        // As much as the file says is header, and not what lies behind it. Its length was checked
        // against the room that it has here.
        let header = bzimage.header();
        let room = &mut page.as_mut_slice()[SETUP_HEADER_OFFSET..];
        room[..header.len()].copy_from_slice(header);
    } else {
        page.hdr.boot_flag = BOOT_FLAG;
        page.hdr.header = HEADER_MAGIC;
        page.hdr.version = VERSION;
        page.hdr.kernel_alignment = KERNEL_ALIGNMENT;
        page.hdr.cmdline_size = parameters.cmdline_len as u32;
    }
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.loadflags |= LOADED_HIGH;
    page.hdr.cmd_line_ptr = CMDLINE_START as u32;
    if let Some((address, size)) = parameters.initrd {
        // It lies below 4 GiB, so the upper halves are zero; they are written to say so.
        page.hdr.ramdisk_image = address as u32;
        page.ext_ramdisk_image = (address >> 32) as u32;
        page.hdr.ramdisk_size = size as u32;
        page.ext_ramdisk_size = (size >> 32) as u32;
    }
    page.acpi_rsdp_addr = parameters.rsdp;
    for (slot, entry) in page.e820_table.iter_mut().zip(&parameters.memory_map) {
        *slot = e820(entry);
        page.e820_entries += 1;
    }
    write(memory, "the zero page", ZERO_PAGE_START, page.as_slice())
}

fn e820(entry: &MemoryMapEntry) -> boot_e820_entry {
    boot_e820_entry {
        addr: entry.address,
        size: entry.size,
        r#type: entry.kind as u32,
    }
}
