//! A folder of unpacked kernels.
//!
//! # What is in the folder
//!
//! | name | what it is |
//! |---|---|
//! | `HASH.vmlinux` | an unpacked kernel and a trailer; the hash (BLAKE3) is that of the packed one |
//! | `IDENTITY.seen` | a symbolic link to a hash: which packed kernel was found in a certain file |
//! | `tmp-…` | a kernel that is being written; its writer has it locked |
//!
//! # Whom it believes
//!
//! - A kernel is made under a temporary name and renamed, so readers see it whole or not at all, and
//!   of two writers the first one wins. No one waits for another.
//! - To hash a bzImage takes about as long as all the rest of a start. It is not done again for a
//!   file that is known to be the same: the same inode of the same file system, with the same size
//!   and times. The time of the last change (ctime), unlike that of the last modification, is
//!   nobody's to set; it moves with every write, but no finer than the kernel's clock ticks, and so a
//!   file that was changed in the last two seconds is not remembered. What it does not see: a write
//!   through a shared mapping that was dirty when the file was hashed, and file systems that do not
//!   keep a ctime of their own.
//! - After a loss of power a file that was renamed may be there without its content. Nothing waits
//!   for the disk (`fsync`) for that; the identity of a file includes that of the host's run (its boot
//!   id), so after each start of the host a kernel is first compared with its checksum.
//! - The folder and what is in it must be ours and not writable by others.
//!
//! All that goes wrong in the folder is not an error: the kernel is then unpacked into memory.

mod entry;
mod folder;
mod identity;

use std::error::Error;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use crate::unpack::{decompress, in_memory, read_payload, unpack_into_memory};
use crate::{CacheError, UnpackError};

use folder::Folder;
use identity::Identity;

/// A folder in which unpacked kernels are kept.
///
/// Clones share the open folder. Any number of processes can use one folder at the same time. What
/// is removed from it stays as it is for machines that have it mapped.
#[derive(Clone, Debug)]
pub struct KernelCache(Arc<Cache>);

#[derive(Debug)]
struct Cache {
    path: PathBuf,
    /// Opened when it is needed; `None` where it cannot be used.
    folder: OnceLock<Option<Folder>>,
    limit: u64,
}

/// Where an unpacked kernel comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// It was in the cache.
    Kept,
    /// It was unpacked just now, and is in the cache from now on.
    Unpacked,
    /// It was unpacked just now, into memory: the cache could not take it.
    Memory,
}

/// An unpacked kernel.
#[derive(Debug)]
pub struct Vmlinux {
    /// Its ELF image. There may be more behind it in the file. Nobody writes to the file again.
    pub file: File,
    /// Where it comes from.
    pub origin: Origin,
}

impl KernelCache {
    /// Bytes enough for eight kernels of Debian's.
    pub const DEFAULT_LIMIT: u64 = 512 << 20;

    /// The folder for the kernels of the user whom the process runs as: `kiln/kernels` in
    /// `$XDG_CACHE_HOME`, or else in `$HOME/.cache` (XDG Base Directory Specification). `None` where
    /// neither is set to an absolute path, or where it belongs to another user, as under some `sudo`.
    ///
    /// Nothing is made.
    pub fn user_folder() -> Option<PathBuf> {
        folder::user_folder()
    }

    /// Opens a folder for a cache, and makes it where it is not there. `limit` is how many bytes the
    /// kernels in it may take together; those that were not used for the longest time go first.
    ///
    /// # Errors
    ///
    /// [`CacheError`] where the folder cannot be made or opened, belongs to another user, or can be
    /// written to by others.
    pub fn open(folder: impl AsRef<Path>, limit: u64) -> Result<Self, CacheError> {
        let cache = Self::on_demand(folder.as_ref(), limit);
        // It is new, and so the folder is not set yet.
        let _ = cache.0.folder.set(Some(Folder::open(folder.as_ref())?));
        Ok(cache)
    }

    /// As [`open`](Self::open), but the folder is made and opened when the first kernel is asked for.
    /// Where it cannot be, one line of the log says so, and kernels are in memory.
    pub fn on_demand(folder: impl Into<PathBuf>, limit: u64) -> Self {
        Self(Arc::new(Cache {
            path: folder.into(),
            folder: OnceLock::new(),
            limit,
        }))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Gives the kernel in a bzImage, from the cache if it is there. The file is only read, and its
    /// position stays.
    ///
    /// # Errors
    ///
    /// [`UnpackError`], of the bzImage alone: where the cache can't take the kernel, it is in memory,
    /// and one line of the log says so.
    pub fn vmlinux(&self, bzimage: &File) -> Result<Vmlinux, UnpackError> {
        match self.0.folder() {
            Some(folder) => folder.vmlinux(bzimage, self.0.limit),
            None => Ok(Vmlinux {
                file: unpack_into_memory(bzimage)?,
                origin: Origin::Memory,
            }),
        }
    }
}

impl Cache {
    fn folder(&self) -> Option<&Folder> {
        let open = || match Folder::open(&self.path) {
            Ok(folder) => Some(folder),
            Err(error) => {
                let why = error
                    .source()
                    .map_or_else(String::new, |why| format!(": {why}"));
                tracing::warn!("{error}{why}; kernels are unpacked into memory");
                None
            }
        };
        self.folder.get_or_init(open).as_ref()
    }
}

impl Folder {
    fn vmlinux(&self, bzimage: &File, limit: u64) -> Result<Vmlinux, UnpackError> {
        let identity = Identity::of(bzimage).map_err(UnpackError::Read)?;
        if let Some(file) = identity.and_then(|identity| self.remembered(&identity)) {
            return Ok(Vmlinux {
                file,
                origin: Origin::Kept,
            });
        }
        let payload = read_payload(bzimage)?;
        let hash = blake3::hash(&payload).to_hex();
        let (file, origin) = match entry::open_checked(self, &hash) {
            Some(file) => (file, Origin::Kept),
            None => {
                let content = decompress(&payload)?;
                match entry::store(self, &hash, &content, limit) {
                    Ok(file) => (file, Origin::Unpacked),
                    Err(error) => {
                        let path = self.path().display();
                        tracing::warn!("keep a kernel in `{path}`: {error}; it is in memory");
                        (in_memory(&content)?, Origin::Memory)
                    }
                }
            }
        };
        // The file that was hashed, not one that was changed meanwhile.
        let same = |now: &Identity| Some(*now) == identity && now.is_settled(SystemTime::now());
        let now = Identity::of(bzimage).map_err(UnpackError::Read)?;
        if let (Some(identity), true) = (now.filter(same), origin != Origin::Memory) {
            self.remember(&identity, &hash);
        }
        Ok(Vmlinux { file, origin })
    }

    /// The kernel of a bzImage that was hashed before.
    fn remembered(&self, identity: &Identity) -> Option<File> {
        let hash = self.read_link(&identity.name())?;
        entry::open(self, &hash)
    }

    fn remember(&self, identity: &Identity, hash: &str) {
        let name = identity.name();
        let result = match self.link(hash, &name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.remove(&name);
                self.link(hash, &name)
            }
            other => other,
        };
        match result {
            Ok(()) => entry::forget_old_identities(self),
            Err(error) => {
                let path = self.path().display();
                tracing::debug!("remember a bzImage in `{path}`: {error}");
            }
        }
    }
}

#[cfg(test)]
mod tests;
