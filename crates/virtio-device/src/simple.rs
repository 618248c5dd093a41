//! A whole device around a handler of its queues.

use std::fmt;

use crate::{ActivateError, Activation, ActiveQueue, QueueHandler, VirtioDevice, Worker};

/// A virtio device of which nothing is special but the [handler](QueueHandler) of its queues: its
/// features need no look at the machine, and its configuration does not change.
///
/// The crate's front page has an example of one.
pub struct SimpleDevice<H> {
    device_type: u32,
    queue_max_sizes: Box<[u16]>,
    features: u64,
    config: Box<[u8]>,
    worker: Worker<H>,
}

impl<H: QueueHandler> SimpleDevice<H> {
    /// A device of this type (virtio 1.3, section 5), with queues of these largest sizes.
    pub fn new(device_type: u32, queue_max_sizes: impl Into<Box<[u16]>>, handler: H) -> Self {
        Self {
            device_type,
            queue_max_sizes: queue_max_sizes.into(),
            features: 0,
            config: Box::default(),
            worker: Worker::new(handler),
        }
    }

    /// The feature bits that it offers: see [`VirtioDevice::features`].
    pub fn features(mut self, features: u64) -> Self {
        self.features = features;
        self
    }

    /// Its device-specific configuration, which the driver reads.
    pub fn config(mut self, config: impl Into<Box<[u8]>>) -> Self {
        self.config = config.into();
        self
    }
}

impl<H: QueueHandler> VirtioDevice for SimpleDevice<H> {
    fn device_type(&self) -> u32 {
        self.device_type
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_max_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.worker.activate(activation)
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.worker.deactivate()
    }
}

impl<H> fmt::Debug for SimpleDevice<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimpleDevice")
            .field("device_type", &self.device_type)
            .field("queue_max_sizes", &self.queue_max_sizes)
            .finish_non_exhaustive()
    }
}
