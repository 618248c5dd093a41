//! From the driver to the network.

use std::sync::atomic::Ordering;

use kiln_virtio_device::{QueueError, Turn};

use super::NetBackend;
use super::device::{HEADER_BYTES, MAX_PACKET, NetCounters};

/// The Ethernet header, without which there is no frame.
const ETHERNET_BYTES: usize = 14;

/// Sends what the driver made available. A packet that cannot be sent at once is dropped, as on
/// any wire: waiting would let one guest's traffic hold up the thread's other devices.
pub(super) fn transmit(
    backend: &mut dyn NetBackend,
    counters: &NetCounters,
    turn: &mut Turn<'_>,
) -> Result<(), QueueError> {
    while let Some(chain) = turn.pop()? {
        let len = chain.readable.len();
        let fits = (HEADER_BYTES + ETHERNET_BYTES..=MAX_PACKET).contains(&len);
        if fits && backend.send(chain.readable.slices()).is_ok() {
            counters.tx_packets.fetch_add(1, Ordering::Relaxed);
            let bytes = (len - HEADER_BYTES) as u64;
            counters.tx_bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            counters.tx_dropped.fetch_add(1, Ordering::Relaxed);
        }
        turn.complete(chain, 0)?;
    }
    Ok(())
}
