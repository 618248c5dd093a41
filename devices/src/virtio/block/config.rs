//! The configuration that a driver sees (virtio 1.3, section 5.2.4).

use super::{BlockProperties, SECTOR_SIZE};

/// The most bytes that a driver may put into one segment.
pub(super) const SEGMENT_BYTES: u32 = 1 << 20;
/// The most bytes of zeros that one range of a request may ask for: they may have to be written.
pub(super) const MAX_ZEROES: u32 = 64 << 20;
/// The most bytes that one range of a request may discard.
pub(super) const MAX_DISCARD: u64 = 4 << 30;
/// The most ranges of a request to discard or to write zeros.
pub(super) const MAX_RANGES: usize = 16;

/// Where the driver writes whether writes may be lost until they are flushed.
pub(super) const WRITEBACK: usize = 32;

/// What of the configuration stays as it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Config {
    pub(super) properties: BlockProperties,
    pub(super) segments: u32,
    pub(super) queues: u16,
}

impl Config {
    /// Up to and with the fields of write zeroes.
    pub(super) const BYTES: usize = 60;

    /// The configuration, in little endian.
    pub(super) fn bytes(&self, sectors: u64, writeback: bool) -> [u8; Self::BYTES] {
        let properties = &self.properties;
        let block = properties.logical_block_size.max(SECTOR_SIZE as u32);
        let physical = properties.physical_block_size / block;
        let mut config = [0; Self::BYTES];
        let mut put = |at: usize, bytes: &[u8]| {
            for (to, from) in config.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        };
        put(0, &sectors.to_le_bytes());
        put(8, &SEGMENT_BYTES.to_le_bytes());
        put(12, &self.segments.to_le_bytes());
        // 16 to 20 is the geometry, which is not offered.
        put(20, &block.to_le_bytes());
        // The topology: the physical block as a power of two of blocks, the offset of the first
        // one, and the least and the best request in blocks.
        put(24, &[physical.checked_ilog2().unwrap_or(0) as u8, 0]);
        put(26, &u16::try_from(physical).unwrap_or(1).to_le_bytes());
        put(28, &(properties.optimal_io_size / block).to_le_bytes());
        put(WRITEBACK, &[u8::from(writeback)]);
        put(34, &self.queues.to_le_bytes());
        let sectors_of = |bytes: u64| ((bytes / SECTOR_SIZE) as u32).to_le_bytes();
        if properties.discard {
            put(36, &sectors_of(MAX_DISCARD));
            put(40, &(MAX_RANGES as u32).to_le_bytes());
            let alignment = properties.discard_alignment.max(block);
            put(44, &sectors_of(u64::from(alignment)));
        }
        if properties.write_zeroes {
            put(48, &sectors_of(u64::from(MAX_ZEROES)));
            put(52, &(MAX_RANGES as u32).to_le_bytes());
            put(56, &[1]);
        }
        config
    }
}
