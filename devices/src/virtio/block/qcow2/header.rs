//! The header of a qcow2 image: what it says, and whether it can be true.
//!
//! The driver reads the header, too. It is read here first because an image may be made by anybody:
//! what could make the driver fail, take much memory or go to other files is refused with a message
//! that says what it is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::Qcow2Error;

/// `QFI\xfb`, which every qcow2 image begins with.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Where a header has the place of the refcount table (64 bits) and its clusters (32 bits).
pub(super) const REFCOUNT_TABLE: u64 = 48;
/// Where it has the entries of the L1 table (32 bits) and that table's place (64 bits).
pub(super) const L1_TABLE: usize = 36;

/// The header's bytes in version 2, and the least in version 3.
pub(super) const HEADER_V2: usize = 72;
const HEADER_V3: usize = 104;
/// The sizes that a cluster can have, as powers of two.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// The most bytes of an L1 table and of a refcount table, as in QEMU.
const TABLE_BYTES: u64 = 32 << 20;
/// What an offset in the file stays below.
const OFFSET_LIMIT: u64 = 1 << 56;
/// The most bytes of a backing file's name.
const NAME_BYTES: usize = 1023;

/// Incompatible features, by their bits.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// Header extensions, by their types.
const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
/// The bytes of an entry of the table of feature names.
const FEATURE_NAME: usize = 48;

/// What a header says.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// The size of the disk, in bytes.
    pub(super) size: u64,
    pub(super) backing: Option<Backing>,
    pub(super) refcount_order: u32,
    /// Where the L1 table is.
    pub(super) l1_table: u64,
    pub(super) refcount_table: u64,
    pub(super) refcount_table_bytes: u64,
}

/// The backing file that a header names.
#[derive(Debug)]
pub(super) struct Backing {
    pub(super) name: String,
    /// How the header calls its format, if it does.
    pub(super) format: Option<String>,
}

/// Reads the header of an image of `file_size` bytes.
pub(super) fn read(path: &Path, file: &File, file_size: u64) -> Result<Header, Qcow2Error> {
    let read_error = |source| Qcow2Error::Read {
        path: path.to_owned(),
        source,
    };
    let mut start = [0; HEADER_V3];
    let len = read_up_to(file, &mut start).map_err(read_error)?;
    if start[..4] != MAGIC {
        return Err(Qcow2Error::NotQcow2 {
            path: path.to_owned(),
        });
    }
    let fields = Fields {
        path,
        start: &start,
    };
    let cluster_bits = fields.u32(20);
    if len < HEADER_V2 || !CLUSTER_BITS.contains(&cluster_bits) {
        return Err(fields.malformed(format!(
            "its clusters are of 2^{cluster_bits} bytes, not of 2^{} to 2^{}",
            CLUSTER_BITS.start(),
            CLUSTER_BITS.end()
        )));
    }
    // All that a header has is in the first cluster.
    let mut cluster = vec![0; 1 << cluster_bits];
    read_up_to(file, &mut cluster).map_err(read_error)?;
    let header = fields.header(&cluster)?;
    check_tables(&fields, &header, file_size)?;
    Ok(header)
}

/// Fills `buffer` from the file's beginning, as far as that goes.
fn read_up_to(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

struct Fields<'a> {
    path: &'a Path,
    start: &'a [u8; HEADER_V3],
}

impl Fields<'_> {
    fn u32(&self, at: usize) -> u32 {
        u32_at(self.start, at)
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) << 32 | u64::from(self.u32(at + 4))
    }

    fn malformed(&self, problem: impl Into<String>) -> Qcow2Error {
        Qcow2Error::Malformed {
            path: self.path.to_owned(),
            problem: problem.into(),
        }
    }

    fn unsupported(&self, feature: impl Into<String>) -> Qcow2Error {
        Qcow2Error::Unsupported {
            path: self.path.to_owned(),
            feature: feature.into(),
        }
    }

    fn header(&self, cluster: &[u8]) -> Result<Header, Qcow2Error> {
        let version = self.u32(4);
        let (refcount_order, length) = match version {
            2 => (4, HEADER_V2),
            3 => (self.u32(96), self.header_length(cluster.len())?),
            _ => return Err(self.unsupported(format!("version {version} of the format"))),
        };
        if version == 3 {
            self.check_features(self.u64(72))?;
        }
        match self.u32(32) {
            0 => {}
            _ => return Err(self.unsupported("encryption")),
        }
        if refcount_order > 6 {
            return Err(self.malformed(format!("its refcounts are of 2^{refcount_order} bits")));
        }
        let format = self.extensions(cluster, length)?;
        let cluster_bits = self.u32(20);
        Ok(Header {
            version,
            cluster_bits,
            size: self.u64(24),
            backing: self.backing(cluster, format)?,
            refcount_order,
            l1_table: self.u64(L1_TABLE + 4),
            refcount_table: self.u64(REFCOUNT_TABLE as usize),
            refcount_table_bytes: u64::from(self.u32(REFCOUNT_TABLE as usize + 8)) << cluster_bits,
        })
    }

    fn header_length(&self, cluster: usize) -> Result<usize, Qcow2Error> {
        let length = self.u32(100) as usize;
        if length < HEADER_V3 || length > cluster || !length.is_multiple_of(8) {
            return Err(self.malformed(format!("its header is of {length} bytes")));
        }
        Ok(length)
    }

    fn check_features(&self, features: u64) -> Result<(), Qcow2Error> {
        let unclean = |problem| Qcow2Error::Unclean {
            path: self.path.to_owned(),
            problem,
        };
        if features & CORRUPT != 0 {
            return Err(unclean("it is marked as corrupt"));
        }
        if features & DIRTY != 0 {
            return Err(unclean(
                "it was not closed by the last program that wrote to it",
            ));
        }
        // A data file is another file of the host, and the guest's data in it has no refcounts.
        for (bit, name) in [
            (DATA_FILE, "an external data file"),
            (COMPRESSION, "a compression other than zlib"),
            (EXTENDED_L2, "extended L2 entries"),
        ] {
            if features & bit != 0 {
                return Err(self.unsupported(name));
            }
        }
        if features != 0 {
            return Err(self.unsupported(format!("unknown features ({features:#x})")));
        }
        Ok(())
    }

    /// Walks through the header's extensions; gives the format of the backing file.
    fn extensions(&self, cluster: &[u8], start: usize) -> Result<Option<String>, Qcow2Error> {
        let too_long = || self.malformed("its header does not end in the first cluster");
        let mut format = None;
        let mut at = start;
        // The backing file's name is behind the extensions, and may be what ends them.
        let end = usize::try_from(self.u64(8)).unwrap_or(0);
        loop {
            if at == end {
                return Ok(format);
            }
            let head = at.checked_add(8).and_then(|end| cluster.get(at..end));
            let (kind, len) = match head {
                Some(head) => (u32_at(head, 0), u32_at(head, 4) as usize),
                None => return Err(too_long()),
            };
            let data = (at + 8)
                .checked_add(len)
                .and_then(|end| cluster.get(at + 8..end))
                .ok_or_else(too_long)?;
            match kind {
                END => return Ok(format),
                BACKING_FORMAT => {
                    let text = std::str::from_utf8(data)
                        .map_err(|_| self.malformed("the backing file's format is not text"))?;
                    if format.replace(text.to_owned()).is_some() {
                        return Err(self.malformed("the backing file has two formats"));
                    }
                }
                FEATURE_NAMES if !len.is_multiple_of(FEATURE_NAME) => {
                    return Err(self.malformed("its table of feature names ends in an entry"));
                }
                _ => {}
            }
            // Each begins at a multiple of 8. It cannot overflow: the data is in the cluster.
            at += 8 + len.next_multiple_of(8);
        }
    }

    fn backing(
        &self,
        cluster: &[u8],
        format: Option<String>,
    ) -> Result<Option<Backing>, Qcow2Error> {
        let (offset, len) = (self.u64(8), self.u32(16) as usize);
        if offset == 0 {
            return Ok(None);
        }
        let name = usize::try_from(offset).ok().and_then(|offset| {
            let end = offset.checked_add(len).filter(|end| *end < cluster.len())?;
            cluster.get(offset..end)
        });
        let name = name.filter(|name| (1..=NAME_BYTES).contains(&name.len()) && !name.contains(&0));
        let name = name.and_then(|name| std::str::from_utf8(name).ok());
        match name {
            Some(name) => Ok(Some(Backing {
                name: name.to_owned(),
                format,
            })),
            None => Err(self.malformed("the backing file's name is not one")),
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    match bytes.get(at..at + 4) {
        Some([a, b, c, d]) => u32::from_be_bytes([*a, *b, *c, *d]),
        _ => 0,
    }
}

/// The two tables that the header has the places of must lie in the file, and the L1 table must be
/// as large as the disk takes.
fn check_tables(fields: &Fields<'_>, header: &Header, file_size: u64) -> Result<(), Qcow2Error> {
    let cluster_bits = header.cluster_bits;
    let l1_bytes = u64::from(fields.u32(L1_TABLE)) * 8;
    let tables = [
        ("L1 table", header.l1_table, l1_bytes),
        (
            "refcount table",
            header.refcount_table,
            header.refcount_table_bytes,
        ),
    ];
    for (name, offset, bytes) in tables {
        if bytes > TABLE_BYTES {
            return Err(fields.malformed(format!("its {name} is of {bytes} bytes")));
        }
        let aligned = offset.is_multiple_of(1 << cluster_bits);
        let inside = offset < file_size.min(OFFSET_LIMIT) && offset != 0;
        if bytes != 0 && (!aligned || !inside) {
            return Err(fields.malformed(format!("its {name} is at {offset:#x}")));
        }
    }
    if header.refcount_table_bytes == 0 {
        return Err(fields.malformed("it has no refcount table"));
    }
    // An entry stands for an L2 table, which is a cluster of entries of 8 bytes.
    let reach = u128::from(l1_bytes / 8) << (2 * cluster_bits - 3);
    if u128::from(header.size) > reach {
        return Err(fields.malformed(format!(
            "its L1 table is too small for a disk of {} bytes",
            header.size
        )));
    }
    Ok(())
}
