//! What a disk has done.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::virtio::LatencyHistogram;

/// What a block device has done since it was made.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Reads that succeeded.
    pub reads: AtomicU64,
    /// The bytes that they read.
    pub read_bytes: AtomicU64,
    /// Writes that succeeded.
    pub writes: AtomicU64,
    /// The bytes that they wrote.
    pub write_bytes: AtomicU64,
    /// Flushes that succeeded.
    pub flushes: AtomicU64,
    /// Requests to discard that succeeded.
    pub discards: AtomicU64,
    /// The bytes that they discarded.
    pub discard_bytes: AtomicU64,
    /// Requests to write zeros that succeeded.
    pub write_zeroes: AtomicU64,
    /// The bytes that they wrote.
    pub write_zeroes_bytes: AtomicU64,
    /// Requests for the disk's identification that succeeded.
    pub ids: AtomicU64,
    /// Requests that failed, for whatever reason.
    pub errors: AtomicU64,
    /// Reads that had to wait for a limit.
    pub reads_throttled: AtomicU64,
    /// The same for writes, and for all other requests.
    pub writes_throttled: AtomicU64,
    /// How long the backend took for each read that it was asked for, whether or not it succeeded.
    pub read_latency: LatencyHistogram,
    /// The same for writes.
    pub write_latency: LatencyHistogram,
    /// The same for flushes, those included that writes need where they have to last at once.
    pub flush_latency: LatencyHistogram,
    /// The same for requests to discard, all ranges of a request together.
    pub discard_latency: LatencyHistogram,
    /// The same for requests to write zeros.
    pub write_zeroes_latency: LatencyHistogram,
}

/// Queues may count at the same time.
pub(super) fn count(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
