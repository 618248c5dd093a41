//! Guest RAM.
#![deny(missing_docs)]

use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{GuestMemoryMmap, VolatileSlice};

/// The bitmap of the pages that the VMM itself has written, where the log of dirty pages is on.
pub type DirtyBitmap = Option<AtomicBitmap>;

/// The RAM of a guest; shared as `Arc<GuestMemory>`.
pub type GuestMemory = GuestMemoryMmap<DirtyBitmap>;

/// A piece of guest RAM that is contiguous in the host's address space.
pub type GuestSlice<'a> = VolatileSlice<'a, BS<'a, DirtyBitmap>>;
