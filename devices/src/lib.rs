//! The devices of a virtual machine.
//!
//! None of them knows KVM, and none knows where it sits: a device on a bus is a
//! [`BusDevice`](kiln_device_api::BusDevice), a virtio device is a
//! [`VirtioDevice`](kiln_virtio_device::VirtioDevice), and interrupts are traits whose other side
//! is a recorder in the tests. So all of this runs without `/dev/kvm`.
//!
//! Each device has a plain state type that it gives and can be built from.
//!
//! | module | what lives there |
//! |---|---|
//! | [`legacy`] | what a PC has: [serial port](legacy::serial), [i8042](legacy::I8042), [CMOS RTC](legacy::Rtc), [I/O APIC](legacy::IoApic) |
//! | [`acpi`] | what ACPI describes: [power management and power button](acpi::PowerManagement), [pvpanic](acpi::PvPanic) |
//! | [`virtio`] | virtio devices |
//! | [`console`] | what may be at the host's end of a [serial port](legacy::serial) or of a [virtio console](virtio::console) |
//! | [`rate_limit`] | limits on how much may be done in a time |
//! | `socket_file` | Unix sockets that listen at a path |
//!
//! # Example
//!
//! A serial port whose output is kept, and a guest's driver that sends a byte to it:
//!
//! ```
//! use kiln_device_api::{BusDevice, InterruptLine};
//! use kiln_devices::legacy::serial::{Console, ConsoleInput, ConsoleOutput, Serial};
//! use kiln_io_thread::IoThread;
//! use std::sync::Arc;
//! use std::time::Duration;
//! use vmm_sys_util::eventfd::EventFd;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let io = IoThread::spawn("io", |panic| eprintln!("{panic}"))?;
//! let interrupt: Arc<dyn InterruptLine> = Arc::new(EventFd::new(0)?);
//! let (output, captured) = ConsoleOutput::capture(1024);
//! let console = Console::new(ConsoleInput::null(), output);
//! let serial = Serial::new(console, interrupt)?;
//! serial.connect(io.handle())?;
//!
//! let mut line_status = [0xff];
//! serial.read(5, &mut line_status);
//! assert_eq!(line_status, [0x60]); // the transmitter is free
//! assert!(serial.write(0, b"x").is_continue());
//!
//! assert!(serial.close(Duration::from_secs(10)));
//! assert_eq!(captured.text(), "x");
//! # Ok(())
//! # }
//! ```

#![deny(missing_docs)]

pub mod acpi;
pub mod console;
pub mod legacy;
pub mod rate_limit;
mod socket_file;
pub mod virtio;

#[cfg(test)]
mod test_support;
