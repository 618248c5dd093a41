//! What the driver asks for, and the answers (virtio 1.3, section 5.2.6).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_io_thread::Registrar;
use kiln_virtio_device::{Chain, GuestBuffers, QueueError, QueueHandler, Turn};
use tracing::Span;
use virtio_bindings::virtio_blk as raw;

use super::{BlockBackend, SECTOR_SIZE};
use crate::virtio::LatencyHistogram;

/// The length of the identification string (virtio 1.3, section 5.2.6).
pub(super) const ID_BYTES: usize = raw::VIRTIO_BLK_ID_BYTES as usize;
/// The most bytes that a driver may put into one segment.
pub(super) const SEGMENT_BYTES: u32 = 1 << 20;
/// The most bytes of data that a request may have: one that follows the limits has no more.
const REQUEST_BYTES: usize = super::device::SEGMENTS as usize * SEGMENT_BYTES as usize;

const OK: u8 = raw::VIRTIO_BLK_S_OK as u8;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

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
    /// Requests for the disk's identification that succeeded.
    pub ids: AtomicU64,
    /// Requests that failed, for whatever reason.
    pub errors: AtomicU64,
    /// How long the backend took for each read that it was asked for, whether or not it succeeded.
    pub read_latency: LatencyHistogram,
    /// The same for writes.
    pub write_latency: LatencyHistogram,
    /// The same for flushes, those included that writes need where the driver does not flush.
    pub flush_latency: LatencyHistogram,
}

/// What lives on the I/O thread: the disk.
pub(super) struct BlockHandler {
    pub(super) backend: Box<dyn BlockBackend>,
    pub(super) id: [u8; ID_BYTES],
    pub(super) counters: Arc<BlockCounters>,
    /// The driver does not flush, so every write has to last (virtio 1.3, section 5.2.6.2).
    write_through: bool,
    told: bool,
    /// The device's span, for the one message.
    span: Span,
}

/// The answer to a request: how many bytes of data were written to the guest, or what status to
/// report.
type Answer = Result<usize, u8>;

impl BlockHandler {
    pub(super) fn new(backend: Box<dyn BlockBackend>, id: [u8; ID_BYTES]) -> Self {
        let counters = Arc::default();
        Self {
            backend,
            id,
            counters,
            write_through: false,
            told: false,
            span: Span::none(),
        }
    }

    /// Serves a request; gives the number of bytes that were written to the chain.
    fn serve(&mut self, chain: &mut Chain<'_>) -> u32 {
        // The status is the last writable byte, wherever it lies.
        let data = chain.writable.len().checked_sub(1);
        let Some(Ok(mut status)) = data.map(|data| chain.writable.split_off(data)) else {
            // There is no place even for an answer.
            self.counters.errors.fetch_add(1, Ordering::Relaxed);
            return 0;
        };
        let answer = self.answer(&mut chain.readable, &mut chain.writable);
        let (code, written) = match answer {
            Ok(written) => (OK, written),
            Err(code) => {
                self.counters.errors.fetch_add(1, Ordering::Relaxed);
                (code, 0)
            }
        };
        // It has the one byte.
        let _ = status.write(&[code]);
        u32::try_from(written + 1).unwrap_or(u32::MAX)
    }

    fn answer(&mut self, readable: &mut GuestBuffers<'_>, data: &mut GuestBuffers<'_>) -> Answer {
        // The header: type, a reserved word, sector.
        let mut header = [0; 16];
        readable.read(&mut header).map_err(|_| IO_ERROR)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            raw::VIRTIO_BLK_T_IN => self.read(sector, data),
            raw::VIRTIO_BLK_T_OUT => self.write(sector, readable),
            raw::VIRTIO_BLK_T_FLUSH => self.flush(),
            raw::VIRTIO_BLK_T_GET_ID => {
                data.write(&self.id).map_err(|_| IO_ERROR)?;
                self.counters.ids.fetch_add(1, Ordering::Relaxed);
                Ok(ID_BYTES)
            }
            _ => Err(UNSUPPORTED),
        }
    }

    fn read(&mut self, sector: u64, data: &GuestBuffers<'_>) -> Answer {
        let offset = self.check(sector, data.len())?;
        let latency = &self.counters.read_latency;
        let result = latency.time(|| self.backend.read_at(offset, data.slices()));
        self.check_io("read from", result)?;
        self.counters.reads.fetch_add(1, Ordering::Relaxed);
        self.counters
            .read_bytes
            .fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(data.len())
    }

    fn write(&mut self, sector: u64, data: &GuestBuffers<'_>) -> Answer {
        if self.backend.is_read_only() {
            return Err(IO_ERROR);
        }
        let offset = self.check(sector, data.len())?;
        let latency = &self.counters.write_latency;
        let result = latency.time(|| self.backend.write_at(offset, data.slices()));
        self.check_io("write to", result)?;
        if self.write_through {
            self.flush_backend()?;
        }
        self.counters.writes.fetch_add(1, Ordering::Relaxed);
        self.counters
            .write_bytes
            .fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(0)
    }

    fn flush(&mut self) -> Answer {
        if !self.backend.is_read_only() {
            self.flush_backend()?;
        }
        self.counters.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(0)
    }

    fn flush_backend(&mut self) -> Result<(), u8> {
        let latency = &self.counters.flush_latency;
        let result = latency.time(|| self.backend.flush());
        self.check_io("flush", result)
    }

    /// Where in bytes a request for `len` bytes begins, if it is one of whole sectors that the
    /// disk has.
    fn check(&self, sector: u64, len: usize) -> Result<u64, u8> {
        let offset = sector.checked_mul(SECTOR_SIZE).ok_or(IO_ERROR)?;
        let end = offset.checked_add(len as u64).ok_or(IO_ERROR)?;
        let whole = len != 0 && (len as u64).is_multiple_of(SECTOR_SIZE);
        if !whole || len > REQUEST_BYTES || end > self.backend.size() {
            return Err(IO_ERROR);
        }
        Ok(offset)
    }

    fn check_io(&mut self, what: &str, result: io::Result<()>) -> Result<(), u8> {
        result.map_err(|error| {
            if !std::mem::replace(&mut self.told, true) {
                self.span
                    .in_scope(|| tracing::warn!("{what} a disk (told once): {error}"));
            }
            IO_ERROR
        })
    }
}

impl QueueHandler for BlockHandler {
    fn start(&mut self, features: u64, _registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        self.span = Span::current();
        self.write_through = features & (1 << raw::VIRTIO_BLK_F_FLUSH) == 0;
        Ok(())
    }

    fn process(
        &mut self,
        turn: &mut Turn<'_>,
        _registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        while let Some(mut chain) = turn.pop()? {
            let written = self.serve(&mut chain);
            turn.complete(chain, written)?;
        }
        Ok(())
    }
}
