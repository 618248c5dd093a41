//! The control queue (virtio 1.3, section 5.1.6.5): the driver's commands.

use std::io;
use std::sync::Arc;

use kiln_virtio_device::{GuestBuffers, QueueError, ShortBuffer, Turn};
use virtio_bindings::virtio_net as raw;
use vmm_sys_util::eventfd::EventFd;

use super::features::{self, CTRL_GUEST_OFFLOADS, CTRL_MAC_ADDR, CTRL_RX, CTRL_RX_EXTRA};
use super::features::{CTRL_VLAN, GUEST_ANNOUNCE, GUEST_OFFLOADS, MQ};
use super::filter::{ReceiveFilter, TABLE_LIMIT, VLAN_LIMIT};
use super::shared::{NetState, Shared};
use super::{MacAddress, NetBackend};

const OK: u8 = raw::VIRTIO_NET_OK as u8;
const ERR: u8 = raw::VIRTIO_NET_ERR as u8;

const RX: u8 = raw::VIRTIO_NET_CTRL_RX as u8;
const RX_PROMISC: u8 = raw::VIRTIO_NET_CTRL_RX_PROMISC as u8;
const RX_ALLMULTI: u8 = raw::VIRTIO_NET_CTRL_RX_ALLMULTI as u8;
const RX_ALLUNI: u8 = raw::VIRTIO_NET_CTRL_RX_ALLUNI as u8;
const RX_NOMULTI: u8 = raw::VIRTIO_NET_CTRL_RX_NOMULTI as u8;
const RX_NOUNI: u8 = raw::VIRTIO_NET_CTRL_RX_NOUNI as u8;
const RX_NOBCAST: u8 = raw::VIRTIO_NET_CTRL_RX_NOBCAST as u8;
const MAC: u8 = raw::VIRTIO_NET_CTRL_MAC as u8;
const MAC_TABLE_SET: u8 = raw::VIRTIO_NET_CTRL_MAC_TABLE_SET as u8;
const MAC_ADDR_SET: u8 = raw::VIRTIO_NET_CTRL_MAC_ADDR_SET as u8;
const VLAN: u8 = raw::VIRTIO_NET_CTRL_VLAN as u8;
const VLAN_ADD: u8 = raw::VIRTIO_NET_CTRL_VLAN_ADD as u8;
const VLAN_DEL: u8 = raw::VIRTIO_NET_CTRL_VLAN_DEL as u8;
const ANNOUNCE: u8 = raw::VIRTIO_NET_CTRL_ANNOUNCE as u8;
const ANNOUNCE_ACK: u8 = raw::VIRTIO_NET_CTRL_ANNOUNCE_ACK as u8;
const PAIRS: u8 = raw::VIRTIO_NET_CTRL_MQ as u8;
const PAIRS_SET: u8 = raw::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8;
const OFFLOADS: u8 = raw::VIRTIO_NET_CTRL_GUEST_OFFLOADS as u8;
const OFFLOADS_SET: u8 = raw::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET as u8;

/// Why a command was not followed; the driver learns only that it was not.
#[derive(Debug, thiserror::Error)]
enum Refused {
    /// It is shorter than such a command is.
    #[error("read a command")]
    Short(#[from] ShortBuffer),
    /// There is no such command, or driver and device have not agreed on it.
    #[error("find the command")]
    Unknown,
    /// What it is to set cannot be so.
    #[error("set a value that cannot be")]
    Value,
    /// The network does not do it.
    #[error("have the network follow a command")]
    Network(#[from] io::Error),
}

/// Who follows the commands: the thread of the first pair of queues.
#[derive(Default)]
pub(super) struct Commands {
    /// The index of the control queue, in the numbering that the driver agreed on.
    pub(super) queue: u16,
    /// How many pairs of queues there are.
    pub(super) pairs: u16,
    /// To be written to where the pairs have to see a change.
    pub(super) wakes: Vec<Arc<EventFd>>,
}

impl Commands {
    /// Follows the driver's commands, until there are no more.
    pub(super) fn process(
        &self,
        shared: &Shared,
        features: u64,
        backend: &mut dyn NetBackend,
        turn: &mut Turn<'_>,
    ) -> Result<(), QueueError> {
        while let Some(mut chain) = turn.pop()? {
            let command = &mut chain.readable;
            let answer = match self.follow(command, shared, features, backend) {
                Ok(()) => OK,
                Err(_) => ERR,
            };
            let written = chain.writable.write(&[answer]).is_ok();
            turn.complete(chain, u32::from(written))?;
        }
        Ok(())
    }

    fn follow(
        &self,
        command: &mut GuestBuffers<'_>,
        shared: &Shared,
        features: u64,
        backend: &mut dyn NetBackend,
    ) -> Result<(), Refused> {
        let mut head = [0; 2];
        command.read(&mut head)?;
        let has = |bit: u64| features & bit != 0;
        match head {
            [RX, which] if has(CTRL_RX) || has(CTRL_RX_EXTRA) => {
                let on = read::<1>(command)?[0] != 0;
                shared.change(|state| set_mode(&mut state.filter, which, on, features))
            }
            [MAC, MAC_TABLE_SET] if has(CTRL_RX) => {
                let unicast = read_table(command)?;
                let multicast = read_table(command)?;
                shared.change(|state| {
                    state.filter.unicast = unicast;
                    state.filter.multicast = multicast;
                });
                Ok(())
            }
            [MAC, MAC_ADDR_SET] if has(CTRL_MAC_ADDR) => {
                let mac = MacAddress::new(read(command)?);
                if !mac.is_unicast() {
                    return Err(Refused::Value);
                }
                shared.change(|state| state.mac = mac);
                Ok(())
            }
            [VLAN, which @ (VLAN_ADD | VLAN_DEL)] if has(CTRL_VLAN) => {
                let vlan = u16::from_le_bytes(read(command)?);
                if vlan >= VLAN_LIMIT {
                    return Err(Refused::Value);
                }
                shared.change(|state| match which {
                    VLAN_ADD => state.filter.add_vlan(vlan),
                    _ => state.filter.remove_vlan(vlan),
                });
                Ok(())
            }
            [ANNOUNCE, ANNOUNCE_ACK] if has(GUEST_ANNOUNCE) => {
                shared.announced();
                Ok(())
            }
            [PAIRS, PAIRS_SET] if has(MQ) => {
                let pairs = u16::from_le_bytes(read(command)?);
                if !(1..=self.pairs).contains(&pairs) {
                    return Err(Refused::Value);
                }
                self.change_pairs(shared, |state| state.queue_pairs = pairs);
                Ok(())
            }
            [OFFLOADS, OFFLOADS_SET] if has(CTRL_GUEST_OFFLOADS) => {
                let wanted = u64::from_le_bytes(read(command)?);
                if wanted & !(features & GUEST_OFFLOADS) != 0 || !features::are_complete(wanted) {
                    return Err(Refused::Value);
                }
                backend.set_offloads(features::guest_offloads(wanted))?;
                self.change_pairs(shared, |state| state.offloads = Some(wanted));
                Ok(())
            }
            _ => Err(Refused::Unknown),
        }
    }

    /// Changes what pairs have to see also while they have no packets.
    fn change_pairs(&self, shared: &Shared, change: impl FnOnce(&mut NetState)) {
        shared.change(change);
        for wake in &self.wakes {
            // It fails only where the counter is full, and then it is woken anyway.
            let _ = wake.write(1);
        }
    }
}

fn set_mode(filter: &mut ReceiveFilter, which: u8, on: bool, features: u64) -> Result<(), Refused> {
    let (mode, needed) = match which {
        RX_PROMISC => (&mut filter.promiscuous, CTRL_RX),
        RX_ALLMULTI => (&mut filter.all_multicast, CTRL_RX),
        RX_ALLUNI => (&mut filter.all_unicast, CTRL_RX_EXTRA),
        RX_NOMULTI => (&mut filter.no_multicast, CTRL_RX_EXTRA),
        RX_NOUNI => (&mut filter.no_unicast, CTRL_RX_EXTRA),
        RX_NOBCAST => (&mut filter.no_broadcast, CTRL_RX_EXTRA),
        _ => return Err(Refused::Unknown),
    };
    if features & needed == 0 {
        return Err(Refused::Unknown);
    }
    *mode = on;
    Ok(())
}

fn read<const N: usize>(command: &mut GuestBuffers<'_>) -> Result<[u8; N], ShortBuffer> {
    let mut bytes = [0; N];
    command.read(&mut bytes)?;
    Ok(bytes)
}

/// Reads a table of addresses; one that is too large is as good as all addresses.
fn read_table(command: &mut GuestBuffers<'_>) -> Result<Option<Vec<MacAddress>>, Refused> {
    let count = u32::from_le_bytes(read(command)?) as usize;
    if count > TABLE_LIMIT {
        let bytes = count.checked_mul(6).ok_or(Refused::Value)?;
        command.skip(bytes)?;
        return Ok(None);
    }
    let mut table = Vec::with_capacity(count);
    for _ in 0..count {
        table.push(MacAddress::new(read(command)?));
    }
    Ok(Some(table))
}
