//! The port and MMIO buses of a virtual machine, and who has which address and interrupt.
//!
//! A [`DeviceManager`] is filled while a machine is put together: devices are placed at addresses,
//! and those that don't care where they are get an address or an interrupt allocated. What cannot
//! be - two devices in one place, no interrupt left - is refused there, with an error that names
//! the devices. [`DeviceManager::build`] then freezes the whole into [`Buses`], which vCPUs use
//! without a lock and without an allocation.
//!
//! The manager knows no device: each is an `Arc<dyn BusDevice>` with a name.
//!
//! | module | what lives there |
//! |---|---|
//! | `manager` | [`DeviceManager`]: placing and allocating |
//! | `bus` | one address space, while it is built and after |
//! | `buses` | [`Buses`]: what a vCPU sees |
//! | `gsi` | who has which interrupt |
//! | `error` | [`Error`], [`AddressSpace`] |
//!
//! # Example
//!
//! ```
//! use kiln_device_api::{BusDevice, ExitRequest, VcpuBus};
//! use kiln_device_manager::DeviceManager;
//! use std::ops::ControlFlow;
//! use std::sync::Arc;
//!
//! struct Id(u8);
//! impl BusDevice for Id {
//!     fn read(&self, _offset: u64, data: &mut [u8]) {
//!         data.fill(self.0);
//!     }
//!     fn write(&self, _offset: u64, _data: &[u8]) -> ControlFlow<ExitRequest> {
//!         ControlFlow::Break(ExitRequest::Shutdown)
//!     }
//! }
//!
//! # fn main() -> Result<(), kiln_device_manager::Error> {
//! let mut manager = DeviceManager::new(24, 0xd000_0000..0xd100_0000)?;
//! manager.add_pio("id", 0x3f8, 8, Arc::new(Id(7)))?;
//! let refused = manager.add_pio("other", 0x3ff, 2, Arc::new(Id(8))).unwrap_err();
//! assert_eq!(
//!     refused.to_string(),
//!     "place `other` at ports 0x3ff..=0x400: `id` is at ports 0x3f8..=0x3ff",
//! );
//! let base = manager.allocate_mmio("disk", 0x1000, 0x1000)?;
//! manager.add_mmio("disk", base, 0x1000, Arc::new(Id(9)))?;
//! manager.reserve_gsi("id", 4)?;
//! assert_eq!(manager.allocate_gsi("disk")?, 0);
//!
//! let buses = manager.build();
//! let mut data = [0xff];
//! buses.pio_read(0x3f8, &mut data);
//! assert_eq!(data, [7]);
//! assert!(buses.mmio_write(base, &[0; 4]).is_break());
//! # Ok(())
//! # }
//! ```
#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod bus;
mod buses;
mod error;
mod gsi;
mod manager;

pub use buses::Buses;
pub use error::{AddressSpace, Error};
pub use manager::DeviceManager;
