//! What can go wrong.

use std::error::Error;
use std::io;
use std::path::PathBuf;

/// Why the kernel in a bzImage could not be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// The file could not be read.
    #[error("read the bzImage")]
    Read(#[source] io::Error),
    /// The file is something else.
    #[error("it is not a bzImage")]
    NotABzImage,
    /// The bzImage is too old to say where its kernel is, or has none.
    #[error("the bzImage does not say where its kernel is")]
    NoPayload,
    /// The file ends before its kernel.
    #[error("the bzImage is truncated: it has {has} bytes, and its kernel ends at {needs}")]
    Truncated {
        /// The bytes that it has.
        has: u64,
        /// The bytes that it needs.
        needs: u64,
    },
    /// The kernel, packed or unpacked, is larger than any that is.
    #[error("the kernel in the bzImage has {size} bytes: {limit} are the most")]
    TooLarge {
        /// The bytes that it has, or says to have.
        size: u64,
        /// The most that it may have.
        limit: u64,
    },
    /// The kernel is packed in a way that is not known.
    #[error("the kernel in the bzImage is packed in an unknown way: it begins with {start:02x?}")]
    UnknownCompression {
        /// Its first bytes.
        start: Vec<u8>,
    },
    /// What is packed is damaged.
    #[error("unpack the bzImage's kernel ({compression})")]
    Decode {
        /// How it is packed.
        compression: &'static str,
        /// What the decoder said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The kernel has another size than the bzImage says.
    #[error("the bzImage's kernel unpacks to {has} bytes, not to {declared} as the bzImage says")]
    Size {
        /// The bytes that came out.
        has: u64,
        /// The bytes that should have.
        declared: u64,
    },
    /// What was packed is no ELF image.
    #[error("what is packed in the bzImage is not an ELF image")]
    NotElf,
    /// There is no memory for it.
    #[error("keep the unpacked kernel in memory")]
    Memory(#[source] io::Error),
}

/// Why a folder cannot hold a cache.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// The folder could not be made or opened.
    #[error("open kernel cache `{}`", path.display())]
    Open {
        /// The folder.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The folder is somebody else's.
    #[error("kernel cache `{}` belongs to user {owner}, not to us (user {user})", path.display())]
    Foreign {
        /// The folder.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Who we are.
        user: u32,
    },
    /// Others can write to the folder.
    #[error("kernel cache `{}` can be written to by others (mode {mode:o})", path.display())]
    Shared {
        /// The folder.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
}
