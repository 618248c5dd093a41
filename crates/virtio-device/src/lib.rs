//! What a virtio device is, and the transports that a guest's driver reaches it through.
//!
//! A device implements [`VirtioDevice`]: what it is (type, features, queue sizes, configuration)
//! and what it does when it is activated and deactivated. It knows nothing of registers, of
//! interrupts or of KVM. A transport - [`PciTransport`] or [`MmioTransport`], to its machine a
//! [`VirtioTransport`] - owns the device, answers the driver's registers as virtio 1.3 has them,
//! and gives the device its queues once the driver is ready. Deactivation gives the queues back:
//! that one mechanism is the driver's reset, of the device or of a single queue, and pause,
//! snapshot and unplug.
//!
//! Most devices only say what to do with the buffers of a queue, as a [`QueueHandler`], and leave
//! the rest to a [`Worker`], which runs the handler on an I/O thread; a [`SimpleDevice`] is a whole
//! device around one. There the driver's
//! notifications and interrupts are decided (event index, batches), busy queues take turns, and a
//! ring that no driver should write makes the device say `DEVICE_NEEDS_RESET`.
//!
//! | module | what lives there |
//! |---|---|
//! | `device` | [`VirtioDevice`], and what it is activated with |
//! | `interrupt` | [`VirtioInterrupt`]: the way from a device to its driver |
//! | `counters` | [`DeviceCounters`], [`QueueCounters`]: what a device has done, to be read at any time |
//! | `core` | the state machine of status, features and queues, which all transports share |
//! | `transport` | [`VirtioTransport`]: what a machine asks of every transport |
//! | `mmio` | [`MmioTransport`] |
//! | `pci` | [`PciTransport`], a function on a [PCI bus](kiln_pci) |
//! | `buffers` | [`GuestBuffers`]: descriptor chains as slices of guest RAM, with no copy |
//! | `worker` | [`QueueHandler`], [`Worker`], [`Turn`], [`Chain`] and [`InFlight`] |
//! | `simple` | [`SimpleDevice`] |
//! | `state` | [`CoreState`], [`MmioState`], [`PciTransportState`], [`QueueState`]: state to be stored |
//! | `testing` | a mock driver over each transport, and an interrupt recorder (feature `test-utils`) |
//!
//! A transport, and the device behind it, belong to the `tracing` span in which the transport is made:
//! the device is activated, deactivated and started on its I/O thread in that span. Processing a
//! queue is not worth entering it; a [`QueueHandler`] that may have to log something there keeps
//! `tracing::Span::current()` of its `start`.
//!
//! # Example
//!
//! A device of one's own, which answers every request with dice throws, and a driver that asks it
//! for some:
//!
//! ```
//! use kiln_io_thread::Registrar;
//! use kiln_virtio_device::testing::{Buffer, MockDriver};
//! use kiln_virtio_device::{QueueError, QueueHandler, SimpleDevice, Turn};
//!
//! struct Dice;
//!
//! impl QueueHandler for Dice {
//!     fn process(&mut self, turn: &mut Turn, _: &mut Registrar) -> Result<(), QueueError> {
//!         while let Some(mut chain) = turn.pop()? {
//!             let throws = [4; 64]; // chosen by fair dice roll
//!             let len = chain.writable.len().min(throws.len());
//!             chain.writable.write(&throws[..len])?;
//!             turn.complete(chain, len as u32)?;
//!         }
//!         Ok(())
//!     }
//! }
//!
//! let device = SimpleDevice::new(4, [64], Dice); // entropy (virtio 1.3, section 5.4)
//! let mut driver = MockDriver::new(Box::new(device));
//! driver.start(0, 64);
//! let written = driver.request(0, &[Buffer::writable(0x1000, 8)]);
//! assert_eq!(written, 8);
//! assert_eq!(driver.bytes(0x1000, 9), [4, 4, 4, 4, 4, 4, 4, 4, 0]);
//! driver.line.wait_for(1);
//! ```
//!
//! [`PciTransport`] has an example of a device on a PCI bus.
#![deny(missing_docs)]
#![deny(unsafe_code)]

mod buffers;
mod core;
mod counters;
mod device;
mod error;
mod interrupt;
mod mmio;
mod pci;
mod simple;
mod state;
mod status;
#[cfg(test)]
mod test_device;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
mod transport;
mod worker;

pub use buffers::{ChainError, GuestBuffers, ShortBuffer};
pub use counters::{DeviceCounters, QueueCounters};
pub use device::{ActivateError, Activation, ActiveQueue, VirtioDevice, read_config_bytes};
pub use error::TransportError;
pub use interrupt::{InterruptEvent, VirtioInterrupt};
pub use mmio::MmioTransport;
pub use pci::PciTransport;
pub use simple::SimpleDevice;
pub use state::{CoreState, MmioState, PciTransportState, QueueState};
pub use transport::{NeedsResetHook, VirtioTransport};
pub use worker::{Chain, InFlight, QueueError, QueueHandler, Turn, Worker};
