//! What can go wrong while guest RAM is allocated, or given back.

use std::fmt;
use std::io;

use thiserror::Error;

use crate::MemorySize;

/// Why guest RAM could not be allocated, or given back.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// No region was asked for.
    #[error("guest memory has no region: its size must be more than 0")]
    NoRegions,
    /// A region is empty or is not made of whole pages.
    #[error(
        "guest memory region of {size} at {address:#x} is not a whole number of {unit} pages: \
         choose a multiple"
    )]
    NotWholePages {
        /// Guest physical address of the region.
        address: u64,
        /// Its size.
        size: MemorySize,
        /// The page size that it must be a multiple of.
        unit: MemorySize,
    },
    /// Regions overlap, are not sorted by address, or pass the end of the address space.
    #[error(
        "guest memory region of {size} at {address:#x} overlaps the one before it, or passes the \
         end of the address space"
    )]
    BadLayout {
        /// Guest physical address of the region.
        address: u64,
        /// Its size.
        size: MemorySize,
    },
    /// The host has no memory or address space for a mapping of this size.
    #[error("map {size} of guest memory: more than this host can map")]
    Map {
        /// The size of the mapping.
        size: MemorySize,
        /// What the host said.
        source: io::Error,
    },
    /// The host's pool of huge pages has not enough free pages.
    #[error(
        "map {size} of guest memory: not enough free {page} huge pages; reserve {count} of them in \
         {page:#}, or do without huge pages"
    )]
    HugePages {
        /// The size of the mapping.
        size: MemorySize,
        /// The size of the pages.
        page: HugePageSize,
        /// How many pages the mapping needs.
        count: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The memfd could not be created, sized or sealed.
    #[error("create a memfd of {size} for guest memory: could not {action}")]
    Memfd {
        /// The size of the file.
        size: MemorySize,
        /// What was attempted.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// A file could not be mapped.
    #[error("map {size} of a file into guest memory")]
    MapFile {
        /// How much of the file.
        size: MemorySize,
        /// What the host said.
        source: io::Error,
    },
    /// The host refused an advice that was asked for.
    #[error("advise the host on {size} of guest memory: {advice} was refused")]
    Advise {
        /// The size of the mapping.
        size: MemorySize,
        /// Which advice.
        advice: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The host does not take pages back.
    #[error("give {size} of guest memory at {address:#x} back to the host")]
    Discard {
        /// Guest physical address of the pages.
        address: u64,
        /// How much it was.
        size: MemorySize,
        /// What the host said.
        source: io::Error,
    },
    /// The host does not tell which pages are in memory.
    #[error("ask the host which pages of guest memory it holds")]
    Resident {
        /// What the host said.
        source: io::Error,
    },
}

/// The size of a page from the host's pool; `{:#}` names the file that sets how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HugePageSize {
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

impl HugePageSize {
    /// The size of the page in bytes.
    pub const fn as_bytes(self) -> u64 {
        match self {
            Self::Size2M => 1 << 21,
            Self::Size1G => 1 << 30,
        }
    }
}

impl fmt::Display for HugePageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if f.alternate() {
            let kib = self.as_bytes() / 1024;
            return write!(f, "/sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages");
        }
        MemorySize::bytes(self.as_bytes()).fmt(f)
    }
}
