//! How much a driver may ask of a disk in a time.

use std::io;
use std::sync::Arc;

use kiln_io_thread::Registrar;

use super::{BlockCounters, BlockError};
use crate::rate_limit::{RateLimiter, RateLimits, Throttle};

/// How much a driver may ask of a disk in a time: by default, any amount.
///
/// A read has as many bytes as it reads, a write as many as it writes; flushes, discards and the
/// like have none. Each is an operation; all that are not reads count as writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockRateLimits {
    /// Reads and writes together; there are none for each by itself then.
    pub total: RateLimits,
    /// Reads.
    pub read: RateLimits,
    /// Writes.
    pub write: RateLimits,
}

impl BlockRateLimits {
    /// Refuses limits that cannot be together.
    pub(super) fn check(&self) -> Result<(), BlockError> {
        let by_direction = !self.read.is_empty() || !self.write.is_empty();
        if by_direction && !self.total.is_empty() {
            return Err(BlockError::RateLimits);
        }
        Ok(())
    }
}

/// The limits of a disk, which its queues share.
#[derive(Debug)]
pub(super) struct Limiters {
    total: Arc<RateLimiter>,
    read: Arc<RateLimiter>,
    write: Arc<RateLimiter>,
}

impl Limiters {
    pub(super) fn new(limits: BlockRateLimits) -> Self {
        let limiter = |limits| Arc::new(RateLimiter::new(limits));
        Self {
            total: limiter(limits.total),
            read: limiter(limits.read),
            write: limiter(limits.write),
        }
    }

    pub(super) fn get(&self) -> BlockRateLimits {
        BlockRateLimits {
            total: self.total.limits(),
            read: self.read.limits(),
            write: self.write.limits(),
        }
    }

    pub(super) fn set(&self, limits: BlockRateLimits) {
        self.read.set_limits(limits.read);
        self.write.set_limits(limits.write);
        // Last: whoever waits there asks again, by the other two where this one is none.
        self.total.set_limits(limits.total);
    }

    /// Whether a request may go on that reads, or else writes, so many bytes; if not, the throttle's
    /// timer says when to ask again.
    pub(super) fn may(
        &self,
        is_read: bool,
        bytes: u64,
        counters: &BlockCounters,
        throttle: &mut Throttle,
        registrar: &mut Registrar<'_, '_>,
    ) -> io::Result<bool> {
        let (direction, throttled) = if is_read {
            (&self.read, &counters.reads_throttled)
        } else {
            (&self.write, &counters.writes_throttled)
        };
        let limiter = if self.total.is_limited() {
            &self.total
        } else {
            direction
        };
        throttle.may(bytes, limiter, throttled, registrar)
    }
}
