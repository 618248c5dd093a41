//! The refcounts of an image that is to be written: whether the driver can find free clusters with
//! them, and taking a cluster ahead of the driver.
//!
//! The driver looks for a free cluster one by one. So what the refcounts describe must not be much
//! larger than the file, or an image of a few kilobytes could keep it busy for years.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::Qcow2Error;
use super::header::{self, Header};

/// The most clusters of a file that is to be written: looking at all of them takes seconds. With
/// the usual clusters of 64 KiB these are 16 TiB.
const MOST_CLUSTERS: u64 = 1 << 28;
/// How many blocks of refcounts may describe what is behind the file's end: clusters that were
/// taken, and not written to before a crash.
const BLOCKS_BEHIND: u64 = 2;
/// How much of the table is looked at with one read.
const PIECE: usize = 64 << 10;

/// Checks the refcounts of an image of `file_size` bytes.
pub(super) fn check(
    path: &Path,
    file: &File,
    header: &Header,
    file_size: u64,
) -> Result<(), Qcow2Error> {
    let malformed = |problem: String| Qcow2Error::Malformed {
        path: path.to_owned(),
        problem,
    };
    let clusters = file_size.div_ceil(1 << header.cluster_bits);
    if clusters > MOST_CLUSTERS {
        return Err(Qcow2Error::Unsupported {
            path: path.to_owned(),
            feature: format!("{clusters} clusters, more than {MOST_CLUSTERS}"),
        });
    }
    let read_error = |source| Qcow2Error::Read {
        path: path.to_owned(),
        source,
    };
    let per_block = 1_u64 << (header.cluster_bits + 3 - header.refcount_order);
    let most_blocks = clusters.div_ceil(per_block) + BLOCKS_BEHIND;
    let mut blocks = Vec::new();
    let mut piece = vec![0; PIECE.min(header.refcount_table_bytes as usize)];
    let mut index = 0;
    while index * 8 < header.refcount_table_bytes {
        let left = header.refcount_table_bytes - index * 8;
        let bytes = &mut piece[..(PIECE as u64).min(left) as usize];
        read_or_zeros(file, bytes, header.refcount_table + index * 8).map_err(read_error)?;
        for entry in bytes.chunks_exact(8) {
            let block = entry
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte));
            if block != 0 {
                let inside = block < file_size && block.is_multiple_of(1 << header.cluster_bits);
                if !inside || index >= most_blocks {
                    return Err(malformed(format!(
                        "block {index} of its refcounts is at {block:#x}"
                    )));
                }
                blocks.push(block);
            }
            index += 1;
        }
    }
    blocks.sort_unstable();
    if let Some(pair) = blocks.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(malformed(format!(
            "two blocks of its refcounts are at {:#x}",
            pair[0]
        )));
    }
    check_first(path, file, header).map_err(read_error)?
}

/// The first cluster is the header's. Where it counts as free, so may all others.
fn check_first(path: &Path, file: &File, header: &Header) -> io::Result<Result<(), Qcow2Error>> {
    let mut entry = [0; 8];
    read_or_zeros(file, &mut entry, header.refcount_table)?;
    let block = u64::from_be_bytes(entry);
    let mut first = [0; 8];
    if block != 0 {
        read_or_zeros(file, &mut first, block)?;
    }
    let bits = 1_u32 << header.refcount_order;
    // Below a byte, the first refcount is in the lowest bits.
    let is_free = match bits {
        64 => first == [0; 8],
        8.. => first[..bits as usize / 8].iter().all(|byte| *byte == 0),
        _ => first[0] & ((1 << bits) - 1) == 0,
    };
    Ok(match is_free {
        true => Err(Qcow2Error::Unclean {
            path: path.to_owned(),
            problem: "its refcounts are wrong",
        }),
        false => Ok(()),
    })
}

/// How the refcounts of an image are laid out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) cluster_bits: u32,
    /// The bits of a refcount, as a power of two.
    pub(super) order: u32,
}

/// Where a refcount is in the file, and what it has to become.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) offset: u64,
    pub(super) bytes: Vec<u8>,
}

impl Layout {
    /// What has to be written so that the file itself says of the cluster at `cluster` that it is
    /// in use. Nothing where it says so already, or where no refcounts of it are in the file.
    pub(super) fn take(self, file: &File, cluster: u64) -> io::Result<Option<Change>> {
        let per_block_bits = self.cluster_bits + 3 - self.order;
        let index = cluster >> self.cluster_bits;
        let mut table = [0; 12];
        read_or_zeros(file, &mut table, header::REFCOUNT_TABLE)?;
        let [table @ .., c0, c1, c2, c3] = table;
        let table = u64::from_be_bytes(table);
        let table_bytes = u64::from(u32::from_be_bytes([c0, c1, c2, c3])) << self.cluster_bits;
        let entry = (index >> per_block_bits) * 8;
        if entry >= table_bytes {
            return Ok(None);
        }
        let mut block = [0; 8];
        read_or_zeros(file, &mut block, table.saturating_add(entry))?;
        let block = u64::from_be_bytes(block);
        if block == 0 {
            return Ok(None);
        }
        let bit = (index & ((1 << per_block_bits) - 1)) << self.order;
        let offset = block.saturating_add(bit / 8);
        let mut bytes = vec![0; (1 << self.order >> 3_u32).max(1)];
        read_or_zeros(file, &mut bytes, offset)?;
        // Below a byte, the first refcount is in the lowest bits.
        let (mask, one) = match self.order {
            0..3 => {
                let shift = bit % 8;
                (
                    (((1_u16 << (1 << self.order)) - 1) << shift) as u8,
                    1 << shift,
                )
            }
            _ => (0xff, 1),
        };
        if bytes.iter().any(|byte| byte & mask != 0) {
            return Ok(None);
        }
        if let Some(last) = bytes.last_mut() {
            *last |= one;
        }
        Ok(Some(Change { offset, bytes }))
    }
}

/// Fills `bytes` from the file, and with zeros behind its end.
fn read_or_zeros(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], offset.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes[done..].fill(0);
    Ok(())
}
