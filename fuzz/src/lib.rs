//! The fuzz targets of Kiln: everything that takes bytes from a guest or from a file, driven by
//! bytes of libFuzzer's.
//!
//! A target is a function of bytes here, and a program of a line in `fuzz_targets/`. None has a
//! thread, a KVM or a clock of its own, so that the same bytes do the same each time. See
//! `docs/fuzzing.md`.
//!
//! | module | what lives there |
//! |---|---|
//! | `guest` | a driver that does what the bytes say to the queues of a device |
//! | `targets` | the targets |

#![forbid(unsafe_code)]
// What goes wrong here is a finding.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod guest;
mod targets;

pub use targets::balloon::balloon;
pub use targets::block::block;
pub use targets::config::config;
pub use targets::console::console;
pub use targets::image::image;
pub use targets::kernel::kernel;
pub use targets::legacy::legacy;
pub use targets::net::net;
pub use targets::pci::pci;
pub use targets::qcow2::qcow2;
pub use targets::rng::rng;
pub use targets::transport::{mmio, virtio_pci};
pub use targets::unpack::unpack;
pub use targets::vsock::vsock;
