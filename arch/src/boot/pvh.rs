//! The PVH boot protocol (Xen: docs/misc/pvh.pandoc and the public header `hvm/start_info.h`).

use kiln_memory::GuestMemory;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::{Parameters, write};
use crate::Error;
use crate::layout::{CMDLINE_START, PVH_START_INFO_START};

const MAGIC: u32 = 0x336e_c578;
/// Version 1 brought the memory map.
const VERSION: u32 = 1;
/// The list of modules and the memory map follow in the same page.
const MODULES_START: u64 = PVH_START_INFO_START + 0x100;
const MEMORY_MAP_START: u64 = PVH_START_INFO_START + 0x200;

/// Writes `hvm_start_info` and what it points to.
pub(super) fn write_parameters(memory: &GuestMemory, parameters: &Parameters) -> Result<(), Error> {
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: CMDLINE_START,
        rsdp_paddr: parameters.rsdp,
        memmap_paddr: MEMORY_MAP_START,
        memmap_entries: parameters.memory_map.len() as u32,
        ..Default::default()
    };
    if let Some((paddr, size)) = parameters.initrd {
        info.nr_modules = 1;
        info.modlist_paddr = MODULES_START;
        let module = hvm_modlist_entry {
            paddr,
            size,
            ..Default::default()
        };
        write(
            memory,
            "the PVH module list",
            MODULES_START,
            module.as_slice(),
        )?;
    }
    let mut map = Vec::new();
    for entry in &parameters.memory_map {
        let entry = hvm_memmap_table_entry {
            addr: entry.address,
            size: entry.size,
            type_: entry.kind as u32,
            reserved: 0,
        };
        map.extend_from_slice(entry.as_slice());
    }
    write(memory, "the PVH memory map", MEMORY_MAP_START, &map)?;
    write(
        memory,
        "the PVH start info",
        PVH_START_INFO_START,
        info.as_slice(),
    )
}
