//! From a bzImage to the ELF image that is packed in it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::UnpackError;
use crate::bzimage::{self, HEAD_SIZE};
use crate::compression::Compression;

/// The most bytes that a kernel may have, packed or unpacked: several times as many as the largest
/// ones have.
pub const SIZE_LIMIT: u64 = 512 << 20;

/// What is written or left out at a time.
const BLOCK_SIZE: usize = 1 << 16;
static ZEROS: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];

/// Of the size behind the packed kernel.
const SIZE_FIELD: usize = 4;

/// Unpacks the kernel in a bzImage: its ELF image, with the table of relocations behind it that
/// only the bzImage's own code uses.
///
/// It takes memory for the unpacked kernel, and a few megabytes more for some of the decoders,
/// whatever is in the bzImage.
///
/// # Errors
///
/// [`UnpackError`], for all but a whole bzImage with a kernel that is not larger than [`SIZE_LIMIT`].
pub fn unpack(bzimage: &[u8]) -> Result<Vec<u8>, UnpackError> {
    let range = bzimage::payload(bzimage, bzimage.len() as u64)?;
    check_size(range.end - range.start)?;
    // It was found to lie in the slice.
    decompress(&bzimage[range.start as usize..range.end as usize])
}

/// As [`unpack`], from a file into one that is only in memory. The file is only read, and its
/// position stays.
///
/// # Errors
///
/// As for [`unpack`], [`UnpackError::Read`], and [`UnpackError::Memory`].
pub fn unpack_into_memory(bzimage: &File) -> Result<File, UnpackError> {
    in_memory(&decompress(&read_payload(bzimage)?)?)
}

pub(crate) fn in_memory(content: &[u8]) -> Result<File, UnpackError> {
    let file = memfd_create("kiln-vmlinux", MemfdFlags::CLOEXEC).map(File::from);
    let written = file.map_err(io::Error::from).and_then(|file| {
        file.set_len(content.len() as u64)?;
        // A third of a kernel's pages are zeros, which take no memory where they are not written.
        for (block, offset) in content.chunks(BLOCK_SIZE).zip((0..).step_by(BLOCK_SIZE)) {
            if block != &ZEROS[..block.len()] {
                file.write_all_at(block, offset)?;
            }
        }
        Ok(file)
    });
    written.map_err(UnpackError::Memory)
}

/// The packed kernel, with the size behind it.
pub(crate) fn read_payload(bzimage: &File) -> Result<Vec<u8>, UnpackError> {
    let len = bzimage.metadata().map_err(UnpackError::Read)?.len();
    let mut head = vec![0; HEAD_SIZE.min(usize::try_from(len).unwrap_or(HEAD_SIZE))];
    bzimage
        .read_exact_at(&mut head, 0)
        .map_err(UnpackError::Read)?;
    let range = bzimage::payload(&head, len)?;
    let size = check_size(range.end - range.start)?;
    let mut payload = vec![0; size];
    bzimage
        .read_exact_at(&mut payload, range.start)
        .map_err(UnpackError::Read)?;
    Ok(payload)
}

/// Unpacks what [`read_payload`] gave.
pub(crate) fn decompress(payload: &[u8]) -> Result<Vec<u8>, UnpackError> {
    let compression = Compression::of(payload)?;
    // Linux appends the unpacked size to all formats but gzip, which ends with it itself.
    let Some((packed, size)) = payload.split_last_chunk::<SIZE_FIELD>() else {
        return Err(UnpackError::NoPayload);
    };
    let declared = u32::from_le_bytes(*size);
    let packed = match compression {
        Compression::Gzip => payload,
        _ => packed,
    };
    // Zeroed memory that is not touched costs nothing: a false size does not.
    let mut content = vec![0; check_size(declared.into())?];
    let has = compression
        .decode(packed, &mut content)
        .map_err(|source| UnpackError::Decode {
            compression: compression.name(),
            source,
        })?;
    if has != content.len() {
        return Err(UnpackError::Size {
            has: has as u64,
            declared: declared.into(),
        });
    }
    if !content.starts_with(b"\x7fELF") {
        return Err(UnpackError::NotElf);
    }
    Ok(content)
}

fn check_size(size: u64) -> Result<usize, UnpackError> {
    match usize::try_from(size) {
        Ok(bytes) if size <= SIZE_LIMIT => Ok(bytes),
        _ => Err(UnpackError::TooLarge {
            size,
            limit: SIZE_LIMIT,
        }),
    }
}

#[cfg(test)]
pub(crate) mod tests;
