//! Base address registers: what a function decodes, and how much of it.

use crate::AddressSpace;
use crate::registers::{BAR_IO, BAR_MEMORY_64, BAR_PREFETCHABLE};

/// A base address register (PCI 3.0, section 6.2.5.1): a range of memory or I/O space that the
/// function answers in, wherever the guest puts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    kind: Kind,
    size: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Io,
    Memory32 { prefetchable: bool },
    Memory64 { prefetchable: bool },
}

impl Bar {
    /// An I/O BAR of `size` ports: a power of two, 4 to 256.
    pub const fn io(size: u64) -> Self {
        Self {
            kind: Kind::Io,
            size,
        }
    }

    /// A memory BAR of `size` bytes that lies below 4 GiB: a power of two, 16 bytes to 2 GiB.
    pub const fn memory32(size: u64) -> Self {
        Self {
            kind: Kind::Memory32 {
                prefetchable: false,
            },
            size,
        }
    }

    /// A memory BAR of `size` bytes that may lie anywhere: a power of two, 16 bytes to 2^62. It
    /// takes two registers.
    pub const fn memory64(size: u64) -> Self {
        Self {
            kind: Kind::Memory64 {
                prefetchable: false,
            },
            size,
        }
    }

    /// Says that reads of a memory BAR have no side effects, and that writes to it may be merged.
    #[must_use]
    pub const fn prefetchable(mut self) -> Self {
        match &mut self.kind {
            Kind::Io => {}
            Kind::Memory32 { prefetchable } | Kind::Memory64 { prefetchable } => {
                *prefetchable = true;
            }
        }
        self
    }

    /// The size in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The address space it is in.
    pub const fn space(&self) -> AddressSpace {
        match self.kind {
            Kind::Io => AddressSpace::Io,
            Kind::Memory32 { .. } | Kind::Memory64 { .. } => AddressSpace::Memory,
        }
    }

    /// Whether it takes two registers.
    pub(crate) const fn is_64bit(&self) -> bool {
        matches!(self.kind, Kind::Memory64 { .. })
    }

    /// The smallest and the largest size of a BAR of this kind (PCI 3.0, section 6.2.5.1).
    pub(crate) const fn size_limits(&self) -> (u64, u64) {
        match self.kind {
            Kind::Io => (4, 256),
            Kind::Memory32 { .. } => (16, 1 << 31),
            Kind::Memory64 { .. } => (16, 1 << 62),
        }
    }

    /// The low bits of the register, that say what kind of BAR it is.
    pub(crate) const fn type_bits(&self) -> u32 {
        match self.kind {
            Kind::Io => BAR_IO,
            Kind::Memory32 { prefetchable } => prefetchable_bit(prefetchable),
            Kind::Memory64 { prefetchable } => BAR_MEMORY_64 | prefetchable_bit(prefetchable),
        }
    }

    /// The bits of the register, or of both, that hold the address.
    pub(crate) const fn address_mask(&self) -> u64 {
        let mask = !(self.size - 1);
        if self.is_64bit() {
            mask
        } else {
            mask & 0xffff_ffff
        }
    }
}

const fn prefetchable_bit(prefetchable: bool) -> u32 {
    if prefetchable { BAR_PREFETCHABLE } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_type_is_in_the_low_bits() {
        for (bar, bits, mask) in [
            (Bar::io(32), 0x1, 0xffff_ffe0),
            (Bar::io(32).prefetchable(), 0x1, 0xffff_ffe0),
            (Bar::memory32(0x1000), 0x0, 0xffff_f000),
            (Bar::memory32(0x1000).prefetchable(), 0x8, 0xffff_f000),
            (Bar::memory64(0x1000), 0x4, 0xffff_ffff_ffff_f000),
            (
                Bar::memory64(1 << 40).prefetchable(),
                0xc,
                0xffff_ff00_0000_0000,
            ),
        ] {
            assert_eq!(bar.type_bits(), bits, "{bar:?}");
            assert_eq!(bar.address_mask(), mask, "{bar:?}");
        }
    }
}
