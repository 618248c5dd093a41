//! What a virtio device is, whatever transport it is reached through.

use std::sync::Arc;

use kiln_io_thread::IoHandle;
use kiln_memory::GuestMemory;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::VirtioInterrupt;

/// A virtio device (virtio 1.3, section 2), which knows nothing of its transport.
///
/// The transport owns the device, and calls it from vCPU threads, one call at a time. Work on the
/// queues happens elsewhere: [`activate`](Self::activate) moves what that work needs onto an I/O
/// thread, and [`deactivate`](Self::deactivate) takes it back.
pub trait VirtioDevice: Send {
    /// The device type (virtio 1.3, section 5), such as 2 for a block device.
    fn device_type(&self) -> u32;

    /// The feature bits of this device type that are offered. The transport adds those that belong
    /// to it and to the rings: `VERSION_1`, `RING_INDIRECT_DESC` and `RING_EVENT_IDX`.
    fn features(&self) -> u64;

    /// The largest size, in descriptors, of each of the device's queues: a power of two of at most
    /// 32768 for each.
    fn queue_max_sizes(&self) -> &[u16];

    /// Whether the device can work with this subset of the offered features, asked when the driver
    /// sets `FEATURES_OK`.
    fn validate_features(&self, acknowledged: u64) -> bool {
        let _ = acknowledged;
        true
    }

    /// Reads the device-specific configuration at `offset` bytes. `data` comes filled with zeros;
    /// what lies beyond the configuration stays so.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device-specific configuration at `offset` bytes. Most devices have nothing to
    /// write to.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver has set `DRIVER_OK`: start working on the queues.
    ///
    /// # Errors
    ///
    /// On an error the transport sets `DEVICE_NEEDS_RESET`; the queues are handed back inside the
    /// error's return by value.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops working on the queues, finishes what is in flight, and gives the queues back.
    ///
    /// One mechanism serves the driver's reset, pause, snapshot and unplug. A device that is not
    /// active gives nothing.
    fn deactivate(&mut self) -> Vec<ActiveQueue>;
}

/// What a device is given when it becomes active.
pub struct Activation {
    /// The guest's RAM.
    pub memory: Arc<GuestMemory>,
    /// The features that driver and device agreed on, those of transport and rings included.
    pub features: u64,
    /// The queues that the driver enabled, in the order of their indices.
    pub queues: Vec<ActiveQueue>,
    /// How to reach the driver.
    pub interrupt: Arc<dyn VirtioInterrupt>,
    /// The thread to work on.
    pub io: IoHandle,
}

/// A queue that the driver enabled.
pub struct ActiveQueue {
    /// The queue's index in the device.
    pub index: u16,
    /// The queue.
    pub queue: Queue,
    /// Written when the driver notifies the device of new buffers.
    pub kick: Arc<EventFd>,
}

/// Why a device could not become active.
#[derive(Debug, thiserror::Error)]
#[error("activate the device: {reason}")]
pub struct ActivateError {
    /// What failed.
    pub reason: String,
}
