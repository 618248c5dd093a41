//! How much may come and go in a time.

use std::sync::Arc;

use crate::rate_limit::{RateLimiter, RateLimits};

/// How much a network interface carries in a time: by default, any amount. The bytes are those of
/// frames, the operations are packets, of which one may be as large as 64 KiB where the driver and
/// the network leave the cutting of segments to each other.
///
/// A packet goes on as soon as there is anything of what the limits give, and what it takes too
/// much is paid before the next one goes on. Packets that have to wait stay where they are: in the
/// driver's queue, and in the network's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetRateLimits {
    /// What the driver receives.
    pub rx: RateLimits,
    /// What the driver sends.
    pub tx: RateLimits,
}

/// The limits of an interface, which its queues share.
#[derive(Debug)]
pub(super) struct Limiters {
    pub(super) rx: Arc<RateLimiter>,
    pub(super) tx: Arc<RateLimiter>,
}

impl Limiters {
    pub(super) fn new(limits: NetRateLimits) -> Self {
        Self {
            rx: Arc::new(RateLimiter::new(limits.rx)),
            tx: Arc::new(RateLimiter::new(limits.tx)),
        }
    }

    pub(super) fn get(&self) -> NetRateLimits {
        NetRateLimits {
            rx: self.rx.limits(),
            tx: self.tx.limits(),
        }
    }

    pub(super) fn set(&self, limits: NetRateLimits) {
        self.rx.set_limits(limits.rx);
        self.tx.set_limits(limits.tx);
    }
}
