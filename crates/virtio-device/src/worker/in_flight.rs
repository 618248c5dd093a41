//! Chains that stay with the device when the turn in which they were popped is over.
#![allow(unsafe_code)]

use std::fmt;
use std::mem::transmute;
use std::sync::Arc;

use kiln_memory::GuestMemory;

use super::Chain;

/// A chain whose buffers are read or written by something that goes on by itself, such as the
/// kernel, until a later [`Turn`](crate::Turn) completes it.
///
/// It keeps the guest's RAM. What is in flight when the work on its queue ends is to be completed
/// in [`QueueHandler::drain`](crate::QueueHandler::drain), or waited for in
/// [`QueueHandler::abandon`](crate::QueueHandler::abandon).
#[must_use = "a chain that is dropped never returns to the driver"]
pub struct InFlight {
    /// Not really for ever, but for as long as `_memory` is there, which is dropped later.
    chain: Chain<'static>,
    _memory: Arc<GuestMemory>,
}

// SAFETY: what keeps it from being sent are the pointers of its slices. Those are to guest RAM,
// which belongs to no thread, and is there for as long as `_memory`.
unsafe impl Send for InFlight {}

impl InFlight {
    /// Keeps a chain of this memory.
    pub(super) fn new<'m>(chain: Chain<'m>, memory: &'m Arc<GuestMemory>) -> Self {
        // SAFETY: only the lifetime changes. The slices of the chain point into the mappings of
        // `memory`, and to its bitmaps, which stay where they are for as long as there is an `Arc`
        // of it. One is kept beside the chain, which leaves here with it, or by a closure that
        // takes a chain of any lifetime and so cannot keep a part of it.
        let chain = unsafe { transmute::<Chain<'m>, Chain<'static>>(chain) };
        Self {
            chain,
            _memory: Arc::clone(memory),
        }
    }

    /// Lets `f` work on the chain.
    pub fn with<R>(&mut self, f: impl for<'m> FnOnce(&mut Chain<'m>) -> R) -> R {
        f(&mut self.chain)
    }

    /// What a turn needs to complete the chain.
    pub(super) fn into_done<'m>(self) -> Chain<'m> {
        self.chain.without_buffers()
    }
}

/// The room of chains that were completed, from one turn to the next.
#[derive(Debug, Default)]
pub(super) struct SpareChains(Vec<Chain<'static>>);

// SAFETY: these chains have no slice, and so no pointer that would keep them from being sent.
unsafe impl Send for SpareChains {}

impl SpareChains {
    /// Takes what is in the chains out, and keeps their room.
    pub(super) fn new<'m>(chains: impl Iterator<Item = Chain<'m>>) -> Self {
        Self(chains.map(Chain::without_buffers).collect())
    }

    pub(super) fn into_chains<'m>(self) -> Vec<Chain<'m>> {
        self.0.into_iter().map(Chain::without_buffers).collect()
    }
}

impl fmt::Debug for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("InFlight").field(&self.chain).finish()
    }
}
