//! A PCI bus of a virtual machine: bus 0 with a host bridge and up to 248 functions, of which
//! nothing knows KVM or any kind of device.
//!
//! A device describes a function ([`FunctionDescription`]: identity, BARs, capabilities,
//! interrupts) and answers in its BARs ([`PciFunction`]). A [`PciBusBuilder`] does what firmware
//! would: it gives functions their places and BARs their addresses. The [`PciBus`] keeps all
//! registers, and three kinds of bus device lead the guest to it: [`Ecam`], [`ConfigPorts`], and a
//! [`PciWindow`] for each part of the address spaces that BARs may be in. These are placed on the
//! machine's buses once and stay; BARs move behind them.
//!
//! Rules:
//!
//! - **The bus calls a device without holding a lock.** Only what follows the registers is called
//!   with one held, in the order of the changes: [`BarObserver`], [`MsixSink`] and
//!   [`LevelInterrupt`], and these must not call back.
//! - **An access to a BAR takes no lock but for a look-up**, while a vCPU may move that BAR.
//! - **BARs answer in a window only**, where the command register lets them, and where they are
//!   not on top of one that was there first in the order of functions and registers.
//! - **Configuration accesses come in parts of aligned double words**: one that crosses them is
//!   taken as several. Of the MSI-X table whole aligned words are written, two at most at once.
//! - **No message is lost** however threads trigger, mask and unmask a vector: [`MsixSink`] says
//!   how.
//!
//! Functions are conventional PCI: none has a PCI Express capability unless its device adds one.
//! There are no bridges, no hotplug, no expansion ROMs, and no power management.
//!
//! | module | what lives there |
//! |---|---|
//! | `address` | [`PciAddress`]: slot and function |
//! | `identity`, `bar`, `capability`, `description` | what a device tells about a function |
//! | `function` | [`PciFunction`], [`BarObserver`]: what a device does |
//! | `config` | the registers of a function, and which bits of them can be written |
//! | `registers` | their offsets and bits |
//! | `builder` | [`PciBusBuilder`]: places, addresses of BARs, interrupt lines |
//! | `bus` | [`PciBus`]: accesses to registers and BARs, reset, state |
//! | `routes` | which BAR answers at an address |
//! | `window` | [`PciWindow`]: the parts of the address spaces that BARs are in |
//! | `ecam`, `ports` | [`Ecam`], [`ConfigPorts`]: the two ways to the registers |
//! | `host_bridge` | the function at 00:00.0 |
//! | `msix` | [`Msix`], [`MsixSink`]: message-signalled interrupts |
//! | `intx` | [`IntxPin`], [`LevelInterrupt`]: interrupt pins and lines |
//! | `state` | what has to be saved |
//! | `error` | [`Error`] |
//!
//! # Example
//!
//! A function with a register of its own, found and used as a guest would:
//!
//! ```
//! use kiln_device_api::{BusDevice, ExitRequest};
//! use kiln_pci::{
//!     AddressSpace, Bar, ConfigPorts, FunctionDescription, Identity, PciBusBuilder, PciFunction,
//! };
//! use std::ops::ControlFlow;
//! use std::sync::Arc;
//!
//! struct Seven;
//! impl PciFunction for Seven {
//!     fn bar_read(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
//!         data.fill(7);
//!     }
//!     fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) -> ControlFlow<ExitRequest> {
//!         ControlFlow::Continue(())
//!     }
//!     fn reset(&self) {}
//! }
//!
//! # fn main() -> Result<(), kiln_pci::Error> {
//! let identity = Identity { vendor_id: 0x1234, device_id: 0x5678, ..Identity::default() };
//! let mut description = FunctionDescription::new("seven", &identity);
//! description.add_bar(Bar::memory32(0x1000))?;
//! let mut builder = PciBusBuilder::new();
//! builder.add_window(AddressSpace::Memory, 0xe000_0000..0xe100_0000)?;
//! builder.add(description, Arc::new(Seven))?;
//! let bus = builder.build()?;
//!
//! // The guest looks at slot 1 through the ports ...
//! let ports = ConfigPorts::new(bus.clone());
//! let register = |offset: u32| {
//!     let mut data = [0xff; 4];
//!     let _ = ports.write(0, &(0x8000_0800 | offset).to_le_bytes());
//!     ports.read(4, &mut data);
//!     u32::from_le_bytes(data)
//! };
//! assert_eq!(register(0x00), 0x5678_1234);
//! assert_eq!(register(0x10), 0xe000_0000);
//!
//! // ... and lets it answer at its BAR.
//! let _ = ports.write(0, &0x8000_0804_u32.to_le_bytes());
//! let window = &bus.windows()[0];
//! let mut data = [0xff; 2];
//! window.device.read(0, &mut data);
//! assert_eq!(data, [0xff; 2]);
//! let _ = ports.write(4, &[0x02, 0x00]);
//! window.device.read(0, &mut data);
//! assert_eq!(data, [7; 2]);
//! # Ok(())
//! # }
//! ```
#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod address;
mod bar;
mod builder;
mod bus;
mod capability;
mod config;
mod description;
mod ecam;
mod error;
mod function;
mod host_bridge;
mod identity;
mod intx;
mod msix;
mod ports;
mod registers;
mod routes;
mod state;
mod window;

pub use address::{FUNCTIONS, PciAddress, SLOTS};
pub use bar::Bar;
pub use builder::PciBusBuilder;
pub use bus::{FunctionInfo, PciBus};
pub use capability::{Capability, ExtendedCapability};
pub use config::ConfigState;
pub use description::FunctionDescription;
pub use ecam::Ecam;
pub use error::{AddressSpace, Error};
pub use function::{BarObserver, CapabilityAccess, PciFunction};
pub use identity::Identity;
pub use intx::{INTX_LINES, IntxLine, IntxPin, LevelInterrupt, intx_line};
pub use kiln_device_api::MsiMessage;
pub use msix::{MAX_VECTORS, Msix, MsixPlacement, MsixSink, MsixState, VectorState};
pub use ports::{ConfigPorts, ConfigPortsState};
pub use state::{FunctionState, PciBusState};
pub use window::PciWindow;
