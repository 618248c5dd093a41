//! What can be refused while a bus is put together or restored.

use std::fmt;

use crate::PciAddress;

/// One of the two address spaces that BARs are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AddressSpace {
    /// x86 I/O ports.
    Io,
    /// Guest physical addresses.
    Memory,
}

impl fmt::Display for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Io => "I/O",
            Self::Memory => "memory",
        })
    }
}

/// Why a function could not be described, a bus not be built, or a state not be restored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The size of a BAR is none that a BAR can have.
    #[error(
        "give `{name}` a BAR of {size:#x} bytes: the size must be a power of two, at least {min:#x} and at most {max:#x}"
    )]
    BarSize {
        /// The function.
        name: String,
        /// The size asked for, in bytes.
        size: u64,
        /// The smallest size of such a BAR.
        min: u64,
        /// The largest size of such a BAR.
        max: u64,
    },
    /// A function has six BAR registers, of which a 64-bit BAR takes two.
    #[error("give `{name}` another BAR: its six registers are taken")]
    TooManyBars {
        /// The function.
        name: String,
    },
    /// The capability doesn't fit into what is left of the function's configuration space.
    #[error(
        "give `{name}` capability {id:#x} of {size} bytes: {left} bytes of its configuration space are left"
    )]
    CapabilityRoom {
        /// The function.
        name: String,
        /// The capability's id.
        id: u16,
        /// The capability's size in bytes, header included.
        size: usize,
        /// The bytes that are left.
        left: usize,
    },
    /// A capability's write mask is not as long as its body.
    #[error(
        "give `{name}` capability {id:#x}: its body has {body} bytes, but its write mask has {mask}"
    )]
    CapabilityMask {
        /// The function.
        name: String,
        /// The capability's id.
        id: u16,
        /// The bytes of the body.
        body: usize,
        /// The bytes of the write mask.
        mask: usize,
    },
    /// A function can have 1 to 2048 MSI-X vectors.
    #[error("make {vectors} MSI-X vectors: a function has 1 to 2048")]
    MsixVectors {
        /// The vectors asked for.
        vectors: u16,
    },
    /// The MSI-X table or the pending bits are not in a place where they can be.
    #[error("place the MSI-X {structure} of `{name}` at {offset:#x} of BAR {bar}: {reason}")]
    MsixPlacement {
        /// The function.
        name: String,
        /// "table" or "pending bits".
        structure: &'static str,
        /// The BAR.
        bar: usize,
        /// The offset into it.
        offset: u32,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A function has at most one MSI-X capability.
    #[error("give `{name}` MSI-X: it has it already")]
    SecondMsix {
        /// The function.
        name: String,
    },
    /// There is no place left for another function on the bus.
    #[error("place `{name}`: a bus has room for {limit} functions beside the host bridge")]
    TooManyFunctions {
        /// The function.
        name: String,
        /// How many there can be.
        limit: usize,
    },
    /// A window is empty or reaches beyond its address space, or a memory window lies on both
    /// sides of 4 GiB.
    #[error("open the {space} window {start:#x}..{end:#x}: {reason}")]
    Window {
        /// The window's address space.
        space: AddressSpace,
        /// Its first address.
        start: u64,
        /// The address behind its last one.
        end: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No window has room for a BAR.
    #[error("place BAR {bar} of `{name}` ({size:#x} bytes): no window for it has that much room")]
    NoAddress {
        /// The function.
        name: String,
        /// The number of the BAR.
        bar: usize,
        /// Its size in bytes.
        size: u64,
    },
    /// A function has an INTx pin, but the bus was given no interrupt lines.
    #[error("connect the INTx pin of `{name}`: the bus has no interrupt lines")]
    NoInterruptLines {
        /// The function.
        name: String,
    },
    /// A saved state is of another bus than this one.
    #[error("restore the bus: the state has {found} functions, and the bus {expected}")]
    StateFunctions {
        /// The functions of the bus.
        expected: usize,
        /// The functions of the state.
        found: usize,
    },
    /// A saved state is of another function than this one.
    #[error("restore function {address} (`{name}`): {reason}")]
    StateMismatch {
        /// Where the function is.
        address: PciAddress,
        /// The function.
        name: String,
        /// What differs.
        reason: String,
    },
}
