//! Devices of the PC platform: serial port, i8042, CMOS RTC, IOAPIC.
//!
//! Each of them sits on byte-wide registers of an 8-bit bus (but for the IOAPIC): a wider access is
//! what it is on that bus, one of several bytes at consecutive registers.

mod i8042;
mod ioapic;
mod rtc;
pub mod serial;

pub use i8042::{I8042, I8042State};
pub use ioapic::{IOAPIC_PINS, IoApic, IoApicState, MsiRoute, MsiRouter};
pub use rtc::{Rtc, RtcState};
