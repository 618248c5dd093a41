//! What can go wrong between a device and its transport on the host's side.

use std::io;

/// Why a device could not be put behind a transport, or its state not be taken or restored.
///
/// Nothing that a driver does ends up here: its mistakes are answered in the registers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The device offers a queue of a size that no queue can have.
    #[error(
        "offer queue {index} of virtio device type {device_type} with {size} descriptors: \
         not a power of two from 1 to 32768"
    )]
    QueueSize {
        /// The virtio device type.
        device_type: u32,
        /// The queue's index.
        index: usize,
        /// The size that the device gave.
        size: u16,
    },
    /// The device has more queues than an index can name.
    #[error("offer {count} queues of virtio device type {device_type}: at most 65535 are possible")]
    QueueCount {
        /// The virtio device type.
        device_type: u32,
        /// The number of queues that the device gave.
        count: usize,
    },
    /// The eventfd of a queue could not be made.
    #[error("create the notification eventfd of queue {index} of virtio device type {device_type}")]
    Kick {
        /// The virtio device type.
        device_type: u32,
        /// The queue's index.
        index: u16,
        /// What the system said.
        source: io::Error,
    },
    /// The type has no number among PCI devices.
    #[error(
        "put virtio device type {device_type} on PCI: only the types 0 to 63 have a PCI device ID"
    )]
    PciDeviceType {
        /// The virtio device type.
        device_type: u32,
    },
    /// The PCI function of the device could not be described.
    #[error("describe the PCI function of virtio device type {device_type}")]
    PciFunction {
        /// The virtio device type.
        device_type: u32,
        /// What the bus has against it.
        source: kiln_pci::Error,
    },
    /// State was asked for while the device works on its queues.
    #[error("save the state of virtio device type {device_type}: it is not paused")]
    NotPaused {
        /// The virtio device type.
        device_type: u32,
    },
    /// The state does not fit the device.
    #[error("restore the state of virtio device type {device_type}: {reason}")]
    State {
        /// The virtio device type.
        device_type: u32,
        /// What does not fit.
        reason: String,
    },
}

/// An error with all that explains it, on one line.
pub(crate) fn one_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        line.push_str(": ");
        line.push_str(&error.to_string());
        source = error.source();
    }
    line
}
