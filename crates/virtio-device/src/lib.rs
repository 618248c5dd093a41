//! Virtio devices and transports.
#![forbid(unsafe_code)]

mod device;
mod interrupt;

pub use device::{Activation, ActivateError, ActiveQueue, VirtioDevice};
pub use interrupt::{InterruptEvent, VirtioInterrupt};
