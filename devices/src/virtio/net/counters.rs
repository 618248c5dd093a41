//! What a device counts.

use std::sync::atomic::{AtomicU64, Ordering};

use super::device::HEADER_BYTES;

/// What a network device has done since it was made. Bytes are those of frames.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// Packets given to the driver.
    pub rx_packets: AtomicU64,
    /// The bytes of these.
    pub rx_bytes: AtomicU64,
    /// Packets that were too large or too small for the driver.
    pub rx_dropped: AtomicU64,
    /// Packets that the driver does not want: its filters are against them, or the link is down.
    pub rx_filtered: AtomicU64,
    /// Errors of the network, and buffers of the driver of no use.
    pub rx_errors: AtomicU64,
    /// Packets that the network took.
    pub tx_packets: AtomicU64,
    /// The bytes of these.
    pub tx_bytes: AtomicU64,
    /// Packets that the network did not take.
    pub tx_dropped: AtomicU64,
    /// How often receiving had to wait for a limit.
    pub rx_throttled: AtomicU64,
    /// How often a packet to be sent had to.
    pub tx_throttled: AtomicU64,
}

impl NetCounters {
    /// Counts a packet of `len` bytes, its header included, that the driver was given.
    pub(super) fn received(&self, len: usize) {
        add(&self.rx_packets, 1);
        add(&self.rx_bytes, len.saturating_sub(HEADER_BYTES) as u64);
    }

    /// Counts a packet of `len` bytes, its header included, that the network took.
    pub(super) fn sent(&self, len: usize) {
        add(&self.tx_packets, 1);
        add(&self.tx_bytes, len.saturating_sub(HEADER_BYTES) as u64);
    }
}

/// Several pairs of queues count at the same time.
pub(super) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
