//! From the driver to the network.

use std::io;

use kiln_virtio_device::{QueueError, Turn};

use super::counters::add;
use super::device::{HEADER_BYTES, MAX_PACKET};
use super::shared::Shared;
use super::{NetBackend, NetCounters};

/// The Ethernet header, without which there is no frame.
const ETHERNET_BYTES: usize = 14;

/// Sends what the driver made available. A packet that cannot be sent at once waits in the queue
/// where the network says when there is room for it; else it is dropped, as on any wire. Waiting
/// here would let one guest's traffic hold up the thread's other devices. Where `may_go_on` says
/// no, the limit is reached, and what is left waits in the queue too.
pub(super) fn transmit(
    backend: &mut dyn NetBackend,
    shared: &Shared,
    turn: &mut Turn<'_>,
    mut may_go_on: impl FnMut() -> io::Result<bool>,
) -> Result<(), QueueError> {
    let counters = &shared.counters;
    while let Some(chain) = turn.pop()? {
        if !may_go_on()? {
            turn.put_back(chain);
            break;
        }
        let len = chain.readable.len();
        let fits = (HEADER_BYTES + ETHERNET_BYTES..=MAX_PACKET).contains(&len);
        let result = if fits {
            backend.send(chain.readable.slices())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        };
        if let Err(error) = &result
            && error.kind() == io::ErrorKind::WouldBlock
            && backend.send_readiness().is_some()
        {
            turn.put_back(chain);
            break;
        }
        match result {
            Ok(()) => {
                counters.sent(len);
                shared.rate_limits.tx.charge((len - HEADER_BYTES) as u64);
            }
            Err(_) => add(&counters.tx_dropped, 1),
        }
        turn.complete(chain, 0)?;
    }
    backend.flush();
    Ok(())
}

/// Drops what the driver made available: the link is down, or the driver does not use these queues.
pub(super) fn drop_all(counters: &NetCounters, turn: &mut Turn<'_>) -> Result<(), QueueError> {
    while let Some(chain) = turn.pop()? {
        add(&counters.tx_dropped, 1);
        turn.complete(chain, 0)?;
    }
    Ok(())
}
