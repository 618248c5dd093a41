//! Virtio devices. What they have in common - queues, features, the transports - is in
//! [`kiln_virtio_device`]; here is what each type of device does.
//!
//! | module | what lives there |
//! |---|---|
//! | [`balloon`] | [`Balloon`](balloon::Balloon): RAM of the guest for the host |
//! | [`block`] | [`Block`](block::Block), and raw files as disks |
//! | [`console`] | [`VirtioConsole`](console::VirtioConsole): a console of the guest, and named ports |
//! | [`net`] | [`Net`](net::Net), and taps as its cable |
//! | [`rng`] | [`Rng`](rng::Rng): random numbers of the host for the guest |
//! | [`vsock`] | [`Vsock`](vsock::Vsock): streams between programs of the guest and of the host |
//! | `latency` | [`LatencyHistogram`]: how long something took, counted without a lock |
//! | `iovec` | vectored I/O between file descriptors and guest RAM |

pub mod balloon;
pub mod block;
pub mod console;
#[cfg(test)]
mod hostile;
mod iovec;
mod latency;
pub mod net;
pub mod rng;
pub mod vsock;

pub use latency::{LatencyHistogram, LatencySnapshot};
