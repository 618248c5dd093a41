//! What can be refused while a machine is put together.

use std::fmt;
use std::ops::RangeInclusive;

/// One of the two address spaces that devices are placed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AddressSpace {
    /// x86 I/O ports.
    Pio,
    /// Guest physical addresses.
    Mmio,
}

impl fmt::Display for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pio => "ports",
            Self::Mmio => "addresses",
        })
    }
}

/// Why a device could not be placed, or an address or interrupt not be allocated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The place is (partly) that of another device.
    #[error(
        "place `{name}` at {space} {:#x}..={:#x}: `{other}` is at {space} {:#x}..={:#x}",
        .range.start(), .range.end(), .other_range.start(), .other_range.end()
    )]
    Overlap {
        /// The device that was to be placed.
        name: String,
        /// Where.
        space: AddressSpace,
        /// The first and the last of its addresses.
        range: RangeInclusive<u64>,
        /// The device that is there.
        other: String,
        /// The first and the last of the addresses of the device that is there.
        other_range: RangeInclusive<u64>,
    },
    /// The range is empty, or ends beyond the address space.
    #[error(
        "place `{name}` at {space} from {base:#x}: {size:#x} is no size that a device can have there"
    )]
    Range {
        /// The device that was to be placed.
        name: String,
        /// Where.
        space: AddressSpace,
        /// The first address.
        base: u64,
        /// The number of addresses.
        size: u64,
    },
    /// The window that MMIO addresses are allocated from is empty.
    #[error("allocate MMIO addresses from {start:#x}..{end:#x}: the window is empty")]
    MmioWindow {
        /// The first address of the window.
        start: u64,
        /// The first address behind the window.
        end: u64,
    },
    /// A size of zero, or an alignment that is no power of two, was asked for.
    #[error(
        "allocate {size:#x} bytes of MMIO addresses for `{name}`, aligned to {alignment:#x}: \
         a size of at least 1 and an alignment to a power of two can be had"
    )]
    MmioRequest {
        /// The device.
        name: String,
        /// The bytes asked for.
        size: u64,
        /// The alignment asked for, in bytes.
        alignment: u64,
    },
    /// The window has no room left.
    #[error(
        "no free MMIO addresses for `{name}`: {size:#x} bytes wanted, \
         {used:#x} of {total:#x} in use"
    )]
    MmioExhausted {
        /// The device.
        name: String,
        /// The bytes asked for.
        size: u64,
        /// The bytes that are allocated.
        used: u64,
        /// The bytes of the window.
        total: u64,
    },
    /// The machine was to have no interrupts, or more than there can be.
    #[error("allocate interrupts from {pins} pins: 1 to 240 can be had")]
    GsiCount {
        /// The number asked for.
        pins: u32,
    },
    /// The machine has no such interrupt.
    #[error("reserve interrupt {gsi} for `{name}`: the machine has 0 to {last}")]
    GsiRange {
        /// The device.
        name: String,
        /// The interrupt asked for.
        gsi: u32,
        /// The last interrupt there is.
        last: u32,
    },
    /// The interrupt is that of another device.
    #[error("reserve interrupt {gsi} for `{name}`: `{other}` has it")]
    GsiTaken {
        /// The device.
        name: String,
        /// The interrupt asked for.
        gsi: u32,
        /// The device that has it.
        other: String,
    },
    /// No interrupt is left.
    #[error("no free interrupt for `{name}`: {total} of {total} in use")]
    GsiExhausted {
        /// The device.
        name: String,
        /// The number of interrupts there are.
        total: u32,
    },
}
