//! The front door: from a kernel, an initrd and a command line to memory that is ready to start.

mod initrd;
mod linux64;
mod memory_map;
mod pvh;
mod reset_vector;

use kiln_memory::GuestMemory;
use kvm_bindings::{kvm_fpu, kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

pub use initrd::Initrd;
use memory_map::{MemoryMapEntry, memory_map};

use crate::gdt::{self, Mode};
use crate::kernel::{BootProtocol, Kernel};
use crate::layout::{CMDLINE_START, GDT_START, RESET_VECTOR_START};
use crate::{Error, paging, regs};

/// How the boot vCPU starts a kernel that [`prepare`] left in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryPoint {
    /// The state that the vCPU must be in.
    pub protocol: BootProtocol,
    /// Guest physical address of the first instruction.
    pub address: u64,
}

impl EntryPoint {
    /// The general registers.
    pub fn regs(&self) -> kvm_regs {
        match self.protocol {
            BootProtocol::Linux64 => regs::linux64_regs(self.address),
            BootProtocol::Pvh => regs::pvh_regs(self.address),
        }
    }

    /// Turns the special registers that a vCPU has after reset into those of the start.
    pub fn set_sregs(&self, sregs: &mut kvm_sregs) {
        match self.protocol {
            BootProtocol::Linux64 => regs::set_linux64_sregs(sregs),
            BootProtocol::Pvh => regs::set_pvh_sregs(sregs),
        }
    }

    /// The floating point state.
    pub fn fpu(&self) -> kvm_fpu {
        regs::fpu()
    }
}

/// Puts all that a kernel needs into guest memory, which must be new (all zeros): the kernel, the
/// initrd, the command line, and the structures of the boot protocol.
///
/// `rsdp` is where the ACPI tables begin ([`AcpiTables::rsdp`](crate::acpi::AcpiTables::rsdp));
/// they are written apart from this, before or after.
///
/// The command line reaches the guest byte for byte, in UTF-8 and with a NUL behind it.
///
/// # Errors
///
/// Everything that does not fit, does not go together or cannot be read is an [`Error`] that names
/// it. Guest memory is then good for nothing more.
pub fn prepare(
    memory: &GuestMemory,
    kernel: &Kernel,
    initrd: Option<&Initrd>,
    cmdline: &str,
    rsdp: Option<GuestAddress>,
) -> Result<EntryPoint, Error> {
    check_cmdline(kernel, cmdline)?;
    let ram_end = memory_map::low_ram_end(memory);
    let placed = kernel.placement(ram_end)?;
    let initrd = match initrd {
        Some(initrd) => {
            let highest = kernel.bzimage().map_or(u64::MAX, |it| it.initrd_addr_max());
            let address = initrd.place(ram_end.min(highest.saturating_add(1)), &placed)?;
            Some((initrd, address))
        }
        None => None,
    };
    kernel.load(memory, &placed)?;
    if let Some((initrd, address)) = initrd {
        initrd.load(memory, address)?;
    }
    let mut line = cmdline.as_bytes().to_vec();
    line.push(0);
    write(memory, "the command line", CMDLINE_START, &line)?;
    write(
        memory,
        "the reset vector",
        RESET_VECTOR_START,
        &reset_vector::code(),
    )?;
    let parameters = Parameters {
        initrd: initrd.map(|(initrd, address)| (address, initrd.len())),
        cmdline_len: cmdline.len(),
        rsdp: rsdp.map_or(0, |address| address.0),
        memory_map: memory_map(memory),
    };
    match kernel.protocol() {
        BootProtocol::Linux64 => {
            linux64::write_parameters(memory, kernel, &parameters)?;
            for (address, table) in paging::identity_map() {
                write(memory, "the page tables", address, &table)?;
            }
            write(
                memory,
                "the descriptor table",
                GDT_START,
                &gdt::table(Mode::Long),
            )?;
        }
        BootProtocol::Pvh => {
            pvh::write_parameters(memory, &parameters)?;
            write(
                memory,
                "the descriptor table",
                GDT_START,
                &gdt::table(Mode::Protected),
            )?;
        }
    }
    Ok(EntryPoint {
        protocol: kernel.protocol(),
        address: placed.entry,
    })
}

/// What the boot protocols tell the kernel.
struct Parameters {
    /// Guest physical address and size in bytes.
    initrd: Option<(u64, u64)>,
    /// The bytes of the command line, without its NUL.
    cmdline_len: usize,
    /// Guest physical address, or 0.
    rsdp: u64,
    memory_map: Vec<MemoryMapEntry>,
}

fn check_cmdline(kernel: &Kernel, cmdline: &str) -> Result<(), Error> {
    if let Some(position) = cmdline.bytes().position(|byte| byte == 0) {
        return Err(Error::CommandLineNul { position });
    }
    let (length, limit) = (cmdline.len(), kernel.cmdline_size());
    if length > limit {
        return Err(Error::CommandLineTooLong {
            name: kernel.name().to_owned(),
            length,
            limit,
        });
    }
    Ok(())
}

fn write(
    memory: &GuestMemory,
    what: &'static str,
    address: u64,
    bytes: &[u8],
) -> Result<(), Error> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|source| Error::Write {
            what,
            address,
            source,
        })
}

#[cfg(test)]
mod tests;
