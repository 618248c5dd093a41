//! Virtio devices and transports.
#![forbid(unsafe_code)]

mod core;
mod device;
mod error;
mod interrupt;
mod mmio;
mod state;
mod status;

pub use device::{ActivateError, Activation, ActiveQueue, VirtioDevice};
pub use error::TransportError;
pub use interrupt::{InterruptEvent, VirtioInterrupt};
pub use mmio::MmioTransport;
pub use state::{CoreState, MmioState, QueueState};
