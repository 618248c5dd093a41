//! Counters of exits, one set a vCPU.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// How often a vCPU came out of the guest, by kind, since it was started. Reading them stops
/// nothing; counts of different kinds may be a few exits apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ExitCounts {
    /// Port reads; a `rep ins` counts once for each exit, not for each element.
    pub pio_in: u64,
    /// Port writes, counted in the same way.
    pub pio_out: u64,
    /// Reads of MMIO.
    pub mmio_read: u64,
    /// Writes of MMIO.
    pub mmio_write: u64,
    /// Ends of level-triggered interrupts.
    pub end_of_interrupt: u64,
    /// Interruptions by a kick or by another signal.
    pub interrupted: u64,
    /// Everything else.
    pub other: u64,
}

impl ExitCounts {
    /// The counts, each with the name of its kind, which is that of the field.
    pub fn by_kind(&self) -> [(&'static str, u64); 7] {
        [
            ("pio_in", self.pio_in),
            ("pio_out", self.pio_out),
            ("mmio_read", self.mmio_read),
            ("mmio_write", self.mmio_write),
            ("end_of_interrupt", self.end_of_interrupt),
            ("interrupted", self.interrupted),
            ("other", self.other),
        ]
    }

    /// The sum of all kinds.
    pub fn total(&self) -> u64 {
        self.by_kind().iter().map(|(_, count)| count).sum()
    }
}

/// The kinds, in the order of [`Counters`].
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    PioIn,
    PioOut,
    MmioRead,
    MmioWrite,
    EndOfInterrupt,
    Interrupted,
    Other,
}

/// One vCPU's counters, alone in their cache lines (two of 64 bytes, as processors fetch pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Counters([AtomicU64; 7]);

impl Counters {
    /// Counts one; called by the vCPU's own thread alone, so no locked instruction is needed.
    pub(crate) fn count(&self, kind: Kind) {
        let counter = &self.0[kind as usize];
        counter.store(
            counter.load(Ordering::Relaxed).wrapping_add(1),
            Ordering::Relaxed,
        );
    }

    pub(crate) fn read(&self) -> ExitCounts {
        let get = |kind: Kind| self.0[kind as usize].load(Ordering::Relaxed);
        ExitCounts {
            pio_in: get(Kind::PioIn),
            pio_out: get(Kind::PioOut),
            mmio_read: get(Kind::MmioRead),
            mmio_write: get(Kind::MmioWrite),
            end_of_interrupt: get(Kind::EndOfInterrupt),
            interrupted: get(Kind::Interrupted),
            other: get(Kind::Other),
        }
    }
}
