//! Devices of the PC platform: serial port, i8042, CMOS RTC, IOAPIC.
