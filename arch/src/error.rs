//! What can go wrong while a start state is made.

use std::io;

use kiln_kernel_cache::UnpackError;
use thiserror::Error;
use vm_memory::GuestMemoryError;

use crate::kernel::KernelProblem;

/// Why a start state could not be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened or read.
    #[error("{action} {kind} `{name}`")]
    File {
        /// What the file is for: `kernel` or `initrd`.
        kind: &'static str,
        /// Its name.
        name: String,
        /// What was attempted: `open` or `read`.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// It is a directory, a device or a pipe.
    #[error("{kind} `{name}` is not a regular file")]
    NotAFile {
        /// What the file is for.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// A file has no bytes.
    #[error("{kind} `{name}` is empty")]
    Empty {
        /// What the file is for.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// A file has another size than when it was opened.
    #[error("{kind} `{name}` was changed since it was opened")]
    Changed {
        /// What the file is for.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// A file is not a kernel that can be started as asked.
    #[error("kernel `{name}` {problem}")]
    Kernel {
        /// The kernel's name.
        name: String,
        /// What is wrong with it.
        problem: KernelProblem,
    },
    /// A kernel that was whole could not be loaded.
    #[error("load kernel `{name}`")]
    Load {
        /// The kernel's name.
        name: String,
        /// What the loader said.
        source: linux_loader::loader::Error,
    },
    /// The kernel in a bzImage could not be unpacked.
    #[error("unpack kernel `{name}`")]
    Unpack {
        /// The kernel's name.
        name: String,
        /// What is wrong.
        source: UnpackError,
    },
    /// There is no room for the initrd.
    #[error(
        "initrd `{name}` of {size} bytes does not fit into the guest's RAM: {available} bytes are \
         left beside the kernel; give the guest more memory"
    )]
    InitrdTooLarge {
        /// The initrd's name.
        name: String,
        /// Its size in bytes.
        size: u64,
        /// The largest piece of RAM that is left for it.
        available: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("command line of {length} bytes is longer than the {limit} that kernel `{name}` takes")]
    CommandLineTooLong {
        /// The kernel's name.
        name: String,
        /// The bytes of the command line.
        length: usize,
        /// The most that the kernel takes.
        limit: usize,
    },
    /// The command line has a NUL, at which the kernel would stop to read.
    #[error("command line has a NUL at byte {position}")]
    CommandLineNul {
        /// Where it is.
        position: usize,
    },
    /// There is not enough RAM for what the boot protocol puts there.
    #[error("write {what} to guest memory at {address:#x}: the guest has too little RAM")]
    Write {
        /// What was to be written.
        what: &'static str,
        /// Guest physical address.
        address: u64,
        /// What guest memory said.
        source: GuestMemoryError,
    },
    /// The number of vCPUs cannot be described.
    #[error("a machine of {count} vCPUs cannot be described: 1 to {limit} are possible")]
    Vcpus {
        /// The number that was asked for.
        count: u64,
        /// The most that is possible.
        limit: u32,
    },
    /// The CPUID table of a vCPU has more entries than KVM takes.
    #[error("CPUID table of {leaves} leaves is more than KVM takes")]
    Cpuid {
        /// The entries of the table.
        leaves: usize,
    },
    /// The ACPI tables cannot describe the machine.
    #[error("the ACPI tables {what}")]
    Acpi {
        /// What they cannot do.
        what: String,
    },
}
