//! What the driver asks for (virtio 1.3, section 5.2.6).

use kiln_virtio_device::GuestBuffers;
use virtio_bindings::virtio_blk as raw;

use super::SECTOR_SIZE;
use super::config::{Config, MAX_DISCARD, MAX_RANGES, MAX_ZEROES, SEGMENT_BYTES};
use super::device::SEGMENTS;

/// The length of the identification string (virtio 1.3, section 5.2.6).
pub(super) const ID_BYTES: usize = raw::VIRTIO_BLK_ID_BYTES as usize;
/// The most bytes of data that a request may have: one that follows the limits has no more.
const REQUEST_BYTES: usize = SEGMENTS as usize * SEGMENT_BYTES as usize;
/// The length of a range of a request to discard or to write zeros.
const RANGE_BYTES: usize = 16;

pub(super) const OK: u8 = raw::VIRTIO_BLK_S_OK as u8;
pub(super) const IO_ERROR: u8 = raw::VIRTIO_BLK_S_IOERR as u8;
pub(super) const UNSUPPORTED: u8 = raw::VIRTIO_BLK_S_UNSUPP as u8;

/// A request that can be tried. Offsets and lengths are in bytes, and within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Fill all of the data.
    Read {
        offset: u64,
    },
    /// Write all of the data.
    Write {
        offset: u64,
    },
    Flush,
    GetId,
    Discard(Ranges),
    WriteZeroes(Ranges),
}

/// A part of the disk to discard, or to be zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) unmap: bool,
}

/// The ranges of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ranges {
    all: [Range; MAX_RANGES],
    count: usize,
}

impl Ranges {
    /// Those that are not empty.
    pub(super) fn iter(&self) -> impl Iterator<Item = Range> + '_ {
        let ranges = self.all.iter().take(self.count);
        ranges.copied().filter(|range| range.len > 0)
    }

    /// The bytes of all of them.
    pub(super) fn bytes(&self) -> u64 {
        self.iter()
            .fold(0, |sum, range| sum.saturating_add(range.len))
    }
}

/// Reads a request from its header, and its ranges; the data of others stays where it is.
///
/// # Errors
///
/// The status to answer with.
pub(super) fn parse(
    readable: &mut GuestBuffers<'_>,
    writable: &GuestBuffers<'_>,
    disk: &Disk<'_>,
) -> Result<Request, u8> {
    // The header: type, a reserved word, sector.
    let mut header = [0; 16];
    readable.read(&mut header).map_err(|_| IO_ERROR)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        raw::VIRTIO_BLK_T_IN => Ok(Request::Read {
            offset: disk.data(sector, writable.len())?,
        }),
        raw::VIRTIO_BLK_T_OUT if disk.read_only => Err(IO_ERROR),
        raw::VIRTIO_BLK_T_OUT => Ok(Request::Write {
            offset: disk.data(sector, readable.len())?,
        }),
        raw::VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        raw::VIRTIO_BLK_T_GET_ID if writable.len() < ID_BYTES => Err(IO_ERROR),
        raw::VIRTIO_BLK_T_GET_ID => Ok(Request::GetId),
        raw::VIRTIO_BLK_T_DISCARD if disk.limits.properties.discard => {
            Ok(Request::Discard(disk.ranges(readable, false)?))
        }
        raw::VIRTIO_BLK_T_WRITE_ZEROES if disk.limits.properties.write_zeroes => {
            Ok(Request::WriteZeroes(disk.ranges(readable, true)?))
        }
        _ => Err(UNSUPPORTED),
    }
}

/// What requests are judged by.
pub(super) struct Disk<'a> {
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    pub(super) limits: &'a Config,
}

impl Disk<'_> {
    /// Where in bytes a request for `len` bytes begins, if it is one of whole sectors that the
    /// disk has.
    fn data(&self, sector: u64, len: usize) -> Result<u64, u8> {
        let whole = len != 0 && (len as u64).is_multiple_of(SECTOR_SIZE);
        if !whole || len > REQUEST_BYTES {
            return Err(IO_ERROR);
        }
        self.range(sector, len as u64 / SECTOR_SIZE)
    }

    /// Where in bytes a part of the disk begins, if it is one.
    fn range(&self, sector: u64, sectors: u64) -> Result<u64, u8> {
        let end = sector.checked_add(sectors).ok_or(IO_ERROR)?;
        if end > self.sectors {
            return Err(IO_ERROR);
        }
        sector.checked_mul(SECTOR_SIZE).ok_or(IO_ERROR)
    }

    /// The ranges in the data of a request, judged before anything is done with one of them.
    fn ranges(&self, data: &mut GuestBuffers<'_>, zeroes: bool) -> Result<Ranges, u8> {
        let count = data.len() / RANGE_BYTES;
        let whole = count > 0 && data.len().is_multiple_of(RANGE_BYTES);
        if !whole || count > MAX_RANGES {
            return Err(IO_ERROR);
        }
        let mut ranges = Ranges {
            all: [Range::default(); MAX_RANGES],
            count,
        };
        for range in ranges.all.iter_mut().take(count) {
            *range = self.next_range(data, zeroes)?;
        }
        Ok(ranges)
    }

    /// One range: sector, sectors, flags, of which the first is to unmap.
    fn next_range(&self, data: &mut GuestBuffers<'_>, zeroes: bool) -> Result<Range, u8> {
        let mut bytes = [0; RANGE_BYTES];
        data.read(&mut bytes).map_err(|_| IO_ERROR)?;
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u64::from(u32::from_le_bytes([n0, n1, n2, n3]));
        let flags = u32::from_le_bytes(flags);
        let known = if zeroes {
            raw::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
        } else {
            0
        };
        if flags & !known != 0 {
            return Err(UNSUPPORTED);
        }
        let most = if zeroes {
            u64::from(MAX_ZEROES)
        } else {
            MAX_DISCARD
        };
        let len = sectors * SECTOR_SIZE;
        if len > most {
            return Err(IO_ERROR);
        }
        Ok(Range {
            offset: self.range(sector, sectors)?,
            len,
            unmap: flags != 0,
        })
    }
}
