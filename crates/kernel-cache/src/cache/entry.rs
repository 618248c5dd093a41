//! An unpacked kernel in the folder: how it is written, found again, and removed.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::folder::{Folder, Listed};
use super::identity;

/// The ends and the beginning of names.
const SUFFIX: &str = ".vmlinux";
const TEMPORARY: &str = "tmp-";

/// Behind a kernel: this, its size, and its CRC-32, all of 8 bytes.
const MAGIC: &[u8; 8] = b"kiln-elf";
const TRAILER_SIZE: usize = 24;

/// That a kernel was used is noted no more often than this.
const USE_INTERVAL: Duration = Duration::from_secs(3600);
/// A writer that has not locked its file after this time was interrupted.
const TEMPORARY_AGE: Duration = Duration::from_secs(60);
/// How many bzImages are remembered.
const IDENTITIES: usize = 256;

fn name_of(hash: &str) -> String {
    format!("{hash}{SUFFIX}")
}

/// Opens a kernel that was written, or checked, since the host started.
pub(super) fn open(folder: &Folder, hash: &str) -> Option<File> {
    let file = folder.open_ours(&name_of(hash))?;
    trailer(&file)?;
    note_use(&file);
    Some(file)
}

/// Opens a kernel and compares it with its checksum. A damaged one is removed.
pub(super) fn open_checked(folder: &Folder, hash: &str) -> Option<File> {
    let file = folder.open_ours(&name_of(hash))?;
    let is_whole = trailer(&file).is_some_and(|(size, crc)| checksum(&file, size) == Some(crc));
    if !is_whole {
        tracing::warn!(
            "an unpacked kernel in `{}` is damaged: it is unpacked again",
            folder.path().display()
        );
        folder.remove(&name_of(hash));
        return None;
    }
    note_use(&file);
    Some(file)
}

/// The size and the checksum that a trailer gives, where it fits the file.
fn trailer(file: &File) -> Option<(u64, u32)> {
    let size = file
        .metadata()
        .ok()?
        .len()
        .checked_sub(TRAILER_SIZE as u64)?;
    let mut trailer = [0; TRAILER_SIZE];
    file.read_exact_at(&mut trailer, size).ok()?;
    let crc = (0..=u64::from(u32::MAX)).contains(&number(&trailer[16..])?);
    let is_ours = trailer.starts_with(MAGIC) && number(&trailer[8..])? == size && crc;
    is_ours.then_some((size, number(&trailer[16..])? as u32))
}

fn number(bytes: &[u8]) -> Option<u64> {
    bytes.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
}

fn checksum(file: &File, size: u64) -> Option<u32> {
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 1 << 18];
    let mut offset = 0;
    while offset < size {
        let count = usize::try_from(size - offset).unwrap_or(usize::MAX);
        let count = count.min(buffer.len());
        file.read_exact_at(&mut buffer[..count], offset).ok()?;
        hasher.update(&buffer[..count]);
        offset += count as u64;
    }
    Some(hasher.finalize())
}

/// The time of the last modification says when a kernel was used last: nothing modifies it.
fn note_use(file: &File) {
    let now = SystemTime::now();
    let used = file.metadata().and_then(|metadata| metadata.modified());
    let is_recent = |used: SystemTime| now.duration_since(used).is_ok_and(|age| age < USE_INTERVAL);
    if !used.is_ok_and(is_recent) {
        // On a read-only file system the order of use does not matter.
        let _ = file.set_modified(now);
    }
}

/// Writes a kernel, after making room for it, and gives its file: ours, or that of another writer
/// who was first.
pub(super) fn store(folder: &Folder, hash: &str, content: &[u8], limit: u64) -> io::Result<File> {
    let size = (content.len() + TRAILER_SIZE) as u64;
    if size > limit {
        return Err(io::Error::other(format!(
            "it has {size} bytes, and the cache {limit}"
        )));
    }
    make_room(folder, limit - size)?;
    let temporary = Temporary::create(folder)?;
    let mut file = &temporary.file;
    file.write_all(content)?;
    let mut trailer = MAGIC.to_vec();
    trailer.extend((content.len() as u64).to_le_bytes());
    trailer.extend(u64::from(crc32fast::hash(content)).to_le_bytes());
    file.write_all(&trailer)?;
    file.set_permissions(PermissionsExt::from_mode(0o400))?;
    let name = name_of(hash);
    if !folder.rename_new(&temporary.name, &name)? {
        if let Some(file) = open(folder, hash) {
            return Ok(file);
        }
        // What has the name is not ours, or was cut short.
        folder.remove(&name);
        folder.rename_new(&temporary.name, &name)?;
    }
    temporary.keep()
}

/// A file that is being written; it is removed where it is not kept.
struct Temporary<'a> {
    folder: &'a Folder,
    name: String,
    file: File,
    is_kept: bool,
}

impl<'a> Temporary<'a> {
    fn create(folder: &'a Folder) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let time = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let (process, time) = (process::id(), time.as_nanos());
        let name = format!(
            "{TEMPORARY}{process}-{time}-{}",
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let temporary = Self {
            folder,
            file: folder.create(&name)?,
            name,
            is_kept: false,
        };
        // Where there are no locks, others go by the file's age alone.
        let _ = flock(&temporary.file, FlockOperation::NonBlockingLockExclusive);
        Ok(temporary)
    }

    /// Leaves the file, which was renamed.
    fn keep(mut self) -> io::Result<File> {
        self.is_kept = true;
        flock(&self.file, FlockOperation::Unlock).ok();
        self.file.try_clone()
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if !self.is_kept {
            self.folder.remove(&self.name);
        }
    }
}

/// Removes what was interrupted, and the kernels that were not used for the longest time, until
/// those that stay take `limit` bytes or less.
fn make_room(folder: &Folder, limit: u64) -> io::Result<()> {
    for left in folder.list(|name| name.starts_with(TEMPORARY))? {
        if was_interrupted(folder, &left) {
            folder.remove(&left.name);
        }
    }
    let mut kept = folder.list(|name| name.ends_with(SUFFIX) || name.starts_with(TEMPORARY))?;
    kept.sort_unstable_by_key(|file| file.modified);
    let mut total: u64 = kept.iter().map(|file| file.size).sum();
    for file in kept.iter().filter(|file| file.name.ends_with(SUFFIX)) {
        if total <= limit {
            break;
        }
        folder.remove(&file.name);
        total -= file.size;
    }
    Ok(())
}

fn was_interrupted(folder: &Folder, temporary: &Listed) -> bool {
    let age = SystemTime::now().duration_since(temporary.modified);
    if age.is_ok_and(|age| age < TEMPORARY_AGE) {
        return false;
    }
    let Some(file) = folder.open_ours(&temporary.name) else {
        return true;
    };
    // Where there are no locks they go by their age.
    flock(&file, FlockOperation::NonBlockingLockExclusive) != Err(Errno::WOULDBLOCK)
}

/// Removes the oldest links by identity where there are too many.
pub(super) fn forget_old_identities(folder: &Folder) {
    let Ok(mut links) = folder.list(|name| name.ends_with(identity::SUFFIX)) else {
        return;
    };
    links.sort_unstable_by_key(|link| link.modified);
    for link in &links[..links.len().saturating_sub(IDENTITIES)] {
        folder.remove(&link.name);
    }
}
