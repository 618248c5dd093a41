//! Guest RAM: from a layout of regions to mappings that cost nothing until the guest touches them.
//!
//! [`allocate`] maps every region without reserving, filling or zeroing anything: a page of host
//! memory is taken when the guest (or a device on its behalf) first writes to it. The result is
//! vm-memory's [`GuestMemoryMmap`], shared by all that reach guest RAM as `Arc<GuestMemory>`.
//!
//! | module | what lives there |
//! |---|---|
//! | `size` | [`MemorySize`]: how much RAM, as people write it |
//! | `options` | [`MemoryOptions`], [`Backing`], [`HugePages`] |
//! | `allocate` | [`allocate`]: regions to mappings |
//! | `discard` | [`discard`], [`discard_slice`]: pages back to the host; [`resident`]: what it holds |
//! | `overlay` | [`map_file`]: a file mapped instead of read; [`populate`]: pages taken ahead of use |
//! | `slices` | [`scatter`], [`gather`]: copies to and from guest RAM in pieces |
//! | `error` | [`Error`] |
//!
//! # Example
//!
//! ```
//! use kiln_memory::{MemoryOptions, MemorySize, allocate};
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
//!
//! let size: MemorySize = "64M".parse()?;
//! let regions = [(GuestAddress(0), usize::try_from(size.as_bytes())?)];
//! let memory = allocate(&regions, &MemoryOptions::default())?;
//!
//! assert_eq!(memory.last_addr(), GuestAddress(0x3ff_ffff));
//! memory.write_slice(b"hello", GuestAddress(0x1000))?;
//! assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1000))?, b'h');
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(missing_docs)]

mod allocate;
mod discard;
mod error;
mod options;
mod overlay;
mod size;
mod slices;

use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{GuestMemoryMmap, VolatileSlice};

pub use allocate::allocate;
pub use discard::{discard, discard_slice, resident};
pub use error::{Error, HugePageSize};
pub use options::{Backing, HugePages, MemoryOptions};
pub use overlay::{map_file, populate};
pub use size::{MemorySize, ParseMemorySizeError};
pub use slices::{gather, gather_into, scatter};

/// The bitmap of the pages that the VMM itself has written, where the log of dirty pages is on.
pub type DirtyBitmap = Option<AtomicBitmap>;

/// The RAM of a guest; shared as `Arc<GuestMemory>`.
pub type GuestMemory = GuestMemoryMmap<DirtyBitmap>;

/// A piece of guest RAM that is contiguous in the host's address space.
pub type GuestSlice<'a> = VolatileSlice<'a, BS<'a, DirtyBitmap>>;
