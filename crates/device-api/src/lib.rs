//! The few traits by which devices, buses and vCPUs meet without knowing each other.
//!
//! Devices implement [`BusDevice`], a bus holds them, a vCPU sees only a [`VcpuBus`], and an
//! interrupt is an [`InterruptLine`]. None of these knows KVM, so every device can be tested
//! without `/dev/kvm`.
//!
//! Two rules hold everywhere:
//!
//! - **Guest nonsense is not a host error.** Bus accesses return no `Result`. A read comes filled
//!   with `0xff`, as an empty bus answers, and a device overwrites what it has; a nonsense write is
//!   dropped, as hardware does.
//! - **The end of a machine is returned, not called back.** A write returns
//!   [`ControlFlow<ExitRequest>`](ExitRequest), and `Break` ends the machine at that instruction.
//!
//! | module | what lives there |
//! |---|---|
//! | `bus` | [`BusDevice`], [`BusDeviceMut`], [`VcpuBus`] |
//! | `exit` | [`ExitRequest`] |
//! | `interrupt` | [`InterruptLine`], [`MsiMessage`] |
//! | `panic` | [`panic_message`] |
//!
//! # Example
//!
//! A debug port that ends the machine when the guest writes zero to it:
//!
//! ```
//! use kiln_device_api::{BusDevice, BusDeviceMut, ExitRequest};
//! use std::ops::ControlFlow;
//! use std::sync::Mutex;
//!
//! #[derive(Default)]
//! struct DebugPort(Vec<u8>);
//!
//! impl BusDeviceMut for DebugPort {
//!     fn read(&mut self, _offset: u64, data: &mut [u8]) {
//!         data.fill(self.0.len() as u8);
//!     }
//!     fn write(&mut self, _offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
//!         if data == [0] {
//!             return ControlFlow::Break(ExitRequest::Shutdown);
//!         }
//!         self.0.extend_from_slice(data);
//!         ControlFlow::Continue(())
//!     }
//! }
//!
//! let port = Mutex::new(DebugPort::default());
//! assert!(BusDevice::write(&port, 0, b"x").is_continue());
//! let mut answer = [0xff];
//! BusDevice::read(&port, 0, &mut answer);
//! assert_eq!(answer, [1]);
//! assert_eq!(BusDevice::write(&port, 0, &[0]), ControlFlow::Break(ExitRequest::Shutdown));
//! ```
#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod bus;
mod exit;
mod interrupt;
mod panic;

pub use bus::{BusDevice, BusDeviceMut, VcpuBus};
pub use exit::ExitRequest;
pub use interrupt::{InterruptLine, MsiMessage};
pub use panic::panic_message;
