//! The state of a transport as plain values that can be stored.

use serde::{Deserialize, Serialize};

/// The state of a queue: what the driver wrote into its registers, and how far the device got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// The size in descriptors that the driver chose.
    pub size: u16,
    /// Whether the driver enabled the queue.
    pub ready: bool,
    /// The guest physical address of the descriptor table.
    pub desc_table: u64,
    /// The guest physical address of the available ring (driver area).
    pub avail_ring: u64,
    /// The guest physical address of the used ring (device area).
    pub used_ring: u64,
    /// The index of the next available ring entry that the device takes.
    pub next_avail: u16,
    /// The index of the next used ring entry that the device writes.
    pub next_used: u16,
}

/// The state of a virtio device that does not depend on the transport.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreState {
    /// The device status field (virtio 1.3, section 2.1).
    pub status: u8,
    /// Which 32 feature bits of the device are looked at.
    pub device_features_select: u32,
    /// Which 32 feature bits the driver writes.
    pub driver_features_select: u32,
    /// The features that the driver accepted.
    pub driver_features: u64,
    /// The queue whose registers are looked at.
    pub queue_select: u32,
    /// The number that changes with the configuration.
    pub config_generation: u32,
    /// The queues, all that the device has.
    pub queues: Vec<QueueState>,
}

/// The state of an [`MmioTransport`](crate::MmioTransport).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    /// What does not depend on the transport.
    pub core: CoreState,
    /// The `InterruptStatus` register.
    pub interrupt_status: u32,
}

/// The state of a [`PciTransport`](crate::PciTransport). Configuration space, BARs and the MSI-X
/// table are in the state of the bus.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciTransportState {
    /// What does not depend on the transport.
    pub core: CoreState,
    /// The ISR status register.
    pub isr: u8,
    /// The MSI-X vector for changes of the configuration; 0xffff for none.
    pub config_vector: u16,
    /// The MSI-X vector of each queue; 0xffff for none.
    pub queue_vectors: Vec<u16>,
}
