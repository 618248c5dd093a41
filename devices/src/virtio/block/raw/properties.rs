//! What a file or a block device of the host is like.

use std::fs::{File, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use rustix::fs::{fstatfs, ioctl_blkpbszget, ioctl_blksszget};

use super::holes::Holes;
use crate::virtio::block::BlockProperties;

/// The largest block that is told to a driver.
const LARGEST_BLOCK: u32 = 64 << 10;

/// What the system says of it; where it says nothing, or nonsense, what holds for any.
pub(super) fn of(file: &File, metadata: &Metadata, holes: &Holes) -> BlockProperties {
    let mut properties = BlockProperties {
        discard: holes.can_discard(),
        discard_alignment: holes.alignment(),
        write_zeroes: holes.can_write_zeroes(),
        ..BlockProperties::default()
    };
    if !metadata.file_type().is_block_device() {
        return properties;
    }
    if ioctl_blksszget(file).is_ok_and(|size| size == 4096) {
        properties.logical_block_size = 4096;
    }
    if let Ok(size) = ioctl_blkpbszget(file)
        && size.is_power_of_two()
        && (properties.logical_block_size..=LARGEST_BLOCK).contains(&size)
    {
        // Below a page the host's cache has to read before it can write.
        properties.physical_block_size = size.max(properties.physical_block_size);
    }
    if let Some(size) = limit(metadata, "optimal_io_size").and_then(|size| u32::try_from(size).ok())
        && size.is_multiple_of(properties.logical_block_size)
    {
        properties.optimal_io_size = size;
    }
    properties
}

/// A limit of a block device, from the system's description of it. A partition has those of the
/// disk it is on.
pub(super) fn limit(metadata: &Metadata, name: &str) -> Option<u64> {
    let number = metadata.rdev();
    let (major, minor) = (libc::major(number), libc::minor(number));
    let folder = format!("/sys/dev/block/{major}:{minor}");
    let text = std::fs::read_to_string(format!("{folder}/queue/{name}"))
        .or_else(|_| std::fs::read_to_string(format!("{folder}/../queue/{name}")));
    text.ok()?.trim().parse().ok()
}

/// Whether a file is in memory and nowhere else.
pub(super) fn is_in_memory(file: &File) -> bool {
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    fstatfs(file).is_ok_and(|system| matches!(system.f_type, TMPFS | RAMFS))
}
