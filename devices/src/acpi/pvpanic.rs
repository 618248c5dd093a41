//! The port by which a guest's kernel says that it panicked (ACPI device `QEMU0001`).

use std::ops::ControlFlow;

use kiln_device_api::{BusDevice, ExitRequest};

/// The guest panicked.
const PANICKED: u8 = 1 << 0;
/// The guest panicked, and has a crash kernel that will take over.
const CRASH_LOADED: u8 = 1 << 1;

/// The pvpanic port (one byte wide): a read gives the events that are understood, a write reports
/// events.
///
/// A write with bit 0 (panicked) ends the machine as [`ExitRequest::GuestPanic`]. One with bit 1
/// alone (a crash kernel takes over) does not: that kernel is to run.
#[derive(Debug, Default)]
pub struct PvPanic;

impl BusDevice for PvPanic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        match (offset, data.first()) {
            (0, Some(events)) if events & PANICKED != 0 => {
                ControlFlow::Break(ExitRequest::GuestPanic)
            }
            _ => ControlFlow::Continue(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::every_access;

    #[test]
    fn a_panic_ends_the_machine_and_a_loaded_crash_kernel_does_not() {
        let port = PvPanic;
        let mut events = [0xff];
        port.read(0, &mut events);
        assert_eq!(events, [3]);
        assert_eq!(
            port.write(0, &[1]),
            ControlFlow::Break(ExitRequest::GuestPanic)
        );
        assert!(port.write(0, &[2]).is_continue());
        assert!(port.write(0, &[0]).is_continue());
    }

    #[test]
    fn only_the_documented_write_ends_the_machine() {
        every_access(&PvPanic, 1, |offset, data, end| {
            assert_eq!(end.is_break(), offset == 0 && data[0] & 1 != 0, "{data:?}");
        });
    }
}
