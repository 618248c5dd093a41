//! The kernel in a bzImage, unpacked by the host and kept for the next time.
//!
//! A bzImage is a program that unpacks a kernel. A virtual machine monitor can unpack it once
//! instead, keep the ELF image that comes out, and map it into every guest: none of them spends its
//! first hundreds of milliseconds on it, and all of them share the host's one copy.
//!
//! [`unpack`] does it in memory, [`KernelCache`] keeps the result in a folder. Neither runs or
//! believes anything of the file: what it can make the host spend is bounded, and what is not
//! understood is an [`UnpackError`], after which the bzImage can still be started as it is.
//!
//! | module | what lives there |
//! |---|---|
//! | `bzimage` | where in the file the packed kernel is |
//! | `compression` | how it is packed, and the decoders: gzip, bzip2, lzma, xz, lzo, lz4, zstd |
//! | `unpack` | from a file to an ELF image in memory |
//! | `cache` | [`KernelCache`]: the folder; which files it trusts, and when |
//! | `error` | [`UnpackError`], [`CacheError`] |
//!
//! # Example
//!
//! ```
//! use kiln_kernel_cache::{KernelCache, Origin};
//! use std::fs::File;
//!
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("vmlinuz");
//! # std::fs::write(&path, kiln_kernel_cache::example_bzimage())?;
//! # let folder = folder.path().join("kernels");
//! let cache = KernelCache::open(&folder, 512 << 20)?;
//! let vmlinuz = File::open(path)?;
//! assert_eq!(cache.vmlinux(&vmlinuz)?.origin, Origin::Unpacked);
//! let kept = cache.vmlinux(&vmlinuz)?;
//! assert_eq!(kept.origin, Origin::Kept);
//! println!("an ELF image with a trailer: {:?}", kept.file);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod bzimage;
mod cache;
mod compression;
mod error;
mod unpack;

pub use cache::{KernelCache, Origin, Vmlinux};
pub use error::{CacheError, UnpackError};
pub use unpack::{SIZE_LIMIT, unpack, unpack_into_memory};

/// A bzImage with nothing in it that could be started, for the example above.
#[doc(hidden)]
pub fn example_bzimage() -> Vec<u8> {
    // An LZ4 block of one run of literals: the first four bytes of an ELF image.
    let payload = b"\x02\x21\x4c\x18\x05\0\0\0\x40\x7fELF\x04\0\0\0";
    bzimage::around(payload)
}
