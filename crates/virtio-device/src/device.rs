//! What a virtio device is, whatever transport it is reached through.

use std::fmt;
use std::sync::Arc;

use kiln_io_thread::IoThreadSet;
use kiln_memory::GuestMemory;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use crate::{QueueCounters, VirtioInterrupt};

/// A virtio device (virtio 1.3, section 2), which knows nothing of its transport.
///
/// The transport owns the device, and calls it from vCPU threads, one call at a time. Work on the
/// queues happens elsewhere: [`activate`](Self::activate) moves what that work needs onto an I/O
/// thread, and [`deactivate`](Self::deactivate) takes it back.
pub trait VirtioDevice: Send {
    /// The device type (virtio 1.3, section 5), such as 2 for a block device.
    fn device_type(&self) -> u32;

    /// The feature bits of this device type that are offered: bits 0 to 23 and from 50 on (virtio
    /// 1.3, section 2.2). The others belong to the transport and the rings, which add their own
    /// (`VERSION_1`, `RING_INDIRECT_DESC`, `RING_EVENT_IDX` and `RING_RESET`) and take out what is
    /// set here.
    ///
    /// Asked once, when the device is given to its transport. By default there are none.
    fn features(&self) -> u64 {
        0
    }

    /// The largest size, in descriptors, of each of the device's queues: for each a power of two
    /// of at most 32768.
    ///
    /// Asked once, when the device is given to its transport.
    fn queue_max_sizes(&self) -> &[u16];

    /// Whether the device can work with this subset of the offered features, asked when the driver
    /// sets `FEATURES_OK`.
    fn validate_features(&self, acknowledged: u64) -> bool {
        let _ = acknowledged;
        true
    }

    /// Reads the device-specific configuration at `offset` bytes. `data` comes filled with zeros;
    /// what lies beyond the configuration stays so. By default there is none.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let _ = (offset, data);
    }

    /// Writes the device-specific configuration at `offset` bytes. Most devices have nothing to
    /// write to.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver has set `DRIVER_OK`, a paused machine goes on, or there is a queue more or less
    /// because the driver has reset one: start working on the queues.
    ///
    /// The transport notifies every queue once the device is active, so nothing that the driver
    /// made available before is missed.
    ///
    /// # Errors
    ///
    /// On an error the transport sets `DEVICE_NEEDS_RESET`. The queues stay with the device, which
    /// gives them back, like those of an active device, at the next
    /// [`deactivate`](Self::deactivate).
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops working on the queues, finishes what is in flight, and gives the queues back, in any
    /// order. When this returns nothing of the device touches guest memory any more.
    ///
    /// One mechanism serves the driver's reset, pause, snapshot and unplug. A device that was not
    /// activated gives nothing.
    fn deactivate(&mut self) -> Vec<ActiveQueue>;

    /// The driver has reset the device, which is not active: what a device keeps while a machine is
    /// paused, and a driver that begins anew should find nothing of, goes now. Most devices keep
    /// nothing.
    fn reset(&mut self) {}
}

/// Answers [`VirtioDevice::read_config`] from a configuration that is kept as bytes.
///
/// ```
/// let mut data = [0; 4];
/// kiln_virtio_device::read_config_bytes(&[1, 2, 3], 1, &mut data);
/// assert_eq!(data, [2, 3, 0, 0]);
/// ```
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    let known = config.get(offset..).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(known) {
        *to = *from;
    }
}

/// What a device is given when it becomes active.
pub struct Activation {
    /// The guest's RAM.
    pub memory: Arc<GuestMemory>,
    /// The features that driver and device agreed on, those of transport and rings included.
    pub features: u64,
    /// The queues that the driver enabled, in the order of their indices. The driver need not have
    /// enabled all of them.
    pub queues: Vec<ActiveQueue>,
    /// How to reach the driver.
    pub interrupt: Arc<dyn VirtioInterrupt>,
    /// The threads to work on.
    pub io: IoThreadSet,
}

impl Activation {
    /// The same for several [workers](crate::Worker), of which each has some of the queues: those
    /// for which `worker_of` gives its number, below `workers`. A queue that is given to none
    /// stays with the last one.
    pub fn split(self, workers: usize, worker_of: impl Fn(u16) -> usize) -> Vec<Self> {
        let count = workers.max(1);
        let mut parts: Vec<_> = (0..count)
            .map(|_| Self {
                memory: Arc::clone(&self.memory),
                features: self.features,
                queues: Vec::new(),
                interrupt: Arc::clone(&self.interrupt),
                io: self.io.clone(),
            })
            .collect();
        for queue in self.queues {
            let worker = worker_of(queue.index).min(count - 1);
            if let Some(part) = parts.get_mut(worker) {
                part.queues.push(queue);
            }
        }
        parts
    }
}

impl fmt::Debug for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Activation")
            .field("features", &format_args!("{:#x}", self.features))
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

/// A queue that the driver enabled.
pub struct ActiveQueue {
    /// The queue's index in the device.
    pub index: u16,
    /// The queue.
    pub queue: Queue,
    /// Written when the driver notifies the device of new buffers. It does not block.
    pub kick: Arc<EventFd>,
    /// What was done on the queue; a [`Worker`](crate::Worker) counts it.
    pub counters: Arc<QueueCounters>,
}

impl fmt::Debug for ActiveQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ActiveQueue")
            .field("index", &self.index)
            .field("size", &self.queue.size())
            .finish_non_exhaustive()
    }
}

/// Why a device could not become active.
#[derive(Debug, thiserror::Error)]
#[error("activate the device: {reason}")]
pub struct ActivateError {
    /// What was attempted on which object.
    pub reason: String,
    /// What went wrong there, where something else says so.
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl ActivateError {
    /// An error with no other behind it.
    pub fn new(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            source: None,
        }
    }

    /// An error that another one explains.
    pub fn with_source(
        reason: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self {
            reason: reason.into(),
            source: Some(source.into()),
        }
    }
}
