//! x86_64 start state: all that must be in memory and registers before the first instruction.
//!
//! Everything here is values and bytes: the crate opens no KVM descriptor and starts no thread, so
//! all of it is tested without `/dev/kvm`. A virtual machine monitor
//!
//! 1. lays out RAM with [`layout::ram_regions`] and describes its devices to [`acpi::build`];
//! 2. gives the kernel, the initrd and the command line to [`boot::prepare`], which leaves guest
//!    memory ready and returns an [`EntryPoint`];
//! 3. sets on every vCPU the [`cpuid`], [`msr`] and [`lapic`] state, and on the first one the
//!    registers of the entry point.
//!
//! | module | what lives there |
//! |---|---|
//! | [`layout`] | the address map: RAM, devices, ports, interrupts |
//! | `kernel` | what a kernel file is, and whether it is whole |
//! | [`boot`] | the 64-bit Linux and the PVH boot protocols |
//! | [`acpi`] | the tables by which the guest finds processors and devices |
//! | [`cpuid`] | what each vCPU says of itself, and the topology |
//! | [`regs`], [`msr`], [`lapic`] | the registers that a vCPU starts with |
//!
//! # Example
//!
//! ```
//! use kiln_arch::acpi::{self, AcpiConfig};
//! use kiln_arch::{Kernel, boot, layout};
//! use kiln_memory::{MemoryOptions, allocate};
//!
//! let memory = allocate(&layout::ram_regions(64 << 20), &MemoryOptions::default())?;
//! let tables = acpi::build(
//!     &AcpiConfig { apic_ids: vec![0], ..Default::default() },
//!     layout::ACPI_TABLES_START,
//! )?;
//! tables.write(&memory)?;
//!
//! // Three bytes of 64-bit code: jump to itself, after a HLT.
//! let kernel = Kernel::from_code(&[0xf4, 0xeb, 0xfd])?;
//! let entry = boot::prepare(&memory, &kernel, None, "console=ttyS0", Some(tables.rsdp()))?;
//! assert_eq!(entry.regs().rip, layout::KERNEL_MIN_START);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(missing_docs)]
#![forbid(unsafe_code)]

pub mod acpi;
pub mod boot;
pub mod cpuid;
mod error;
mod file;
mod gdt;
mod kernel;
pub mod lapic;
pub mod layout;
pub mod msr;
mod paging;
pub mod regs;

pub use boot::{EntryPoint, Initrd};
pub use error::Error;
pub use kernel::{BootProtocol, Kernel, KernelFormat, KernelProblem};
