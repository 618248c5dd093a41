//! Feature bits (virtio 1.3, section 5.1.3), and how they depend on each other.

use virtio_bindings::virtio_net as raw;

use super::Offloads;

pub(super) const CSUM: u64 = 1 << raw::VIRTIO_NET_F_CSUM;
pub(super) const GUEST_CSUM: u64 = 1 << raw::VIRTIO_NET_F_GUEST_CSUM;
pub(super) const MTU: u64 = 1 << raw::VIRTIO_NET_F_MTU;
pub(super) const MAC: u64 = 1 << raw::VIRTIO_NET_F_MAC;
pub(super) const MRG_RXBUF: u64 = 1 << raw::VIRTIO_NET_F_MRG_RXBUF;
pub(super) const STATUS: u64 = 1 << raw::VIRTIO_NET_F_STATUS;

pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << raw::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
pub(super) const CTRL_VQ: u64 = 1 << raw::VIRTIO_NET_F_CTRL_VQ;
pub(super) const CTRL_RX: u64 = 1 << raw::VIRTIO_NET_F_CTRL_RX;
pub(super) const CTRL_VLAN: u64 = 1 << raw::VIRTIO_NET_F_CTRL_VLAN;
pub(super) const CTRL_RX_EXTRA: u64 = 1 << raw::VIRTIO_NET_F_CTRL_RX_EXTRA;
pub(super) const GUEST_ANNOUNCE: u64 = 1 << raw::VIRTIO_NET_F_GUEST_ANNOUNCE;
pub(super) const MQ: u64 = 1 << raw::VIRTIO_NET_F_MQ;
pub(super) const CTRL_MAC_ADDR: u64 = 1 << raw::VIRTIO_NET_F_CTRL_MAC_ADDR;

/// What every device offers that has to do with its control queue.
pub(super) const CONTROL: u64 = CTRL_VQ
    | CTRL_GUEST_OFFLOADS
    | CTRL_RX
    | CTRL_VLAN
    | CTRL_RX_EXTRA
    | GUEST_ANNOUNCE
    | CTRL_MAC_ADDR;

/// What takes a look at each packet.
pub(super) const FILTERS: u64 = CTRL_RX | CTRL_VLAN | CTRL_RX_EXTRA;

const GUEST_TSO4: u64 = 1 << raw::VIRTIO_NET_F_GUEST_TSO4;
const GUEST_TSO6: u64 = 1 << raw::VIRTIO_NET_F_GUEST_TSO6;
const GUEST_ECN: u64 = 1 << raw::VIRTIO_NET_F_GUEST_ECN;
const GUEST_UFO: u64 = 1 << raw::VIRTIO_NET_F_GUEST_UFO;
const GUEST_USO4: u64 = 1 << raw::VIRTIO_NET_F_GUEST_USO4;
const GUEST_USO6: u64 = 1 << raw::VIRTIO_NET_F_GUEST_USO6;
const HOST_TSO4: u64 = 1 << raw::VIRTIO_NET_F_HOST_TSO4;
const HOST_TSO6: u64 = 1 << raw::VIRTIO_NET_F_HOST_TSO6;
const HOST_ECN: u64 = 1 << raw::VIRTIO_NET_F_HOST_ECN;
const HOST_UFO: u64 = 1 << raw::VIRTIO_NET_F_HOST_UFO;
const HOST_USO: u64 = 1 << raw::VIRTIO_NET_F_HOST_USO;

/// With any of these, packets for the driver may be larger than the MTU.
pub(super) const GUEST_LARGE: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_UFO | GUEST_USO4 | GUEST_USO6;

/// What a driver can turn on and off while it runs (virtio 1.3, section 5.1.6.5.6).
pub(super) const GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_ECN | GUEST_LARGE;

/// Features, and those of which they need one (virtio 1.3, section 5.1.3.1).
const NEEDS: [(u64, u64); 5] = [
    (HOST_TSO4 | HOST_TSO6 | HOST_UFO | HOST_USO, CSUM),
    (HOST_ECN, HOST_TSO4 | HOST_TSO6),
    (GUEST_LARGE, GUEST_CSUM),
    (GUEST_ECN, GUEST_TSO4 | GUEST_TSO6),
    ((CONTROL | MQ) & !CTRL_VQ, CTRL_VQ),
];

/// Whether these features have what they build on.
pub(super) fn are_complete(features: u64) -> bool {
    let has = |bits: u64| features & bits != 0;
    NEEDS
        .into_iter()
        .all(|(bits, base)| !has(bits) || has(base))
}

/// The features that say that the network can do this, in both directions.
pub(super) fn of_offloads(offloads: Offloads) -> u64 {
    if !offloads.checksum {
        return 0;
    }
    let ecn = offloads.ecn && (offloads.tso4 || offloads.tso6);
    let offered = [
        (true, CSUM | GUEST_CSUM),
        (offloads.tso4, HOST_TSO4 | GUEST_TSO4),
        (offloads.tso6, HOST_TSO6 | GUEST_TSO6),
        (ecn, HOST_ECN | GUEST_ECN),
        (offloads.ufo, HOST_UFO | GUEST_UFO),
        (offloads.uso, HOST_USO | GUEST_USO4 | GUEST_USO6),
    ];
    offered
        .into_iter()
        .filter(|(offered, _)| *offered)
        .fold(0, |features, (_, bits)| features | bits)
}

/// The offloads of packets that a driver with these features takes.
pub(super) fn guest_offloads(features: u64) -> Offloads {
    let has = |bits: u64| features & bits == bits;
    Offloads {
        checksum: has(GUEST_CSUM),
        tso4: has(GUEST_TSO4),
        tso6: has(GUEST_TSO6),
        ecn: has(GUEST_ECN),
        ufo: has(GUEST_UFO),
        // A network does it for both, or for none.
        uso: has(GUEST_USO4 | GUEST_USO6),
    }
}
