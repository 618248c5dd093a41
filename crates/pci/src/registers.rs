//! Offsets and bits of the type 0 configuration space (PCI 3.0, section 6.1 and 6.2).

/// The registers of a function that the configuration ports reach.
pub(crate) const CONVENTIONAL_SIZE: usize = 0x100;
/// The registers of a function that ECAM reaches (PCIe 5.0, section 7.2.2).
pub(crate) const EXTENDED_SIZE: usize = 0x1000;

pub(crate) const VENDOR_ID: usize = 0x00;
pub(crate) const DEVICE_ID: usize = 0x02;
pub(crate) const COMMAND: usize = 0x04;
pub(crate) const STATUS: usize = 0x06;
pub(crate) const REVISION_ID: usize = 0x08;
/// Programming interface, subclass and base class, a byte each.
pub(crate) const CLASS_CODE: usize = 0x09;
pub(crate) const CACHE_LINE_SIZE: usize = 0x0c;
pub(crate) const LATENCY_TIMER: usize = 0x0d;
pub(crate) const HEADER_TYPE: usize = 0x0e;
pub(crate) const BAR0: usize = 0x10;
pub(crate) const BAR_COUNT: usize = 6;
pub(crate) const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
pub(crate) const SUBSYSTEM_ID: usize = 0x2e;
pub(crate) const CAPABILITIES_POINTER: usize = 0x34;
pub(crate) const INTERRUPT_LINE: usize = 0x3c;
pub(crate) const INTERRUPT_PIN: usize = 0x3d;
/// Behind the header, which is the same for all: capabilities.
pub(crate) const FIRST_CAPABILITY: usize = 0x40;

/// The function answers at its I/O BARs.
pub(crate) const COMMAND_IO: u16 = 1 << 0;
/// The function answers at its memory BARs.
pub(crate) const COMMAND_MEMORY: u16 = 1 << 1;
pub(crate) const COMMAND_BUS_MASTER: u16 = 1 << 2;
pub(crate) const COMMAND_PARITY_ERROR: u16 = 1 << 6;
pub(crate) const COMMAND_SERR: u16 = 1 << 8;
pub(crate) const COMMAND_INTX_DISABLE: u16 = 1 << 10;

/// The function asserts its INTx pin, or would if `COMMAND_INTX_DISABLE` let it.
pub(crate) const STATUS_INTERRUPT: u16 = 1 << 3;
pub(crate) const STATUS_CAPABILITIES: u16 = 1 << 4;
/// The errors that a function notes until software writes ones to them: master data parity error,
/// signaled and received target abort, received master abort, signaled system error, detected
/// parity error.
pub(crate) const STATUS_ERRORS: u16 = 0xf900;

/// Function 0 of a device that has more of them (PCI 3.0, section 6.2.1).
pub(crate) const HEADER_MULTI_FUNCTION: u8 = 1 << 7;

/// A BAR that is in I/O space (PCI 3.0, section 6.2.5.1).
pub(crate) const BAR_IO: u32 = 1 << 0;
/// A memory BAR of 64 bits, whose upper half is the register that follows.
pub(crate) const BAR_MEMORY_64: u32 = 2 << 1;
pub(crate) const BAR_PREFETCHABLE: u32 = 1 << 3;

pub(crate) const CAPABILITY_MSIX: u8 = 0x11;
/// Offsets into the MSI-X capability (PCI 3.0, section 6.8.2), from its id on.
pub(crate) const MSIX_CONTROL: usize = 2;
pub(crate) const MSIX_CONTROL_FUNCTION_MASK: u16 = 1 << 14;
pub(crate) const MSIX_CONTROL_ENABLE: u16 = 1 << 15;
