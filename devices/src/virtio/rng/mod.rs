//! Entropy devices (virtio 1.3, section 5.4): random numbers of the host for the guest.
//!
//! The numbers are those of the host's kernel (`getrandom`), or of a [reader](Rng::from_reader) of
//! your own. A guest can be kept from asking for them all the time by a [`RateLimit`], in bytes: it
//! then waits for the rest of what it asked for.
//!
//! The device has no state but its transport's.
//!
//! # Example
//!
//! A device, and a driver that asks for 16 bytes:
//!
//! ```
//! use kiln_devices::virtio::rng::{Rng, RngOptions};
//! use kiln_virtio_device::testing::{Buffer, MockDriver};
//!
//! let mut driver = MockDriver::new(Box::new(Rng::new(RngOptions::default())?));
//! driver.start(0, 16);
//! assert_eq!(driver.request(0, &[Buffer::writable(0x1000, 16)]), 16);
//! assert_ne!(driver.bytes(0x1000, 16), [0; 16]);
//! # Ok::<(), kiln_devices::virtio::rng::RngError>(())
//! ```
//!
//! [`RateLimit`]: crate::rate_limit::RateLimit

mod device;
#[cfg(test)]
mod tests;

pub use device::{Rng, RngError, RngOptions};
