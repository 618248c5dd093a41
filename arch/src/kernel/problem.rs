//! What can be wrong with a kernel.

use crate::Error;
use crate::layout::{KERNEL_MIN_START, MMIO_HOLE_START};

/// What is wrong with a kernel; each text goes on from "kernel `name`".
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum KernelProblem {
    /// The content is none that can be started.
    #[error("is neither a bzImage nor a 64-bit x86 ELF image")]
    NotAKernel,
    /// The file ends before what its own headers say.
    #[error("is truncated: it has {has} bytes, and its headers speak of {needs}")]
    Truncated {
        /// The bytes that it has.
        has: u64,
        /// The bytes that it needs.
        needs: u64,
    },
    /// An ELF image of the wrong class.
    #[error("is a 32-bit ELF image: only 64-bit kernels can be started")]
    Elf32,
    /// An ELF image for another processor.
    #[error("is for another architecture (ELF machine {machine}), not for x86_64")]
    WrongMachine {
        /// `e_machine`.
        machine: u16,
    },
    /// An ELF image that contradicts itself.
    #[error("is a malformed ELF image: {0}")]
    BadElf(&'static str),
    /// More program headers than any kernel has, or none.
    #[error("is a malformed ELF image: it has {count} program headers")]
    ProgramHeaders {
        /// `e_phnum`.
        count: u16,
    },
    /// Two segments of an ELF image lie in the same place.
    #[error("is a malformed ELF image: its segments at {first:#x} and {second:#x} overlap")]
    SegmentsOverlap {
        /// Physical address of the lower one.
        first: u64,
        /// Physical address of the higher one.
        second: u64,
    },
    /// A segment lies where a kernel cannot be.
    #[error(
        "has a segment at {start:#x} to {end:#x}: kernels are loaded between {min:#x} and {max:#x}",
        min = KERNEL_MIN_START, max = MMIO_HOLE_START
    )]
    SegmentOutside {
        /// Physical address of the segment.
        start: u64,
        /// The address behind it.
        end: u64,
    },
    /// The entry is not in the kernel.
    #[error("has its entry at {entry:#x}, outside of all its segments")]
    EntryOutside {
        /// The entry's address.
        entry: u64,
    },
    /// There is no PVH entry.
    #[error("has no PVH entry")]
    NoPvhEntry,
    /// A bzImage that contradicts itself.
    #[error("is a malformed bzImage: {0}")]
    BadBzImage(&'static str),
    /// A bzImage that is too old.
    #[error(
        "speaks version {major}.{minor} of the Linux boot protocol: 2.12 is the oldest that can be \
         started"
    )]
    OldProtocol {
        /// The protocol's major version.
        major: u8,
        /// Its minor version.
        minor: u8,
    },
    /// A bzImage without `XLF_KERNEL_64`.
    #[error("has no 64-bit entry: only 64-bit kernels can be started")]
    No64BitEntry,
    /// There is too little RAM.
    #[error(
        "needs RAM up to {end:#x}, but the guest's RAM below the device hole ends at {ram_end:#x}: \
         give the guest more memory"
    )]
    OutsideRam {
        /// The address behind the kernel.
        end: u64,
        /// Where RAM ends.
        ram_end: u64,
    },
}

impl KernelProblem {
    /// The error that says which kernel has the problem.
    pub(super) fn of(self, name: &str) -> Error {
        Error::Kernel {
            name: name.to_owned(),
            problem: self,
        }
    }
}
