//! What tests of virtio devices and transports share: an interrupt recorder, and a driver that
//! writes registers and rings as a guest's does, or as no guest should.
//!
//! Everything here is for tests, and panics where a test has gone wrong.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod driver;
mod pci;
mod queue;
mod recorder;
mod transport;

pub use driver::{MockDriver, TestIo, register, status};
pub use pci::TestPci;
pub use queue::{Buffer, DriverQueue, RawDescriptor};
pub use recorder::{InterruptRecorder, LONG, wait_until};
pub use transport::{TestState, TestTransport, TransportKind, over_each_transport};
